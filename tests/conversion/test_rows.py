"""Blocks of any tensor equal the tensor, whatever its layout; damage gives an error and ends the thread."""

from __future__ import annotations

import threading

import h5py
import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st

from jasper_store.conversion import rows, writeback
from jasper_store.conversion.checksum import Hasher, checksum, checksum_of
from jasper_store.errors import CorruptFileError
from jasper_store.formats.base import Extent, Inline, Schema, TensorSpec
from jasper_store.formats.registry import FORMATS
from jasper_store.store.tensors import block_rows
from tests.conversion.samples import same_bits


def whole(spec: TensorSpec, nbytes: int) -> torch.Tensor:
    blocks = [block.clone() for block in rows.read_blocks(spec, nbytes)]
    if not spec.shape:
        (block,) = blocks
        return block
    return torch.cat([torch.empty((0, *spec.shape[1:]), dtype=spec.dtype), *blocks])


@given(
    shape=st.lists(st.integers(1, 9), max_size=4),
    order=st.randoms(use_true_random=False),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.int8, torch.int64, torch.bool]),
    block=st.sampled_from([1, 40, 1 << 20]),
    scratch=st.sampled_from([8, 64, 1 << 20]),
)
def test_every_stride_order_reads_as_torch_sees_it(tmp_path_factory, shape, order, dtype, block, scratch):
    path = tmp_path_factory.mktemp("rows") / "a.bin"
    dims = list(range(len(shape)))
    order.shuffle(dims)
    # Wider than the tensor in every dimension, so that the view has holes; then the dimensions are exchanged.
    base = torch.randint(-100, 100, [n + order.randint(0, 2) for n in shape]).to(dtype)
    view = base[tuple(slice(0, n) for n in shape)].permute(dims)
    path.write_bytes(bytes(16) + base.reshape(-1).view(torch.uint8).numpy().tobytes())
    spec = TensorSpec("a", dtype, tuple(view.shape), Extent(path, 16, view.stride()))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rows, "SCRATCH_NBYTES", scratch)
        assert same_bits(whole(spec, block), view)


def test_an_expanded_view_reads_its_one_row_again(tmp_path):
    path = tmp_path / "a.bin"
    path.write_bytes(torch.arange(4.0).numpy().tobytes())
    spec = TensorSpec("a", torch.float32, (5, 4), Extent(path, 0, (0, 1)))
    assert torch.equal(whole(spec, 40), torch.arange(4.0).expand(5, 4))


def test_rows_larger_than_the_memory_bound_are_views_of_a_map(tmp_path, monkeypatch):
    monkeypatch.setattr(rows, "BLOCK_NBYTES", 16)
    values = torch.randn(3, 500)
    path = tmp_path / "a.bin"
    path.write_bytes(values.numpy().tobytes())
    spec = TensorSpec("a", torch.float32, (3, 500), Extent(path, 0))
    assert isinstance(rows.open_rows(spec), rows._HugeRows)
    assert torch.equal(whole(spec, 16), values)


def test_compressed_blocks_are_whole_chunks(tmp_path):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.create_dataset("a", data=np.arange(1000.0).reshape(100, 10), chunks=(7, 4), compression="gzip")
    (spec,) = FORMATS["hdf5"].locate(tmp_path / "a.h5", Schema())
    assert block_rows(spec, 1) == 7
    assert block_rows(spec, 80 * 21) == 21
    assert torch.equal(whole(spec, 80 * 21), torch.arange(1000.0, dtype=torch.float64).reshape(100, 10))


def test_a_truncated_file_is_an_error_and_no_thread_is_left(tmp_path):
    path = tmp_path / "a.bin"
    path.write_bytes(bytes(1000))
    spec = TensorSpec("a", torch.float32, (1000,), Extent(path, 0))
    with pytest.raises(CorruptFileError, match=r"needs bytes up to .*, found the end of the file at 1,000"):
        whole(spec, 400)
    assert not [t for t in threading.enumerate() if t.name == "read a"]


def test_a_reader_that_is_given_up_ends_its_thread(tmp_path):
    path = tmp_path / "a.bin"
    path.write_bytes(bytes(4000))
    blocks = rows.read_blocks(TensorSpec("a", torch.float32, (1000,), Extent(path, 0)), 400)
    next(blocks)
    blocks.close()
    assert not [t for t in threading.enumerate() if t.name == "read a"]


@pytest.mark.parametrize("value", [torch.tensor(3), torch.empty(0, 4), torch.empty(3, 0), torch.arange(6).view(2, 3)])
def test_values_that_came_with_the_header(tmp_path, value):
    spec = TensorSpec("a", value.dtype, tuple(value.shape), Inline(tmp_path, value))
    assert same_bits(whole(spec, 8), value)
    assert checksum(spec) == checksum_of(value)


def test_a_checksum_is_of_the_values_and_not_of_the_blocks():
    values = torch.randn(100, 7)
    hasher = Hasher()
    for start in range(0, 100, 13):
        hasher.update(values[start : start + 13])
    assert hasher.hexdigest() == checksum_of(values) == checksum_of(values.t().contiguous().t())
    changed = values.clone()
    changed[50, 3] += 1e-6
    assert checksum_of(changed) != checksum_of(values)
    # The definition, so that other tools can compare: xxh3-128 of the little-endian bytes.
    import xxhash

    assert checksum_of(values) == xxhash.xxh3_128_hexdigest(values.numpy().tobytes())


@pytest.mark.parametrize("drop", [True, False])
@pytest.mark.parametrize("start", [None, 100])
def test_following_a_writer(tmp_path, monkeypatch, drop, start):
    import xxhash

    monkeypatch.setattr(writeback, "WINDOW_NBYTES", 1000)
    path = tmp_path / "a.bin"
    data = np.random.default_rng(0).bytes(12_345)
    with path.open("wb", buffering=0) as file:
        file.write(bytes(100))
        follower = writeback.WriteBehind(path, start=start, drop=drop)
        for at in range(0, len(data), 700):
            file.write(data[at : at + 700])
            follower.written(min(at + 700, len(data)))
        found = follower.finish(len(data))
    follower.close()
    assert found == (None if start is None else xxhash.xxh3_128_hexdigest(data))


def test_following_a_writer_that_wrote_less_proves_nothing(tmp_path):
    path = tmp_path / "a.bin"
    path.write_bytes(bytes(100))
    follower = writeback.WriteBehind(path, start=0, drop=False)
    assert follower.finish(200) is None


def test_a_failing_disk_is_reported_by_the_writer(tmp_path, monkeypatch):
    def fail(*args: object) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(writeback, "_sync_range", fail)
    path = tmp_path / "a.bin"
    path.write_bytes(bytes(100))
    follower = writeback.WriteBehind(path, start=0, drop=False)
    with pytest.raises(OSError, match="Input/output"):
        follower.finish(100)
