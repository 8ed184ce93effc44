"""Changes inputs at random."""

from __future__ import annotations

import json
import random
from copy import deepcopy
from typing import Any

__all__ = ["changed"]

_NUMBERS = [0, 1, 2, 4, 7, 8, 16, 32, 64, 127, 128, 255, 256, 4096, 65535, 65536, 2**31 - 1, 2**31, 2**32 - 1]
_NUMBERS += [2**32, 2**48, 2**62, 2**63 - 1, 2**63, 2**64 - 16, 2**64 - 1]
_VALUES: list[Any] = [None, True, False, "", [], {}, [[]], [{}], 0, -1, 1, 2, 3, 4, 5, 8, 127, 2**31, 2**53 + 1, 2**62]
_VALUES += [2**63 - 1, 2**63, 2**64, 10**30, 0.5, -0.0, 1e308, float("inf"), float("nan"), "a" * 300, "a/" * 3000]
_VALUES += [
    "..",
    "../a.npy",
    "/",
    "/dev/zero",
    "\0",
    "\ud800",
    "\u212a",
    "a.npy",
    "x" * 20,
    "F32",
    "BF16",
    "int64",
    "[i]",
]


def changed(data: bytes, rng: random.Random, tokens: tuple[bytes, ...], others: list[bytes]) -> bytes:
    """One to six changes: bits, bytes, numbers, tokens, pieces that go, come again or come from another input.

    Half of the inputs that are JSON stay JSON, and have one to three other values in it.
    """
    if data[:1] == b"{" and rng.random() < 0.5 and (found := _changed_json(data, rng)) is not None:
        return found
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 3, 6))):
        at = int(rng.random() * (len(out) + 1))
        n = rng.choice((1, 1, 2, 4, 8, 16, 64))
        what = int(rng.random() * 8)
        if what == 0 and at < len(out):
            out[at] ^= 1 << int(rng.random() * 8)
        elif what == 1 and at < len(out):
            out[at] = int(rng.random() * 256)
        elif what == 2:
            width = rng.choice((1, 2, 4, 8))
            number = (rng.choice(_NUMBERS) % 256**width).to_bytes(width, rng.choice(("little", "big")))
            out[at : at + width] = number
        elif what == 3:
            del out[at : at + n]
        elif what == 4:
            out[at:at] = out[at : at + n] * rng.choice((1, 2, 20))
        elif what == 5 and tokens:
            out[at : at + rng.choice((0, n))] = rng.choice(tokens)
        elif what == 6:
            other = rng.choice(others)
            begin = int(rng.random() * (len(other) + 1))
            out[at : at + n] = other[begin : begin + n]
        else:
            begin = int(rng.random() * (len(out) + 1))
            out[at : at + n] = out[begin : begin + n]
    return bytes(out)


def _changed_json(data: bytes, rng: random.Random) -> bytes | None:
    """Other values, keys and lengths in a JSON object; ``None`` if it is none."""
    try:
        root = json.loads(data)
    except (ValueError, RecursionError):
        return None
    for _ in range(rng.choice((1, 1, 2, 3))):
        nodes: list[tuple[Any, Any]] = []
        stack = [root]
        while stack:
            node = stack.pop()
            keys = list(node) if isinstance(node, dict) else range(len(node))
            nodes += [(node, key) for key in keys]
            stack += [node[key] for key in keys if isinstance(node[key], (dict, list))]
        if not nodes:
            break
        node, key = rng.choice(nodes)
        what = rng.random()
        if what < 0.15:
            del node[key]
        elif what < 0.3 and isinstance(node, list):
            node[key:key] = [deepcopy(node[key]) for _ in range(rng.choice((1, 2, 20)))]
        elif what < 0.3:
            node[str(rng.choice(_VALUES))] = deepcopy(node[key])
        elif what < 0.5:
            other, place = rng.choice(nodes)
            node[key] = deepcopy(other[place])  # so that nothing contains itself
        elif what < 0.6 and type(node[key]) in (int, float):
            node[key] += rng.choice((-1, 1))
        elif what < 0.7 and isinstance(node[key], str):
            node[key] = rng.choice((node[key] + node[key], node[key][:-1], node[key].upper(), "./" + node[key]))
        else:
            node[key] = deepcopy(rng.choice(_VALUES))
    try:
        return json.dumps(root).encode()
    except ValueError:
        return None
