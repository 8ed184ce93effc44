"""Seeds, changed seeds, and every input that ever failed, read again: opened or refused, nothing else, within limits."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest

from tests.fuzz.mutate import changed
from tests.fuzz.records import Counts, keep
from tests.fuzz.table import FAILED, TITLES, write
from tests.fuzz.targets import TARGETS

pytest.importorskip("resource", reason="limits of a child process are POSIX")
pytest.importorskip("pyarrow")

CHANGED = 200


def inputs(name: str) -> tuple[int, list[bytes]]:
    """How many seeds there are, and they, what failed before, and changed seeds."""
    target = TARGETS[name]
    seeds = target.seeds()
    rng = random.Random(0)
    failed = [path.read_bytes() for path in sorted((FAILED / name).glob("*.bin"))]
    more = [changed(rng.choice(seeds), rng, target.tokens, seeds)[: target.most] for _ in range(CHANGED)]
    return len(seeds), [*seeds, *failed, *more]


@pytest.mark.parametrize("library", [False, True])
def test_nothing_but_errors_of_the_tree(tmp_path: Path, library: bool) -> None:
    seeds = {}
    for name, target in TARGETS.items():
        if target.library is library:
            (tmp_path / name).mkdir()
            seeds[name], contents = inputs(name)
            for i, data in enumerate(contents):
                (tmp_path / name / f"{i:04}").write_bytes(data)
    # In a child, which a crash of a library or a limit may end.
    done = subprocess.run(
        [sys.executable, "-m", "tests.fuzz.replay", str(tmp_path)],
        check=False,
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, list[str]] = dict(map(json.loads, done.stdout.splitlines()))
    assert found.keys() == seeds.keys()
    for name, outcomes in found.items():
        assert len(outcomes) >= seeds[name] + CHANGED
        # Some seeds are refused, for a reason that others are not; many are opened, so that there is something to walk.
        assert outcomes[: seeds[name]].count("opened") > seeds[name] / 3, name


def test_every_failed_input_belongs_to_a_target() -> None:
    assert {path.parent.name for path in FAILED.glob("*/*.bin")} <= TARGETS.keys()


def test_the_table_has_a_row_for_each_target(tmp_path: Path) -> None:
    assert TITLES.keys() == TARGETS.keys()
    counts = Counts(tmp_path / "names.counts")
    counts.untraced = 1234
    counts.end()
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- fuzz:table -->\nold\n<!-- /fuzz -->\nafter\n")
    write(tmp_path, page)
    lines = page.read_text().splitlines()
    assert len(lines) == len(TARGETS) + 9
    assert lines[-5] == "| numbered file names | 0 | 1 234 | 0 | 2 |"
    assert lines[-4].startswith("| all | 0 | 1 234 | 0 | ")
    assert (lines[0], lines[-1]) == ("before", "after")


def test_counts_and_findings_outlive_a_process(tmp_path: Path) -> None:
    counts = Counts(tmp_path / "x.counts")
    counts.begin(b"first")
    counts.guided = False
    counts.begin(b"second")
    again = Counts(tmp_path / "x.counts")
    assert (again.traced, again.untraced, again.current()) == (1, 1, b"second")
    counts.end()
    assert not Counts(tmp_path / "x.counts").current()
    assert [keep(tmp_path / "found", bytes([i]), "ValueError x.py:1", "why") for i in range(5)] == [True] * 3 + [
        False
    ] * 2
    assert len(list((tmp_path / "found").glob("*.bin"))) == len(list((tmp_path / "found").glob("*.txt"))) == 3
