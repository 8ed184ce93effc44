"""``jasper-store demo``: the whole job on real embeddings, from embeddings and pairs to a trained model."""

from __future__ import annotations

import importlib.util
import tempfile
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

import jasper_store as js
from jasper_store.cli.build import build_report_tables, follow_stages, rate_column
from jasper_store.cli.console import print_json, progress, results, table
from jasper_store.cli.convert import follow_bytes
from jasper_store.cli.options import Json, Seed
from jasper_store.cli.outputs import make_directory
from jasper_store.cli.plan import show_plan
from jasper_store.cli.sample import SAMPLE
from jasper_store.errors import DatasetNotFoundError, PerformanceWarning
from jasper_store.memory.sizes import format_bytes

__all__ = ["SAMPLE", "demo"]

_BATCH = 32
_SPEED_BATCH = 256
_SPEED_SECONDS = 0.5
_LIMIT_SHARE = 3
"""What the step of little memory may preload: one in so many bytes of the dataset."""


@dataclass(frozen=True)
class _Speed:
    format: str
    placement: str
    samples_per_second: float
    memory_limit: int | None = None
    preloaded_nbytes: int = 0
    mapped: tuple[str, ...] = ()

    @property
    def place(self) -> str:
        """Where its rows came from, in words."""
        if self.memory_limit is None:
            return self.placement
        return (
            f"limit {format_bytes(self.memory_limit)}: {format_bytes(self.preloaded_nbytes)} in ram, "
            f"{len(self.mapped)} tensors mapped"
        )


def demo(
    epochs: Annotated[int, typer.Option(min=1, help="Epochs to train; the default curriculum ends at 40.")] = 50,
    out: Annotated[Path | None, typer.Option("--out", help="Keep the converted datasets in this directory.")] = None,
    seed: Seed = 42,
    *,
    json: Json = False,
) -> None:
    """Build, convert, plan, train and compare, on the bundled WordNet + MiniLM embeddings.

    Begins with embeddings and 1 000 real pairs: builds clusters, steering, hard negatives and splits of them.
    Converts the dataset from .pt to safetensors and HDF5, and prints the placement plan: as it is on this
    machine, and as it would be with memory for a third of the data, where the rest is mapped.
    Trains a small predictor while the curriculum moves.
    Ends with recall before and after, and how fast each format was served, from memory, mapped, and from both.
    With --out, report.html shows the dataset.

    Examples:
      jasper-store demo
      jasper-store demo --epochs 5 --out demo-data/
    """
    if not SAMPLE.is_dir():
        raise DatasetNotFoundError(
            f"{SAMPLE}: the bundled sample is missing from this installation; install jasper-store again", path=SAMPLE
        )
    with _directory(out) as directory:
        found = _Demo(directory, epochs, seed, quiet=json, kept=out is not None).run()
    if json:
        print_json(found)


@contextmanager
def _directory(out: Path | None) -> Iterator[Path]:
    if out is not None:
        yield make_directory(out)
        return
    with tempfile.TemporaryDirectory(prefix="jasper-store-demo-") as name:
        yield Path(name)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Steps of 32 samples are over before a second thread has woken, and on a busy machine all wait for it."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


