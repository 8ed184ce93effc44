"""Shuffled orders of an epoch that need no memory: keyed bijections of positions, computed where they are needed.

An order is a function from a position in the epoch to an index of the dataset. It is never materialised, so an
epoch of 10**9 samples costs as much memory as one of 10, resuming anywhere costs nothing, and any process
computes any part of it from (n, seed, epoch) alone. An order may be asked with a tensor on any device and answers
on that device.

Two shuffles are offered. :func:`order` mixes everything with everything. :func:`block_order` shuffles blocks of
consecutive rows and mixes rows inside a window of blocks, so that a disk reads runs instead of single rows;
``mixing`` says in figures what that costs in randomness.
"""

from __future__ import annotations

import hashlib
import operator
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, SupportsIndex, TypeAlias, cast, overload

import numpy as np
import torch

from jasper_store.errors import IncompatibleOptionsError
from jasper_store.native.library import library

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

__all__ = ["BlockOrder", "GlobalOrder", "Order", "SequentialOrder", "bijection", "block_order", "like", "order"]

#: Rows per block and blocks per window of the block order. Runs of 64 rows of 384 floats are read at 1.24 GB/s where
#: runs of 256 are read at 1.22; what a smaller window saves is memory: two windows, of all steering variants, must
#: stay in the page cache at a time (docs/notes-paging.md).
BLOCK, WINDOW = 64, 128
#: Below this a sorted table of hashes is exact, better mixed than a Feistel network of a few bits, and still small.
TABLE_LIMIT = 4096
#: Positions that are computed at a time on the host: their intermediate results stay in the cache.
CHUNK = 8192
#: Four rounds make a Feistel network pseudo-random; two more leave nothing for a statistical test to find.
ROUNDS = 6
#: Above this the two halves of a position no longer fit the 31-bit arithmetic of :meth:`_Feistel.apply`.
MAX_LENGTH = 1 << 60
#: int64 numbers: a numpy array on the host, where it costs half of what a tensor costs and never waits for other
#: threads; a tensor on a device. All arithmetic below means the same on both.
_Numbers: TypeAlias = Any
_MASK31 = (1 << 31) - 1
# Odd multipliers of well-tested mixers (golden ratio, PCG), as signed 64-bit numbers; int64 tensors wrap around.
_SPREAD, _MIX = 0x9E3779B1, 0x5851F42D4C957F2D


def _keys(count: int, *parts: int | str) -> list[int]:
    """``count`` non-negative 62-bit keys that depend on every part; the same on every machine and release."""
    seed = ":".join(map(str, parts)).encode()
    digest = hashlib.blake2b(seed, digest_size=8 * count, person=b"jasper-order").digest()
    return [int.from_bytes(digest[i : i + 8], "little") >> 2 for i in range(0, 8 * count, 8)]


class _Feistel:
    """A bijection of [0, n): a Feistel network over 2**h x b >= n values, walked until it lands below n.

    The left half has a power of two of values and is mixed by xor; the right half has just as many as are
    needed and is mixed by addition modulo b. Fewer than 2**h <= sqrt(n) values are superfluous, so that less
    than one position in sqrt(n) has to be walked.
    """

    def __init__(self, n: int, keys: Sequence[int]) -> None:
        self.n = n
        self.keys = tuple(keys)
        self.bits = (n - 1).bit_length() // 2
        self.right = -(-n >> self.bits)
        self._packed = np.array([n, self.bits, self.right, len(self.keys), *self.keys], dtype=np.int64)

    def apply(self, x: _Numbers) -> _Numbers:
        """Images of int64 values in [0, n); the argument is kept."""
        compiled = library()
        if compiled is not None and isinstance(x, np.ndarray):
            x = np.ascontiguousarray(x, dtype=np.int64)
            images = np.empty_like(x)
            compiled.jasper_shuffle(self._packed.ctypes.data, x.ctypes.data, len(x), images.ctypes.data)
            return images
        return self.by_arrays(x)

    def by_arrays(self, x: _Numbers) -> _Numbers:
        """The same by numpy or torch, on any device, also where the library was not built."""
        out = self._rounds(x)
        if self.right << self.bits == self.n:
            return out
        walking = _where(out >= self.n)
        while len(walking):
            moved = self._rounds(out[walking])
            out[walking] = moved
            walking = walking[moved >= self.n]
        return out

    def _rounds(self, x: _Numbers) -> _Numbers:
        mask, b = (1 << self.bits) - 1, self.right
        left, right = x & mask, x >> self.bits
        for number, key in enumerate(self.keys):
            mixed = (left if number % 2 else right) * _SPREAD
            mixed += key
            mixed ^= mixed >> 29
            mixed *= _MIX
            mixed >>= 33
            if number % 2:
                # The upper bits scaled to [0, b) without a division; the addition may pass b once.
                mixed &= _MASK31
                mixed *= b
                mixed >>= 31
                right += mixed
                right -= (right >= b) * b
            else:
                mixed &= mask
                left ^= mixed
        right <<= self.bits
        right |= left
        return right


