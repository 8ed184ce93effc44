"""``import jasper_store`` does no work, and what the library needs now and then is imported now and then."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

import jasper_store as js

# Slow to import, or nobody's who trains from mapped files: h5py alone takes longer than all of our own modules.
SELDOM = {
    "accelerate",
    "datasets",
    "h5py",
    "hdf5plugin",
    "isal",
    "lightning",
    "matplotlib",
    "numpy.testing",
    "ray",
    "rich",
    "safetensors",
    "torchdata",
    "typer",
}


def imported_by(statement: str) -> set[str]:
    """The modules that a statement brings into a fresh process, beyond torch's own."""
    code = f"import sys, json, torch\nbefore = set(sys.modules)\n{statement}\nprint(json.dumps([*set(sys.modules) - before]))"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    return set(json.loads(done.stdout))


def test_the_import_brings_no_module_of_others() -> None:
    brought = imported_by("import jasper_store")
    ours = {name for name in brought if name.split(".")[0] == "jasper_store"}
    assert ours == {
        "jasper_store",
        "jasper_store.errors",
    }
    assert not {name.split(".")[0] for name in brought - ours} - set(sys.stdlib_module_names)


def test_all_public_names_together_bring_nothing_that_is_seldom_needed() -> None:
    brought = imported_by("import jasper_store as js\nfor name in js.__all__: getattr(js, name)")
    assert not brought & SELDOM
    assert "jasper_store.loading.loader" in brought
    assert not {name for name in brought if name.startswith("jasper_store.cli")}


def test_convert_stays_the_function_whatever_is_imported_later() -> None:
    imported_by(
        "import jasper_store as js\n"
        "js.create_loader, js.verify\n"
        "import jasper_store.conversion.run\n"
        "import jasper_store.conversion.report as room\n"
        "from jasper_store.files.atomic import atomic_file\n"
        "assert callable(js.convert), js.convert"
    )


def test_names_are_found_before_they_are_used() -> None:
    imported_by("import jasper_store as js\nassert set(js.__all__) <= set(dir(js))")
    imported_by("from jasper_store import *\nassert plan and JASPERSteeringDataset")


def test_an_unknown_name_is_refused() -> None:
    with pytest.raises(AttributeError, match="nothing_of_the_kind"):
        js.nothing_of_the_kind  # type: ignore[attr-defined]  # noqa: B018