class _Demo:
    """The steps of the demo; each prints what it did unless ``quiet``, and gives it back as plain values."""

    def __init__(self, directory: Path, epochs: int, seed: int, *, quiet: bool, kept: bool) -> None:
        self.kept = kept
        self.epochs = epochs
        self.seed = seed
        self.quiet = quiet
        self.limit = 0  # known once the first plan was made
        self.pt = directory / "pt"
        self.converted = {"safetensors": directory / "safetensors", "hdf5": directory / "hdf5"}

    def run(self) -> dict[str, Any]:
        return {
            "build": self._build(),
            "conversions": self._convert(),
            "plan": self._plan(),
            "plan_under_limit": self._limit(),
            **self._train(),
            "speed": self._speed(),
            "report": self._report(),
        }

    def _say(self, *what: Any) -> None:
        if not self.quiet:
            results().print(*what)

    def _build(self) -> dict[str, Any]:
        """A dataset in .pt files from the sample's embeddings, pairs and keywords alone."""
        raw: dict[str, Any] = dict.fromkeys(("questions", "sources", "pairs", "keywords", "pair_keywords"), SAMPLE)
        if importlib.util.find_spec("faiss") is None:
            raw["clusters"] = {"pairs": SAMPLE}
            self._say("Clusters are those of the sample; with pip install jasper_store\\[build] they are computed.")
        with progress(rate_column()) as bars:
            report = js.build(
                self.pt,
                **raw,
                format="pt",
                # In this sample no source but its own answers a question, so that very similar ones are kept.
                mining={"relative_margin": None},
                progress=follow_stages(bars),
            )
        for shown in build_report_tables(report):
            self._say(shown)
        self._say("")
        return report.to_dict()

    def _report(self) -> dict[str, Any]:
        """One HTML page about the dataset, as it is under the small memory limit."""
        from jasper_store.files.atomic import write_bytes
        from jasper_store.report.gather import make_report
        from jasper_store.report.page.document import page

        with progress() as bars:
            task = bars.add_task("report", total=None)
            found = make_report(
                self.converted["safetensors"],
                storage_format="auto",
                verify=True,
                memory_limit=self.limit,
                step=lambda what, done, total: bars.update(task, description=what, completed=done, total=total),
            )
        out = self.pt.parent / "report.html"
        write_bytes(out, page(found, js.__version__).encode("utf-8", "replace"))
        kept = f"{out}: open it in a browser" if self.kept else "keep it, and the datasets, with --out"
        self._say(f"Report: the dataset {'is sound' if found.ok else 'has errors'}; {escape(kept)}")
        return {"ok": found.ok, "page": str(out) if self.kept else None}

    def _convert(self) -> list[dict[str, Any]]:
        reports = []
        for to, destination in self.converted.items():
            with progress() as bars:
                report = js.convert(
                    self.pt,
                    destination,
                    format=to,
                    compression="gzip" if to == "hdf5" else None,
                    progress=follow_bytes(bars, f"pt -> {to}:"),
                )
            reports.append(report.to_dict())
        cells = [
            (
                f"pt -> {report['format']}" + (f" ({report['compression']})" if report["compression"] else ""),
                format_bytes(report["bytes_in"]),
                format_bytes(report["bytes_out"]),
                f"{report['saving']:.1%}",
                f"{report['seconds']:.2f} s",
            )
            for report in reports
        ]
        columns = ("conversion", "in", "out", "saved", "took")
        self._say(table("Conversion, values proven equal by checksum", columns, cells, right=columns[1:]), "")
        return reports

    def _plan(self) -> dict[str, Any]:
        made = js.plan(self.converted["safetensors"])
        self.limit = made.nbytes // _LIMIT_SHARE
        if not self.quiet:
            show_plan(made, "Where each tensor will live on this machine")
            results().print()
        return made.to_dict()

    def _train(self) -> dict[str, Any]:
        from jasper_store.cli.epochs import curriculum_table, recall_table, run_epochs
        from jasper_store.model.predictor import dataset_of, evaluate, question_alone
        from jasper_store.model.training import Trainer, TrainingOptions

        path = self.converted["safetensors"]
        loader = js.create_loader(path, "train", _BATCH, seed=self.seed)
        validation = js.create_loader(path, "val", _SPEED_BATCH, seed=self.seed)
        trainer = Trainer(loader, TrainingOptions(epochs=self.epochs, seed=self.seed))
        recalls = {
            "question alone": evaluate(validation, question_alone),
            "question + steering": evaluate(validation, lambda question, steering: question + steering),
            "predictor, untrained": evaluate(validation, trainer.model),
        }
        with _one_thread(), progress() as bars:
            for _ in run_epochs(trainer, bars):
                pass
        recalls[f"predictor, {self.epochs} epochs"] = evaluate(validation, trainer.model)
        samples = len(dataset_of(validation))
        self._say(curriculum_table(trainer.history))
        self._say(recall_table(recalls, trainer.dataset.n_neg, samples))
        self._say(
            "An untrained predictor is the question's embedding, so its row is the cosine baseline. "
            f"One of the {samples} samples is {1 / samples:.1%}.\n"
        )
        return {"recall_at_1": recalls, "epochs": [asdict(report) for report in trainer.history]}

    def _limit(self) -> dict[str, Any]:
        """The same dataset where memory is short: what is read most stays in memory, the rest is mapped."""
        made = js.plan(self.converted["safetensors"], memory_limit=self.limit)
        if not self.quiet:
            show_plan(made, f"The same under --memory-limit {self.limit}, {format_bytes(self.limit)}")
            results().print()
        return made.to_dict()

    def _speed(self) -> list[dict[str, Any]]:
        speeds = []
        for directory in (self.pt, *self.converted.values()):
            for use_mmap in (True, False):
                with warnings.catch_warnings():
                    # That compressed HDF5 cannot be mapped is what the table is about to show.
                    warnings.simplefilter("ignore", PerformanceWarning)
                    speeds.append(_measure(directory, use_mmap=use_mmap))
        speeds.append(_measure(self.converted["safetensors"], memory_limit=self.limit))
        cells = [(speed.format, speed.place, f"{speed.samples_per_second:,.0f}") for speed in speeds]
        title = (
            f"Training samples served per second: batches of {_SPEED_BATCH}, the fastest epoch after a warm-up and an "
            "epoch to begin with"
        )
        self._say(table(title, ("format", "placement", "samples/s"), cells, right=("samples/s",)))
        return [asdict(speed) for speed in speeds]


def _measure(directory: Path, *, use_mmap: bool | None = None, memory_limit: int | None = None) -> _Speed:
    """Samples per second of ``create_loader``: the fastest of a few whole epochs, after one to warm up."""
    from jasper_store.model.predictor import dataset_of

    loader = js.create_loader(directory, "train", _SPEED_BATCH, use_mmap=use_mmap, memory_limit=memory_limit)
    with dataset_of(loader) as dataset:
        js.warm_up(dataset.store)
        seconds: list[float] = []
        served = 0
        while len(seconds) < 2 or sum(seconds) < _SPEED_SECONDS:
            js.set_epoch(loader, len(seconds))
            began = time.perf_counter()
            served = sum(len(batch["question_emb"]) for batch in loader)
            seconds.append(time.perf_counter() - began)
        plan = dataset.store.plan
        return _Speed(
            dataset.storage_format,
            plan.placement("source_embs"),
            served / min(seconds[1:]),
            memory_limit,
            plan.preloaded_nbytes,
            tuple(entry.name for entry in plan.entries if entry.placement == "mmap"),
        )
