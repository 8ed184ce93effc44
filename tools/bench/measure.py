"""A whole run: case after case, the JSON written after each, the machine put back at the end."""

from __future__ import annotations

import datetime as dt
import time
import traceback
from importlib import import_module
from typing import TYPE_CHECKING, Any

from tools.bench import block_device, machine, results
from tools.bench.context import Context
from tools.bench.readers.registry import READERS
from tools.bench.results import CaseResult
from tools.bench.stats import median

if TYPE_CHECKING:
    from pathlib import Path

    from tools.bench.settings import Settings

__all__ = ["CASES", "measure"]

# More than the kernel's own threads and the harness need beside a measurement.
BUSY = 0.15
OWN_SETTINGS = frozenset(
    {"readers", "convert_gb", "disk_budget", "generic_rows", "growth_pairs", "packed_pairs", "sparse_gib", "fio"}
)
# Row files first, datasets after them: the disk budget holds one kind at a time.
CASES = (
    "cold",
    "warm",
    "parts",
    "signal",
    "warmup",
    "loader",
    "hybrid",
    "block",
    "packed",
    "generic",
    "mixing",
    "preload",
    "sharing",
    "convert",
    "verify",
    "open",
    "growth",
)


def measure(settings: Settings, names: list[str], out: Path, *, quick: bool) -> int:
    """Run the cases and leave the document in ``out``; status 1 if one of them failed."""
    settings.data_dir.mkdir(parents=True, exist_ok=True)
    left = block_device.restore(settings.data_dir)
    if left:
        print(f"a killed run had left something changed: {left}")
    context = Context(settings, lambda text: print(text, flush=True))
    document = _begin(settings, out, quick=quick)
    context.measured = document["cases"]
    for name in names:
        case = _case(context, name)
        document["cases"][name] = case.to_dict()
        results.save(document, out)
        _tell(case)
    return 1 if any(document["cases"][name]["status"] == "failed" for name in names) else 0


def _begin(settings: Settings, out: Path, *, quick: bool) -> dict[str, Any]:
    """A new document, holding the cases of an earlier one with the same settings."""
    document: dict[str, Any] = {
        "schema": results.SCHEMA,
        "measured": dt.datetime.now(dt.timezone.utc).isoformat(timespec="seconds"),
        "quick": quick,
        "machine": machine.describe(settings.data_dir, {reader.dist for reader in READERS.values()}),
        "settings": results.plain(settings.to_dict()),
        "cases": {},
    }
    if out.exists():
        before = results.load(out)
        if _shared(before["settings"]) == _shared(document["settings"]):
            document["cases"] = before["cases"]
    return document


def _shared(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings that several cases depend on; the sizes that one case goes through stand in its own rows."""
    return {name: value for name, value in settings.items() if name not in OWN_SETTINGS}


def _case(context: Context, name: str) -> CaseResult:
    module = import_module(f"tools.bench.cases.{name}")
    context.say(f"{name}: {module.TITLE}")
    context.foreign.clear()
    begin = time.perf_counter()
    try:
        case: CaseResult = module.run(context)
    except Exception as exc:  # noqa: BLE001 - one case that fails must not cost the figures of the others
        traceback.print_exc()
        case = CaseResult(name, module.TITLE, status="failed", why=f"{type(exc).__name__}: {exc}")
    case.seconds = time.perf_counter() - begin
    if context.foreign:
        case.foreign = median(context.foreign)
        if case.foreign > BUSY:
            case.notes.append(
                f"**Other programs used {case.foreign:.0%} of the processors meanwhile: these figures are rough.**"
            )
    return case


def _tell(case: CaseResult) -> None:
    print(f"{case.name}: {case.status} {case.why} ({case.seconds:.0f} s)")
    for item in case.targets:
        found = "not measured" if item.ratio is None else f"{item.ratio:.2f}"
        sign = "at most" if item.at_most else "at least"
        verdict = {True: "met", False: "MISSED", None: ""}[item.met]
        print(f"  {item.what} / {item.against}: {found}, {sign} {item.target:g} {verdict}")
