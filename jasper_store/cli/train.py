"""``jasper-store train``: the demo's predictor on your dataset."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

import jasper_store as js
from jasper_store.cli.console import print_json, progress, results
from jasper_store.cli.epochs import curriculum_table, recall_table, run_epochs
from jasper_store.cli.options import Device, FormatOption, Json, MemoryLimit, Mmap, Seed
from jasper_store.errors import IncompatibleOptionsError
from jasper_store.model.predictor import dataset_of, evaluate, question_alone
from jasper_store.model.training import Trainer, TrainingOptions

__all__ = ["train"]

_CHECKPOINT = "checkpoint.pt"


def train(
    path: Annotated[Path, typer.Argument(metavar="DIR", help="A JASPER dataset directory.")],
    epochs: Annotated[int, typer.Option(min=1, help="Epochs in all, resumed ones included.")] = 50,
    batch_size: Annotated[int, typer.Option(min=1, help="Samples per step.")] = 32,
    out: Annotated[Path | None, typer.Option("--out", help="Directory for a checkpoint after every epoch.")] = None,
    workers: Annotated[int, typer.Option(min=0, help="Loader processes; 0 loads in this one.")] = 0,
    storage_format: FormatOption = "auto",
    device: Device = None,
    memory_limit: MemoryLimit = None,
    mmap: Mmap = None,
    seed: Seed = 42,
    *,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the checkpoint in --out, if any.")] = False,
    json: Json = False,
) -> None:
    """Train a small predictor (question + steering -> source); say what it gained on the validation split.

    The curriculum moves with the epochs; with --out a checkpoint is written after each.
    With --resume too, a run that was interrupted ends with the weights of one that never stopped.

    Examples:
      jasper-store train data/ --epochs 20
      jasper-store train data/ --out run1/ --resume
    """
    checkpoint = _checkpoint(out, resume=resume)
    opening: dict[str, Any] = {
        "storage_format": storage_format,
        "use_mmap": mmap,
        "device": device,
        "memory_limit": memory_limit,
        "seed": seed,
    }
    loader = js.create_loader(path, "train", batch_size, num_workers=workers, **opening)
    validation = js.create_loader(path, "val", max(batch_size, 256), **opening)
    trainer = Trainer(loader, TrainingOptions(epochs=epochs, seed=seed))
    if checkpoint is not None and checkpoint.is_file():
        trainer.load(checkpoint)
    before = evaluate(validation, question_alone)
    with progress() as bars:
        for _ in run_epochs(trainer, bars):
            if checkpoint is not None:
                trainer.save(checkpoint)
    after = evaluate(validation, trainer.model)
    if json:
        print_json(
            {
                "path": str(path),
                "format": trainer.dataset.storage_format,
                "plan": trainer.dataset.store.plan.to_dict(),
                "options": asdict(trainer.options),
                "epochs": [asdict(report) for report in trainer.history],
                "recall_at_1": {"question": before, "trained": after},
                "checkpoint": checkpoint and str(checkpoint),
            }
        )
        return
    results().print(curriculum_table(trainer.history))
    rows = {"question alone": before, "trained": after}
    results().print(recall_table(rows, trainer.dataset.n_neg, len(dataset_of(validation))))
    if checkpoint is not None:
        results().print(f"checkpoint: {checkpoint}", markup=False, soft_wrap=True)


def _checkpoint(out: Path | None, *, resume: bool) -> Path | None:
    """Where checkpoints go; the directory is made.

    Raises:
        IncompatibleOptionsError: ``--resume`` without ``--out``, or a checkpoint that would be overwritten.
    """
    if out is None:
        if resume:
            raise IncompatibleOptionsError("--resume needs --out, the directory that holds the checkpoint")
        return None
    checkpoint = out / _CHECKPOINT
    if checkpoint.exists() and not resume:
        raise IncompatibleOptionsError(
            f"{checkpoint} is there already; pass --resume to go on from it, or another --out", path=checkpoint
        )
    out.mkdir(parents=True, exist_ok=True)
    return checkpoint
