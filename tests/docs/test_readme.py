"""The README of a package: what PyPI shows has no relative link."""

from __future__ import annotations

import re

import pytest

from tests.docs.pages import ROOT

# hatchling builds the package; an environment that installs it built has none.
hook = pytest.importorskip("hatch_readme")
absolute = hook.absolute

TEXT = "<!-- a mark -->\n# A\n\n![Speed](docs/speed.svg)\n\nSee [how](docs/how.md#here), [there](https://a.b/c), [below](#a).\n"


def test_links_lead_to_the_tag() -> None:
    made = absolute(TEXT, "https://host/owner/name/", "v1.2.3")
    assert "![Speed](https://host/owner/name/raw/v1.2.3/docs/speed.svg)\n" in made
    assert "[how](https://host/owner/name/blob/v1.2.3/docs/how.md#here), [there](https://a.b/c), [below](#a)" in made
    assert "<!--" not in made


def test_without_an_address_nothing_is_broken() -> None:
    made = absolute(TEXT, "", "v1.2.3")
    assert made == "# A\n\n\nSee how, [there](https://a.b/c), [below](#a).\n"


def test_the_package_has_links_where_there_is_an_address() -> None:
    made = hook.links("https://host/owner/name/")
    assert made["Repository"] == "https://host/owner/name"
    assert made["Issues"] == "https://host/owner/name/issues"
    files = [link.removeprefix("https://host/owner/name/blob/main/") for link in made.values() if "/blob/" in link]
    assert files
    assert all((ROOT / file).is_file() for file in files), files
    assert hook.links("") == {}


def test_the_package_has_such_a_readme() -> None:
    from hatchling.metadata.core import ProjectMetadata
    from hatchling.plugin.manager import PluginManager

    core = ProjectMetadata(str(ROOT), PluginManager()).core
    assert core.readme_content_type == "text/markdown"
    assert core.readme.startswith("# jasper_store\n")
    targets = re.findall(r"\]\(([^)\s]+)\)", core.readme)
    assert all(re.match(r"https://|#", target) for target in targets), targets
