"""The list of phrases: planted ones are found where people read, with their line, and code is left alone."""

from __future__ import annotations

from pathlib import Path

import pytest

from tools.prose import RULES, Finding, Rule, check, main, read_rules, sources

# The left column of the project's list of sentences to write again, and the words that it bans by name.
BANNED = [
    "Let go of what the present place is done with, have read what it comes to, and wait for what it needs.",
    "up to as far into the next window as place is in its own",
    "Calls without a row of a tensor, after which it has no say in whether to prefetch.",
    "each by rows that the one before it found: one call a batch",
    "lie one behind the other, so that one index reaches all",
    "A step of the work on the side that was begun first, and of what may go on beside it.",
    "Read what a read in the queue left over.",
    "Nobody else has this one, so it goes when the storage does.",
    "a run that believes to be alone would serve everything on every rank",
    "what the run has had is a beginning of the epoch, and one number says where it stands",
    "later ones take that as read",
    "it shows that the harness works, and no speed",
    "warnings are things you may want",
    "options that cannot hold together",
    "in memory of one's own",
    "whoever reads the file",
    "somebody has to wait",
    "a thread who waits",
]


@pytest.fixture(scope="module")
def rules() -> list[Rule]:
    return read_rules(RULES.read_text(encoding="utf-8"))


def found(rules: list[Rule], path: Path, text: str) -> list[Finding]:
    path.write_text(text, encoding="utf-8")
    return check(path, rules)


@pytest.mark.parametrize("phrase", BANNED)
def test_a_planted_phrase_is_found_on_a_page(rules: list[Rule], tmp_path: Path, phrase: str) -> None:
    assert not found(rules, tmp_path / "page.md", "# A page\n\nRows are read.\n")
    lines = {one.line for one in found(rules, tmp_path / "page.md", f"# A page\n\n{phrase}\n")}
    assert lines == {3}


@pytest.mark.parametrize("phrase", BANNED)
def test_a_planted_phrase_is_found_in_a_docstring(rules: list[Rule], tmp_path: Path, phrase: str) -> None:
    lines = {one.line for one in found(rules, tmp_path / "module.py", f'"""Read rows.\n\n{phrase}\n"""\n')}
    assert lines == {3}


def test_a_phrase_is_found_across_lines(rules: list[Rule], tmp_path: Path) -> None:
    wrapped = "def f():\n    # These cannot hold\n    # together.\n    pass\n"
    assert [one.line for one in found(rules, tmp_path / "module.py", wrapped)] == [2]
    assert [one.line for one in found(rules, tmp_path / "page.md", "a\nThese cannot\nhold together.\n")] == [2]
    comment = "int f(void); /* What the reader\n * hands\n * back. */\n"
    assert [one.line for one in found(rules, tmp_path / "rows.c", comment)] == [2]


def test_a_docstring_of_an_attribute_is_read(rules: list[Rule], tmp_path: Path) -> None:
    assert found(rules, tmp_path / "module.py", 'X = 1\n"""Whoever reads it."""\n')


def test_code_is_left_alone(rules: list[Rule], tmp_path: Path) -> None:
    page = "Call `whoever()`.\n\n```python\nwhoever = nobody\n```\n\n- a\n\n    ```sh\n    whoever\n    ```\n\n[a](nobody.md)\n"
    assert not found(rules, tmp_path / "page.md", page)
    assert not found(rules, tmp_path / "page.md", "<!-- bench:signal -->\nannounced by whoever\n<!-- /bench -->\n")
    module = '"""Calls ``whoever`` and :func:`nobody`."""\nwhoever = "nobody"\n'
    assert not found(rules, tmp_path / "module.py", module)
    assert not found(rules, tmp_path / "rows.c", 'char *whoever = "nobody";\n')


def test_some_rules_are_for_pages_alone(tmp_path: Path) -> None:
    rules = read_rules("[docs]\nfor ever -> without end\n")
    assert found(rules, tmp_path / "page.md", "It waits for ever.\n")
    assert not found(rules, tmp_path / "module.py", '"""It waits for ever."""\n')


def test_a_name_that_was_renamed_is_found_in_code(rules: list[Rule], tmp_path: Path) -> None:
    (one,) = found(rules, tmp_path / "module.py", '"""A module."""\n\nfrom there import LookAhead\n')
    assert (one.line, one.phrase, one.advice) == (3, "LookAhead", "Prefetcher")
    assert not found(rules, tmp_path / "module.py", '"""A module."""\n\nLookAheadOfTime = 1\n')


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("a -> b", "line 1: expected"),
        ("[docs]\n\nno arrow", "line 3"),
        ("[docs]\n(a -> b", "line 2: .* regular expression"),
    ],
)
def test_a_rule_that_is_none_is_named(text: str, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        read_rules(text)


def test_the_command_prints_and_fails(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "jasper_store").mkdir()
    (tmp_path / "docs").mkdir()
    (tmp_path / "README.md").write_text("Rows are read.\n", encoding="utf-8")
    (tmp_path / "jasper_store" / "rows.c").write_text("/* Reads rows. */\n", encoding="utf-8")
    assert main(tmp_path) == 0
    assert capsys.readouterr().out == ""
    (tmp_path / "docs" / "page.md").write_text("Options that\ncan not hold together.\n", encoding="utf-8")
    assert main(tmp_path) == 1
    assert capsys.readouterr().out.startswith(
        "docs/page.md:2: 'can not hold together': write are incompatible\n1 phrase"
    )


def test_every_page_and_module_is_read() -> None:
    names = {path.name for path in sources()}
    assert {"README.md", "CONTRIBUTING.md", "index.md", "errors.py", "rows.c", "helpers.h"} <= names
