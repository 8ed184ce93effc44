from __future__ import annotations

import zlib

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from jasper_store.formats.hdf5.deflate import InflateError, Workspace, inflate, shuffle

KINDS = {
    "noise": lambda rng, n: rng.integers(0, 256, n, dtype=np.uint8),
    "zeros": lambda rng, n: np.zeros(n, np.uint8),
    "few values": lambda rng, n: rng.choice(np.array([3, 4, 5, 200], np.uint8), n, p=[0.5, 0.3, 0.15, 0.05]),
    "repeats": lambda rng, n: np.resize(rng.integers(0, 256, 300, dtype=np.uint8), n),
    "steps": lambda rng, n: (np.arange(n) % 256).astype(np.uint8),
}
ITEMSIZES = [1, 2, 4, 8]


def compress(chunks: np.ndarray, itemsize: int) -> list[bytes]:
    return compress_in(Workspace(), chunks, itemsize)


def compress_in(work: Workspace, chunks: np.ndarray, itemsize: int) -> list[bytes]:
    count, nbytes = chunks.shape
    work.fit(count, nbytes, itemsize)
    work.data[: chunks.size] = chunks.reshape(-1)
    return [bytes(stream) for stream in work.compress(count, nbytes, itemsize)]


def chunks_of(kinds: list[str], elements: int, itemsize: int) -> np.ndarray:
    """A chunk per kind; all of its planes are of that kind."""
    rng = np.random.default_rng(0)
    planes = np.array([[KINDS[kind](rng, elements) for _ in range(itemsize)] for kind in kinds], np.uint8)
    chunks: np.ndarray = planes.transpose(0, 2, 1).reshape(len(kinds), -1)
    return chunks


def shuffled(chunks: np.ndarray, itemsize: int) -> np.ndarray:
    planes: np.ndarray = np.empty((len(chunks), itemsize, chunks.shape[1] // itemsize), np.uint8)
    shuffle(chunks.copy(), itemsize, planes)
    return planes


def check(chunks: np.ndarray, itemsize: int) -> int:
    """Compress, compare what other readers find, and return the bytes that it took."""
    streams = compress(chunks, itemsize)
    for stream, planes in zip(streams, shuffled(chunks, itemsize), strict=True):
        assert zlib.decompress(stream) == planes.tobytes()
        assert inflate(stream, planes.nbytes) == planes.tobytes()
    return sum(map(len, streams))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("elements", [1, 7, 4096, 65535, 65536, 100_000])
@pytest.mark.parametrize("itemsize", ITEMSIZES)
def test_any_reader_of_zlib_streams_reads_it(kind, elements, itemsize):
    chunks = chunks_of([kind] * 2, elements, itemsize)
    # Noise grows by what its stored blocks need, five bytes in 65 535, and nothing else.
    assert check(chunks, itemsize) <= chunks.nbytes + 2 * (itemsize * 5 * (elements // 65535 + 1) + 2 + 4)


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.sampled_from(sorted(KINDS)), min_size=1, max_size=6), st.integers(1, 3000), st.sampled_from(ITEMSIZES)
)
def test_neighbours_of_any_kinds(kinds, elements, itemsize):
    chunks = chunks_of(kinds, elements, itemsize)
    assert check(chunks, itemsize) <= chunks.nbytes + len(kinds) * (itemsize * 5 + 6)


@settings(max_examples=100, deadline=None)
@given(st.data(), st.sampled_from(ITEMSIZES))
def test_chunks_of_any_bytes(data, itemsize):
    count, elements = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 60))
    nbytes = elements * itemsize
    found = data.draw(st.binary(min_size=count * nbytes, max_size=count * nbytes))
    check(np.frombuffer(found, np.uint8).reshape(count, nbytes), itemsize)


@pytest.mark.parametrize(("kind", "ratio"), [("zeros", 0.01), ("few values", 0.27), ("repeats", 0.05), ("steps", 0.05)])
@pytest.mark.parametrize("itemsize", ITEMSIZES)
def test_what_has_order_shrinks(kind, ratio, itemsize):
    chunks = chunks_of([kind] * 4, 65536 // itemsize, itemsize)
    # Each plane brings its own code.
    assert check(chunks, itemsize) < ratio * chunks.nbytes + 4 * itemsize * 100


@pytest.mark.parametrize("kind", ["zeros", "few values", "steps"])
def test_noise_that_ends_is_noticed_at_once(kind):
    before, after = chunks_of(["noise"] * 4, 16384, 4), chunks_of([kind] * 12, 16384, 4)
    assert check(np.concatenate([before, after]), 4) < before.nbytes + 1.02 * check(after, 4) + 200
    assert check(np.concatenate([after, before]), 4) < before.nbytes + 1.02 * check(after, 4) + 200


def test_every_change_is_noticed():
    kinds = ["noise", "zeros", "few values", "repeats", "noise", "few values", "zeros", "noise", "repeats", "zeros"]
    chunks = chunks_of(kinds, 16384, 4)
    alone = sum(check(chunk[None], 4) for chunk in chunks)
    # Repeats of bytes that are spread like noise may be taken for noise that goes on.
    assert check(chunks, 4) < alone + 2 * 65536


def test_repeats_of_rows_between_rows_that_are_new():
    # As a steering vector that is the cluster's centroid: few rows, in any order, and now and then none of them.
    rng = np.random.default_rng(0)
    rows = rng.integers(0, 256, (6, 1536), dtype=np.uint8)
    chunks = np.stack([rows[rng.integers(0, 6, 42)].reshape(-1) for _ in range(16)])
    chunks[5] = chunks_of(["noise"], 42 * 384, 4)[0]
    assert check(chunks, 4) < 0.45 * chunks.nbytes


@settings(max_examples=50)
@given(st.binary(max_size=400), st.sampled_from(ITEMSIZES))
def test_shuffle_puts_equal_bytes_together(data, itemsize):
    values = np.frombuffer(data[: len(data) // itemsize * itemsize], np.uint8)
    planes = shuffled(values.reshape(1, -1), itemsize)[0]
    assert planes.tobytes() == b"".join(values.tobytes()[i::itemsize] for i in range(itemsize))


def test_a_workspace_is_used_again_for_other_sizes():
    work = Workspace()
    for count, elements, itemsize in [(3, 100, 4), (1, 5000, 8), (16, 7, 1), (2, 3000, 2)]:
        chunks = chunks_of(["few values"] * count, elements, itemsize)
        streams = compress_in(work, chunks, itemsize)
        assert [zlib.decompress(stream) for stream in streams] == [p.tobytes() for p in shuffled(chunks, itemsize)]


def test_streams_that_are_not_what_they_should_be():
    (stream,) = compress(np.arange(100, dtype=np.uint8).reshape(1, 100), 1)
    bomb = zlib.compress(bytes(10_000_000))
    cases = [
        (stream, 99),
        (stream, 101),
        (stream[:-1], 100),
        (stream[:20], 100),
        (b"", 100),
        (b"junk", 100),
        (stream[:-4] + bytes(4), 100),
        (bomb, 100),
    ]
    for data, nbytes in cases:
        with pytest.raises(InflateError):
            inflate(data, nbytes)
