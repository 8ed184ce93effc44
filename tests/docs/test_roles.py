"""The API page: cross-references of docstrings become links or names, none is printed as it stands."""

from __future__ import annotations

import re
from pathlib import Path

from tests.docs.pages import ROOT
from tools.docs_roles import on_page_content, without_roles

PAGE = (
    '<h2 id="jasper_store.Dataset"></h2><p>See :meth:<code>close</code>.</p>'
    '<h3 id="jasper_store.Dataset.close"></h3><p>Not :func:<code>~jasper_store.store.build</code>.</p>'
    '<h2 id="jasper_store.TensorStore"></h2>'
    '<h3 id="jasper_store.TensorStore.close"></h3><p>As :meth:<code>close</code>; :class:<code>Dataset</code>.</p>'
)


def test_a_name_is_looked_up_from_where_it_stands() -> None:
    first, second = re.findall(r'<a href="#([\w.]+)"><code>close</code></a>', without_roles(PAGE))
    assert (first, second) == ("jasper_store.Dataset.close", "jasper_store.TensorStore.close")
    assert '<a href="#jasper_store.Dataset"><code>Dataset</code></a>' in without_roles(PAGE)


def test_what_the_page_does_not_have_is_a_name() -> None:
    assert "<p>Not <code>build</code>.</p>" in without_roles(PAGE)


def test_two_objects_of_one_name_are_not_guessed() -> None:
    page = '<h2 id="a.X.close"></h2><h2 id="a.Y.close"></h2><h2 id="b.z"></h2><p>:meth:<code>close</code></p>'
    assert without_roles(page).endswith("<p><code>close</code></p>")


def test_no_role_is_left_and_code_is_kept() -> None:
    assert ":meth:" not in on_page_content(PAGE, page=None, config=None, files=None)
    block = "<pre><code>x = {1:2}\n</code></pre><p>12:30:<code>a</code></p>"
    assert without_roles(block) == block


def test_two_colons_before_code_are_one() -> None:
    page = "<p>Its loaders::</p>\n<pre><code>x::</code></pre>\n<p>::</p>\n<div class='highlight'></div><p>a::</p>"
    made = "<p>Its loaders:</p>\n<pre><code>x::</code></pre>\n<div class='highlight'></div><p>a::</p>"
    assert on_page_content(page) == made


def test_every_role_in_a_docstring_has_the_form_that_is_replaced() -> None:
    for path in Path(ROOT / "jasper_store").rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        opened = len(re.findall(r"(?<![\w`]):[a-z]+:`", text))
        assert opened == len(re.findall(r":[a-z]+:`~?[\w.]+`", text)), path


def test_the_site_uses_the_hook() -> None:
    assert "tools/docs_roles.py" in (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
