"""Makes the README of a package, and its links.

Links and pictures of the README are relative in the repository, and PyPI cannot follow those.
``[tool.hatch.metadata.hooks.custom]`` in ``pyproject.toml`` names the repository's address. Links become absolute, to the
tag of the version that is built. Without an address they become plain text and pictures are left out, so that no link is
broken, and the package has no links of its own.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from hatchling.metadata.plugin.interface import MetadataHookInterface

_PICTURE = re.compile(r"!\[(?P<text>[^\]\n]*)\]\((?P<target>(?![a-z]+:|#)[^)\s]+)\)\n?")
_LINK = re.compile(r"(?<!!)\[(?P<text>[^\]\n]+)\]\((?P<target>(?![a-z]+:|#)[^)\s]+)\)")
_MARK = re.compile(r"<!--.*?-->\n?", re.DOTALL)


class ReadmeHook(MetadataHookInterface):
    """Gives ``project.readme`` and ``project.urls``, which are dynamic."""

    PLUGIN_NAME = "custom"

    def update(self, metadata: dict[str, Any]) -> None:
        """Called by hatchling with the metadata of the project."""
        text = Path(self.root, "README.md").read_text(encoding="utf-8")
        version = re.search(r'__version__ = "(.+)"', Path(self.root, "jasper_store", "__init__.py").read_text("utf-8"))
        address = str(self.config.get("repository", ""))
        metadata["urls"] = links(address)
        metadata["readme"] = {
            "content-type": "text/markdown",
            "text": absolute(text, address, f"v{version[1]}" if version else "main"),
        }


def links(repository: str) -> dict[str, str]:
    """The package's links at a repository, by their labels; none without an address."""
    if not repository:
        return {}
    base = repository.rstrip("/")
    return {
        "Repository": base,
        "Documentation": f"{base}/blob/main/docs/index.md",
        "Changelog": f"{base}/blob/main/CHANGELOG.md",
        "Issues": f"{base}/issues",
        "Security": f"{base}/blob/main/SECURITY.md",
    }


def absolute(text: str, repository: str, tag: str) -> str:
    """A README with absolute links to a tag of a repository, such as ``https://github.com/owner/name``; or with none."""
    text = _MARK.sub("", text)
    if not repository:
        return _LINK.sub(lambda match: match["text"], _PICTURE.sub("", text))
    base = repository.rstrip("/")
    text = _PICTURE.sub(lambda match: f"![{match['text']}]({base}/raw/{tag}/{match['target']})\n", text)
    return _LINK.sub(lambda match: f"[{match['text']}]({base}/blob/{tag}/{match['target']})", text)
