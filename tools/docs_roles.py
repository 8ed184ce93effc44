"""Take reStructuredText out of the API page: a hook of mkdocs (``hooks`` in ``mkdocs.yml``).

Docstrings name other objects by Sphinx's roles, ``:class:`Dataset```, which Python tools understand. mkdocstrings reads
docstrings as Markdown and would print a role as it stands. This hook replaces each role in a finished page: by a link to
the object's entry where the page has one, else by its name as code. The two colons before a block of code become one.
"""

from __future__ import annotations

import re
from typing import Any

__all__ = ["on_page_content", "without_roles"]

_ROLE = re.compile(r":(?:py:)?[a-z]+:<code>(?P<name>~?[^<]+)</code>")
_LONE_COLONS = re.compile(r"<p>::</p>\s*(?=<(?:pre|div))")
_COLONS = re.compile(r"::</p>(?=\s*<(?:pre|div))")
_ID = re.compile(r'\bid="(?P<id>[A-Za-z_][\w.]*)"')


def on_page_content(html: str, **_: Any) -> str:
    """Called by mkdocs with the content of each page."""
    return _COLONS.sub(":</p>", _LONE_COLONS.sub("", without_roles(html)))


def without_roles(html: str) -> str:
    """The content of a page with links, or plain names, for its roles."""
    entries = [(match.start(), match["id"]) for match in _ID.finditer(html)]
    known = {name for _, name in entries}

    def replace(match: re.Match[str]) -> str:
        name = match["name"]
        # The heading of the object whose docstring this is; names are relative to it, as in Python.
        inside = next((entry for at, entry in reversed(entries) if at < match.start() and "." in entry), "")
        target = _target(name.lstrip("~"), inside, known)
        shown = name.rpartition(".")[2] if name.startswith("~") else name
        return f'<a href="#{target}"><code>{shown}</code></a>' if target else f"<code>{shown}</code>"

    return _ROLE.sub(replace, html)


def _target(name: str, inside: str, known: set[str]) -> str:
    """The entry that a name means, seen from within another one; empty if the page has none, or several."""
    if name in known:
        return name
    while inside:
        if f"{inside}.{name}" in known:
            return f"{inside}.{name}"
        inside = inside.rpartition(".")[0]
    last = name.rpartition(".")[2]
    similar = sorted(entry for entry in known if entry.endswith(f".{last}"))
    return similar[0] if len(similar) == 1 else ""
