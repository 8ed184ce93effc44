"""Training the predictor: epochs, learning rate, and checkpoints from which an interrupted run continues exactly."""

from __future__ import annotations

import math
import pickle
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from jasper_store.errors import CorruptFileError, DatasetNotFoundError, IncompatibleOptionsError
from jasper_store.files.atomic import atomic_file
from jasper_store.loading.epochs import set_epoch
from jasper_store.model.predictor import JasperPredictor, dataset_of, info_nce

if TYPE_CHECKING:
    from jasper_store.jasper.dataset import JASPERSteeringDataset
    from jasper_store.loading.loader import Loader

__all__ = ["EpochReport", "Trainer", "TrainingOptions"]

_VERSION = 1


@dataclass(frozen=True)
class TrainingOptions:
    """What decides a training run, together with the dataset and its loader.

    Attributes:
        epochs: how many the run has in all; the learning rate falls to zero over them.
        gate_lr: peak learning rate of the predictor's gate.
        correction_lr: peak learning rate of its correction.
        weight_decay: of AdamW.
        temperature: of InfoNCE.
        warmup: share of all steps over which the learning rate rises.
        hidden: width of the predictor's networks.
        dropout: share of hidden values dropped.
        seed: of the initial weights and of dropout.
    """

    epochs: int = 50
    gate_lr: float = 5e-3
    correction_lr: float = 3e-4
    weight_decay: float = 0.05
    temperature: float = 0.1
    warmup: float = 0.1
    hidden: int = 64
    dropout: float = 0.2
    seed: int = 0

    def __post_init__(self) -> None:
        if self.epochs < 1:
            raise IncompatibleOptionsError(f"epochs should be at least 1, found {self.epochs}")
        if self.temperature <= 0:
            raise IncompatibleOptionsError(f"temperature should be above 0, found {self.temperature}")


@dataclass(frozen=True)
class EpochReport:
    """One epoch, done.

    Attributes:
        epoch: counted from 0.
        loss: mean over its batches.
        samples: trained on.
        seconds: wall time, loading included.
        probabilities: the curriculum's, of (none, centroid, keyword_weighted, residual).
        drawn: samples that got each of these, as it came out.
    """

    epoch: int
    loss: float
    samples: int
    seconds: float
    probabilities: tuple[float, ...]
    drawn: tuple[int, ...]


