from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from jasper_store.errors import CorruptFileError
from jasper_store.formats.base import Chunked, Extent, TensorSpec
from jasper_store.paging import madvise as paging
from jasper_store.paging.mapping import FileMap
from jasper_store.store import mapped
from jasper_store.store.mapped import MappedTensor, rows_are_runs, why_not_mappable

ROWS, WIDTH = 4096, 384


@pytest.fixture
def tensor(tmp_path):
    """6 MiB of rows, large enough to be watched."""
    values = np.random.default_rng(0).standard_normal((ROWS, WIDTH), dtype=np.float32)
    path = tmp_path / "x.bin"
    path.write_bytes(b"\0" * 4096 + values.tobytes())
    spec = TensorSpec("x", torch.float32, (ROWS, WIDTH), Extent(path, 4096))
    return MappedTensor(spec, FileMap(path)), torch.from_numpy(values)


@pytest.fixture
def prefetched(monkeypatch):
    """Everything that is handed to the kernel."""
    seen = []
    monkeypatch.setattr(paging.MadviseBatcher, "prefetch", lambda self, ranges: seen.append(ranges.copy()))
    return seen


def rows(*numbers):
    return torch.tensor(numbers)


def test_cold_rows_are_prefetched_before_they_are_gathered(tensor, prefetched):
    x, values = tensor
    if paging.madvise_batcher().backend == "none":
        pytest.skip("this system cannot prefetch")
    index = rows(7, 4000, 7, 0)
    assert torch.equal(x.take(index), values[index])
    (ranges,) = prefetched
    expected = paging.row_ranges(x._address, WIDTH * 4, WIDTH * 4, index.numpy())
    assert np.array_equal(ranges, expected)


def test_rows_prefetched_ahead_are_not_prefetched_again(tensor, prefetched):
    x, values = tensor
    if paging.madvise_batcher().backend == "none":
        pytest.skip("this system cannot prefetch")
    batches = [torch.randint(ROWS, (64,), generator=torch.Generator().manual_seed(i)) for i in range(6)]
    for batch in batches[:3]:
        x.prefetch(batch)
    assert len(prefetched) == 3
    for i, batch in enumerate(batches[:3]):
        assert torch.equal(x.take(batch), values[batch])
        x.prefetch(batches[3 + i])
    assert len(prefetched) == 6
    for batch in batches[3:]:
        x.take(batch)
    assert len(prefetched) == 6
    x.take(batches[0])
    assert len(prefetched) == 7


def test_large_batches_are_prefetched_in_turn_with_their_gathers(tensor, prefetched, monkeypatch):
    x, values = tensor
    if paging.madvise_batcher().backend == "none":
        pytest.skip("this system cannot prefetch")
    # Nothing is read here, and the policy would soon notice.
    monkeypatch.setattr("jasper_store.paging.prefetch_policy._PATIENCE", 1 << 40)
    batches = [torch.randint(ROWS, (1000,), generator=torch.Generator().manual_seed(i)) for i in range(5)]
    x.prefetch(batches[0])
    x.prefetch(batches[1])
    assert len(prefetched) == 2, "nobody has taken anything yet, so all of them may be needed at once"
    assert torch.equal(x.take(batches[0]), values[batches[0]])
    x.prefetch(batches[2])
    assert len(prefetched) == 3
    out = torch.empty(1000, WIDTH)
    assert x.take(batches[1], out=out) is out
    assert torch.equal(out, values[batches[1]])
    assert len(prefetched) == 6
    assert np.array_equal(pages(prefetched[2:]), pages([x._prefetcher.ranges(batches[2])]))
    x.prefetch(batches[3])
    with pytest.raises(IndexError, match="row 4096 at position 700"):
        x.take(torch.cat([batches[2][:700], rows(ROWS)]))
    x.prefetch(batches[4])  # what was left is not forgotten
    assert np.array_equal(
        pages(prefetched[6:]), pages([x._prefetcher.ranges(batches[3]), x._prefetcher.ranges(batches[4])])
    )


