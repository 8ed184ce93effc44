"""What every format must do. A format's own test file inherits :class:`FormatSuite` and says what is its own."""

from __future__ import annotations

import math
import os
import pickle
import subprocess
import sys
from typing import TYPE_CHECKING, ClassVar

import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st

from jasper_store.errors import (
    ClosedError,
    CorruptFileError,
    DatasetNotFoundError,
    IncompatibleOptionsError,
    IntegrityError,
)
from jasper_store.formats.base import Chunked, Extent, FormatName, Inline, Schema, TensorSpec
from jasper_store.formats.files import tensor_bytes
from jasper_store.formats.hdf5.chunks import ChunkedReader
from jasper_store.formats.protocols import FileWriter, Format
from jasper_store.formats.registry import FORMATS

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

DTYPES = (
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
    torch.int8,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.uint8,
    torch.bool,
)


def values(dtype: torch.dtype, shape: Sequence[int], seed: int = 0) -> torch.Tensor:
    """Any bits at all, NaNs among them; a bool is 0 or 1."""
    generator = torch.Generator().manual_seed(seed)
    raw = torch.randint(256, (math.prod(shape) * dtype.itemsize,), dtype=torch.uint8, generator=generator)
    if dtype == torch.bool:
        raw = raw % 2
    return raw.view(dtype).reshape(tuple(shape))


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal to the bit, where ``==`` would call NaNs different."""
    return a.dtype == b.dtype and a.shape == b.shape and bytes(tensor_bytes(a)) == bytes(tensor_bytes(b))


def read(spec: TensorSpec) -> torch.Tensor:
    """The values that a spec points at, by the plainest means there are."""
    location = spec.location
    if isinstance(location, Chunked):
        out = torch.empty(spec.shape, dtype=spec.dtype)
        reader = ChunkedReader(spec)
        reader.read_block(0, spec.n_rows, out)
        reader.close()
        return out
    if not isinstance(location, Extent):
        assert isinstance(location, Inline)
        assert location.values.dtype == spec.dtype
        assert tuple(location.values.shape) == spec.shape
        return location.values
    if spec.nbytes == 0:
        return torch.empty(spec.shape, dtype=spec.dtype)
    with location.path.open("rb") as file:
        file.seek(location.offset)
        raw = bytearray(file.read())
    whole = len(raw) // spec.dtype.itemsize * spec.dtype.itemsize
    flat = torch.frombuffer(raw[:whole], dtype=spec.dtype)
    strides = location.strides or torch.empty(spec.shape, device="meta").stride()
    return flat.as_strided(spec.shape, strides)


def write(
    writer: FileWriter, name: str, tensor: torch.Tensor, *, rows_known: bool = True, block: int | None = None
) -> None:
    """Write one tensor in blocks of rows."""
    if tensor.ndim == 0:
        writer.begin(name, tensor.dtype, None, 1)
        writer.append(tensor)
    else:
        writer.begin(name, tensor.dtype, tuple(tensor.shape[1:]), len(tensor) if rows_known else None)
        for part in tensor.split(block or max(1, len(tensor))):
            writer.append(part)
    writer.end()


# A small space that holds every edge: no row, one row, empty rows, scalars.
tensors = st.builds(
    values,
    st.sampled_from(DTYPES),
    st.lists(st.integers(0, 7), min_size=0, max_size=3),
    st.integers(0, 3),
)
# The base class's methods run in every subclass, and each example makes a file of its own.
relaxed = settings(
    max_examples=60, suppress_health_check=[HealthCheck.differing_executors, HealthCheck.function_scoped_fixture]
)


_KILLED = """
import ast, os, pathlib, sys
from tests.formats.conformance import FORMATS, FormatSuite, Schema
name, folder, compressions = sys.argv[1:]
writers = []
for compression in ast.literal_eval(compressions):
    for steps in range(4):
        path = pathlib.Path(folder) / f"{compression}-{steps}"
        writers.append(FORMATS[name].writer(path, Schema(), compression=compression))
        FormatSuite.steps(writers[-1], steps)
