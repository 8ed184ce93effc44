"""What the documents hold: fenced blocks and links, and how a block is run."""

from __future__ import annotations

import io
import re
import shlex
from collections.abc import Iterator
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from typer.testing import CliRunner

from jasper_store.cli.app import app

__all__ = ["ROOT", "Block", "blocks", "commands", "comparable", "links", "pages", "run_block"]

ROOT = Path(__file__).parents[2]

_FENCE = re.compile(r"^(?P<fence>```+)(?P<info>[^\n`]*)\n(?P<text>.*?)^(?P=fence)\s*$", re.DOTALL | re.MULTILINE)
_MARK = re.compile(r"<!-- (?P<mark>run|no-run)(?: exit=(?P<code>\d+))? -->\s*\Z")
_LINK = re.compile(r"(?<!!)\[[^\]\n]+\]\((?P<target>[^)\s]+)\)|!\[[^\]\n]*\]\((?P<picture>[^)\s]+)\)")
_NUMBER = re.compile(r"\d[\d.,]*|\b(?:[KMGT]i)?B\b")
_RULES = re.compile(r"[─═█·▏▎▍▌▋▊▉-]{2,}|->")


@dataclass(frozen=True)
class Block:
    """One fenced block.

    Attributes:
        page: the file, relative to the root.
        line: number of its first line.
        language: the first word behind the fence.
        text: what stands in it.
        runs: whether it is to be run.
        code: exit status expected of its last command.
    """

    page: str
    line: int
    language: str
    text: str
    runs: bool
    code: int


def pages() -> list[Path]:
    """The README, and all pages of the site."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def blocks(page: Path) -> Iterator[Block]:
    """The fenced blocks of a page that may be run."""
    source = page.read_text(encoding="utf-8")
    for found in _FENCE.finditer(source):
        language = found["info"].strip().split(" ")[0]
        if language not in {"python", "sh", "console"}:
            continue
        mark = _MARK.search(source[: found.start()])
        # A block with a title is a file that the reader saves, not a step that he takes.
        runs = mark["mark"] == "run" if mark else language == "python" and "title=" not in found["info"]
        code = int(mark["code"] or 0) if mark else 0
        line = source.count("\n", 0, found.start()) + 2
        yield Block(str(page.relative_to(ROOT)), line, language, found["text"], runs, code)


def links(page: Path) -> Iterator[str]:
    """Targets of the links and pictures of a page, outside of its code."""
    source = re.sub(r"`[^`\n]+`", "", _FENCE.sub("", page.read_text(encoding="utf-8")))
    for found in _LINK.finditer(source):
        yield found["target"] or found["picture"]


def commands(block: Block) -> list[str]:
    """The commands of a shell block; in a console block the lines behind a dollar sign."""
    lines = block.text.replace("\\\n", " ").splitlines()
    if block.language == "console":
        lines = [line[2:] for line in lines if line.startswith("$ ")]
    return [line for line in (line.split("  #")[0].strip() for line in lines) if line and not line.startswith("#")]


def comparable(text: str) -> set[str]:
    """Lines of output without what differs from machine to machine: numbers, units, rules, widths."""
    lines = (_RULES.sub(" ", _NUMBER.sub("#", line)) for line in text.splitlines())
    return {" ".join(line.split()) for line in lines} - {"", "..."}


def run_block(block: Block, names: dict[str, Any]) -> None:
    """Run a block in the current directory; python blocks share ``names``.

    Raises:
        AssertionError: a command ended otherwise than it should, or printed something else than the page shows.
    """
    if block.language == "python":
        with redirect_stdout(io.StringIO()):
            exec(compile("\n" * (block.line - 1) + block.text, block.page, "exec"), names)
        return
    printed = ""
    todo = commands(block)
    for number, command in enumerate(todo):
        program, *arguments = shlex.split(command)
        assert program == "jasper-store", f"{block.page}:{block.line}: only jasper-store is run here, not {program!r}"
        result = CliRunner().invoke(app, arguments)
        expected = block.code if number == len(todo) - 1 else 0
        assert result.exit_code == expected, f"{block.page}:{block.line}: {command}\n{result.output}"
        printed += result.output
    if block.language == "console":
        shown = "\n".join(line for line in block.text.splitlines() if not line.startswith("$ "))
        missing = comparable(shown) - comparable(printed)
        assert not missing, f"{block.page}:{block.line}: not in the real output:\n" + "\n".join(sorted(missing))
