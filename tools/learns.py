"""Whether a model learns as well from a dataset that ``build`` made as from one that was made by hand.

    python tools/learns.py HAND_MADE [--epochs 50] [--seeds 0 1 2] [--no-margin] [--out docs/bench/learns.json]

``build`` gets the embeddings, pairs, keywords and splits of the hand-made dataset and computes the rest by its defaults. The
demo's predictor is trained on both. Each is measured on the validation pairs, which are the same, with its own steering:
against the hand-made negatives, which both share, and against those that ``build`` mined.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch

import jasper_store as js
from jasper_store.model.predictor import evaluate, question_alone
from jasper_store.model.training import Trainer, TrainingOptions

_BATCH = 32
_NEGATIVES = ("hard_negatives", "negative_tiers")


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
    """Recall@1 of each variant on the validation split."""
    return evaluate(js.create_loader(dataset, "val", 256), predict)


def main() -> None:
    """Train on both with each seed; print and keep the figures."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("hand", type=Path)
    parser.add_argument("--epochs", type=int, default=50)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--no-margin", action="store_true", help="mine without a margin to the positive")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        n_neg = json.loads((options.hand / "config.json").read_text())["n_neg"]
        with (
            js.open(options.hand, use_mmap=True) as store,
            js.DatasetWriter(root / "hand", config=json.loads((options.hand / "config.json").read_text())) as writer,
        ):
            for name in store:
                writer.append(name, store[name].tensor())
        mining: dict[str, Any] = {"relative_margin": None} if options.no_margin else {}
        built = build_from(root / "hand", root / "built", n_neg, mining)
        places = {
            ("hand", "hand"): root / "hand",
            ("built", "hand"): with_negatives(built, root / "hand", root / "built-hand"),
            ("hand", "built"): with_negatives(root / "hand", built, root / "hand-built"),
            ("built", "built"): built,
        }
        runs: list[dict[str, Any]] = []
        for (trained, negatives), place in places.items():
            runs.append(
                {
                    "trained_on": None,
                    "steering": trained,
                    "negatives": negatives,
                    "recall": recall(place, question_alone),
                }
            )
        for seed in options.seeds:
            for trained in ("hand", "built"):
                model = train(places[trained, trained], options.epochs, seed).model
                for negatives in ("hand", "built"):
                    found = recall(places[trained, negatives], model)
                    runs.append({"trained_on": trained, "seed": seed, "negatives": negatives, "recall": found})
                    print(json.dumps(runs[-1]), flush=True)
        with js.open(built, use_mmap=True) as store:
            facts = {
                "mining": mining,
                "pairs": len(store["pair_index"]),
                "clusters": len(store["centroid_embs"]),
                "epochs": options.epochs,
            }
    if options.out:
        options.out.write_text(json.dumps({**facts, "runs": runs}, indent=2) + "\n")


if __name__ == "__main__":
    main()
