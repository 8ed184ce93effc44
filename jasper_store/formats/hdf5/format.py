"""HDF5: one file that holds every tensor of a dataset, each under its own path.

A contiguous dataset is one run of bytes, so it becomes an :class:`Extent` and is mapped like any other file. A
chunked or compressed one becomes :class:`Chunked`. What lies in other files is never read: soft and external links are
not followed, external storage and virtual datasets are refused before the library opens them
(:mod:`jasper_store.formats.hdf5.header`). h5py is imported inside the calls: it takes a tenth of a second.

Source: https://support.hdfgroup.org/documentation/hdf5/latest/ and https://docs.h5py.org.
"""

from __future__ import annotations

import math
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from jasper_store.formats.base import Chunked, Extent, Inline, Skipped, TensorSpec
from jasper_store.formats.files import check_shape, open_for_reading
from jasper_store.formats.hdf5.header import Headers, ObjectHeader
from jasper_store.formats.hdf5.heap import check_heaps
from jasper_store.formats.hdf5.library import corrupt, describe_filters, open_file
from jasper_store.formats.hdf5.texts import read_texts
from jasper_store.formats.hdf5.variable import longest_row
from jasper_store.formats.texts import SkippedMemo, Texts

if TYPE_CHECKING:
    from collections.abc import Hashable
    from pathlib import Path

    from numpy.typing import NDArray

    from jasper_store.formats.base import FormatName, Location, Schema
    from jasper_store.formats.protocols import FileWriter

__all__ = ["Hdf5Format", "open_file"]

_DTYPES = {
    np.dtype(name): getattr(torch, name)
    for name in (
        "bool",
        "uint8",
        "int8",
        "uint16",
        "int16",
        "uint32",
        "int32",
        "uint64",
        "int64",
        "float16",
        "float32",
        "float64",
    )
}
_MEMO = SkippedMemo()
# A row per dataset below this depth of groups is a damaged file, not a layout.
_MAX_DEPTH = 32
# Two links may lead to one object, and two groups' links to one group: what a file lists is counted as it is walked.
_NBYTES_PER_LINK = 8
_MAX_KEY = 4096
# Values of ragged rows, which are read with the header. Many rows may be compressed, or be one and the same.
_VALUES_PER_BYTE = 16
_VALUES_AT_LEAST = 1 << 18
# Rows of variable length that are read at once. How many values they have is not known before; at most the file's.
_ROWS_AT_ONCE = 1 << 16
_ROWS_AT_LEAST = 64
_NBYTES_AT_ONCE = 1 << 26


class Hdf5Format:
    """Reads any HDF5 file of numeric datasets; writes contiguous or compressed ones."""

    name: FormatName = "hdf5"
    suffixes: tuple[str, ...] = (".h5", ".hdf5", ".hdf")
    one_file: str | None = "dataset.h5"

    def locate(self, path: Path, schema: Schema) -> list[TensorSpec]:
        """See :meth:`jasper_store.formats.protocols.Format.locate`.

        A dataset is named by ``schema.hdf5_paths`` and ``schema.hdf5_aliases``, else by its path. A group of
        ``values`` and ``offsets``, a group of datasets ``"0"`` to ``"N-1"`` and a variable-length dataset of
        ints are ragged tensors. What cannot be a tensor (texts, compounds) is skipped.
        """
        return list(self._walked(path, schema).specs.values())

    def skipped(self, path: Path, schema: Schema) -> list[Skipped]:
        """See :class:`jasper_store.formats.protocols.SupportsSkipped`: texts, compounds, datasets without a shape."""
        known = _MEMO.get(_memo_key(path, schema))
        return self._walked(path, schema).skipped if known is None else known

    def texts(self, path: Path, schema: Schema) -> list[Texts]:
        """See :class:`jasper_store.formats.texts.SupportsTexts`: datasets of strings, of fixed or variable length."""
        texts = self._walked(path, schema).texts
        return [Texts(name, (path,), rows, partial(read_texts, path, name, key)) for name, (key, rows) in texts.items()]

    def _walked(self, path: Path, schema: Schema) -> _Walk:
        memo_key = _memo_key(path, schema)
        with open_for_reading(path) as (raw, _), open_file(path) as (file, size):
            walk = _Walk(path, size, schema, Headers(path, raw, size))
            walk.group(file, "", frozenset())
        _MEMO.put(memo_key, walk.skipped)
        return walk

    def writer(self, path: Path, schema: Schema, *, compression: str | None = None) -> FileWriter:
        """See :meth:`jasper_store.formats.protocols.Format.writer`; several tensors, rows must be known.

        Args:
            path: the file to create.
            schema: says under which HDF5 path a tensor is written.
            compression: ``None`` (contiguous, aligned to 4096 bytes, can be mapped), ``"gzip"`` (with the shuffle
                filter, compressed in parallel), ``"lzf"``, or with hdf5plugin ``"blosc"``, ``"zstd"``, ``"lz4"``.
        """
        from jasper_store.formats.hdf5.writer import make_writer

        return make_writer(path, schema, compression)


