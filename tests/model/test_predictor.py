"""The predictor: its baseline, its loss, its measure, and that a run is a pure function of its options."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from jasper_store.errors import CorruptFileError, DatasetNotFoundError, IncompatibleOptionsError
from jasper_store.jasper.loader import create_loader
from jasper_store.model.predictor import JasperPredictor, evaluate, info_nce, question_alone, recall_at_1
from jasper_store.model.training import Trainer, TrainingOptions
from tests.builders import build_pt_dataset


def batch_of(positives: torch.Tensor, negatives: torch.Tensor, tiers: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"target_source_emb": positives, "negative_embs": negatives, "negative_tiers": tiers}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return build_pt_dataset(tmp_path / "data")


def test_untrained_is_the_question() -> None:
    question, steering = torch.randn(5, 8), torch.randn(5, 8)
    expected = torch.nn.functional.normalize(question, dim=1)
    assert torch.equal(JasperPredictor(8).eval()(question, steering), expected)


def test_the_seed_decides_and_the_global_state_stays() -> None:
    state = torch.get_rng_state()
    one, same, other = JasperPredictor(8, seed=1), JasperPredictor(8, seed=1), JasperPredictor(8, seed=2)
    assert torch.equal(torch.get_rng_state(), state)
    weights, same_weights, other_weights = (next(model.parameters()) for model in (one, same, other))
    assert torch.equal(weights, same_weights)
    assert not torch.equal(weights, other_weights)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_embeddings_of_any_floating_dtype(dtype: torch.dtype) -> None:
    predicted = JasperPredictor(8)(torch.randn(3, 8, dtype=dtype), torch.zeros(3, 8, dtype=dtype))
    assert predicted.dtype == torch.float32


def test_nonsense_sizes_are_refused() -> None:
    with pytest.raises(IncompatibleOptionsError, match="at least 1"):
        JasperPredictor(0)


def test_loss_by_hand() -> None:
    # One sample: the positive at similarity 1, negatives of tiers 0 and 2 at similarity 0.
    e = torch.eye(4)
    batch = batch_of(e[:1], e[None, 1:3], torch.tensor([[0, 2]]))
    expected = -math.log(math.e / (math.e + 1.0 + 1.5))
    assert info_nce(e[:1], batch, temperature=1.0).item() == pytest.approx(expected, rel=1e-6)


def test_loss_takes_other_positives_as_negatives_unless_they_are_the_same_source() -> None:
    e = torch.eye(4)
    negatives, tiers = e[3:].expand(2, 1, 4), torch.zeros(2, 1, dtype=torch.int64)
    different = info_nce(e[:2], batch_of(e[:2], negatives, tiers), temperature=1.0)
    same = info_nce(e[[0, 0]], batch_of(e[[0, 0]], negatives, tiers), temperature=1.0)
    assert different.item() == pytest.approx(-math.log(math.e / (math.e + 2)), rel=1e-6)
    assert same.item() == pytest.approx(-math.log(math.e / (math.e + 1)), rel=1e-6)


def test_loss_does_not_depend_on_the_length_of_embeddings() -> None:
    batch = batch_of(torch.randn(4, 8), torch.randn(4, 3, 8), torch.randint(3, (4, 3)))
    longer = {key: value * 7 if value.is_floating_point() else value for key, value in batch.items()}
    predicted = torch.nn.functional.normalize(torch.randn(4, 8), dim=1)
    torch.testing.assert_close(info_nce(predicted, batch), info_nce(predicted, longer))


def test_recall_counts_a_tie_as_a_miss() -> None:
    e = torch.eye(3)
    batch = batch_of(e[[0, 0, 0]], e[[1, 0, 2]][:, None], torch.zeros(3, 1))
    assert recall_at_1(e[[0, 0, 2]], batch).tolist() == [True, False, False]


def test_evaluate_forces_each_variant_and_lets_go(data: Path) -> None:
    loader = create_loader(data, "val", 4)
    seen = []

    def predict(question: torch.Tensor, steering: torch.Tensor) -> torch.Tensor:
        seen.append(bool(steering.abs().sum() > 0))
        return question

    assert list(evaluate(loader, predict)) == ["none", "centroid", "keyword_weighted", "residual"]
    batches = len(loader)
    assert seen == [False] * batches + [True] * 3 * batches
    fresh = create_loader(data, "val", 4)
    for batch, untouched in zip(loader, fresh, strict=True):
        assert torch.equal(batch["steering_variant"], untouched["steering_variant"])


def test_evaluate_leaves_the_mode_as_it_was(data: Path) -> None:
    loader, model = create_loader(data, "val", 4), JasperPredictor(16)
    assert model.training
    assert evaluate(loader, model) == evaluate(loader, question_alone)
    assert model.training


def test_a_run_is_a_pure_function(data: Path, tmp_path: Path) -> None:
    options = TrainingOptions(epochs=3, seed=5)
    whole = Trainer(create_loader(data, "train", 8), options)
    losses = [report.loss for report in whole.run()]
    torch.rand(11)  # what else draws random numbers does not matter

    first = Trainer(create_loader(data, "train", 8), options)
    next(first.run())
    first.save(tmp_path / "checkpoint.pt")
    second = Trainer(create_loader(data, "train", 8, use_mmap=True), options)
    second.load(tmp_path / "checkpoint.pt")
    assert second.epoch == 1
    assert [second.history[0].loss, *(report.loss for report in second.run())] == losses
    for one, other in zip(whole.model.parameters(), second.model.parameters(), strict=True):
        assert torch.equal(one, other)


def test_the_loss_falls(data: Path) -> None:
    reports = list(Trainer(create_loader(data, "train", 8), TrainingOptions(epochs=15, correction_lr=5e-3)).run())
    assert reports[-1].loss < reports[0].loss
    assert sum(reports[0].drawn) == reports[0].samples


@pytest.mark.parametrize("change", [{"seed": 9}, {"epochs": 4}])
def test_a_checkpoint_of_other_options_is_refused(data: Path, tmp_path: Path, change: dict[str, int]) -> None:
    Trainer(create_loader(data, "train", 8), TrainingOptions(epochs=3)).save(tmp_path / "c.pt")
    other = Trainer(create_loader(data, "train", 8), TrainingOptions(**{"epochs": 3} | change))
    with pytest.raises(IncompatibleOptionsError, match=next(iter(change))):
        other.load(tmp_path / "c.pt")


def test_a_checkpoint_of_another_loader_is_refused(data: Path, tmp_path: Path) -> None:
    Trainer(create_loader(data, "train", 8)).save(tmp_path / "c.pt")
    with pytest.raises(IncompatibleOptionsError, match="batch_size"):
        Trainer(create_loader(data, "train", 4)).load(tmp_path / "c.pt")


def test_no_checkpoint_and_one_that_contradicts_itself(data: Path, tmp_path: Path) -> None:
    trainer = Trainer(create_loader(data, "train", 8))
    with pytest.raises(DatasetNotFoundError, match="no such checkpoint"):
        trainer.load(tmp_path / "c.pt")
    trainer.save(tmp_path / "c.pt")
    state = torch.load(tmp_path / "c.pt", weights_only=True)
    state["model"].popitem()
    torch.save(state, tmp_path / "c.pt")
    with pytest.raises(CorruptFileError, match="start anew"):
        trainer.load(tmp_path / "c.pt")


@pytest.mark.parametrize("options", [{"epochs": 0}, {"temperature": 0.0}])
def test_nonsense_options_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(IncompatibleOptionsError, match=next(iter(options))):
        TrainingOptions(**options)  # type: ignore[arg-type]
