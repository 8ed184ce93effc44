"""``jasper-store mine``: hard negatives for a dataset that is there."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

import jasper_store as js
from jasper_store.cli.build import follow_stages, rate_column
from jasper_store.cli.console import print_json, progress, results, table
from jasper_store.cli.options import Json, LocalDirectory
from jasper_store.cli.sizes import parse_size
from jasper_store.errors import IncompatibleOptionsError

if TYPE_CHECKING:
    from jasper_store.building.mining_report import MiningReport

__all__ = ["mine"]


def mine(
    path: LocalDirectory,
    n_neg: Annotated[
        int | None, typer.Option("--n-neg", min=1, help="Negatives per pair. Default: as many as there are, else 5.")
    ] = None,
    tiers: Annotated[
        str | None,
        typer.Option(metavar="PARTS", help="Parts in the cluster, adjacent, other, random. Default: 3,4,3,2."),
    ] = None,
    relative_margin: Annotated[
        float, typer.Option("--relative-margin", help="Share of the positive's cosine that a negative stays below it.")
    ] = 0.05,
    absolute_margin: Annotated[
        float | None, typer.Option("--absolute-margin", help="Cosine that a negative stays below the positive.")
    ] = None,
    max_similarity: Annotated[
        float | None, typer.Option("--max-similarity", help="Highest cosine of a negative.")
    ] = None,
    ranks: Annotated[
        str | None, typer.Option(metavar="FIRST,LAST", help="Ranks that may be chosen, from 0, without the last.")
    ] = None,
    tier_numbers: Annotated[
        str, typer.Option("--tier-numbers", metavar="RULE", help="jasper writes 0 to 2, builder 1 to 4.")
    ] = "jasper",
    method: Annotated[
        str, typer.Option(help="exact; or faiss, an approximate index with its recall measured.")
    ] = "exact",
    memory_limit: Annotated[
        int | None,
        typer.Option("--memory-limit", parser=parse_size, metavar="SIZE", help="Upper bound on memory, e.g. 8GiB."),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of random negatives.")] = 42,
    device: Annotated[str, typer.Option(help="Where matrices are multiplied: cpu or cuda.")] = "cpu",
    *,
    similarities: Annotated[
        bool, typer.Option("--similarities", help="Write the cosines of positives and negatives, too.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Mine even if the negatives are up to date.")] = False,
    json: Json = False,
) -> None:
    """Mine hard negatives from a dataset's embeddings, and write them into it in one step.

    A loader at work takes them by reload_negatives(). An interrupted run is continued by the same command.

    Examples:
      jasper-store mine data/ --n-neg 12
      jasper-store mine data/ --tiers 0,0,3,1 --relative-margin 0.1 --similarities
    """
    with progress(rate_column("products")) as bars:
        report = js.mine_negatives(
            path,
            n_neg,
            tiers=_numbers(tiers, float, "--tiers"),
            relative_margin=relative_margin,
            absolute_margin=absolute_margin,
            max_similarity=max_similarity,
            ranks=_numbers(ranks, int, "--ranks"),
            tier_numbers=tier_numbers,  # type: ignore[arg-type]
            method=method,  # type: ignore[arg-type]
            memory_limit=memory_limit,
            seed=seed,
            similarities=similarities,
            force=force,
            device=device,
            progress=follow_stages(bars),
        )
    if json:
        print_json(report.to_dict())
        return
    if report.existed:
        results().print(str(report), markup=False, soft_wrap=True)
        return
    for shown in _tables(report):
        results().print(shown)
    if report.recall is not None:
        results().print(f"faiss found {report.recall:.1%} of the most similar sources (measured on up to 256 pairs)")
    results().print(
        f"{report.path}: {report.n_pairs:,} pairs, {report.settings['n_neg']} negatives each, in {report.seconds:.1f} s",
        markup=False,
        soft_wrap=True,
    )


def _numbers(text: str | None, kind: type[float | int], flag: str) -> tuple[Any, ...] | None:
    try:
        return None if text is None else tuple(kind(part) for part in text.split(","))
    except ValueError as exc:
        raise IncompatibleOptionsError(f"{flag} {text}: expected numbers with commas between them") from exc


def _tables(report: MiningReport) -> list[Any]:
    """Negatives of each kind with their cosines, then what the rules left out."""
    means = report.similarity_of_kinds
    kinds = [("positive", f"{report.n_pairs:,}", f"{report.positive_similarity:.3f}")]
    kinds += [
        (kind, f"{count:,}", "" if means[kind] is None else f"{means[kind]:.3f}")
        for kind, count in report.kinds.items()
    ]
    counts = [(what.replace("_", " "), f"{count:,}") for what, count in report.counts.items() if count]
    return [
        table("Negatives", ("kind", "count", "mean cosine"), kinds, right=("count", "mean cosine")),
        table("Left out, and gaps that were filled", ("what", "count"), counts, right=("count",)),
    ]