@dataclass
class Trainer:
    """A predictor in training over one loader.

    A pure function of the dataset, the loader's options and its own: run, or run half, save, load and run the rest,
    and the weights are bit-equal. The global random state is left as it was.

    Args:
        loader: of ``create_loader(dataset_dir, "train", ...)``; the model lives where its batches are.
        options: see :class:`TrainingOptions`.

    Raises:
        IncompatibleOptionsError: the loader has no batch, so that nothing could be learnt.
    """

    loader: Loader
    options: TrainingOptions = field(default_factory=TrainingOptions)

    def __post_init__(self) -> None:
        if len(self.loader) == 0:
            raise IncompatibleOptionsError(
                f"the training split has {len(self.dataset)} samples, fewer than one batch of "
                f"{self.loader.batch_size}, and the last partial batch is dropped; use a smaller batch size"
            )
        options = self.options
        self.model = JasperPredictor(
            self.dataset.embedding_dim, hidden=options.hidden, dropout=options.dropout, seed=options.seed
        ).to(self.dataset.device)
        self.optimizer = torch.optim.AdamW(
            self.model.parameter_groups(options.gate_lr, options.correction_lr), weight_decay=options.weight_decay
        )
        self.history: list[EpochReport] = []

    @property
    def dataset(self) -> JASPERSteeringDataset:
        """The dataset behind the loader."""
        return dataset_of(self.loader)

    @property
    def epoch(self) -> int:
        """The next epoch to run, which is also how many are done."""
        return len(self.history)

    def run(self, on_batch: Callable[[int], None] | None = None) -> Iterator[EpochReport]:
        """Train the epochs that are left, yielding after each; stopping the iteration stops the training.

        Args:
            on_batch: called with the number of samples after every step, e.g. to move a progress bar.
        """
        while self.epoch < self.options.epochs:
            report = self._run_epoch(self.epoch, on_batch)
            self.history.append(report)
            yield report

    def _run_epoch(self, epoch: int, on_batch: Callable[[int], None] | None) -> EpochReport:
        set_epoch(self.loader, epoch)
        began = time.perf_counter()
        losses = []
        samples = 0
        drawn = torch.zeros(4, dtype=torch.int64)
        devices = [self.dataset.device] if self.dataset.device.type == "cuda" else []
        self.model.train()
        # Dropout is drawn from (seed, epoch), so that a resumed run drops what the uninterrupted one would have.
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(self.options.seed * 1_000_003 + epoch)
            for number, batch in enumerate(self.loader):
                self._set_learning_rate(epoch * len(self.loader) + number)
                losses.append(self._step(batch))
                samples += len(batch["question_emb"])
                drawn += torch.bincount(batch["steering_variant"].cpu(), minlength=4)
                if on_batch is not None:
                    on_batch(len(batch["question_emb"]))
        return EpochReport(
            epoch=epoch,
            loss=torch.stack(losses).mean().item(),
            samples=samples,
            seconds=time.perf_counter() - began,
            probabilities=tuple(self.dataset.get_steering_stats()["probs"]),
            drawn=tuple(drawn.tolist()),
        )

    def _step(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        predicted = self.model(batch["question_emb"], batch["steering"])
        loss = info_nce(predicted, batch, self.options.temperature)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        return loss.detach()

    def _set_learning_rate(self, step: int) -> None:
        """Linear warm-up, then a half cosine to zero: a pure function of the step, so there is no state to save."""
        total = self.options.epochs * len(self.loader)
        warmup = max(1, round(self.options.warmup * total))
        rising = min(1.0, (step + 1) / warmup)
        falling = 0.5 * (1 + math.cos(math.pi * max(0, step - warmup) / max(1, total - warmup)))
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak_lr"] * rising * falling

    # --- checkpoints ------------------------------------------------------------------------------------------

    def save(self, path: Path) -> None:
        """Write a checkpoint, atomically: a run that is killed leaves the one before.

        Raises:
            ConversionError: no space, or a directory that cannot be written to.
        """
        state = {
            "version": _VERSION,
            "embedding_dim": self.dataset.embedding_dim,
            "options": asdict(self.options),
            "run": self._identity(),
            "history": [asdict(report) for report in self.history],
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }
        with atomic_file(path) as temporary:
            torch.save(state, temporary)

    def load(self, path: Path) -> None:
        """Continue from a checkpoint of :meth:`save`.

        Raises:
            DatasetNotFoundError: there is no such file.
            CorruptFileError: it is no checkpoint of this version.
            IncompatibleOptionsError: it was made with other options, or from another dataset.
        """
        state = _read(path)
        for what, expected in (("options", asdict(self.options)), ("run", self._identity())):
            differing = [key for key in expected if state[what].get(key) != expected[key]]
            if differing:
                key = differing[0]
                raise IncompatibleOptionsError(
                    f"{path} was made with {key}={state[what].get(key)!r}, and this run has {expected[key]!r}; "
                    "resume with what the run was started with, or start a new one in another directory",
                    path=path,
                )
        try:
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.history = [
                EpochReport(**row | {key: tuple(row[key]) for key in ("probabilities", "drawn")})
                for row in state["history"]
            ]
        except (KeyError, TypeError, ValueError, RuntimeError) as exc:
            raise CorruptFileError(
                f"{path}: its contents contradict each other ({exc}); start anew", path=path
            ) from exc

    def _identity(self) -> dict[str, Any]:
        return {
            "fingerprint": self.dataset.fingerprint(),
            "dataset seed": self.dataset.seed,
            "batch_size": self.loader.batch_size,
            "batches": len(self.loader),
        }


def _read(path: Path) -> dict[str, Any]:
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as exc:
        raise DatasetNotFoundError(f"{path}: no such checkpoint; start a new run without resuming", path=path) from exc
    except (OSError, EOFError, RuntimeError, ValueError, KeyError, pickle.UnpicklingError) as exc:
        raise CorruptFileError(
            f"{path}: expected a checkpoint, found a file that torch cannot read", path=path
        ) from exc
    if not isinstance(state, Mapping) or state.get("version") != _VERSION:
        raise CorruptFileError(f"{path}: expected a checkpoint of version {_VERSION} of jasper-store train", path=path)
    missing = {"options", "run", "history", "model", "optimizer"} - state.keys()
    if missing:
        raise CorruptFileError(f"{path}: the checkpoint lacks {', '.join(sorted(missing))}; start anew", path=path)
    return dict(state)
