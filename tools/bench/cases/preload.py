"""Everything into memory: against ``torch.load`` of the same files, and against the disk when cold."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tools.bench.results import CaseResult, Table, target
from tools.bench.stats import median
from tools.bench.timings import COLUMNS, Timings, Way

if TYPE_CHECKING:
    from tools.bench.context import Context

__all__ = ["NAME", "TITLE", "run"]

NAME = "preload"
TITLE = "Preloading"
CALL = "tools.bench.measure_files"


def run(context: Context) -> CaseResult:
    """The same ``.pt`` files for both, and this library's safetensors beside them; warm, then cold."""
    result = CaseResult(NAME, TITLE)
    pt = str(context.assets.ensure("jasper.pt"))
    st = str(context.assets.ensure("jasper.safetensors", {"jasper.pt"}))
    for cold in (False, True):
        ways = {
            "torch": Way("`torch.load`, pt", f"{CALL}:torch_load", {"path": pt, "cold": cold}),
            "ours": Way("`js.open(use_mmap=False)`, pt", f"{CALL}:preload", {"path": pt, "cold": cold}),
            "ours-safetensors": Way(
                "`js.open(use_mmap=False)`, safetensors", f"{CALL}:preload", {"path": st, "cold": cold}
            ),
        }
        probes = [_probe(context) for _ in range(3)] if cold else []
        timings = Timings(ways).measure(context)
        state = "cold" if cold else "warm"
        result.tables.append(Table(f"Files {state}", COLUMNS, timings.rows()))
        what = f"preload, files {state}"
        result.targets.append(
            target(what, "`torch.load` of the same files", timings.rate("ours"), timings.rate("torch"), 2.0)
        )
        if cold:
            limit = median([*probes, *(_probe(context) for _ in range(3))])
            result.targets.append(
                target(what, "the disk's sequential rate (near it)", timings.rate("ours"), limit, 0.9)
            )
            result.targets.append(
                target(
                    f"{what}, safetensors",
                    "the disk's sequential rate (near it)",
                    timings.rate("ours-safetensors"),
                    limit,
                    0.9,
                )
            )
            result.notes.append(f"The disk's sequential rate, own probe before and after: {limit / 1e9:.2f} GB/s.")
    result.notes.append(
        "All files of the dataset on both sides, each time in a new process. The ragged keyword ids become two tensors "
        "here and a list for each pair with `torch.load`."
    )
    return result


def _probe(context: Context) -> float:
    return context.disk_sequential(context.assets.path("jasper.pt") / "steering_residual.pt")
