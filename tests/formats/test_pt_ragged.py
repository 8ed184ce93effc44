"""Rows that are read side by side come out as those that are read one by one, whatever the pickle holds."""

from __future__ import annotations

import io
import itertools
import pickle
import struct

import pytest
import torch
from hypothesis import given, strategies as st

from jasper_store.formats.pt import ragged as pt_ragged
from tests.formats.conformance import relaxed

NUMBERED = 260
"""Rows whose numbers fit a byte come before those with numbers of four bytes, which are read side by side."""

# Every width that a pickle gives to an int, numbers whose bytes are instructions, and both sides of each border.
widths = st.sampled_from([0, 1, 255, 256, 65535, 65536, -1, 2**31 - 1, 2**31, -(2**31), -(2**31) - 1, 2**63 - 1])
instructions = st.sampled_from([0x5D, 0x65, 0x28, 0x725D, 0x2865, 0x5D725D72, 0x65656565, 0x4B4B4B4B])
rows = st.lists(st.lists(widths | instructions, max_size=5), max_size=40)


def one_by_one(data: bytes) -> tuple[list[int], list[int]] | None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pt_ragged, "_NUMBERED", b"never")
        return as_lists(pt_ragged.parse(data))


def as_lists(found: tuple[torch.Tensor, torch.Tensor] | None) -> tuple[list[int], list[int]] | None:
    return None if found is None else (found[0].tolist(), found[1].tolist())


def unpacked(found: tuple[list[int], list[int]] | None) -> list[list[int]]:
    assert found is not None
    values, offsets = found
    return [values[first:last] for first, last in itertools.pairwise(offsets)]


@pytest.fixture(params=[40, 300, 2 << 20], autouse=True)
def window(request, monkeypatch):
    monkeypatch.setattr(pt_ragged, "_WINDOW", request.param)


@pytest.fixture
def calls(monkeypatch):
    made: list[int] = []
    real = pt_ragged._side_by_side

    def counted(data, at):
        at, values, lengths = real(data, at)
        made.append(len(lengths))
        return at, values, lengths

    monkeypatch.setattr(pt_ragged, "_side_by_side", counted)
    return made


@relaxed
@given(rows=rows, before=st.sampled_from([NUMBERED, 990, 999, 1000, 1001]))
def test_numbered_rows(rows, before):
    rows = [[7]] * before + rows
    rows = [list(row) for row in rows]  # none of them twice
    data = pickle.dumps(rows, protocol=2)
    assert unpacked(as_lists(pt_ragged.parse(data))) == rows


def test_most_rows_are_read_side_by_side(calls):
    rows = [[n % 7, n * 1000][: n % 3] for n in range(5000)]
    assert unpacked(as_lists(pt_ragged.parse(pickle.dumps(rows, protocol=2)))) == rows
    assert sum(calls) > 3000


def test_a_number_that_holds_the_head_of_a_row():
    # A long of eight bytes has room for what the guess looks for: "]r" and the number of a row that is yet to come.
    for number in (NUMBERED + 2, NUMBERED + 3, NUMBERED + 20, NUMBERED + 5000):
        trap = int.from_bytes(b"\x00]r" + struct.pack("<i", number) + b"\x00", "little")
        rows = [[n] for n in range(NUMBERED)] + [[trap, n] for n in range(40)]
        assert unpacked(as_lists(pt_ragged.parse(pickle.dumps(rows, protocol=2)))) == rows


def test_what_is_guessed_in_vain_is_not_guessed_for_every_row(calls):
    rows = [[2**40 + n] for n in range(3000)]
    assert unpacked(as_lists(pt_ragged.parse(pickle.dumps(rows, protocol=2)))) == rows
    assert sum(calls) == 0
    if pt_ragged._WINDOW > 300:
        assert len(calls) < 10


@relaxed
@given(rows=rows, place=st.integers(0, 10**6), byte=st.integers(0, 255), cut=st.booleans())
def test_damage_is_judged_alike(rows, place, byte, cut):
    data = bytearray(pickle.dumps([[n, 300] for n in range(NUMBERED)] + rows, protocol=2))
    place = len(data) - 1 - place % (len(data) - 2000)
    if cut:
        del data[place:]
    else:
        data[place] = byte
    assert as_lists(pt_ragged.parse(bytes(data))) == one_by_one(bytes(data))


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4, 5])
def test_other_pickles_are_left_to_others_or_read_alike(protocol):
    rows = [[n] * (n % 4) for n in range(600)]
    data = pickle.dumps(rows, protocol=protocol)
    assert as_lists(pt_ragged.parse(data)) == one_by_one(data)
    assert pickle.load(io.BytesIO(data)) == rows
