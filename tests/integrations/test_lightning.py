"""Lightning's Trainer over a JasperDataModule: epochs, interruptions, processes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from jasper_store.loading.order import order
from jasper_store.model.predictor import JasperPredictor, info_nce
from tests.builders import build_pt_dataset, jasper_tensors
from tests.integrations.launch import Torchrun, program, seen

pytestmark = [
    pytest.mark.integrations("lightning"),
    # Lightning warns of few workers, of the missing logger, and of old names in its own dependencies.
    pytest.mark.filterwarnings("default"),
]

SIZES: dict[str, Any] = {"n_pairs": 300, "dim": 8, "n_neg": 2}
N_TRAIN, N_VAL, BATCH = 210, 45, 16
STEPS = N_TRAIN // BATCH


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_pt_dataset(tmp_path_factory.mktemp("lightning") / "data", **SIZES)


def relevance_of(split: str) -> torch.Tensor:
    tensors = jasper_tensors(**SIZES)
    found: torch.Tensor = tensors["pair_relevance"][tensors[f"{split}_idx"]]
    assert len(found.unique()) == len(found)
    return found


def whole(epoch: int) -> list[float]:
    """What an epoch serves, in order."""
    return relevance_of("train")[order(N_TRAIN, 42, epoch)[:]].tolist()


def model_of(log: Path | None = None) -> Any:
    """The demo's predictor as a LightningModule that writes down what it is given."""
    from lightning.pytorch import LightningModule

    class Model(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.predictor = JasperPredictor(SIZES["dim"], dropout=0.0)
            self.seen: list[tuple[str, int, list[float], tuple[float, ...]]] = []

        def remember(self, what: str, batch: dict[str, torch.Tensor]) -> None:
            probs: tuple[float, ...] = ()
            if what == "train":
                probs = tuple(self.trainer.train_dataloader.dataset_obj.get_steering_stats()["probs"])
            self.seen.append((what, self.trainer.current_epoch, batch["relevance"].tolist(), probs))
            if log is not None:
                with (log / f"{self.global_rank}.jsonl").open("a") as file:
                    file.write(json.dumps(self.seen[-1]) + "\n")

        def training_step(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
            self.remember("train", batch)
            return info_nce(self.predictor(batch["question_emb"], batch["steering"]), batch)

        def validation_step(self, batch: dict[str, torch.Tensor]) -> None:
            self.remember("val", batch)
            loss = info_nce(self.predictor(batch["question_emb"], batch["steering"]), batch)
            self.log("val_loss", loss, sync_dist=True, batch_size=len(batch["relevance"]))

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW(self.parameters(), lr=1e-3)

    return Model()


def samples(model: Any, epoch: int, what: str = "train") -> list[float]:
    return [sample for kind, at, batch, _ in model.seen if (kind, at) == (what, epoch) for sample in batch]


def trainer_of(directory: Path, **options: Any) -> Any:
    from lightning.pytorch import Trainer

    return Trainer(
        **{
            "default_root_dir": directory,
            "accelerator": "cpu",
            "devices": 1,
            "logger": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "num_sanity_val_steps": 2,
            **options,
        }
    )


def module_of(data: Path, batch_size: int = BATCH, num_workers: int = 0, **options: Any) -> Any:
    from jasper_store.jasper.lightning import JasperDataModule

    return JasperDataModule(data, batch_size, num_workers, **options)


def test_every_epoch_reaches_sampler_dataset_and_curriculum(data: Path, tmp_path: Path) -> None:
    directory = build_pt_dataset(
        tmp_path / "data",
        **SIZES,
        config={"curriculum": {"zero_prob_start": 0.8, "zero_prob_end": 0.2, "epochs_total": 3}},
    )
    model, module = model_of(), module_of(directory, warm=True)
    trainer_of(tmp_path, max_epochs=3).fit(model, datamodule=module)
    for epoch in range(3):
        assert samples(model, epoch) == whole(epoch)[: STEPS * BATCH]
        assert samples(model, epoch, "val")[-N_VAL:] == relevance_of("val").tolist()
    probabilities = [
        {probs[0] for kind, at, _, probs in model.seen if (kind, at) == ("train", epoch)} for epoch in range(3)
    ]
    assert [len(values) for values in probabilities] == [1, 1, 1]
    assert len(set.union(*probabilities)) == 3


class KilledError(Exception):
    """The run was killed."""


def interrupted(data: Path, directory: Path, at: int, workers: int) -> tuple[Any, Path]:
    """Train until batch ``at`` of epoch 1, saving every fifth step; the model, and the last checkpoint."""
    from lightning.pytorch.callbacks import Callback, ModelCheckpoint

    class Stop(Callback):
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            if trainer.global_step == STEPS + at:
                raise KilledError

    model = model_of()
    saving = ModelCheckpoint(
        directory, filename="{step}", every_n_train_steps=5, save_top_k=-1, save_on_train_epoch_end=False
    )
    with pytest.raises(KilledError):
        trainer_of(directory, max_epochs=3, callbacks=[Stop(), saving]).fit(
            model, datamodule=module_of(data, num_workers=workers)
        )
    return model, max(directory.glob("*.ckpt"), key=lambda path: int(path.stem.split("=")[1].split("-")[0]))


@pytest.mark.parametrize(
    ("before", "after", "batch"), [(0, 0, BATCH), (0, 2, BATCH), (2, 0, BATCH), (0, 0, 10), (0, 0, 40)]
)
def test_a_run_interrupted_in_an_epoch_goes_on_with_what_is_left(
    data: Path, tmp_path: Path, before: int, after: int, batch: int
) -> None:
    _, checkpoint = interrupted(data, tmp_path, 9, before)
    done = (20 - STEPS) * BATCH  # step 20 was the last to be saved
    assert checkpoint.stem == "step=20"
    model = model_of()
    trainer_of(tmp_path, max_epochs=3).fit(
        model, datamodule=module_of(data, batch, after), ckpt_path=checkpoint, weights_only=True
    )
    assert samples(model, 0) == []
    assert samples(model, 1) == whole(1)[done : done + (N_TRAIN - done) // batch * batch]
    assert samples(model, 2) == whole(2)[: N_TRAIN // batch * batch]


def test_interrupted_and_never_interrupted_end_in_equal_weights(data: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    never = model_of()
    trainer_of(tmp_path / "never", max_epochs=3).fit(never, datamodule=module_of(data))
    _, checkpoint = interrupted(data, tmp_path / "once", 9, 0)
    again = model_of()
    trainer_of(tmp_path / "once", max_epochs=3).fit(
        again, datamodule=module_of(data), ckpt_path=checkpoint, weights_only=True
    )
    for name, value in never.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("with_validation", [True, False])
def test_a_checkpoint_at_the_end_of_an_epoch_begins_the_next_one(
    data: Path, tmp_path: Path, workers: int, with_validation: bool
) -> None:
    limit = {} if with_validation else {"limit_val_batches": 0}
    first = trainer_of(tmp_path, max_epochs=2, **limit)
    first.fit(model_of(), datamodule=module_of(data, num_workers=workers))
    [checkpoint] = (tmp_path / "checkpoints").glob("*.ckpt")
    model = model_of()
    trainer_of(tmp_path, max_epochs=4, **limit).fit(
        model, datamodule=module_of(data, num_workers=workers), ckpt_path=checkpoint, weights_only=True
    )
    assert samples(model, 1) == []
    for epoch in (2, 3):
        assert samples(model, epoch) == whole(epoch)[: STEPS * BATCH]


def test_two_processes_see_no_sample_twice_and_one_goes_on(data: Path, tmp_path: Path) -> None:
    """The program of the documentation: two ranks stop within the second epoch, and one of them takes the rest."""
    script = program("train_lightning.py", tmp_path)
    two = Torchrun(tmp_path / "two", "--standalone", "--nproc-per-node=2", script, data, tmp_path, 2, 10)
    two.wait()
    held_out = set(relevance_of("val").tolist())
    batches = seen(tmp_path / "two")
    steps = N_TRAIN // 2 // BATCH
    for rank in range(2):
        own = [batch for batch in batches if batch.rank == rank]
        trained = [sample for batch in own if not held_out & set(batch.samples) for sample in batch.samples]
        assert trained == whole(0)[rank : 2 * steps * BATCH : 2] + whole(1)[rank : 2 * (10 - steps) * BATCH : 2]
    evaluated = [sample for batch in batches if held_out & set(batch.samples) for sample in batch.samples]
    # Validated after the first epoch, and where the run was stopped.
    assert sorted(evaluated) in (sorted(held_out), sorted([*held_out, *held_out]))

    checkpoint = tmp_path / "step=10.ckpt"
    one = Torchrun(tmp_path / "one", "--standalone", "--nproc-per-node=1", script, data, tmp_path, 2, -1, checkpoint)
    one.wait()
    done = 2 * (10 - steps) * BATCH
    rest = [sample for batch in seen(tmp_path / "one") if not held_out & set(batch.samples) for sample in batch.samples]
    assert rest == whole(1)[done : done + (N_TRAIN - done) // BATCH * BATCH]


@pytest.mark.parametrize("name", ["epoch", "distributed", "rank", "world_size", "drop_last", "padding", "split"])
def test_what_the_trainer_decides_is_refused(data: Path, name: str) -> None:
    with pytest.raises(ValueError, match=f"takes no {name}="):
        module_of(data, **{name: 1})


def test_without_a_trainer_it_serves_one_process(data: Path) -> None:
    module = module_of(data, eval_batch_size=50, use_mmap=True)
    assert len(module.train_dataloader()) == STEPS
    assert [len(batch["relevance"]) for batch in module.val_dataloader()] == [N_VAL]
    assert len(next(iter(module.predict_dataloader()))["relevance"]) == 45
