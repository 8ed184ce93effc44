"""Statistics, the JSON document, and the Markdown that is made of it."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from tools.bench import render, results
from tools.bench.results import CaseResult, Column, Table
from tools.bench.stats import median, ratio, spread


def make_document(**cases: CaseResult) -> dict[str, Any]:
    machine = {
        "system": "Linux 6.1",
        "processor": "a processor",
        "cores": 2,
        "memory": 24 * 10**9,
        "file_system": "ext4",
        "disk": "vda",
        "read_ahead_kib": 128,
        "python": "3.11.7",
        "versions": {"torch": "2.13.0"},
        "load_before": 0.1,
    }
    return {
        "schema": results.SCHEMA,
        "measured": "2026-11-22T10:00:00+00:00",
        "quick": False,
        "machine": machine,
        "settings": {},
        "cases": {name: case.to_dict() for name, case in cases.items()},
    }


def cold_case() -> CaseResult:
    columns = (Column("label", "reader"), Column("batch", "batch", "int"), Column("rows_per_s", "rows/s", "rate"))
    rows: list[dict[str, Any]] = [
        {"key": "ours", "label": "**jasper_store**", "batch": 256, "rows_per_s": 108_110.4, "read_ahead_kib": 128},
        {"key": "numpy", "label": "`np.memmap`", "batch": 256, "rows_per_s": 7_671.0, "read_ahead_kib": 128},
        {"key": "lance", "label": "Lance", "why": "not installed"},
    ]
    met = results.target("cold rows", "the disk", 108_110.4, 110_000.0, 0.9)
    missed = results.target("cold rows", "Lance", 50_000.0, 48_000.0, 2.0)
    unknown = results.target("size", "h5py", None, 3.0, 1.0, at_most=True)
    return CaseResult("cold", "Cold", tables=[Table("Readers", columns, rows)], targets=[met, missed, unknown])


def test_statistics() -> None:
    assert median([3.0, 1.0, 2.0]) == 2.0
    assert math.isnan(median([]))
    assert spread([90.0, 100.0, 110.0]) == pytest.approx(0.1)
    assert spread([5.0]) == 0.0
    assert ratio(3.0, 2.0) == 1.5
    assert ratio(None, 2.0) is None
    assert ratio(1.0, 0.0) is None
    assert ratio(1.0, math.nan) is None


def test_targets_are_judged_both_ways() -> None:
    assert results.target("a", "b", 9.0, 10.0, 0.9).met is True
    assert results.target("a", "b", 8.9, 10.0, 0.9).met is False
    assert results.target("a", "b", 0.04, 0.05, 1.0, at_most=True).met is True
    assert results.target("a", "b", 0.06, 0.05, 1.0, at_most=True).met is False
    assert results.target("a", "b", None, 0.05, 1.0).met is None


def test_document_survives_the_file(tmp_path: Path) -> None:
    case = cold_case()
    case.tables[0].rows.append({"label": "broken", "rows_per_s": math.nan, "why": "failed"})
    document = make_document(cold=case)
    path = tmp_path / "deep" / "run.json"
    results.save(document, path)
    assert results.load(path)["cases"]["cold"]["tables"][0]["rows"][-1]["rows_per_s"] is None
    assert [item.name for item in path.parent.iterdir()] == ["run.json"]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"schema": 99}, "run the benchmark again"),
        ({"cases": []}, "cases is not an object"),
        ({"cases": {"cold": {"title": "t"}}}, "status is missing"),
    ],
)
def test_a_strange_document_is_refused_with_reasons(change: dict[str, Any], says: str, tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    path.write_text(json.dumps(make_document() | change))
    with pytest.raises(ValueError, match=says):
        results.load(path)


def test_a_case_without_figures_must_say_why() -> None:
    document = make_document(cold=CaseResult("cold", "Cold", status="skipped"))
    assert results.check(document) == ["cold: says neither figures nor why there are none"]


def test_unknown_column_kinds_and_cut_targets_are_found() -> None:
    document = make_document(cold=cold_case())
    document["cases"]["cold"]["tables"][0]["columns"][0]["kind"] = "parsecs"
    del document["cases"]["cold"]["targets"][0]["ratio"]
    assert [problem.partition(": ")[2] for problem in results.check(document)] == [
        "column 'label' has the unknown kind 'parsecs'",
        "target 'cold rows' is incomplete",
    ]


@pytest.mark.parametrize(
    ("value", "kind", "text"),
    [
        (None, "rate", "\u2013"),
        (108_110.4, "rate", "108\u202f110"),
        (99.94, "rate", "99.9"),
        (1_234, "int", "1\u202f234"),
        (0.987, "ratio", "0.99"),
        (512.3, "ratio", "512"),
        (3_072_000_000, "bytes", "3.07 GB"),
        (196_000_000, "bytes", "196 MB"),
        (12, "bytes", "12 B"),
        (2.0e9, "bytes_per_s", "2.00 GB/s"),
        (0.051, "percent", "5%"),
        (1.3, "us", "1.30 µs"),
    ],
)
def test_values_as_people_read_them(value: Any, kind: str, text: str) -> None:
    assert render.written(value, kind) == text


def test_tables_and_targets_in_markdown() -> None:
    text = render.section("cold", make_document(cold=cold_case()), Path("performance.md"))
    lines = text.splitlines()
    assert lines[2:5] == [
        "| reader | batch | rows/s |",
        "| --- | ---: | ---: |",
        "| **jasper_store** | 256 | 108\u202f110 |",
    ]
    assert "| Lance | *not installed* | \u2013 |" in lines
    assert "| cold rows | the disk | 0.98 | ≥ 0.9 | met |" in lines
    assert "| cold rows | Lance | 1.04 | ≥ 2 | **missed** |" in lines
    assert "| size | h5py | \u2013 | ≤ 1 | not measured |" in lines


def test_markers_are_filled_and_the_rest_is_kept(tmp_path: Path) -> None:
    page = tmp_path / "performance.md"
    before = (
        "# Title\n\n<!-- bench:cold -->\nformer\n<!-- /bench -->\nprose\n<!-- bench:warm -->\nkept\n<!-- /bench -->\n"
    )
    page.write_text(before)
    document = make_document(cold=cold_case())
    assert render.update(page, document, write=False)
    assert page.read_text() == before
    assert render.update(page, document)
    after = page.read_text()
    assert after.startswith("# Title\n")
    assert "former" not in after
    assert "prose\n<!-- bench:warm -->\nkept\n" in after
    assert not render.update(page, document), "filling a second time changes nothing"


def test_headline_and_machine() -> None:
    document = make_document(cold=cold_case())
    text = render.section("headline", document, Path("README.md"))
    assert "| reader | cold, read-ahead 128 KiB | warm |" in text
    assert "| **jasper_store** | 108\u202f110 | \u2013 |" in text
    assert "2 cores" in render.section("machine", document, Path("README.md"))
    document["quick"] = True
    assert "no speed" in render.section("machine", document, Path("README.md"))


def test_cases_of_other_machines_join_in() -> None:
    first, other = make_document(cold=cold_case()), make_document(gpu=cold_case())
    other["machine"] = {}
    joined = results.joined([first, other])
    assert list(joined["cases"]) == ["cold", "gpu"]
    assert joined["machine"] == first["machine"]
    assert list(first["cases"]) == ["cold"]


def test_an_unknown_marker_is_an_error() -> None:
    with pytest.raises(ValueError, match="means nothing"):
        render.section("nothing:here", make_document(), Path("README.md"))


def test_failed_cases_say_so() -> None:
    case = CaseResult("cold", "Cold", status="failed", why="no disk")
    assert render.section("cold", make_document(cold=case), Path("x.md")) == "*failed: no disk*"
