"""``jasper-store synth``: a synthetic dataset of any size."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

import jasper_store as js
from jasper_store.cli.console import print_json, progress, results
from jasper_store.cli.counts import parse_count
from jasper_store.cli.options import TRAIN_BATCH, Json, Seed
from jasper_store.memory.sizes import format_bytes

__all__ = ["synth"]

_DIM, _N_NEG, _CLUSTERS, _SEED = 384, 5, 64, 0
"""Defaults of ``SynthOptions``, which is not imported before the command runs; a test compares them."""


def synth(
    path: Annotated[Path, typer.Argument(metavar="DIR", help="Directory to make.")],
    pairs: Annotated[
        int, typer.Option(parser=parse_count, metavar="COUNT", help="Pairs of question and source, e.g. 200k or 10M.")
    ],
    dim: Annotated[int, typer.Option(parser=parse_count, metavar="COUNT", help="Embedding dimension.")] = _DIM,
    n_neg: Annotated[int, typer.Option("--n-neg", min=1, help="Hard negatives per pair.")] = _N_NEG,
    clusters: Annotated[int, typer.Option(parser=parse_count, metavar="COUNT", help="Clusters.")] = _CLUSTERS,
    to: Annotated[
        str, typer.Option("--format", "--to", metavar="FORMAT", help="safetensors, npy, hdf5 or pt.")
    ] = "safetensors",
    seed: Seed = _SEED,
    *,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a dataset that is there.")] = False,
    json: Json = False,
) -> None:
    """Make a synthetic dataset: clustered embeddings, with steering, tiers and negatives computed from them.

    Made block by block: memory does not grow with the number of pairs. A model that trains on it learns.
    The same options give the same values.

    Examples:
      jasper-store synth data/ --pairs 200k
      jasper-store synth big/ --pairs 10M --dim 384 --n-neg 5 --clusters 1k --format hdf5
    """
    from jasper_store.building.synth import SynthOptions, synthesize

    options = SynthOptions(pairs=pairs, dim=dim, n_neg=n_neg, clusters=clusters, seed=seed)
    began = time.perf_counter()
    with progress() as bars:
        task = bars.add_task("making pairs", total=pairs)
        made = synthesize(
            path,
            options,
            format=to,
            overwrite=overwrite,
            progress=lambda done, total: bars.update(task, completed=done, total=total),
        )
    seconds = time.perf_counter() - began
    nbytes = js.plan(made, format=to).nbytes
    if json:
        print_json(
            {
                "path": str(made),
                "format": to,
                "pairs": pairs,
                "dim": dim,
                "n_neg": n_neg,
                "clusters": clusters,
                "seed": seed,
                "nbytes": nbytes,
                "seconds": seconds,
            }
        )
        return
    results().print(
        f"{made}: {pairs:,} pairs of {dim} dimensions in {clusters:,} clusters, {n_neg} negatives each, "
        f"{format_bytes(nbytes)} as {to}, in {seconds:.1f} s\n"
        f"Next: jasper-store report {made}, jasper-store bench {made}, jasper-store train {made}{_batch_size(made)}",
        markup=False,
        soft_wrap=True,
    )


def _batch_size(made: Path) -> str:
    """The option that ``train`` needs where the training split is smaller than its batches."""
    with js.open(made, use_mmap=True) as store:
        samples = store["train_idx"].n_rows
    return "" if samples >= TRAIN_BATCH else f" --batch-size {samples}"
