"""``jasper-store train``: the demo's predictor on your dataset."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import jasper_store as js
from jasper_store.cli.console import errors, print_json, progress, results
from jasper_store.cli.options import (
    TRAIN_BATCH,
    Device,
    FormatOption,
    Json,
    MemoryLimit,
    Mmap,
    Preload,
    Seed,
    downloaded,
    use_mmap,
)
from jasper_store.cli.outputs import make_directory
from jasper_store.errors import IncompatibleOptionsError

if TYPE_CHECKING:
    from jasper_store.loading.loader import Loader
    from jasper_store.model.training import Trainer

__all__ = ["train"]

_CHECKPOINT = "checkpoint.pt"


def train(
    path: Annotated[
        Path,
        typer.Argument(metavar="DIR", callback=downloaded, help="A JASPER dataset directory, or hf://owner/name."),
    ],
    epochs: Annotated[int, typer.Option(min=1, help="Epochs in all, resumed ones included.")] = 50,
    batch_size: Annotated[int, typer.Option(min=1, help="Samples per step.")] = TRAIN_BATCH,
    out: Annotated[Path | None, typer.Option("--out", help="Directory for a checkpoint after every epoch.")] = None,
    workers: Annotated[int, typer.Option(min=0, help="Loader processes; 0 loads in this one.")] = 0,
    storage_format: FormatOption = "auto",
    device: Device = None,
    memory_limit: MemoryLimit = None,
    seed: Seed = 42,
    *,
    mmap: Mmap = False,
    preload: Preload = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the checkpoint in --out, if any.")] = False,
    json: Json = False,
) -> None:
    """Train a small predictor (question + steering -> source); say what it gained on the validation split.

    The curriculum moves with the epochs; with --out a checkpoint is written before the first and after each.
    With --resume too, a run that was interrupted ends with the weights of one that never stopped.

    Examples:
      jasper-store train data/ --epochs 20
      jasper-store train data/ --out run1/ --resume
    """
    from jasper_store.model.predictor import evaluate, question_alone
    from jasper_store.model.training import Trainer, TrainingOptions

    checkpoint = _checkpoint(out, resume=resume)
    opening: dict[str, Any] = {
        "storage_format": storage_format,
        "use_mmap": use_mmap(mmap=mmap, preload=preload),
        "device": device,
        "memory_limit": memory_limit,
        "seed": seed,
    }
    loader = js.create_loader(path, "train", batch_size, num_workers=workers, **opening)
    validation = js.create_loader(path, "val", max(batch_size, 256), **opening)
    trainer = Trainer(loader, TrainingOptions(epochs=epochs, seed=seed))
    with _kept_in(checkpoint, trainer):
        recalls = {"question": evaluate(validation, question_alone)}
        _train(trainer, checkpoint)
    recalls["trained"] = evaluate(validation, trainer.model)
    if json:
        print_json(
            {
                "path": str(path),
                "format": trainer.dataset.storage_format,
                "plan": trainer.dataset.store.plan.to_dict(),
                "options": asdict(trainer.options),
                "epochs": [asdict(report) for report in trainer.history],
                "recall_at_1": recalls,
                "checkpoint": checkpoint and str(checkpoint),
            }
        )
    else:
        _show(trainer, validation, recalls, checkpoint)


def _train(trainer: Trainer, checkpoint: Path | None) -> None:
    """Run the epochs that are left, with a checkpoint after each."""
    from jasper_store.cli.epochs import run_epochs

    with progress() as bars:
        for _ in run_epochs(trainer, bars):
            if checkpoint is not None:
                trainer.save(checkpoint)


def _show(trainer: Trainer, validation: Loader, recalls: dict[str, dict[str, float]], checkpoint: Path | None) -> None:
    from jasper_store.cli.epochs import curriculum_table, recall_table
    from jasper_store.model.predictor import dataset_of

    results().print(curriculum_table(trainer.history))
    rows = {"question alone": recalls["question"], "trained": recalls["trained"]}
    results().print(recall_table(rows, trainer.dataset.n_neg, len(dataset_of(validation))))
    if checkpoint is not None:
        results().print(f"checkpoint: {checkpoint}", markup=False, soft_wrap=True)


@contextmanager
def _kept_in(checkpoint: Path | None, trainer: Trainer) -> Iterator[None]:
    """Go on from a checkpoint that is there, else write one of nothing done yet; say where a run was interrupted."""
    if checkpoint is None:
        yield
        return
    if checkpoint.is_file():
        trainer.load(checkpoint)
    else:
        trainer.save(checkpoint)
    try:
        yield
    except KeyboardInterrupt:
        done = f"{trainer.epoch} of {trainer.options.epochs} epochs"
        errors().print(
            f"{checkpoint}: holds {done}; go on with the same options and --resume", markup=False, soft_wrap=True
        )
        raise


def _checkpoint(out: Path | None, *, resume: bool) -> Path | None:
    """Where checkpoints go; the directory is made.

    Raises:
        IncompatibleOptionsError: ``--resume`` without ``--out``, or a checkpoint that would be overwritten.
        ConversionError: the directory cannot be made.
    """
    if out is None:
        if resume:
            raise IncompatibleOptionsError("--resume needs --out, the directory that holds the checkpoint")
        return None
    checkpoint = out / _CHECKPOINT
    if checkpoint.exists() and not resume:
        raise IncompatibleOptionsError(
            f"{checkpoint} is there already; pass --resume, with the options that it was made with, to go on from it, or"
            " another --out",
            path=checkpoint,
        )
    make_directory(out)
    return checkpoint
