"""Small HDF5 files that claim much: memory stays in proportion to the file's size and to the rows that are asked for."""

from __future__ import annotations

import zlib
from typing import TYPE_CHECKING

import h5py
import numpy as np
import pytest

from tests.formats.confined import Outcome, open_confined

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

pytest.importorskip("resource", reason="limits of a child process are POSIX")

LIMIT_SECONDS = 10
LIMIT_NBYTES = 2 << 30
GROWTH_NBYTES = 400 << 20
"""Two rows of 32 MiB as the largest file has, thrice, and what h5py takes."""


def tiny_chunks(file: h5py.File) -> None:
    """A grid of 2**26 chunks, of which two were written."""
    dataset = file.create_dataset("x", shape=(2, 1 << 25), chunks=(1, 1), dtype="u1", fillvalue=3)
    dataset[0, 5] = 1
    dataset[1, 9] = 2


def rows_never_written(file: h5py.File) -> None:
    file.create_dataset("x", shape=(1 << 26,), chunks=(1024,), dtype=h5py.vlen_dtype(np.int32))


def rows_of_one_heap_object(file: h5py.File) -> None:
    """Every row names the values of the first."""
    dataset = file.create_dataset("x", shape=(20_000,), dtype=h5py.vlen_dtype(np.int32))
    dataset[0] = np.arange(15_000)
    file.flush()
    at = dataset.id.get_offset()
    with open(file.filename, "r+b") as raw:  # noqa: PTH123 - the name is all that is known
        raw.seek(at)
        first = raw.read(16)
        raw.seek(at)
        raw.write(first * 20_000)


def claimed(file: h5py.File, at: int) -> None:
    """The row or text that begins at a byte of the file claims to have 900 million values."""
    file.flush()
    with open(file.filename, "r+b") as raw:  # noqa: PTH123 - the name is all that is known
        raw.seek(at)
        raw.write((900_000_000).to_bytes(4, "little"))


def a_row_claims_much(file: h5py.File) -> None:
    dataset = file.create_dataset("x", shape=(3,), dtype=h5py.vlen_dtype(np.uint8))
    dataset[0] = [1, 2]
    file.flush()
    claimed(file, dataset.id.get_offset())


def a_row_of_a_chunk_claims_much(file: h5py.File) -> None:
    dataset = file.create_dataset("x", shape=(30,), dtype=h5py.vlen_dtype(np.uint8), chunks=(10,))
    dataset[:] = [np.arange(2)] * 30
    file.flush()
    claimed(file, dataset.id.get_chunk_info(1).byte_offset + 16 * 3)


def one_dataset_of_many_names(file: h5py.File) -> None:
    file["ids/0"] = np.arange(10_000)
    for i in range(1, 3000):
        file[f"ids/{i}"] = file["ids/0"]


def groups_linked_twice(file: h5py.File) -> None:
    """2**28 ways from the first group to the last."""
    group = file.create_group("g")
    for _ in range(28):
        below = group.create_group("a")
        group["b"] = below
        group = below
    group["x"] = [1.0]


def long_rows_of_one_chunk(file: h5py.File) -> None:
    """The rows asked for are the first and the last of a chunk as high as the dataset."""
    file.create_dataset("x", shape=(1 << 12, 1 << 23), chunks=(1 << 12, 1), dtype="u1", compression="lzf")[5, 7] = 9


def a_chunk_of_four_gigabytes(file: h5py.File) -> None:
    size = 65_000
    dataset = file.create_dataset("x", shape=(size, size), chunks=(size, size), dtype="u1", compression="gzip")
    dataset.id.write_direct_chunk((0, 0), zlib.compress(bytes(1000)))


def long_names(file: h5py.File) -> None:
    group = file.create_group("g" * 60_000)
    for i in range(500):
        group[f"{i}" * 1000] = [1]


FILES: dict[str, Callable[[h5py.File], None]] = {
    make.__name__: make
    for make in (
        tiny_chunks,
        rows_never_written,
        rows_of_one_heap_object,
        a_row_claims_much,
        a_row_of_a_chunk_claims_much,
        one_dataset_of_many_names,
        groups_linked_twice,
        long_rows_of_one_chunk,
        a_chunk_of_four_gigabytes,
        long_names,
    )
}


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory) -> dict[str, Outcome]:
    folder: Path = tmp_path_factory.mktemp("hostile")
    paths = []
    for name, make in FILES.items():
        for libver in ("earliest", "latest"):
            paths.append(folder / f"{name}-{libver}.h5")
            with h5py.File(paths[-1], "w", libver=libver) as file:
                make(file)
    return open_confined("hdf5", paths, seconds=LIMIT_SECONDS, nbytes=LIMIT_NBYTES)


@pytest.mark.parametrize("libver", ["earliest", "latest"])
@pytest.mark.parametrize("name", FILES)
def test_a_small_file_takes_little(outcomes, name, libver):
    outcome = outcomes[f"{name}-{libver}"]
    assert outcome.what in {"refused", "opened"}, outcome
    assert outcome.grown < GROWTH_NBYTES, outcome


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("rows_never_written", "more values than a file"),
        ("rows_of_one_heap_object", "more values than a file"),
        ("a_row_claims_much", "claims 900000000 values"),
        ("a_row_of_a_chunk_claims_much", "claims 900000000 values"),
        ("one_dataset_of_many_names", "more values than a file"),
        ("groups_linked_twice", "links"),
        ("long_names", "links"),
        ("a_chunk_of_four_gigabytes", "inflate"),
    ],
)
def test_the_reason_is_said(outcomes, name, why):
    for libver in ("earliest", "latest"):
        outcome = outcomes[f"{name}-{libver}"]
        assert outcome.what == "refused", outcome
        assert why in outcome.why
