"""The documents do what they say: their code runs, their output is real, their links lead somewhere."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from jasper_store.cli.demo import SAMPLE
from tests.docs.pages import ROOT, blocks, commands, comparable, links, pages, run_block

PAGES = [str(page.relative_to(ROOT)) for page in pages()]


@pytest.fixture
def beside_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory as a reader has it: a PT dataset at data/."""
    shutil.copytree(SAMPLE, tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", PAGES)
def test_the_code_of_a_page_runs(name: str, beside_data: Path) -> None:
    page = ROOT / name
    shared: dict[str, Any] = {"__name__": page.stem}
    for block in blocks(page):
        if block.runs:
            run_block(block, shared)


@pytest.mark.parametrize("name", PAGES)
def test_the_links_of_a_page_lead_somewhere(name: str) -> None:
    page = ROOT / name
    for target in links(page):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, fragment = target.partition("#")
        there = page if not path else page.parent / path
        assert there.exists(), f"{name}: {target} leads nowhere"
        if name.startswith("docs/"):
            assert ROOT / "docs" in there.resolve().parents, f"{name}: {target} is not part of the site"
        if there.suffix == ".png":
            assert fragment in {"", "only-light", "only-dark"}, f"{name}: {target} is shown by no scheme of colours"
        elif fragment:
            headings = re.findall(r"^#+ (.*)$", there.read_text(encoding="utf-8"), re.MULTILINE)
            assert fragment in {_slug(heading) for heading in headings}, f"{name}: no heading for {target}"


def _slug(heading: str) -> str:
    kept = re.sub(r"[^\w\s-]", "", heading.lower())
    return re.sub(r"[\s]+", "-", kept.strip())


def test_every_page_is_in_the_navigation() -> None:
    text = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    listed = set(re.findall(r"[\w/-]+\.md", text[text.index("nav:") :]))
    assert listed == {str(page.relative_to(ROOT / "docs")) for page in pages() if page.name != "README.md"}


def test_a_page_that_shows_other_output_is_found(tmp_path: Path, beside_data: Path) -> None:
    page = ROOT / "docs" / "cli.md"
    block = next(block for block in blocks(page) if block.language == "console" and block.runs)
    assert commands(block)
    changed = type(block)(**{**vars(block), "text": block.text + "this is never printed\n"})
    with pytest.raises(AssertionError, match="this is never printed"):
        run_block(changed, {})


def test_what_is_compared() -> None:
    assert comparable("a  1.50 GiB  ---\n->  b: 3 B\n...\n") == {"a # #", "b: # #"}
