"""Find phrases that this project does not use: ``python -m tools.prose``, part of ``make check``.

The phrases are data, in ``tools/prose.txt``. They are looked for in the prose of the pages (``README.md``,
``CONTRIBUTING.md``, ``docs/``) and in the docstrings and comments of ``jasper_store/``, across line ends. Code is left
out: fenced blocks, inline code, cross-references, and what the benchmark renders between two markers.
"""

from __future__ import annotations

import ast
import io
import re
import sys
import tokenize
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

__all__ = ["Finding", "Rule", "check", "main", "read_rules", "sources"]

ROOT = Path(__file__).resolve().parent.parent
RULES = Path(__file__).with_suffix(".txt")
SECTIONS = ("everywhere", "docs", "names")

# Stands for each character that is no prose. It is no whitespace, so no phrase matches across it.
_CODE = "|"
_MARKDOWN = (
    re.compile(r"<!-- (?P<what>bench|large)\b[^\n]*-->.*?<!-- /(?P=what) -->", re.DOTALL),
    re.compile(r"^(?P<indent> *)(?P<fence>```+|~~~+).*?^(?P=indent)(?P=fence)[ ]*$", re.DOTALL | re.MULTILINE),
    re.compile(r"<!--.*?-->", re.DOTALL),
    re.compile(r"`[^`\n]+`"),
    re.compile(r"(?<=\])\([^)\s]+\)"),
)
_INLINE = (re.compile(r"``.+?``", re.DOTALL), re.compile(r":\w+:`[^`]+`"), re.compile(r"`[^`\n]+`"))
_C_COMMENT = re.compile(r"/\*(.*?)\*/|//([^\n]*)", re.DOTALL)


@dataclass(frozen=True)
class Rule:
    """One line of the list.

    Attributes:
        section: one of :data:`SECTIONS`.
        pattern: what is looked for; in ``names`` a whole identifier, elsewhere words, whatever their case.
        advice: what to write instead.
    """

    section: str
    pattern: re.Pattern[str]
    advice: str


@dataclass(frozen=True)
class Finding:
    """A phrase, where it stands, and what to write instead."""

    path: Path
    line: int
    phrase: str
    advice: str


def read_rules(text: str) -> list[Rule]:
    """The rules of a list: sections in brackets, then ``regular expression -> advice`` a line; # begins a comment.

    Raises:
        ValueError: a line is of no section, lacks its advice, or its expression does not compile; the message names it.
    """
    rules: list[Rule] = []
    section = ""
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip() or line.startswith("#"):
            continue
        if line.strip("[]") in SECTIONS and line.startswith("["):
            section = line.strip("[]")
            continue
        phrase, arrow, advice = (part.strip() for part in line.partition(" -> "))
        if not section or not arrow or not phrase or not advice:
            raise ValueError(f"line {number}: expected [{'], ['.join(SECTIONS)}] or PHRASE -> ADVICE, found {line!r}")
        spaced = phrase if section == "names" else r"\b(?:" + phrase.replace(" ", r"\s+") + r")\b"
        try:
            pattern = re.compile(spaced, 0 if section == "names" else re.IGNORECASE)
        except re.error as exc:
            raise ValueError(f"line {number}: expected a regular expression, found {phrase!r}: {exc}") from exc
        rules.append(Rule(section, pattern, advice))
    return rules


def sources(root: Path = ROOT) -> Iterator[Path]:
    """The files that are read: pages, then modules, then C sources."""
    yield from (root / name for name in ("README.md", "CONTRIBUTING.md") if (root / name).is_file())
    yield from sorted((root / "docs").rglob("*.md"))
    for suffix in ("py", "c", "h"):
        yield from sorted((root / "jasper_store").rglob(f"*.{suffix}"))


def check(path: Path, rules: Iterable[Rule]) -> list[Finding]:
    """Every banned phrase of a file, in the order of the rules.

    Raises:
        SyntaxError: a Python file that does not parse.
    """
    text = path.read_text(encoding="utf-8")
    page = path.suffix == ".md"
    prose = _READERS[path.suffix](text)
    found: list[Finding] = []
    for rule in rules:
        if rule.section == "names":
            found += _names(path, text, rule)
        elif rule.section == "everywhere" or page:
            for match in rule.pattern.finditer(prose):
                line = prose.count("\n", 0, match.start()) + 1
                found.append(Finding(path, line, " ".join(match[0].split()), rule.advice))
    return found


def _names(path: Path, text: str, rule: Rule) -> Iterator[Finding]:
    """Identifiers of Python code that the project has renamed."""
    if path.suffix != ".py" or not rule.pattern.search(text):
        return
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.NAME and rule.pattern.fullmatch(token.string):
            yield Finding(path, token.start[0], token.string, rule.advice)


def _hidden(text: str) -> str:
    return re.sub(r"\S", _CODE, text)


def _without(text: str, patterns: Iterable[re.Pattern[str]]) -> str:
    for pattern in patterns:
        text = pattern.sub(lambda match: _hidden(match[0]), text)
    return text


def _markdown(text: str) -> str:
    return _without(text, _MARKDOWN)


def _python(text: str) -> str:
    """The docstrings (also those below an attribute) and comments, each at its line."""
    lines = text.splitlines(keepends=True)
    shown = [_hidden(line) for line in lines]
    for node in ast.walk(ast.parse(text)):
        value = node.value if isinstance(node, ast.Expr) else None
        if isinstance(value, ast.Constant) and isinstance(value.value, str) and value.end_lineno is not None:
            shown[value.lineno - 1 : value.end_lineno] = lines[value.lineno - 1 : value.end_lineno]
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            row, column = token.start
            shown[row - 1] = shown[row - 1][:column] + token.string.replace("#", " ") + "\n"
    return _without("".join(shown), _INLINE)


def _c(text: str) -> str:
    shown, end = "", 0
    for match in _C_COMMENT.finditer(text):
        words = re.sub(r"^( *)\*", r"\1 ", match[1] or match[2] or "", flags=re.MULTILINE)
        shown += _hidden(text[end : match.start()]) + f"{_CODE} {words} {_CODE}"
        end = match.end()
    return _without(shown + _hidden(text[end:]), _INLINE)


_READERS: dict[str, Callable[[str], str]] = {".md": _markdown, ".py": _python, ".c": _c, ".h": _c}


def main(root: Path = ROOT) -> int:
    """Print what was found in the repository; 1 if there was anything."""
    rules = read_rules(RULES.read_text(encoding="utf-8"))
    found = [finding for path in sources(root) for finding in check(path, rules)]
    for finding in found:
        print(f"{finding.path.relative_to(root)}:{finding.line}: {finding.phrase!r}: write {finding.advice}")
    if found:
        print(f"{len(found)} phrases to write again; the list is {RULES.relative_to(ROOT)}")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