os._exit(9)
"""


class FormatSuite:
    """Inherit as ``TestX``; set ``name``; implement :meth:`peer`."""

    name: ClassVar[FormatName]
    compressions: ClassVar[tuple[str | None, ...]] = (None,)
    rows_may_be_unknown: ClassVar[bool] = True

    @property
    def format(self) -> Format:
        return FORMATS[self.name]

    def peer(self, path: Path, name: str, dtype: torch.dtype) -> list[torch.Tensor]:
        """What other libraries read from the file, once per way of reading."""
        raise AssertionError

    def path(self, tmp_path: Path) -> Path:
        path = tmp_path / f"x{self.format.suffixes[0]}"
        path.unlink(missing_ok=True)
        return path

    def written(self, tmp_path: Path, tensor: torch.Tensor, compression: str | None = None) -> Path:
        path = self.path(tmp_path)
        writer = self.format.writer(path, Schema(), compression=compression)
        write(writer, "x", tensor)
        writer.close()
        return path

    def refused(self, path: Path) -> None:
        """Neither this format nor any other takes the file."""
        for fmt in FORMATS.values():
            with pytest.raises(CorruptFileError) as caught:
                fmt.locate(path, Schema())
            assert str(path) in str(caught.value)

    @relaxed
    @given(tensor=tensors, block=st.integers(1, 9), known=st.booleans(), data=st.data())
    def test_what_is_written_is_read_to_the_bit(self, tmp_path, tensor, block, known, data) -> None:
        path = self.path(tmp_path)
        writer = self.format.writer(path, Schema(), compression=data.draw(st.sampled_from(self.compressions)))
        write(writer, "x", tensor, rows_known=known or not self.rows_may_be_unknown, block=block)
        writer.close()
        (spec,) = self.format.locate(path, Schema())
        assert (spec.name, spec.dtype, spec.shape) == ("x", tensor.dtype, tuple(tensor.shape))
        assert same(read(spec), tensor)
        for other in self.peer(path, "x", tensor.dtype):
            assert same(other, tensor)

    def test_large_blocks_that_are_not_contiguous(self, tmp_path) -> None:
        tensor = values(torch.float32, (64, 3000)).t()
        for compression in self.compressions:
            (spec,) = self.format.locate(self.written(tmp_path, tensor, compression), Schema())
            assert same(read(spec), tensor)

    def test_data_begins_on_a_page(self, tmp_path) -> None:
        (spec,) = self.format.locate(self.written(tmp_path, values(torch.float32, (5, 3))), Schema())
        assert isinstance(spec.location, Extent)
        assert spec.location.offset % 4096 == 0
        assert spec.contiguous

    def test_specs_pickle(self, tmp_path) -> None:
        for tensor in (values(torch.bfloat16, (5, 3)), values(torch.int8, ()), values(torch.bool, (0, 2))):
            (spec,) = self.format.locate(self.written(tmp_path, tensor), Schema())
            again = pickle.loads(pickle.dumps(spec))
            assert (again.name, again.dtype, again.shape, again.nbytes) == (
                "x",
                tensor.dtype,
                tensor.shape,
                tensor.nbytes,
            )
            assert same(read(again), tensor)

    def test_locating_reads_no_data(self, tmp_path) -> None:
        path = self.written(tmp_path, values(torch.float32, (5, 3)))
        with path.open("rb+") as file:
            (spec,) = self.format.locate(path, Schema())
            assert isinstance(spec.location, Extent)
            file.seek(spec.location.offset)
            file.write(bytes(spec.nbytes))
        assert same(read(spec), torch.zeros(5, 3))

    def test_unknown_rows_beforehand(self, tmp_path) -> None:
        writer = self.format.writer(self.path(tmp_path), Schema())
        if self.rows_may_be_unknown:
            write(writer, "x", values(torch.int16, (11, 2)), rows_known=False, block=4)
            writer.close()
        else:
            with pytest.raises(IncompatibleOptionsError, match="number of rows"):
                writer.begin("x", torch.int16, (2,), None)
            writer.abort()

    @pytest.mark.parametrize("steps", range(4))
    def test_what_is_abandoned_opens_nowhere(self, tmp_path, steps) -> None:
        for compression in self.compressions:
            path = self.path(tmp_path)
            writer = self.format.writer(path, Schema(), compression=compression)
            self.steps(writer, steps)
            writer.abort()
            writer.abort()
            self.refused(path)
            with pytest.raises(ClosedError, match="abandoned"):
                writer.begin("y", torch.float32, (3,), 4)

    @staticmethod
    def steps(writer: FileWriter, n: int) -> None:
        for step in [
            lambda: writer.begin("x", torch.float32, (30,), 1000),
            lambda: writer.append(torch.ones(1000, 30)),
            writer.end,
        ][:n]:
            step()

    def test_what_a_killed_process_leaves_opens_nowhere(self, tmp_path) -> None:
        # One process for all stages, since it takes seconds to start; it ends with every writer still open.
        done = subprocess.run(
            [sys.executable, "-c", _KILLED, self.name, tmp_path, repr(self.compressions)],
            check=False,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 9, done.stderr
        left = sorted(tmp_path.iterdir())
        assert len(left) == 4 * len(self.compressions)
        for path in left:
            self.refused(path)

    def test_closing_needs_a_whole_tensor(self, tmp_path) -> None:
        path = self.path(tmp_path)
        writer = self.format.writer(path, Schema())
        writer.begin("x", torch.float32, (3,), 4)
        with pytest.raises(IncompatibleOptionsError, match="abort"):
            writer.close()
        writer.append(torch.ones(3, 3))
        with pytest.raises(IntegrityError, match="4 rows were promised, only 3 came"):
            writer.end()
        writer.append(torch.ones(1, 3))
        writer.end()
        writer.close()
        writer.close()
        assert same(read(self.format.locate(path, Schema())[0]), torch.ones(4, 3))

    def test_blocks_that_do_not_fit_are_refused(self, tmp_path) -> None:
        writer = self.format.writer(self.path(tmp_path), Schema())
        with pytest.raises(IncompatibleOptionsError, match="begin, append"):
            writer.append(torch.ones(2, 3))
        with pytest.raises(IncompatibleOptionsError, match="begin, append"):
            writer.end()
        writer.begin("x", torch.float32, (3,), 4)
        for block in (torch.ones(2, 4), torch.ones(2, 3, dtype=torch.float64), torch.ones(3), torch.tensor(1.0)):
            with pytest.raises(IntegrityError, match="expected a block of float32"):
                writer.append(block)
        with pytest.raises(IntegrityError, match="4 rows were promised, 5 came"):
            writer.append(torch.ones(5, 3))
        writer.abort()

    @pytest.mark.parametrize("name", ["", "a/b", "..", ".hidden", "_part", "a\\b", "C:x", "a\nb", "n" * 201])
    def test_names_that_cannot_be_files_are_refused(self, tmp_path, name) -> None:
        writer = self.format.writer(self.path(tmp_path), Schema())
        with pytest.raises(IncompatibleOptionsError, match="cannot name a tensor"):
            writer.begin(name, torch.float32, (3,), 4)
        writer.abort()

    def test_dtypes_it_cannot_hold_are_refused(self, tmp_path) -> None:
        writer = self.format.writer(self.path(tmp_path), Schema())
        with pytest.raises(IncompatibleOptionsError):
            writer.begin("x", torch.quint8, (3,), 4)
        writer.abort()

    def test_an_existing_file_is_never_written_over(self, tmp_path) -> None:
        path = self.path(tmp_path)
        path.write_bytes(b"precious")
        with pytest.raises(FileExistsError):
            self.format.writer(path, Schema())
        assert path.read_bytes() == b"precious"

    def test_unknown_compression(self, tmp_path) -> None:
        with pytest.raises(IncompatibleOptionsError, match="compression"):
            self.format.writer(self.path(tmp_path), Schema(), compression="zip")
        assert not self.path(tmp_path).exists()

    def test_missing_file(self, tmp_path) -> None:
        with pytest.raises(DatasetNotFoundError, match="no such file") as caught:
            self.format.locate(tmp_path / "nothing", Schema())
        assert caught.value.path == tmp_path / "nothing"

    def test_what_is_not_a_file(self, tmp_path) -> None:
        os.mkfifo(tmp_path / "pipe")
        for path in (tmp_path, tmp_path / "pipe"):
            with pytest.raises(CorruptFileError, match="regular file"):
                self.format.locate(path, Schema())

    @pytest.mark.parametrize("content", [b"", b"\0", b"PK", b"\x93NUMPY", b"\x89HDF\r\n\x1a\n", b"x" * 10_000])
    def test_what_is_of_no_format(self, tmp_path, content) -> None:
        path = self.path(tmp_path)
        path.write_bytes(content)
        self.refused(path)