def test_a_thread_that_only_prefetches_does_not_wait_for_gathers(tensor, prefetched):
    x, _ = tensor
    if paging.madvise_batcher().backend == "none":
        pytest.skip("this system cannot prefetch")
    index = torch.arange(0, ROWS, 3)
    x.take(index)
    before = len(prefetched)
    with ThreadPoolExecutor(1) as thread:
        thread.submit(x.prefetch, index).result()
    assert np.array_equal(pages(prefetched[before:]), pages([x._prefetcher.ranges(index)]))


def pages(ranges):
    """Every page of some arrays of ranges, each once."""
    found = [np.arange(start, start + length, paging.PAGE) for part in ranges for start, length in part.tolist()]
    return np.unique(np.concatenate(found))


def test_warm_rows_stop_being_prefetched(tensor, monkeypatch):
    x, values = tensor
    if paging.madvise_batcher().backend == "none":
        pytest.skip("this system cannot prefetch")
    x.take(range(ROWS))
    for i in range(20):
        index = torch.randint(ROWS, (256,), generator=torch.Generator().manual_seed(i))
        assert torch.equal(x.take(index), values[index])
    assert x.prefetching
    for _ in range(20):
        x.prefetch(index)
        assert torch.equal(x.take(index), values[index])
    assert not x.prefetching
    seen = []
    monkeypatch.setattr(paging.MadviseBatcher, "prefetch", lambda self, ranges: seen.append(ranges))
    for i in range(20):
        x.take(torch.randint(ROWS, (256,), generator=torch.Generator().manual_seed(i)))
    assert not seen


def test_rows_out_of_range_reach_the_kernel_never(tensor, prefetched):
    x, _ = tensor
    x.prefetch([ROWS, -1, 2**50, -(2**50)])
    assert not any(len(ranges) for ranges in prefetched)
    with pytest.raises(IndexError, match="row 1125899906842624 at position 1"):
        x.take([3, 2**50])
    stop = x._address + ROWS * WIDTH * 4
    for ranges in prefetched:
        assert (ranges[:, 0] >= x._address - paging.PAGE).all()
        assert (ranges.sum(axis=1) <= stop + paging.PAGE).all()