def _memo_key(path: Path, schema: Schema) -> Hashable:
    """What decides which datasets of a file are skipped, and their names."""
    named = (frozenset(names.items()) for names in (schema.hdf5_paths, schema.hdf5_aliases))
    return SkippedMemo.key(path, schema.required, *named)


class _UnsupportedError(Exception):
    """A dataset that cannot be a tensor and is skipped, with the reason."""


class _Walk:
    """One pass over the objects of an open file."""

    def __init__(self, path: Path, size: int, schema: Schema, headers: Headers) -> None:
        self.path = path
        self.size = size
        self.headers = headers
        self.links = size // _NBYTES_PER_LINK
        self.budget = max(_VALUES_PER_BYTE * size, _VALUES_AT_LEAST)
        self.required = schema.required
        self.names = {p.strip("/"): name for name, p in schema.hdf5_paths.items()}
        self.names.update(
            {p.strip("/"): name for p, name in schema.hdf5_aliases.items() if p.strip("/") not in self.names}
        )
        self.specs: dict[str, TensorSpec] = {}
        self.skipped: list[Skipped] = []
        self.texts: dict[str, tuple[str, int]] = {}
        self.heaps_checked = False

    def name_of(self, key: str) -> str:
        """Name of the tensor at an HDF5 path."""
        if key in self.names:
            return self.names[key]
        group, slash, part = key.rpartition("/")
        if slash and part in {"values", "offsets"} and group in self.names:
            return f"{self.names[group]}.{part}"
        return key

    def add(self, spec: TensorSpec) -> None:
        if spec.name in self.specs:
            corrupt(self.path, f"two of its datasets mean {spec.name!r:.100}.", tensor=spec.name)
        self.specs[spec.name] = spec

    def group(self, group: Any, key: str, above: frozenset[int]) -> None:
        """Walk a group; ``above`` are the addresses of the groups on the way from the root to it, itself included."""
        import h5py

        if len(above) > _MAX_DEPTH:
            corrupt(self.path, f"the group {key!r:.100} contains itself, or is nested over {_MAX_DEPTH} deep.")
        members = self.members(group, key)
        if members and members.keys() == {str(i) for i in range(len(members))}:
            rows = self.rows(group, members)
            if rows is not None:
                self.ragged(self.name_of(key), rows)
                return
        for name, address in members.items():
            member_key = f"{key}/{name}" if key else name
            # A hard link to a group further up would be walked for ever.
            if address in above:
                corrupt(self.path, f"the group {key!r:.100} contains itself.")
            header = self.headers.read(address, member_key)
            member = group[name]
            if isinstance(member, h5py.Group):
                self.group(member, member_key, above | {address})
            elif isinstance(member, h5py.Dataset):
                self.dataset(member, member_key, header)

    def members(self, group: Any, key: str) -> dict[str, int]:
        """Names and addresses of the objects that a group's hard links lead to."""
        import h5py

        found: dict[bytes, int] = {}
        plausible = True

        def see(raw: bytes, link: Any) -> bool | None:
            """True ends the iteration, in which nothing may be raised: the library has errors of its own then."""
            nonlocal plausible
            self.links -= 1
            plausible = self.links >= 0 and len(key) + len(raw) <= _MAX_KEY
            if not plausible:
                return True
            if link.type == h5py.h5l.TYPE_HARD:
                found[raw] = int(link.u)
            return None

        # In the file's own order: for any other the library first makes a table of a large group's links, and if one of them
        # is damaged it frees what it has not yet written in there.
        group.id.links.iterate(see, order=h5py.h5.ITER_NATIVE, info=True)
        if not plausible:
            corrupt(
                self.path, f"the links of the group {key!r:.100} are more, or longer, than a file of {self.size} has."
            )
        return {raw.decode("utf-8", "surrogateescape"): found[raw] for raw in sorted(found)}

    def dataset(self, dataset: Any, key: str, header: ObjectHeader) -> None:
        import h5py

        name = self.name_of(key)
        try:
            base = h5py.check_vlen_dtype(dataset.dtype)
            if base is not None and np.issubdtype(base, np.integer) and dataset.ndim == 1:
                self.ragged(name, self.variable(dataset, header))
                return
            self.add(self.spec(dataset, key, name))
        except _UnsupportedError as exc:
            if name in self.required:
                corrupt(self.path, f"dataset {key!r:.100} should hold numbers: {exc}.", tensor=name, cause=exc)
            self.skipped.append(Skipped(name, self.path, str(exc)))
            if h5py.check_string_dtype(dataset.dtype) is not None and dataset.ndim == 1:
                self.texts[name] = key, dataset.shape[0]

    def spend(self, key: str, n: int) -> None:
        self.budget -= n
        if self.budget < 0:
            corrupt(
                self.path,
                f"the rows of {key!r:.100} have more values than a file of {self.size} bytes explains (was it truncated?).",
            )

    def rows(self, group: Any, members: dict[str, int]) -> list[NDArray[np.int64]] | None:
        """The rows of a ragged tensor that has a small dataset for each, or ``None`` if the group is something else."""
        import h5py

        rows = []
        name = group.name[1:]
        for i in range(len(members)):
            self.headers.read(members[str(i)], f"{name}/{i}")
            # Below h5py's own objects, which cost five times as much for each of perhaps many thousand rows.
            row = h5py.h5o.open(group.id, str(i).encode())
            if not isinstance(row, h5py.h5d.DatasetID):
                return None
            space = row.get_space()
            length = space.get_simple_extent_npoints()
            # An empty Python list becomes an empty float dataset in the builders that write a dataset per row.
            if length and (row.dtype.kind not in "iu" or space.get_simple_extent_ndims() > 1):
                return None
            if length > self.size:
                corrupt(self.path, f"row {i} of {name!r:.100} is larger than the file (was it truncated?).")
            self.spend(name, length)
            values = np.empty(length, dtype=np.int64)
            if length:
                row.read(h5py.h5s.create_simple((length,)), h5py.h5s.ALL, values)
            rows.append(values)
        return rows

    def variable(self, dataset: Any, header: ObjectHeader) -> list[NDArray[np.int64]]:
        """The rows of a variable-length dataset of ints."""
        self.check_heaps()
        if any(header.fill):
            corrupt(self.path, f"dataset {dataset.name!r:.100} has a fill value of variable length.")
        # Each row takes 16 bytes in the file beside its values, unless it is compressed or was never written.
        if dataset.chunks is None and dataset.size * 16 > max(self.size, 1024):
            corrupt(self.path, f"dataset {dataset.name!r:.100} is larger than the file (was it truncated?).")
        self.spend(dataset.name, dataset.size)
        longest = longest_row(self.headers.raw, dataset)
        if longest > self.size:
            corrupt(
                self.path,
                f"a row of {dataset.name!r:.100} claims {longest} values, the file has {self.size} bytes (was it truncated?).",
            )
        step = min(max(_NBYTES_AT_ONCE // self.size, _ROWS_AT_LEAST), _ROWS_AT_ONCE)
        rows = []
        for start in range(0, dataset.size, step):
            block = [row.astype(np.int64, casting="unsafe") for row in dataset[start : start + step]]
            self.spend(dataset.name, sum(map(len, block)))
            rows += block
        return rows

    def check_heaps(self) -> None:
        if not self.heaps_checked:
            check_heaps(self.path)
            self.heaps_checked = True

    def ragged(self, name: str, rows: list[NDArray[np.int64]]) -> None:
        values = np.concatenate([np.empty(0, dtype=np.int64), *rows])
        offsets = np.zeros(len(rows) + 1, dtype=np.int64)
        np.cumsum([len(row) for row in rows], out=offsets[1:])
        for part, array in (("values", values), ("offsets", offsets)):
            tensor = torch.from_numpy(array)
            self.add(TensorSpec(f"{name}.{part}", tensor.dtype, tuple(tensor.shape), Inline(self.path, tensor)))

    def spec(self, dataset: Any, key: str, name: str) -> TensorSpec:
        dtype = self.dtype(dataset, key)
        if dataset.shape is None:
            raise _UnsupportedError("it has no shape (a null dataspace)")
        shape, nbytes = check_shape(dataset.shape, dtype.itemsize, path=self.path, tensor=name)
        return TensorSpec(name, dtype, shape, self.location(dataset, key, dtype, shape, nbytes))

    def dtype(self, dataset: Any, key: str) -> torch.dtype:
        import h5py

        tid = dataset.id.get_type()
        stored: np.dtype[Any] = dataset.dtype
        if h5py.check_string_dtype(stored) is not None:
            raise _UnsupportedError("it holds strings, not numbers")
        if stored.kind not in "biuf":
            raise _UnsupportedError(f"{stored} is no number")
        if stored.byteorder == ">":
            corrupt(
                self.path,
                f"dataset {key!r:.100} is big-endian; write it as little-endian ({stored.newbyteorder('<')}).",
            )
        # h5py widens what numpy cannot express (12-bit ints, 24-bit floats); the bytes would then be something else.
        if stored not in _DTYPES or not h5py.h5t.py_create(stored, logical=True).equal(tid):
            corrupt(self.path, f"dataset {key!r:.100} has a number type that torch does not have ({stored}).")
        marked = self.mark(dataset)
        if marked is None:
            found: torch.dtype = _DTYPES[stored]
            return found
        if marked not in ("bfloat16", b"bfloat16") or stored != np.uint16:
            corrupt(self.path, f"dataset {key!r:.100}: {stored} with torch_dtype={marked!r:.40} is unknown.")
        return torch.bfloat16

    def mark(self, dataset: Any) -> object:
        """The attribute that names a torch dtype which HDF5 does not have."""
        import h5py

        if "torch_dtype" not in dataset.attrs:
            return None
        attribute = h5py.h5a.open(dataset.id, b"torch_dtype")
        kind = attribute.get_type()
        if not isinstance(kind, h5py.h5t.TypeStringID) or attribute.get_space().get_simple_extent_npoints() != 1:
            return "no text"
        if kind.is_variable_str():
            self.check_heaps()
        return dataset.attrs["torch_dtype"]

    def location(self, dataset: Any, key: str, dtype: torch.dtype, shape: tuple[int, ...], nbytes: int) -> Location:
        import h5py

        plist = dataset.id.get_create_plist()
        layout = plist.get_layout()
        if nbytes == 0:
            return Inline(self.path, torch.empty(shape, dtype=dtype))
        if layout == h5py.h5d.CONTIGUOUS and plist.get_external_count() == 0:
            offset = dataset.id.get_offset()
            if offset is not None:
                # get_offset() already counts the user block.
                if offset + nbytes > self.size:
                    corrupt(
                        self.path,
                        f"dataset {key!r:.100} should end at byte {offset + nbytes}, the file has {self.size} "
                        "(was it truncated?).",
                        tensor=key,
                    )
                return Extent(self.path, offset)
        if layout == h5py.h5d.COMPACT or not shape:
            raw = torch.from_numpy(np.ascontiguousarray(dataset[()]).reshape(shape))
            return Inline(self.path, raw.view(torch.bfloat16) if dtype == torch.bfloat16 else raw)
        chunks = dataset.chunks
        if chunks is not None and (0 in chunks or math.prod(chunks) * dtype.itemsize >= 2**32):
            corrupt(self.path, f"dataset {key!r:.100} has the impossible chunk shape {chunks}.", tensor=key)
        return Chunked(self.path, key, chunks, describe_filters(plist))
