"""The table of docs/reliability.md: what fuzzing has read, of each parser."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

from tests.fuzz.records import Counts

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["FAILED", "TITLES", "rows", "write"]

FAILED = Path(__file__).with_name("failed")
"""Every input that ever failed, by target."""

TITLES = {
    "safetensors": "safetensors, whole files",
    "safetensors-header": "safetensors, headers",
    "npy": "`.npy`, whole files",
    "npy-header": "`.npy`, headers",
    "npy-objects": "`.npy`, pickled strings",
    "npz": "`.npz`, whole files",
    "npz-member": "`.npz`, members",
    "pt": "`.pt`, whole files",
    "pt-records": "`.pt`, pickles in a sound archive",
    "pt-pickle": "`.pt`, pickle machine and ragged lists",
    "pickle": "pickles of arrays",
    "faiss": "FAISS",
    "bin": "`.fbin` and kin",
    "arrow": "Arrow",
    "hdf5-object": "HDF5, object headers, trees and heaps",
    "hdf5-heaps": "HDF5, global heaps",
    "hdf5": "HDF5, whole files through the library",
    "deflate": "deflate, reading",
    "compress": "deflate, writing and reading back",
    "manifest": "`jasper_store.json`, generations",
    "config": "`config.json`",
    "expression": "sample expressions",
    "index": "`*.safetensors.index.json`",
    "state": "`state.json` of `datasets`",
    "names": "numbered file names",
}
_HEAD = """| parser | inputs guided by coverage | changed at random | opened | defects |
|---|---:|---:|---:|---:|
"""
_PLACE = re.compile(r"(?<=<!-- fuzz:table -->\n).*?(?=<!-- /fuzz -->)", re.DOTALL)


def rows(folder: Path) -> Iterator[tuple[str, int, int, int, int]]:
    """Of each target: its title, inputs guided by coverage, others, those opened, and defects that are kept for replay."""
    for name, title in TITLES.items():
        counts = Counts(folder / f"{name}.counts")
        yield title, counts.traced, counts.untraced, counts.opened, len(list((FAILED / name).glob("*.bin")))


def write(folder: Path, page: Path) -> None:
    """Put the counts of ``folder`` between the marks of a page."""
    found = list(rows(folder))
    found.append(("all", *(sum(column) for column in list(zip(*found, strict=True))[1:])))
    lines = [f"| {title} | {' | '.join(f'{n:,}'.replace(',', ' ') for n in numbers)} |" for title, *numbers in found]
    text = page.read_text(encoding="utf-8")
    page.write_text(_PLACE.sub("\n" + _HEAD + "\n".join(lines) + "\n\n", text), encoding="utf-8")