def test_a_small_tensor_is_prefetched_once_and_whole(tmp_path, prefetched):
    path = tmp_path / "small.bin"
    path.write_bytes(np.arange(5000, dtype=np.int64).tobytes())
    x = MappedTensor(TensorSpec("x", torch.int64, (5000,), Extent(path, 0)), FileMap(path))
    for _ in range(5):
        x.take(rows(3, 4))
        x.prefetch(rows(1))
    (ranges,) = prefetched
    assert ranges[:, 1].sum() == -(-40_000 // paging.PAGE) * paging.PAGE
    assert not x.prefetching


def test_a_scan_prefetches_one_block_ahead_and_all_of_it(tensor, prefetched):
    x, values = tensor
    blocks = list(x.blocks(1000))
    assert torch.equal(torch.cat(blocks), values)
    starts = [int(r[0, 0]) - x._address for r in prefetched]
    assert starts == sorted(starts)
    covered = set()
    for ranges in prefetched:
        for start, nbytes in ranges.tolist():
            covered |= set(range(start, start + nbytes, paging.PAGE))
    first = x._address - x._address % paging.PAGE
    assert covered == set(range(first, x._address + ROWS * WIDTH * 4, paging.PAGE))


def test_large_views_bring_read_ahead_back_until_rows_are_taken(tensor, monkeypatch):
    x, _ = tensor
    assert x.advice == "random"
    monkeypatch.setattr(mapped, "LARGE_VIEW", 1 << 20)
    x.tensor()
    assert x.advice == "normal"
    if paging.madvise_batcher().backend != "none":
        x.take(rows(1))
        assert x.advice == "random"


def test_dropping_keeps_private_writes(tensor):
    x, values = tensor
    x.tensor()[100].fill_(5.0)
    x.drop()
    x.drop_runs(np.array([0, 3, 5]), np.array([10**9, 3, 50]))
    for _ in x.blocks(100, drop_behind=True):
        pass
    assert (x.take(rows(100)) == 5.0).all()
    assert torch.equal(x.take(rows(99)), values[99:100])


def test_a_read_only_map_hands_out_copies(tensor):
    x, values = tensor
    x._fmap.writable = False
    again = MappedTensor(x.spec, x._fmap)
    whole = again.tensor()
    whole.zero_()
    again[3].zero_()
    assert torch.equal(again.take(range(ROWS)), values)


def test_other_columns_than_the_first(tmp_path):
    """A row stride wider than the row, as in a saved view of some columns."""
    whole = torch.arange(40 * 10, dtype=torch.float32).view(40, 10)
    path = tmp_path / "v.bin"
    path.write_bytes(whole.numpy().tobytes())
    spec = TensorSpec("v", torch.float32, (40, 3), Extent(path, 8, (10, 1)))
    assert rows_are_runs(spec)
    x = MappedTensor(spec, FileMap(path))
    assert torch.equal(x.take([5, 0, 39]), whole[[5, 0, 39], 2:5])
    assert torch.equal(torch.cat(list(x.blocks(7, drop_behind=True))), whole[:, 2:5])
    x.prefetch(range(40))


@pytest.mark.parametrize(
    ("shape", "strides", "runs"),
    [
        ((4, 3), None, True),
        ((4, 3), (3, 1), True),
        ((4, 3), (7, 1), True),
        ((4, 3), (1, 4), False),
        ((4, 1), (1, 4), True),
        ((4,), (2,), True),
        ((4, 2, 3), (6, 3, 1), True),
        ((4, 2, 3), (6, 1, 2), False),
        ((4, 3), (0, 1), True),
        ((0, 3), (1, 7), True),
        ((), None, True),
    ],
)
def test_which_rows_are_runs(tmp_path, shape, strides, runs):
    spec = TensorSpec("x", torch.float32, shape, Extent(tmp_path, 0, strides))
    assert rows_are_runs(spec) is runs


def test_what_cannot_be_mapped_says_why(tmp_path):
    chunked = TensorSpec("x", torch.float32, (2, 2), Chunked(tmp_path, "x", (1, 2), "gzip"))
    assert "no single place" in why_not_mappable(chunked)
    assert not rows_are_runs(chunked)
    with pytest.raises(CorruptFileError, match="cannot be mapped"):
        MappedTensor(chunked, FileMap(__file__))
    odd = TensorSpec("x", torch.float32, (2, 2), Extent(tmp_path, 3, (1, 2)))
    assert "neither aligned nor contiguous" in why_not_mappable(odd)
    assert not why_not_mappable(TensorSpec("x", torch.float32, (2, 2), Extent(tmp_path, 3)))


@pytest.mark.parametrize("place", ["large", "small"])
def test_a_file_that_is_cut_while_it_is_mapped(tensor, tmp_path, place):
    """Touching a page beyond the end of its file ends the process; nothing here may do so."""
    x, values = tensor
    if place == "small":
        path = tmp_path / "small.bin"
        path.write_bytes(values[:40].numpy().tobytes())
        x = MappedTensor(TensorSpec("x", torch.float32, (40, WIDTH), Extent(path, 0)), FileMap(path))
    with x.path.open("r+b") as file:
        file.truncate(10_000)
    scan = x.blocks(1)
    for use in (
        lambda: x.take(rows(39)),
        lambda: x.take([39], out=torch.empty(1, WIDTH)),
        lambda: x[39],
        lambda: x[30:],
        x.tensor,
        lambda: next(scan),
    ):
        with pytest.raises(CorruptFileError, match="truncated or is being rewritten in place"):
            use()
    x.prefetch(rows(39))
    x.drop()
    x.close()


def test_the_old_name_of_prefetch_reaches_the_override(tensor, prefetched):
    x, _ = tensor
    if paging.madvise_batcher().backend == "none":
        pytest.skip("this system cannot prefetch")
    x.announce(rows(7))
    assert len(prefetched) == 1
