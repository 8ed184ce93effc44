"""The command line: run, render, restore, clean."""

from __future__ import annotations

import argparse
import signal
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from tools.bench import block_device, render, results
from tools.bench.assets import Assets
from tools.bench.measure import CASES, measure
from tools.bench.readers.registry import READERS
from tools.bench.settings import Settings, quick

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["main"]

DEFAULT_OUT = Path("docs/bench/measured.json")
OTHERS = (Path("docs/bench/gpu.json"),)
"""Measured elsewhere, by programs of their own."""
SIGNALS = (signal.SIGTERM, signal.SIGHUP)


def main(argv: Sequence[str] | None = None) -> int:
    """Parse and do; the exit status."""
    arguments = _parser().parse_args(argv)
    # An ordinary exception is what lets every `finally` put the machine back as it was.
    for number in SIGNALS:
        signal.signal(number, _stop)
    status: int = arguments.command(arguments)
    return status


def _stop(number: int, _frame: object) -> NoReturn:
    raise SystemExit(128 + number)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tools.bench", description=__doc__)
    parser.add_argument("--data-dir", type=Path, default=Settings.data_dir, help="generated data, kept between runs")
    parser.set_defaults(command=_all)
    commands = parser.add_subparsers(metavar="COMMAND", help="without one: run everything, then render")

    run = commands.add_parser("run", help="measure and write JSON")
    run.add_argument("--cases", default=",".join(CASES), help=f"comma-separated, of {', '.join(CASES)}")
    run.add_argument("--out", type=Path, default=DEFAULT_OUT, help="JSON file; cases measured before stay in it")
    run.add_argument("--quick", action="store_true", help="small data: shows that the harness works, no more")
    run.add_argument("--rows", type=int, help="rows of the row files")
    run.add_argument("--pairs", type=int, help="pairs of the generated dataset")
    run.add_argument("--generic-rows", type=int, help="rows of the generated embeddings and labels")
    run.add_argument("--seconds", type=float, help="bound on one reader's run")
    run.add_argument("--repeats", type=int)
    run.add_argument("--max-rows", type=int, help="rows that one reader reads at most")
    run.add_argument("--batches", type=_ints, help="batch sizes of the row readers, e.g. 256,2048")
    run.add_argument("--readers", type=_words, help=f"row readers beside our own, of {', '.join(READERS)}; default all")
    run.add_argument("--real-dir", type=Path, help="a real JASPER dataset in .pt files, measured beside the generated")
    run.add_argument("--convert-gb", type=_floats, help="sizes whose conversion's memory is measured, e.g. 1,4,16")
    run.add_argument("--sparse-gib", type=int, help="size of the sparse dataset that is opened")
    run.add_argument("--growth-pairs", type=_ints, help="sizes of the sparse datasets of the case growth")
    run.add_argument("--disk-budget", type=float, help="bytes of generated data at once, e.g. 12e9")
    run.add_argument("--no-fio", action="store_true", help="do not ask fio, though it is installed")
    run.set_defaults(command=_run)

    draw = commands.add_parser("render", help="write tables and plots into the documentation")
    draw.add_argument("json", type=Path, nargs="+", help="results; the cases of later files join those of the first")
    draw.add_argument(
        "--into",
        type=Path,
        nargs="*",
        help="Markdown files with markers (docs/performance.md, README.md, docs/index.md)",
    )
    draw.add_argument("--check", action="store_true", help="write nothing; status 1 if a file would change")
    draw.set_defaults(command=_render)

    commands.add_parser("restore", help="put back what a killed run left changed").set_defaults(command=_restore)
    commands.add_parser("clean", help="remove the generated data").set_defaults(command=_clean)
    return parser


def _ints(text: str) -> tuple[int, ...]:
    return tuple(int(float(part)) for part in text.split(","))


def _words(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(","))


def _floats(text: str) -> tuple[float, ...]:
    return tuple(float(part) for part in text.split(","))


def _settings(arguments: argparse.Namespace) -> Settings:
    settings = replace(Settings(), data_dir=arguments.data_dir.resolve())
    if arguments.quick:
        settings = quick(settings)
    names = (
        "rows",
        "pairs",
        "generic_rows",
        "seconds",
        "repeats",
        "max_rows",
        "batches",
        "real_dir",
        "convert_gb",
        "sparse_gib",
        "growth_pairs",
        "disk_budget",
        "readers",
    )
    given = {name: value for name in names if (value := getattr(arguments, name)) is not None}
    if "disk_budget" in given:
        given["disk_budget"] = int(given["disk_budget"])
    if "real_dir" in given:
        given["real_dir"] = given["real_dir"].resolve()
    return replace(settings, fio=not arguments.no_fio, **given)


def _all(arguments: argparse.Namespace) -> int:
    """What ``make bench`` does."""
    status = main(["--data-dir", str(arguments.data_dir), "run", "--out", str(DEFAULT_OUT)])
    return main(["render", *(str(path) for path in (DEFAULT_OUT, *OTHERS) if path.exists())]) or status


def _run(arguments: argparse.Namespace) -> int:
    names = [name.strip() for name in arguments.cases.split(",") if name.strip()]
    readers = arguments.readers or ()
    for kind, asked, known in (("case", names, CASES), ("reader", readers, tuple(READERS))):
        unknown = [name for name in asked if name not in known]
        if unknown:
            print(f"no such {kind}: {', '.join(unknown)}; there are {', '.join(known)}", file=sys.stderr)
            return 2
    return measure(_settings(arguments), names, arguments.out, quick=arguments.quick)


def _render(arguments: argparse.Namespace) -> int:
    document = results.joined([results.load(path) for path in arguments.json])
    pages = (Path("docs/performance.md"), Path("README.md"), Path("docs/index.md"))
    into = arguments.into or [path for path in pages if path.exists()]
    changed = [path for path in into if render.update(path, document, write=not arguments.check)]
    for path in changed:
        print(f"{path}: {'would change' if arguments.check else 'written'}")
    return 1 if arguments.check and changed else 0


def _restore(arguments: argparse.Namespace) -> int:
    print(block_device.restore(arguments.data_dir) or "nothing was left changed")
    return 0


def _clean(arguments: argparse.Namespace) -> int:
    if not arguments.data_dir.exists():
        print("nothing to remove")
        return 0
    block_device.restore(arguments.data_dir)
    freed = Assets(_only_place(arguments.data_dir)).clean()
    print(f"removed {freed / 1e9:.2f} GB")
    return 0


def _only_place(data_dir: Path) -> Settings:
    return replace(Settings(), data_dir=data_dir)
