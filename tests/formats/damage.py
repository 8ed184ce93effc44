"""Damages a file in many ways and opens each; run as a script, so that a crash of a library is seen and survived.

``python -m tests.formats.damage FORMAT SEED COUNT FILE...`` prints what became of each damage and ends with status 0
if every one was either refused with CorruptFileError or opened with all its values inside the file.
"""

from __future__ import annotations

import contextlib
import random
import sys
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from jasper_store.errors import CorruptFileError, IntegrityError
from jasper_store.formats.base import Chunked, Extent, Inline, Parts, Schema, Streamed
from jasper_store.formats.hdf5.chunks import ChunkedReader
from jasper_store.formats.registry import readable, skipped_in
from jasper_store.formats.streams import ByteStream
from jasper_store.formats.texts import SupportsTexts
from tests.formats.conformance import read

if TYPE_CHECKING:
    from collections.abc import Callable

    from jasper_store.formats.base import TensorSpec

# Values this large can only come from a damaged shape; reading them would measure patience, not safety.
READ_AT_MOST = 1 << 26


def cuts(content: bytes, seed: int, count: int) -> list[bytes]:
    """The file ends too early, at both of its ends and anywhere between."""
    rng = random.Random(seed)
    edges = [0, 1, 7, 8, 9, len(content) - 1, len(content) - 2, len(content) // 2]
    places = edges + [rng.randrange(len(content)) for _ in range(count - len(edges))]
    return [content[:n] for n in places]


def flips(content: bytes, seed: int, count: int) -> list[bytes]:
    """One to three bytes are something else; half of them in the first page, where the headers are."""
    rng = random.Random(seed)
    damaged = []
    for i in range(count):
        copy = bytearray(content)
        for _ in range(rng.choice([1, 1, 3])):
            at = rng.randrange(min(len(copy), 4096) if i % 2 else len(copy))
            copy[at] = rng.choice([0, 255, copy[at] ^ 1 << rng.randrange(8), rng.randrange(256)])
        damaged.append(bytes(copy))
    return damaged


def opened(name: str, path: Path) -> str:
    """``"refused"`` or ``"opened"``; anything else that can happen raises."""
    return "refused" if error_of(name, path) else "opened"


def error_of(
    name: str, path: Path, seen: Callable[[TensorSpec, torch.Tensor], object] = lambda spec, values: None
) -> CorruptFileError | None:
    """Open a file and read its values as a consumer would; the error if it is refused.

    ``seen`` is called with each tensor of at most ``READ_AT_MOST`` bytes.
    """
    size = path.stat().st_size
    try:
        fmt = next(fmt for known, fmt in readable().items() if known == name)
        specs = fmt.locate(path, Schema())
        # A damaged type may become one that is skipped; strings are read as a conversion would.
        skipped = skipped_in(fmt, path, Schema())
        assert all(skip.reason for skip in skipped)
        for texts in fmt.texts(path, Schema()) if skipped and isinstance(fmt, SupportsTexts) else ():
            with contextlib.suppress(IntegrityError):
                assert sum(len(lengths) for _, lengths in texts.blocks()) == texts.rows
        for spec in specs:
            if isinstance(spec.location, Extent):
                strides = spec.location.strides
                if strides is None:
                    assert spec.location.offset + spec.nbytes <= size
                elif spec.nbytes:
                    last = sum((n - 1) * step for n, step in zip(spec.shape, strides, strict=True))
                    assert spec.location.offset + (last + 1) * spec.dtype.itemsize <= size
                assert spec.location.offset >= 0
            if isinstance(spec.location, Chunked):
                if spec.row_nbytes <= READ_AT_MOST:
                    with contextlib.closing(ChunkedReader(spec)) as reader:
                        rows = torch.empty((2, *spec.shape[1:]), dtype=spec.dtype)
                        reader.read_rows(torch.tensor([0, spec.n_rows - 1]), rows)
                        if spec.nbytes <= READ_AT_MOST:
                            values = torch.empty(spec.shape, dtype=spec.dtype)
                            reader.read_block(0, spec.n_rows, values)
                            seen(spec, values)
            elif isinstance(spec.location, Parts):
                ends = spec.location.offsets + np.diff(spec.location.starts) * spec.row_nbytes
                assert spec.location.offsets.min() >= 0
                assert ends.max() <= size
            elif isinstance(spec.location, Streamed):
                if spec.nbytes <= READ_AT_MOST:
                    with contextlib.closing(ByteStream(spec)) as stream:
                        values = torch.empty(spec.shape, dtype=spec.dtype)
                        stream.fill(values)
                        seen(spec, values)
            elif spec.nbytes <= READ_AT_MOST or isinstance(spec.location, Inline):
                values = read(spec)
                assert tuple(values.shape) == spec.shape
                seen(spec, values)
    except CorruptFileError as exc:
        return exc
    return None


def run(
    name: str, source: Path, folder: Path, seed: int, count: int, progress: Callable[[str], object] = str
) -> Counter[str]:
    """Open every damaged copy of a file, each under a name of its own."""
    content = source.read_bytes()
    outcomes: Counter[str] = Counter()
    for kind, copies in (("cut", cuts(content, seed, count)), ("flip", flips(content, seed, count))):
        for i, copy in enumerate(copies):
            path = folder / f"{kind}-{i}{source.suffix}"
            path.write_bytes(copy)
            progress(path.name)
            outcome = opened(name, path)
            if kind == "cut":
                assert outcome == "refused" or len(copy) == len(content), f"{path} opened after it was cut"
            outcomes[f"{kind} {outcome}"] += 1
            path.unlink()
    return outcomes


def main() -> None:
    """See the module's text."""
    name, seed, count, *sources = sys.argv[1:]
    for source in map(Path, sources):
        sys.stdout.write(f"{dict(run(name, source, source.parent, int(seed), int(count), say))}\n")


def say(name: str) -> None:
    """What was being opened is all that is known after a crash."""
    sys.stdout.write(f"{name}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