class _Table:
    """A bijection of [0, n) for small n: the ranks of n hashes, kept as a table."""

    def __init__(self, n: int, keys: Sequence[int]) -> None:
        # Every step below is a bijection of 64-bit numbers, so no two hashes are equal and the ranking is exact.
        hashes = np.arange(n, dtype=np.int64)
        for key in keys[:3]:
            hashes += key
            hashes *= _MIX
            hashes ^= (hashes >> 31) & ((1 << 33) - 1)
        self.table = np.argsort(hashes)

    def apply(self, x: _Numbers) -> _Numbers:
        """Images of int64 values in [0, n)."""
        return like(self.table, x)[x]


def _where(mask: _Numbers) -> _Numbers:
    """Indices at which a mask is set."""
    return mask.nonzero().squeeze(1) if isinstance(mask, torch.Tensor) else np.flatnonzero(mask)


def like(table: np.ndarray[Any, Any], numbers: _Numbers) -> _Numbers:
    """A table in the form of the numbers that index it: an array, or a tensor on their device."""
    return torch.from_numpy(table).to(numbers.device) if isinstance(numbers, torch.Tensor) else table


def bijection(n: int, *parts: int | str) -> _Feistel | _Table:
    """A bijection of [0, n) that depends on every part."""
    keys = _keys(ROUNDS, n, *parts)
    return _Table(n, keys) if n <= TABLE_LIMIT else _Feistel(n, keys)


