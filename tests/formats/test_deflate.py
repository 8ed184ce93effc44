from __future__ import annotations

import zlib

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from jasper_store.formats.deflate import InflateError, compress, inflate, shuffle

KINDS = {
    "noise": lambda rng, n: rng.integers(0, 256, n, dtype=np.uint8),
    "zeros": lambda rng, n: np.zeros(n, np.uint8),
    "few values": lambda rng, n: rng.choice(np.array([3, 4, 5, 200], np.uint8), n, p=[0.5, 0.3, 0.15, 0.05]),
    "repeats": lambda rng, n: np.resize(rng.integers(0, 256, 300, dtype=np.uint8), n),
    "steps": lambda rng, n: (np.arange(n) % 256).astype(np.uint8),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n", [1, 7, 4096, 65535, 65536, 200_000])
def test_any_reader_of_zlib_streams_reads_it(kind, n):
    planes = np.stack([KINDS[kind](np.random.default_rng(i), n) for i in range(2)])
    stream = compress(planes)
    assert zlib.decompress(stream) == planes.tobytes()
    assert inflate(stream, planes.nbytes) == planes.tobytes()
    # Noise grows by what its stored blocks need, five bytes in 65 535, and nothing else.
    assert len(stream) <= planes.nbytes + 2 * 5 * (n // 65535 + 1) + 2 + 5 + 4


@pytest.mark.parametrize(("kind", "ratio"), [("zeros", 0.01), ("few values", 0.27), ("repeats", 0.05), ("steps", 0.05)])
def test_what_has_order_shrinks(kind, ratio):
    plane = KINDS[kind](np.random.default_rng(0), 65536).reshape(1, -1)
    assert len(compress(plane)) < ratio * plane.nbytes


@settings(max_examples=50)
@given(st.binary(max_size=400), st.sampled_from([1, 2, 4, 8]))
def test_shuffle_puts_equal_bytes_together(data, itemsize):
    values = np.frombuffer(data[: len(data) // itemsize * itemsize], np.uint8)
    planes = shuffle(values, itemsize)
    assert planes.tobytes() == b"".join(values.tobytes()[i::itemsize] for i in range(itemsize))


def test_streams_that_are_not_what_they_should_be():
    stream = compress(np.arange(100, dtype=np.uint8).reshape(1, 100))
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
