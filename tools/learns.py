"""Whether a model learns as well from a dataset that ``build`` made as from one that was made by hand.

    python tools/learns.py HAND_MADE [--epochs 50] [--seeds 0 1 2] [--built default no-margin] [--out docs/bench/learns.json]

``build`` gets the embeddings, pairs, keywords and splits of the hand-made dataset and computes the rest, with its default
margin or without one. The demo's predictor is trained on the hand-made dataset, on the built one, and on the hand-made one
with the negatives of the built one, which tells the effect of negatives from that of steering. Recall@1 on the validation pairs
is measured with the steering that the model was trained with: against the hand-made negatives, against those that ``build``
mined, and against the sources of all validation pairs, which favours neither.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch

import jasper_store as js
from jasper_store.jasper.steering import VARIANTS
from jasper_store.model.predictor import SAME_SOURCE, dataset_of, evaluate, question_alone
from jasper_store.model.training import Trainer, TrainingOptions

_BATCH = 32
_NEGATIVES = ("hard_negatives", "negative_tiers")
_HAND = "hand"
_BUILT: dict[str, dict[str, Any]] = {"default": {}, "no-margin": {"relative_margin": None}}
"""Settings of the miner, by name."""


def build_from(hand: Path, out: Path, n_neg: int, mining: dict[str, Any]) -> Path:
    """Build a dataset from what the hand-made one holds of embeddings, pairs, keywords and splits."""
    given = dict.fromkeys(("questions", "sources", "pairs", "keywords", "pair_keywords", "relevance", "splits"), hand)
    # The hand-made splits are kept as they are, even where they share a question.
    return js.build(out, **given, n_neg=n_neg, mining=mining, shared_questions=True).path  # type: ignore[arg-type]


def with_negatives(dataset: Path, other: Path, out: Path) -> Path:
    """A copy of a dataset that has the negatives of another one with the same pairs."""
    with js.open(dataset, use_mmap=True) as store, js.open(other, use_mmap=True) as negatives:
        config = json.loads((dataset / "config.json").read_text())
        with js.DatasetWriter(out, config=config) as writer:
            for name in store:
                writer.append(name, (negatives if name in _NEGATIVES else store)[name].tensor())
    return out


def train(dataset: Path, epochs: int, seed: int) -> Trainer:
    """The demo's training."""
    trainer = Trainer(js.create_loader(dataset, "train", _BATCH, seed=seed), TrainingOptions(epochs=epochs, seed=seed))
    for _ in trainer.run():
        pass
    return trainer


def recall(dataset: Path, predict: Any) -> dict[str, float]:
    """Recall@1 of each variant on the validation split, against the negatives of a dataset."""
    return evaluate(js.create_loader(dataset, "val", 256), predict)


@torch.no_grad()
def recall_among_all(dataset: Path, predict: Any) -> dict[str, float]:
    """Recall@1 of each variant among the sources of all validation pairs."""
    loader = js.create_loader(dataset, "val", 256)
    targets = torch.nn.functional.normalize(torch.cat([batch["target_source_emb"] for batch in loader]).float(), dim=1)
    same = targets @ targets.T > SAME_SOURCE
    found = {}
    for variant in VARIANTS:
        dataset_of(loader).force_steering(variant)
        batches = [predict(batch["question_emb"], batch["steering"]).float() for batch in loader]
        products = torch.nn.functional.normalize(torch.cat(batches), dim=1) @ targets.T
        others = products.masked_fill(same, -torch.inf).amax(dim=1)
        found[variant] = (products.diagonal() > others).float().mean().item()
    return found


def measure(places: dict[tuple[str, str], Path], steering: str, kinds: list[str], predict: Any) -> dict[str, Any]:
    """Recalls of a predictor with some steering, against each dataset's negatives and among all sources."""
    found: dict[str, Any] = {kind: recall(places[steering, kind], predict) for kind in kinds}
    found["among all"] = recall_among_all(places[steering, _HAND], predict)
    return found


def prepare(hand: Path, root: Path, kinds: list[str]) -> dict[tuple[str, str], Path]:
    """Datasets of each steering with each kind of negatives."""
    config = json.loads((hand / "config.json").read_text())
    with js.open(hand, use_mmap=True) as store, js.DatasetWriter(root / _HAND, config=config) as writer:
        for name in store:
            writer.append(name, store[name].tensor())
    places = {(_HAND, _HAND): root / _HAND}
    for kind in kinds:
        built = build_from(root / _HAND, root / kind, config["n_neg"], _BUILT[kind])
        places[kind, kind] = built
        places[kind, _HAND] = with_negatives(built, root / _HAND, root / f"{kind}-{_HAND}")
        places[_HAND, kind] = with_negatives(root / _HAND, built, root / f"{_HAND}-{kind}")
    return places


def main() -> None:
    """Train on all with each seed; print and keep the figures."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("hand", type=Path)
    parser.add_argument("--epochs", type=int, default=50)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--built", choices=list(_BUILT), nargs="+", default=list(_BUILT))
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        places = prepare(options.hand, Path(scratch), options.built)
        with js.open(places[options.built[0], options.built[0]], use_mmap=True) as store:
            facts = {
                "pairs": len(store["pair_index"]),
                "clusters": len(store["centroid_embs"]),
                "epochs": options.epochs,
            }
        kinds = [_HAND, *options.built]
        # With steering of "default" and of "no-margin" alike, since only their negatives differ.
        alone = measure(places, _HAND, kinds, question_alone)
        runs: list[dict[str, Any]] = [{"steering": None, "negatives": None, "recall": alone}]
        trained = [(_HAND, _HAND), *((steering, kind) for kind in options.built for steering in (_HAND, kind))]
        for seed in options.seeds:
            for steering, negatives in trained:
                model = train(places[steering, negatives], options.epochs, seed).model.eval()
                against = kinds if steering == _HAND else [_HAND, steering]
                found = measure(places, steering, against, model)
                runs.append({"steering": steering, "negatives": negatives, "seed": seed, "recall": found})
                print(json.dumps(runs[-1]), flush=True)
                if options.out:
                    options.out.write_text(json.dumps({**facts, "runs": runs}, indent=2) + "\n")


if __name__ == "__main__":
    main()
