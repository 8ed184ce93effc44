"""``jasper-store build``: a dataset from embeddings and pairs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from rich.progress import Progress, ProgressColumn, Task
from rich.text import Text

from jasper_store.cli.console import print_json, progress, results, table
from jasper_store.cli.counts import parse_count
from jasper_store.cli.options import Json
from jasper_store.cli.sizes import parse_size
from jasper_store.errors import IncompatibleOptionsError
from jasper_store.memory.sizes import format_bytes

if TYPE_CHECKING:
    from jasper_store.building.build_report import BuildReport

__all__ = ["build", "build_report_tables", "follow_stages", "rate_column"]

_FILE = "a file, a directory, or PATH:NAME of one of its tensors"


def build(
    dst: Annotated[Path, typer.Argument(metavar="OUT", help="Directory to make.")],
    questions: Annotated[str, typer.Option(metavar="PATH", help=f"Embeddings of questions: {_FILE}.")],
    sources: Annotated[str, typer.Option(metavar="PATH", help=f"Embeddings of sources: {_FILE}.")],
    pairs: Annotated[
        str, typer.Option(metavar="PATH", help="Rows of question and source [pairs, 2]; or .tsv with their ids.")
    ],
    keywords: Annotated[str | None, typer.Option(metavar="PATH", help="Embeddings of keywords.")] = None,
    pair_keywords: Annotated[
        str | None, typer.Option(metavar="PATH", help="Keyword rows of each pair, a ragged tensor.")
    ] = None,
    relevance: Annotated[str | None, typer.Option(metavar="PATH", help="Relevance of each pair; default: 1.")] = None,
    clusters: Annotated[
        str | None,
        typer.Option(metavar="COUNT|PATH", help="How many to make; or the numbers. Default: sqrt(sources / 2)."),
    ] = None,
    clusters_of: Annotated[
        str | None, typer.Option(metavar="WHAT", help="What --clusters PATH numbers: pairs or sources.")
    ] = None,
    splits: Annotated[
        str | None,
        typer.Option(metavar="SHARES|PATH", help="Shares such as 0.8,0.1,0.1 (the default), or each pair's split."),
    ] = None,
    question_ids: Annotated[
        str | None, typer.Option(metavar="PATH", help="Ids of questions: a file of strings.")
    ] = None,
    source_ids: Annotated[str | None, typer.Option(metavar="PATH", help="Ids of sources: a file of strings.")] = None,
    n_neg: Annotated[int, typer.Option("--n-neg", min=1, help="Hard negatives per pair.")] = 5,
    to: Annotated[
        str, typer.Option("--format", "--to", metavar="FORMAT", help="safetensors, npy, hdf5 or pt.")
    ] = "safetensors",
    compression: Annotated[str | None, typer.Option(help="HDF5 only: gzip or lzf.")] = None,
    memory_limit: Annotated[
        int | None,
        typer.Option("--memory-limit", parser=parse_size, metavar="SIZE", help="Upper bound on memory, e.g. 8GiB."),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of clusters, splits and random negatives.")] = 42,
    keyword_weights: Annotated[
        str, typer.Option("--keyword-weights", metavar="RULE", help="equal, or softmax of cosines with the question.")
    ] = "equal",
    *,
    normalize_residual: Annotated[
        bool, typer.Option("--normalize-residual", help="Make steering_residual of length 1.")
    ] = False,
    shared_questions: Annotated[
        bool, typer.Option("--shared-questions", help="Allow a question, or a duplicate, in two splits.")
    ] = False,
    repeated_pairs: Annotated[bool, typer.Option("--repeated-pairs", help="Allow a pair that is there twice.")] = False,
    keep_similarities: Annotated[
        bool, typer.Option("--keep-similarities", help="Keep the cosines of positives and negatives as tensors.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a dataset that is there.")] = False,
    json: Json = False,
) -> None:
    """Build a dataset from embeddings and pairs: clusters, steering, hard negatives and splits are computed.

    Everything is checked before the first byte is written, and the dataset appears whole.
    After an interruption the same command continues; the result has the same bits.

    Examples:
      jasper-store build data/ --questions q.npy --sources s.npy --pairs pairs.npy
      jasper-store build data/ --questions raw.h5:q --sources raw.h5:s --pairs raw.h5:pairs --memory-limit 8GiB
    """
    from jasper_store.building.build import build as build_dataset

    with progress(rate_column()) as bars:
        report = build_dataset(
            dst,
            questions=questions,
            sources=sources,
            pairs=pairs,
            keywords=keywords,
            pair_keywords=pair_keywords,
            relevance=relevance,
            clusters=_clusters(clusters, clusters_of),
            splits=_splits(splits),
            question_ids=question_ids,
            source_ids=source_ids,
            n_neg=n_neg,
            format=to,
            compression=compression,
            memory_limit=memory_limit,
            seed=seed,
            keyword_weights=keyword_weights,  # type: ignore[arg-type]
            normalize_residual=normalize_residual,
            shared_questions=shared_questions,
            repeated_pairs=repeated_pairs,
            keep_similarities=keep_similarities,
            overwrite=overwrite,
            progress=follow_stages(bars),
        )
    if json:
        print_json(report.to_dict())
        return
    for shown in build_report_tables(report):
        results().print(shown)
    results().print(
        f"{report.path}: {format_bytes(report.nbytes)} as {report.format}, in {report.seconds:.1f} s\n"
        f"Next: jasper-store verify {dst}, jasper-store report {dst}, jasper-store train {dst}",
        markup=False,
        soft_wrap=True,
    )


def _clusters(given: str | None, owner: str | None) -> Any:
    """What ``--clusters`` says: a number, or a place."""
    if given is not None and owner is None:
        try:
            return parse_count(given)
        except typer.BadParameter:
            return given
    if owner is not None and given is None:
        raise IncompatibleOptionsError("--clusters-of says what the numbers of --clusters PATH are of; pass both")
    return None if given is None else {owner: given}


def _splits(given: str | None) -> Any:
    """What ``--splits`` says: shares, or a place."""
    try:
        return None if given is None else tuple(float(share) for share in given.split(","))
    except ValueError:
        return given


class _Rate(ProgressColumn):
    """Rows, or others, in a second."""

    def __init__(self, unit: str) -> None:
        super().__init__()
        self._unit = unit

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{speed:,.0f} {self._unit}/s", style="progress.data.speed")


def rate_column(unit: str = "rows") -> ProgressColumn:
    """A column of a progress bar that says how many rows, or others, were done in a second."""
    return _Rate(unit)


def follow_stages(bars: Progress) -> Callable[[str, int, int], None]:
    """A progress callback that has a bar for each stage."""
    tasks: dict[str, Any] = {}

    def moved(stage: str, done: int, total: int) -> None:
        if stage not in tasks:
            tasks[stage] = bars.add_task(stage, total=total)
        bars.update(tasks[stage], completed=done, total=total)

    return moved


def build_report_tables(report: BuildReport) -> list[Any]:
    """What a build did, as tables: its stages, then what there is, and what should be known about it."""
    if report.existed:
        said = "It was there already, built from the same inputs with the same settings; nothing was written."
        return [escape(said)]
    columns = ("stage", "rows", "took", "rows/s")
    stages = [
        (
            stage.name,
            f"{stage.rows:,}",
            "kept from an earlier build" if stage.kept else f"{stage.seconds:.2f} s",
            "" if stage.kept or not stage.seconds else f"{stage.rows / stage.seconds:,.0f}",
        )
        for stage in report.stages
    ]
    counts = [(name.replace("_", " "), f"{count:,}") for name, count in report.counts.items() if count]
    counts += [(f"pairs in {name}", f"{count:,}") for name, count in report.splits.items()]
    counts += [(f"mining: {name.replace('_', ' ')}", _said(value)) for name, value in report.mining.items() if value]
    shown: list[Any] = [
        table("Stages", columns, stages, right=columns[1:]),
        table("What there is", ("what", "count"), counts, right=("count",)),
    ]
    return [*shown, *(escape(note) for note in report.notes)]


def _said(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else escape(str(value))
