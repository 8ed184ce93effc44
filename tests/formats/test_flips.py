"""One flipped byte or bit in an HDF5 file ends no process, and raises no error but ours."""

from __future__ import annotations

import re

import h5py
import numpy as np
import pytest

from tests.formats import flips
from tests.formats.confined import open_confined

pytest.importorskip("resource", reason="limits of a child process are POSIX")

LIBVERS = ["earliest", "latest"]
SHARES = 8
"""A whole run of single bits is 280 000 copies: shares of it can run beside each other, each within the time limit."""


@pytest.mark.parametrize("libver", LIBVERS)
def test_some_flips(tmp_path, libver):
    source = flips.sample(tmp_path / "x.h5", libver)
    content = source.read_bytes()
    patches = flips.bytes_of(content, step=len(content) // 70) + flips.bits_of(content, step=len(content) // 20)
    found = flips.run_apart(source, patches, timeout=200)
    assert found["refused"] + found["opened"] == len(patches)


@pytest.mark.parametrize("libver", LIBVERS)
def test_other_values_are_found_by_verify(tmp_path, libver):
    source = flips.sample(tmp_path / "x.h5", libver)
    patches = flips.bits_of(source.read_bytes(), first=5, step=8 * source.stat().st_size // 60)
    found = flips.run_apart(source, patches, timeout=200, verify=True)
    assert found["refused"] + found["unchanged"] + found["found"] == len(patches)
    assert found["found"] > 12


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("libver", LIBVERS)
@pytest.mark.parametrize("share", range(SHARES + 1))
def test_every_flip(tmp_path, libver, share):
    source = flips.sample(tmp_path / "x.h5", libver)
    content = source.read_bytes()
    patches = flips.bytes_of(content) if share == SHARES else flips.bits_of(content, share, SHARES)
    flips.run_apart(source, patches, timeout=3500, verify=True)


def test_fill_values_of_another_length(tmp_path):
    """The library copies by the datatype's length what has the fill value's."""
    source = flips.sample(tmp_path / "x.h5", "earliest")
    # Type 5, 8 to 24 bytes in all; version 2, both times, "defined"; then the size.
    message = rb"\x05\x00[\x08\x10\x18]\x00.\0\0\0\x02[\0-\3][\0-\3]\x01"
    places = [found.end() for found in re.finditer(message, source.read_bytes(), re.DOTALL)]
    assert len(places) > 9
    sizes = [0x80000000, 0x80000004, 0xFFFFFFFE, 0x7FFFFFFF, 0x10000, 5, 3, 1]
    patches = [(at, size.to_bytes(4, "little").hex()) for size in sizes for at in places]
    assert flips.run_apart(source, patches, timeout=200) == {"refused": len(patches), "opened": 0, "ended": []}
    # 0 and -1 mean that there is none.
    flips.run_apart(source, [(at, size) for size in ("00000000", "ffffffff") for at in places], timeout=200)


def test_indices_that_lead_back_to_themselves(tmp_path):
    """The library goes down a tree by recursion, and follows the free places of a heap, until memory ends."""
    source = flips.sample(tmp_path / "x.h5", "earliest")
    content = source.read_bytes()
    patches = []
    for found in re.finditer(rb"TREE([\0\x01])\0", content):
        at = found.start()
        # Of groups: keys of 8 bytes. Of chunks: a size, a mask, and an offset per dimension and one more.
        for key in (8,) if found[1] == b"\0" else (24, 32):
            child = at + 24 + key
            itself = content[at + 6 : child] + at.to_bytes(8, "little")
            patches += [(at + 5, (level + itself).hex()) for level in (b"\1", b"\xff")]
    trees = len(patches)
    for found in re.finditer(rb"HEAP\0\0\0\0", content):
        free, data = (int.from_bytes(content[i : i + 8], "little") for i in (found.start() + 16, found.start() + 24))
        if free != 1:
            patches.append((data + free, free.to_bytes(8, "little").hex()))
    assert trees > 9
    assert len(patches) > trees
    assert flips.run_apart(source, patches, timeout=200) == {"refused": len(patches), "opened": 0, "ended": []}


def test_datatypes_that_the_library_cannot_call(tmp_path):
    source = flips.sample(tmp_path / "x.h5", "earliest")
    content = source.read_bytes()
    # Variable length, version 1; of texts in an attribute, of numbers in a dataset.
    places = [found.start() + 1 for found in re.finditer(rb"\x19[\0\1][\0\1]\0\x10\0\0\0", content)]
    assert len(places) == 2
    patches = [(at, f"{content[at] ^ 1 << bit:02x}") for at in places for bit in (1, 2, 3)]
    assert flips.run_apart(source, patches, timeout=200) == {"refused": 6, "opened": 0, "ended": []}


def test_datatypes_nested_too_deeply(tmp_path):
    with h5py.File(tmp_path / "x.h5", "w") as file:
        kind = np.dtype("i4")
        for _ in range(100):
            kind = h5py.vlen_dtype(kind)
        file.create_dataset("x", shape=(1,), dtype=kind)
    outcome = open_confined("hdf5", [tmp_path / "x.h5"], seconds=10, nbytes=1 << 30)["x"]
    assert outcome.what == "refused"
    assert "nested over" in outcome.why


def test_a_text_that_claims_much(tmp_path):
    source = flips.sample(tmp_path / "x.h5", "earliest")
    content = source.read_bytes()
    # Behind the attribute's name, its datatype and its dataspace comes the length.
    (at,) = (found.end() for found in re.finditer(rb"torch_dtype\0{5}\x19.{23}\x01\0{7}", content, re.DOTALL))
    assert content[at : at + 4] == (8).to_bytes(4, "little")
    # And so much has one of its letters, whose datatype follows that of the text.
    letter = content.index(b"\x19\1", content.index(b"torch_dtype")) + 8 + 4
    assert content[letter : letter + 4] == b"\1\0\0\0"
    for place, why in ((at, "has a text of 900000000 bytes"), (letter, "numbers of 900000000 bytes")):
        damaged = tmp_path / "damaged.h5"
        damaged.write_bytes(content[:place] + (900_000_000).to_bytes(4, "little") + content[place + 4 :])
        outcome = open_confined("hdf5", [damaged], seconds=10, nbytes=2 << 30)["damaged"]
        assert outcome.what == "refused"
        assert why in outcome.why
        assert outcome.grown < 100 << 20