@dataclass(frozen=True)
class Order:
    """A permutation of ``range(n)``: position in the epoch to index of the dataset. Immutable, picklable, O(1) memory.

    ``len(order)`` is n. ``order[position]`` is an int for an int (negative ones count from the end); for a 1-D
    integer tensor, array, list, range or slice of positions it is an int64 tensor of the same length, on the
    tensor's device. Any thread or process may ask at any time.

    Attributes:
        n: how many indices are ordered.
        seed: decides the shuffle, together with the epoch.
        epoch: number of the epoch; each has its own shuffle.
    """

    n: int
    seed: int = 0
    epoch: int = 0

    #: What ``create_loader(order=...)`` calls it, and what a saved state remembers.
    kind = "sequential"

    @property
    def words(self) -> str:
        """What a saved state remembers of it."""
        return self.kind

    def __post_init__(self) -> None:
        if not 0 <= self.n <= MAX_LENGTH:
            msg = f"an order needs 0 <= n <= 2**60, got n={self.n}; pass the number of samples, len(dataset)"
            raise IncompatibleOptionsError(msg)

    def __len__(self) -> int:
        return self.n

    def __iter__(self) -> Iterator[int]:
        """Yield the indices one by one, computing some thousand at a time."""
        for start in range(0, self.n, TABLE_LIMIT):
            yield from self.at(torch.arange(start, min(start + TABLE_LIMIT, self.n))).tolist()

    @overload
    def __getitem__(self, positions: int) -> int: ...
    @overload
    def __getitem__(self, positions: torch.Tensor | np.ndarray | Sequence[int] | slice) -> torch.Tensor: ...
    def __getitem__(self, positions: int | torch.Tensor | np.ndarray | Sequence[int] | slice) -> int | torch.Tensor:
        """Index, or indices, at one or many positions of the epoch.

        Raises:
            IndexError: a position is outside the epoch.
            TypeError: positions are not integers.
        """
        if isinstance(positions, slice):
            positions = range(self.n)[positions]
        if isinstance(positions, range):
            positions = torch.arange(positions.start, positions.stop, positions.step)
        if not isinstance(positions, (torch.Tensor, np.ndarray, list, tuple)):
            # range() brings the index protocol, negative positions and the error with it.
            return int(self.at(torch.tensor([range(self.n)[operator.index(cast("SupportsIndex", positions))]]))[0])
        return self.at(self._checked(torch.as_tensor(positions)))

    def _checked(self, positions: torch.Tensor) -> torch.Tensor:
        if positions.numel() == 0:
            return positions.to(torch.int64)
        if positions.dtype == torch.bool or positions.is_floating_point() or positions.ndim != 1:
            msg = f"positions must be one-dimensional integers, got {positions.dtype} of shape {tuple(positions.shape)}"
            raise TypeError(msg)
        low, high = (int(bound) for bound in torch.aminmax(positions))
        if low < 0 or high >= self.n:
            msg = f"position {low if low < 0 else high} is outside an epoch of {self.n} samples, 0 to {self.n - 1}"
            raise IndexError(msg)
        return positions.to(torch.int64)

    def at(self, positions: torch.Tensor) -> torch.Tensor:
        """Indices at int64 ``positions`` [k] known to be in [0, n): the unchecked form that samplers use."""
        if positions.device.type == "cpu":
            asked = positions.numpy()
            found = np.empty_like(asked)
            for start in range(0, len(asked), CHUNK):
                found[start : start + CHUNK] = self._at(asked[start : start + CHUNK])
            return torch.from_numpy(found)
        computed: torch.Tensor = self._at(positions)
        return computed

    def _at(self, positions: _Numbers) -> _Numbers:
        """Indices at positions, as a new array or tensor."""
        return positions + 0


class SequentialOrder(Order):
    """The order of the file: position i holds index i, in every epoch."""


class GlobalOrder(Order):
    """A full shuffle by a keyed bijection; see :func:`order`."""

    kind = "global"

    @cached_property
    def _shuffle(self) -> _Feistel | _Table:
        return bijection(self.n, "rows", self.seed, self.epoch)

    def _at(self, positions: _Numbers) -> _Numbers:
        return self._shuffle.apply(positions) if self.n else positions


