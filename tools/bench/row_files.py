"""Plain row files: the same seeded rows, written from start to end in every layout that a reader wants.

Where a layout can choose, the data begins at a multiple of 4096 bytes, so that no reader's rows lie across more
pages than another's.
"""

from __future__ import annotations

import json
import subprocess
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from numpy.typing import NDArray

__all__ = ["NAME", "PARTS", "WRITERS", "RowSource", "orders", "write", "write_numbered"]

NAME = "rows"
BLOCK = 8192
ALIGNMENT = 4096
ARROW_BATCH = 1000
ZARR_CHUNK = 4096
PARTS = 64


@dataclass(frozen=True)
class RowSource:
    """Seeded random rows that do not compress: any block of them, without the ones before it."""

    rows: int
    dim: int
    seed: int

    def block(self, index: int) -> NDArray[np.float32]:
        """Rows ``index * BLOCK`` and on, at most ``BLOCK`` of them."""
        count = min(BLOCK, self.rows - index * BLOCK)
        generator = np.random.default_rng([self.seed, index])
        rows = generator.random((count, self.dim), dtype=np.float32)
        rows -= np.float32(0.5)
        return rows

    def blocks(self) -> Iterator[NDArray[np.float32]]:
        """All rows in order."""
        for index in range(-(-self.rows // BLOCK)):
            yield self.block(index)


def orders(rows: int, count: int, seed: int, batch: int) -> list[NDArray[np.int64]]:
    """The batches that every reader is given: distinct rows of one global shuffle, the same for the same numbers."""
    picked = np.random.default_rng([seed, 1]).permutation(rows)[:count].astype(np.int64)
    return [picked[start : start + batch] for start in range(0, len(picked) - batch + 1, batch)]


def write(layout: str, path: str, rows: int, dim: int, seed: int) -> dict[str, Any]:
    """Write one layout (a name of :data:`WRITERS`); runs in a child, since some layouts need a peer's library."""
    WRITERS[layout](Path(path), RowSource(rows, dim, seed))
    return {}


def _append(path: Path, header: bytes, source: RowSource) -> None:
    with path.open("wb") as file:
        file.write(header)
        for block in source.blocks():
            file.write(block.data)


def write_safetensors(path: Path, source: RowSource) -> None:
    """Header padded with spaces, as the format allows."""
    entry = {"dtype": "F32", "shape": [source.rows, source.dim], "data_offsets": [0, source.rows * source.dim * 4]}
    header = json.dumps({NAME: entry}).encode().ljust(ALIGNMENT - 8)
    _append(path, len(header).to_bytes(8, "little") + header, source)


def write_npy(path: Path, source: RowSource) -> None:
    """Version 1.0 with a header padded to one page."""
    _append(path, _npy_header((source.rows, source.dim)), source)


def _npy_header(shape: tuple[int, int]) -> bytes:
    header = repr({"descr": "<f4", "fortran_order": False, "shape": shape}).encode().ljust(ALIGNMENT - 11) + b"\n"
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header


def write_parts(path: Path, source: RowSource) -> None:
    """The same rows in :data:`PARTS` files of about equal length, as one encoding process each would write them."""
    write_numbered(path, source, PARTS)


def write_numbered(path: Path, source: RowSource, parts: int) -> None:
    """Rows in numbered ``.npy`` files; headers padded to one page."""
    path.mkdir()
    blocks = source.blocks()
    rest = np.empty((0, source.dim), np.float32)
    for number in range(parts):
        count = source.rows * (number + 1) // parts - source.rows * number // parts
        with (path / f"{NAME}-{number:05d}-of-{parts:05d}.npy").open("wb") as file:
            file.write(_npy_header((count, source.dim)))
            while count:
                if not len(rest):
                    rest = next(blocks)
                taken, rest = rest[:count], rest[count:]
                file.write(taken.data)
                count -= len(taken)


def write_raw(path: Path, source: RowSource) -> None:
    """No header at all: what tensordict maps."""
    _append(path, b"", source)


def write_pt(path: Path, source: RowSource) -> None:
    """``torch.save`` itself, told to align its records; it streams from a map, so it needs no memory for the rows."""
    raw = path.with_name(f"{path.name}.raw")
    write_raw(raw, source)
    _save_mapped(path, raw, source)


def write_zeros_pt(path: Path, source: RowSource) -> None:
    """The same of zeros, which then become a hole: a source that takes no room on the disk."""
    raw = path.with_name(f"{path.name}.raw")
    with raw.open("wb") as file:
        file.truncate(source.rows * source.dim * 4)
    _save_mapped(path, raw, source)
    subprocess.run(["fallocate", "--dig-holes", str(path)], check=True)


def _save_mapped(path: Path, raw: Path, source: RowSource) -> None:
    torch = import_module("torch")
    config = import_module("torch.utils.serialization").config
    before = config.save.storage_alignment
    try:
        mapped = torch.from_file(str(raw), shared=True, size=source.rows * source.dim, dtype=torch.float32)
        config.save.storage_alignment = ALIGNMENT
        torch.save(mapped.view(source.rows, source.dim), path)
    finally:
        config.save.storage_alignment = before
        raw.unlink()


def write_hdf5(path: Path, source: RowSource) -> None:
    """One contiguous dataset."""
    h5py = import_module("h5py")
    with h5py.File(path, "w", alignment_threshold=1, alignment_interval=ALIGNMENT) as file:
        data = file.create_dataset(NAME, shape=(source.rows, source.dim), dtype="<f4")
        start = 0
        for block in source.blocks():
            data[start : start + len(block)] = block
            start += len(block)


def write_arrow(path: Path, source: RowSource) -> None:
    """The stream that HF datasets keeps: record batches of its default size, fixed-size lists."""
    pa = import_module("pyarrow")
    schema = pa.schema([(NAME, pa.list_(pa.float32(), source.dim))])
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, schema) as stream:
        for batch in _record_batches(pa, schema, source):
            stream.write_batch(batch)


def write_lance(path: Path, source: RowSource) -> None:
    """Lance's own writer with its own defaults."""
    pa, lance = import_module("pyarrow"), import_module("lance")
    schema = pa.schema([(NAME, pa.list_(pa.float32(), source.dim))])
    reader = pa.RecordBatchReader.from_batches(schema, _record_batches(pa, schema, source))
    lance.write_dataset(reader, str(path))


def _record_batches(pa: Any, schema: Any, source: RowSource) -> Iterator[Any]:
    for block in source.blocks():
        for start in range(0, len(block), ARROW_BATCH):
            values = pa.array(block[start : start + ARROW_BATCH].reshape(-1))
            yield pa.record_batch([pa.FixedSizeListArray.from_arrays(values, source.dim)], schema=schema)


def write_zarr(path: Path, source: RowSource) -> None:
    """Zarr 3 through TensorStore, uncompressed, 4096 rows a chunk."""
    tensorstore = import_module("tensorstore")
    chunk = {"name": "regular", "configuration": {"chunk_shape": [ZARR_CHUNK, source.dim]}}
    spec = {
        "driver": "zarr3",
        "kvstore": {"driver": "file", "path": str(path)},
        "metadata": {
            "shape": [source.rows, source.dim],
            "data_type": "float32",
            "chunk_grid": chunk,
            "codecs": [{"name": "bytes", "configuration": {"endian": "little"}}],
        },
        "create": True,
    }
    data = tensorstore.open(spec).result()
    start = 0
    for block in source.blocks():
        data[start : start + len(block)].write(block).result()
        start += len(block)


WRITERS: Mapping[str, Callable[[Path, RowSource], None]] = {
    "rows.safetensors": write_safetensors,
    "rows.npy": write_npy,
    "rows.parts": write_parts,
    "rows.pt": write_pt,
    "zeros.pt": write_zeros_pt,
    "rows.h5": write_hdf5,
    "rows.raw": write_raw,
    "rows.arrow": write_arrow,
    "rows.lance": write_lance,
    "rows.zarr": write_zarr,
}
