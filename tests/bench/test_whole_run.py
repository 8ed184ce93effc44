"""A whole run, small: measured in children, written as JSON, drawn into a page."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from tools.bench import cli, results

PAGE = "# Page\n\n<!-- bench:machine -->\n<!-- /bench -->\n\n<!-- bench:open -->\n<!-- /bench -->\n"


@pytest.fixture(autouse=True)
def _signals_put_back() -> object:
    before = {number: signal.getsignal(number) for number in cli.SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("cases", ["loader", "generic", "convert,verify,open,growth,mixing"])
def test_a_quick_run_and_its_page(cases: str, tmp_path: Path) -> None:
    out, page = tmp_path / "run.json", tmp_path / "page.md"
    page.write_text(PAGE)
    data = ["--data-dir", str(tmp_path / "data")]
    sizes = ["--rows", "20000", "--pairs", "2000", "--generic-rows", "4000", "--seconds", "0.1", "--sparse-gib", "1"]
    sizes += ["--growth-pairs", "2e3,4e3", "--batches", "256"]
    assert cli.main([*data, "run", "--quick", "--no-fio", "--cases", cases, *sizes, "--out", str(out)]) == 0
    document = results.load(out)
    assert document["quick"] is True
    for name, case in document["cases"].items():
        assert case["status"] == "measured", name
        failed = [row["why"] for table in case["tables"] for row in table["rows"] if row.get("why")]
        assert not failed, name
    for name in {"loader", "generic"} & document["cases"].keys():
        said = [note for note in document["cases"][name]["notes"] if "bit-equal" in note]
        assert said
        assert all("bit-equal: {'equal': True" in note for note in said)
    assert cli.main(["render", str(out), "--into", str(page), "--check"]) == 1
    assert cli.main(["render", str(out), "--into", str(page)]) == 0
    assert cli.main(["render", str(out), "--into", str(page), "--check"]) == 0
    assert " cores, " in page.read_text()
    assert ("`js.open`, second process" in page.read_text()) == ("open" in cases)
    assert cli.main([*data, "clean"]) == 0


@pytest.mark.slow
def test_a_case_that_fails_costs_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: object) -> None:
        raise RuntimeError("no such disk")

    monkeypatch.setattr("tools.bench.cases.open.run", fail)
    out = tmp_path / "run.json"
    data = ["--data-dir", str(tmp_path / "data")]
    status = cli.main([*data, "run", "--quick", "--rows", "5000", "--cases", "open,mixing", "--out", str(out)])
    assert status == 1
    cases = results.load(out)["cases"]
    assert cases["open"]["why"] == "RuntimeError: no such disk"
    assert cases["mixing"]["status"] == "measured"