@dataclass(frozen=True)
class BlockOrder(Order):
    """Blocks shuffled over the whole dataset, rows mixed inside a window of blocks; see :func:`block_order`.

    Attributes:
        block: consecutive rows that stay together on the way from the disk.
        window: blocks whose rows are mixed with each other.
    """

    block: int = BLOCK
    window: int = WINDOW

    kind = "block"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.block < 1 or self.window < 1:
            msg = f"a block order needs block >= 1 and window >= 1, got block={self.block}, window={self.window}"
            raise IncompatibleOptionsError(msg)

    @property
    def words(self) -> str:
        """What a saved state remembers of it."""
        return f"{self.kind} {self.block} x {self.window}"

    @property
    def span(self) -> int:
        """Rows of a full window."""
        return self.block * self.window

    @cached_property
    def _slots(self) -> int:
        return -(-self.n // self.block)

    @cached_property
    def _missing(self) -> int:
        """Rows that the last block of the file lacks."""
        return self._slots * self.block - self.n

    @cached_property
    def _partial_block_slot(self) -> int:
        """The slot of the epoch that holds the file's last, possibly shorter, block."""
        return _keys(1, "ragged", self.n, self.block, self.seed, self.epoch)[0] % self._slots

    @cached_property
    def _shuffle(self) -> _Feistel | _Table:
        # The full blocks share the remaining slots, so that no search is needed for the partial block's slot.
        return bijection(self._slots - 1, "blocks", self.block, self.seed, self.epoch)

    @property
    def n_windows(self) -> int:
        """Windows in the epoch."""
        return -(-self._slots // self.window)

    def window_bounds(self, number: int) -> tuple[int, int]:
        """First position of window ``number``, and the first position after it."""
        first, stop = number * self.window, min((number + 1) * self.window, self._slots)
        return (
            first * self.block - self._missing * (self._partial_block_slot < first),
            stop * self.block - self._missing * (self._partial_block_slot < stop),
        )

    def window_of(self, position: int) -> int:
        """Number of the window that holds a position."""
        ragged = self._partial_block_slot // self.window
        return (position + self._missing * (position >= self.window_bounds(ragged)[1])) // self.span

    def blocks_of(self, number: int) -> torch.Tensor:
        """Blocks of the dataset [<= window] that window ``number`` mixes, in the order of its slots."""
        return torch.from_numpy(self._blocks_of(number))

    def _blocks_of(self, number: int) -> np.ndarray[Any, Any]:
        slots = np.arange(number * self.window, min((number + 1) * self.window, self._slots))
        # What the partial block's slot is mapped to is replaced; it only has to be within bounds.
        others = np.minimum(slots - (slots > self._partial_block_slot), max(self._slots - 2, 0))
        blocks = self._shuffle.apply(others) if self._slots > 1 else slots
        found: np.ndarray[Any, Any] = np.where(slots == self._partial_block_slot, self._slots - 1, blocks)
        return found

    def _at(self, positions: _Numbers) -> _Numbers:
        if not len(positions):
            return positions
        first, last = self.window_of(int(positions.min())), self.window_of(int(positions.max()))
        if first == last:
            return self._in_window(first, positions)
        out = positions + 0
        for number in range(first, last + 1):
            start, stop = self.window_bounds(number)
            inside = _where((positions >= start) & (positions < stop))
            if len(inside):
                out[inside] = self._in_window(number, positions[inside])
        return out

    def _in_window(self, number: int, positions: _Numbers) -> _Numbers:
        start, stop = self.window_bounds(number)
        mix = bijection(stop - start, "window", number, self.n, self.block, self.seed, self.epoch)
        inner = mix.apply(positions - start)
        slot = self._partial_block_slot - number * self.window
        if self._missing and 0 <= slot < self.window:
            # After the partial block every row lies as if that block were full.
            inner += (inner >= slot * self.block + self.block - self._missing) * self._missing
        within = inner // self.block
        inner -= within * self.block
        inner += like(self._blocks_of(number) * self.block, positions)[within]
        return inner


def order(n: int, seed: int, epoch: int) -> GlobalOrder:
    """The permutation of ``range(n)`` that an epoch shuffles by; every position equally likely everywhere.

    Args:
        n: number of samples, 0 to 2**60.
        seed: any integer.
        epoch: any integer; another epoch gives another, unrelated permutation.

    Returns:
        An :class:`Order`; ``order(n, seed, epoch)[positions]`` are the dataset indices at those positions.

    Raises:
        IncompatibleOptionsError: ``n`` is out of range.

    Source: a generalised Feistel network with cycle walking (Black and Rogaway, "Ciphers with Arbitrary Finite
    Domains", 2002); below 4 097 samples the ranks of keyed hashes.
    """
    return GlobalOrder(n, seed, epoch)


def block_order(n: int, seed: int, epoch: int, block: int = BLOCK, window: int = WINDOW) -> BlockOrder:
    """A permutation of ``range(n)`` that reads runs of ``block`` rows: for data that is larger than memory.

    The dataset is cut into blocks of consecutive rows; the blocks are shuffled over the whole dataset, and the
    rows of ``window`` blocks that are now adjacent are shuffled with each other. So a batch draws from
    up to ``window`` regions of the dataset, two rows that are neighbours in the file come within
    ``block * window`` samples of each other, and each window can be read block by block before it is needed.
    With at most ``window`` blocks it is a full shuffle.

    Args:
        n: number of samples.
        seed: any integer.
        epoch: any integer.
        block: consecutive rows per block.
        window: blocks per window.

    Raises:
        IncompatibleOptionsError: a size is out of range.
    """
    return BlockOrder(n, seed, epoch, block, window)
