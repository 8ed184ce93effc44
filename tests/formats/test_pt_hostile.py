"""Small ``.pt`` files that ask for much: time and memory stay in proportion to the file's size, and no file crashes."""

from __future__ import annotations

import struct
import zipfile
from pathlib import Path

import pytest

from tests.formats.confined import Outcome, open_confined

pytest.importorskip("resource", reason="limits of a child process are POSIX")

PROTO = b"\x80\x02"
LIMIT_SECONDS = 10
LIMIT_NBYTES = 1 << 30
GROWTH_NBYTES = 160 << 20
"""What the largest file here may take: 423 KB, of which each byte may become an object of Python's."""


def text(value: str) -> bytes:
    raw = value.encode()
    return b"X" + struct.pack("<I", len(raw)) + raw


def doubled(levels: int, start: bytes = b")") -> bytes:
    """A tuple that holds the tuple below it twice, and so on: 10 bytes a level, 2**levels when written out."""
    return start + b"".join(b"r%bj%b\x86" % ((struct.pack("<I", i),) * 2) for i in range(levels))


def flat_lists(count: int, length: int) -> bytes:
    """A dictionary of ``count`` names for one list of ``length`` ints."""
    names = b"".join(text(f"{i}") + b"h\x00" for i in range(1, count))
    return PROTO + b"}(" + text("0") + b"](" + b"K\x01" * length + b"eq\x00" + names + b"u."


def equal_numbers(rows: int) -> bytes:
    """Rows that are all remembered under one number, where the fast reader guesses from the numbers."""
    row = b"]r\x00\x00\x00\x01"
    return PROTO + b"](" + row * rows + b"e."


def overlapping_heads(count: int) -> bytes:
    """Ints whose bytes are the heads of rows, so that every guessed row reads on to the end of the window."""
    head = b"]r%bM\x00("  # also the bytes of the int that J reads, of the one that M reads, and an instruction
    body = b"".join(b"J" + head % struct.pack("<H", i) for i in range(1, count))
    return PROTO + b"](" + head % b"\0\0" + body + b"ee."


ROW_OF_TENSORS = (
    PROTO
    + b"("
    + text("storage")
    + b"ctorch\nLongStorage\n"
    + text("0")
    + text("cpu")
    + b"M\x00\x40tQq\x01"  # a storage of 16384 int64 is remembered as 1
    + b"ctorch._utils\n_rebuild_tensor_v2\nq\x02"
    + b"(h\x01K\x00%b\x85%b\x85\x89NtRq\x03"
    + b"](%be."
)

STREAMS = {
    "nested-tuples": PROTO + b")" + b"\x85" * 150_000 + b")R.",
    "nested-tuples-alone": PROTO + b")" + b"\x85" * 150_000 + b".",
    "nested-lists": PROTO + b"]" * 150_000 + b"a" * 149_999 + b".",
    "nested-dicts": PROTO + (b"}" + text("a")) * 30_000 + b"}" + b"s" * 30_000 + b".",
    "nested-dicts-and-tuples": PROTO + b"}" + (b"\x85" + b"q\x00}" + text("a") + b"h\x00s") * 20_000 + b".",
    "nested-in-a-key": PROTO + b"}" + b")" + b"\x85" * 150_000 + b"Ns.",
    "nested-from-outside": PROTO + b"]q\x00" + b"](h\x00e0]q\x01h\x00h\x01a0h\x01q\x00" * 20_000 + b".",
    "contains-itself": PROTO + b"]q\x00h\x00a.",
    "doubled-hashed": PROTO + doubled(40) + b")R.",
    "doubled-shown": PROTO + b"](" + doubled(22) + b"e.",
    "doubled-shown-40": PROTO + b"](" + doubled(40) + b"e.",
    "doubled-as-key": PROTO + b"}" + doubled(26) + b"Ns.",
    "doubled-as-name": PROTO + doubled(26) + b"h\x00\x93.",
    "doubled-as-storage": PROTO + doubled(26) + b"Q.",
    "flat-lists": flat_lists(20_000, 100_000),
    "rows-repeated": PROTO + b"](](" + b"K\x01" * 60_000 + b"eq\x00" + b"h\x00" * 60_000 + b"e.",
    "rows-of-nothing": PROTO + b"](]q\x00" + b"h\x00" * 200_000 + b"e.",
    "equal-numbers": equal_numbers(30_000),
    "overlapping-heads": overlapping_heads(30_000),
    "one-long-row": PROTO + b"](]r\x00\x01\x00\x00(" + b"K\x01" * 200_000 + b"e]r\x01\x01\x00\x00e.",
    "long-sizes-again": PROTO
    + b"("
    + b"K\x01" * 50_000
    + b"tq\x00\x85q\x01ctorch\nSize\nq\x020"
    + b"h\x02h\x01R0" * 15_000
    + b"N.",
    "long-arguments-again": PROTO
    + b"("
    + b"N" * 100_000
    + b"tq\x000ctorch._utils\n_rebuild_parameter\nq\x020"
    + b"h\x02h\x00R0" * 15_000
    + b"N.",
    "colliding-keys": PROTO
    + b"}("
    + b"".join(b"\x8a\x0c" + (i * (2**61 - 1)).to_bytes(12, "little") + b"N" for i in range(1, 20_000))
    + b"u.",
    "long-names": PROTO
    + ROW_OF_TENSORS.partition(b"](")[0][2:] % (b"K\x01", b"K\x01")
    + b"}("
    + text("a" * 200_000)
    + b"]("
    + b"h\x03" * 100_000
    + b"eu.",
    "long-global": PROTO + b"c" + b"a" * 100_000 + b"\n" + b"b" * 100_000 + b"\n.",
    "wide-strides": ROW_OF_TENSORS % (b"K\x02", b"M\xff\x3f", b"h\x03" * 50_000),
    "expanded-rows": ROW_OF_TENSORS % (b"J\xff\xff\xff\x0f", b"K\x00", b"h\x03"),
}


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory) -> dict[str, Outcome]:
    folder: Path = tmp_path_factory.mktemp("hostile")
    paths = []
    for name, stream in STREAMS.items():
        paths.append(folder / f"{name}.pt")
        with zipfile.ZipFile(paths[-1], "w") as archive:
            archive.writestr("a/data.pkl", stream)
            archive.writestr("a/data/0", bytes(16384 * 8))
    return open_confined("pt", paths, seconds=LIMIT_SECONDS, nbytes=LIMIT_NBYTES)


@pytest.mark.parametrize("name", STREAMS)
def test_a_small_file_takes_little(outcomes, name):
    outcome = outcomes[name]
    assert outcome.what in {"refused", "opened"}, outcome
    assert outcome.grown < GROWTH_NBYTES, outcome


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("nested-tuples", "nested"),
        ("nested-lists", "nested"),
        ("nested-dicts", "nested"),
        ("contains-itself", "used already"),
        ("doubled-hashed", "nested"),
        ("flat-lists", "more values"),
        ("colliding-keys", "texts as keys"),
        ("long-names", "at most"),
        ("long-global", "asks for"),
    ],
)
def test_the_reason_is_said(outcomes, name, why):
    assert outcomes[name].what == "refused"
    assert why in outcomes[name].why
    assert len(outcomes[name].why) < 600
