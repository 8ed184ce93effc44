"""Mutates sound files at random and opens them, each under a limit of time and memory; a script, not a test.

``python -m tests.formats.fuzz FORMAT SECONDS SEED FOLDER`` works for so long, writes every input that crashes, hangs,
grows or raises what is not ours into ``FOLDER``, and prints the counts. Mutations know the formats: a pickle is put into
an archive with the right checksum, a safetensors header gets its length, HDF5's headers get their checksums again.
"""

from __future__ import annotations

import io
import json
import mmap
import os
import pickle
import random
import signal
import struct
import sys
import tempfile
import time
import traceback
import zipfile
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import numpy as np
import safetensors.torch
import torch

from tests.formats import damage, flips
from tests.formats.confined import confine, resident

if TYPE_CHECKING:
    from collections.abc import Callable

SECONDS = 5
NBYTES = 1 << 30
GROWTH_NBYTES = 300 << 20
PER_CHILD = 500
SUFFIXES = {"pt": ".pt", "npy": ".npy", "safetensors": ".safetensors", "hdf5": ".h5"}
INTERESTING = [0, 1, 2, 4, 7, 8, 16, 32, 64, 127, 128, 255, 256, 4096, 65535, 65536, 2**31 - 1, 2**31, 2**32 - 1]
INTERESTING += [2**32, 2**48, 2**62, 2**63 - 1, 2**63, 2**64 - 16, 2**64 - 1]
OPCODES = b"\x80\x95(0N\x88\x89KMJ\x8aGX\x8c]})\x85\x86\x87taesuqr\x94hjc\x93RQb."


def mutated(data: bytes, rng: random.Random, splices: list[bytes]) -> bytes:
    """One to six changes: bits, bytes, numbers, pieces that go, come again or come from elsewhere."""
    out = bytearray(data)
    for _ in range(rng.choice([1, 1, 1, 2, 3, 6])):
        at = rng.randrange(len(out) + 1) if out else 0
        n = rng.choice([1, 1, 2, 4, 8, 16, 64])
        what = rng.randrange(7)
        if what == 0 and at < len(out):
            out[at] ^= 1 << rng.randrange(8)
        elif what == 1 and at < len(out):
            out[at] = rng.randrange(256)
        elif what == 2:
            width = rng.choice([1, 2, 4, 8])
            out[at : at + width] = (rng.choice(INTERESTING) % 256**width).to_bytes(width, rng.choice(["little", "big"]))
        elif what == 3:
            del out[at : at + n]
        elif what == 4:
            out[at:at] = out[at : at + n] * rng.choice([1, 2, 50])
        elif what == 5:
            out[at:at] = rng.choice(splices)
        else:
            other = rng.randrange(len(out) + 1)
            out[at : at + n] = out[other : other + n]
    return bytes(out)


def pt_inputs(rng: random.Random) -> Callable[[], bytes]:
    base = torch.arange(24.0)
    kinds = [
        {"a": base.reshape(4, 6).t(), "b": base[3:9], "ids": [[1, 2], [300]], "n": 3, "row": [1.5, 2.5]},
        [[i, i * 1000] for i in range(300)],
        [torch.arange(i) for i in range(4)],
        torch.nn.Linear(2, 2).state_dict(),
        [tuple(range(i)) for i in range(5)],
    ]
    seeds = []
    for kind in kinds:
        file = io.BytesIO()
        torch.save(kind, file)
        with zipfile.ZipFile(file) as archive:
            names = {i.filename.partition("/")[2]: archive.read(i) for i in archive.infolist()}
        seeds.append((names.pop("data.pkl"), names, file.getvalue()))
    seeds += [(pickle.dumps(kinds[1], protocol=p), {}, b"PK") for p in (2, 3, 4, 5)]
    splices = [bytes([op]) for op in OPCODES] + [b"](", b"q\x00", b"h\x00", b"\x85" * 60, b"]r\0\0\0\0(", b"K\x01" * 40]

    def make() -> bytes:
        stream, records, whole = rng.choice(seeds)
        if rng.randrange(8) == 0:
            return mutated(whole, rng, splices)
        if rng.randrange(6) == 0:
            stream = b"\x80\x02" + bytes(rng.choice(OPCODES) for _ in range(rng.randrange(60))) + b"."
        out = io.BytesIO()
        with zipfile.ZipFile(out, "w") as archive:
            archive.writestr("x/data.pkl", mutated(stream, rng, splices))
            for name, data in records.items():
                archive.writestr(f"x/{name}", data)
        return out.getvalue()

    return make


def npy_inputs(rng: random.Random) -> Callable[[], bytes]:
    arrays = [np.arange(20.0).reshape(4, 5), np.asfortranarray(np.ones((3, 2), "f4")), np.array(3), np.zeros((0, 3))]
    seeds = []
    for array in arrays:
        file = io.BytesIO()
        np.save(file, array)
        seeds.append(file.getvalue())
    splices = [
        b"0x",
        b"(",
        b")",
        b"[",
        b"'",
        b"9" * 30,
        b"-",
        b"{",
        b"1e9",
        b"True",
        b"'O'",
        b",",
        b"None",
        b"9" * 5000,
    ]

    def make() -> bytes:
        whole = rng.choice(seeds)
        if rng.randrange(3) == 0:
            return mutated(whole, rng, splices)
        text = mutated(whole[10:].partition(b"\n")[0].rstrip(), rng, splices)
        return b"\x93NUMPY\x01\x00" + (len(text) % 65536).to_bytes(2, "little") + text + whole[128:]

    return make


def safetensors_inputs(rng: random.Random) -> Callable[[], bytes]:
    tensors = {f"t{i}": torch.ones(i, 3) for i in range(4)}
    seeds = [safetensors.torch.save(tensors, {"a": "b"}), safetensors.torch.save({"x": torch.ones(2)})]
    splices = [
        b"{",
        b"}",
        b"[",
        b"]",
        b'"',
        b",",
        b":",
        b"9" * 30,
        b"-1",
        b"1e400",
        b"null",
        b"\\ud800",
        b"\xff",
        b"[" * 3000,
    ]

    def make() -> bytes:
        whole = rng.choice(seeds)
        if rng.randrange(3) == 0:
            return mutated(whole, rng, splices)
        n = int.from_bytes(whole[:8], "little")
        text = mutated(whole[8 : 8 + n], rng, splices)
        return len(text).to_bytes(8, "little") + text + whole[8 + n :]

    return make


def lookup3(data: bytes) -> int:
    """HDF5's checksum of metadata: Bob Jenkins' hashlittle with an initial value of 0."""
    v = dict.fromkeys("abc", (0xDEADBEEF + len(data)) & _MASK)
    whole = max(0, (len(data) - 1) // 12 * 12)
    for at in range(0, whole, 12):
        _add(v, data[at : at + 12])
        for (x, y, z), k in ("acb", 4), ("bac", 6), ("cba", 8), ("acb", 16), ("bac", 19), ("cba", 4):
            v[x] = ((v[x] - v[y]) & _MASK) ^ _rotated(v[y], k)
            v[y] = (v[y] + v[z]) & _MASK
    if data:
        _add(v, data[whole:].ljust(12, b"\0"))
        for (x, y), k in ("cb", 14), ("ac", 11), ("ba", 25), ("cb", 16), ("ac", 4), ("ba", 14), ("cb", 24):
            v[x] = ((v[x] ^ v[y]) - _rotated(v[y], k)) & _MASK
    return v["c"]


_MASK = 0xFFFFFFFF


def _add(v: dict[str, int], block: bytes) -> None:
    for x, n in zip("abc", struct.unpack("<III", block), strict=True):
        v[x] = (v[x] + n) & _MASK


def _rotated(x: int, k: int) -> int:
    return (x << k | x >> (32 - k)) & _MASK


def _headers(data: bytes) -> list[tuple[int, int]]:
    """First and last byte of the object headers of version 2, without their checksums."""
    found = []
    at = data.find(b"OHDR\x02")
    while at >= 0:
        flags = data[at + 5]
        begin = at + 6 + (16 if flags & 0x20 else 0) + (4 if flags & 0x10 else 0)
        width = 1 << (flags & 3)
        end = begin + width + int.from_bytes(data[begin : begin + width], "little")
        if end + 4 <= len(data):
            found.append((at, end))
        at = data.find(b"OHDR\x02", at + 1)
    return found


def hdf5_inputs(rng: random.Random) -> Callable[[], bytes]:
    with tempfile.TemporaryDirectory() as folder:
        old, new = (flips.sample(Path(folder) / f"{v}.h5", v).read_bytes() for v in ("earliest", "latest"))
    headers = _headers(new)
    # Where metadata lies in the old one: everything but the plain matrix.
    dull = old.index(np.arange(4.0).tobytes())
    splices = [b"\0" * 8, b"\xff" * 8, b"OCHK", b"\x10\x00\x10\x00\0\0\0\0", b"\x05\x00\x10\x00\0\0\0\0"]

    def make() -> bytes:
        if rng.randrange(2):
            out = bytearray(old)
            for _ in range(rng.choice([1, 2, 4])):
                at = rng.randrange(len(out))
                if dull <= at < dull + 14_400:
                    at = rng.randrange(dull)
                at -= at % rng.choice([1, 2, 4, 8])
                width = rng.choice([1, 2, 4, 8])
                out[at : at + width] = (rng.choice(INTERESTING) % 256**width).to_bytes(width, "little")
            return bytes(out) if rng.randrange(20) else mutated(bytes(out), rng, splices)
        out = bytearray(new)
        begin, end = rng.choice(headers)
        for _ in range(rng.choice([1, 1, 2, 4])):
            at = rng.randrange(begin + 5, end)
            width = rng.choice([w for w in (1, 2, 4, 8) if at + w <= end])
            new_bytes = (rng.choice(INTERESTING) % 256**width).to_bytes(width, "little")
            out[at : at + width] = (
                new_bytes if rng.randrange(3) else bytes([out[at] ^ 1 << rng.randrange(8)]) + out[at + 1 : at + width]
            )
        out[end : end + 4] = lookup3(bytes(out[begin:end])).to_bytes(4, "little")
        return bytes(out)

    return make


INPUTS = {"pt": pt_inputs, "npy": npy_inputs, "safetensors": safetensors_inputs, "hdf5": hdf5_inputs}


def _child(name: str, inputs: list[bytes], path: Path, folder: Path, shared: mmap.mmap) -> NoReturn:
    """Open all inputs; ``shared`` holds how many are done, refused and kept."""
    try:
        confine(SECONDS, NBYTES)
        done, refused, kept = (int.from_bytes(shared[i : i + 8], "little") for i in (0, 8, 16))
        for data in inputs[done:]:
            path.write_bytes(data)
            signal.setitimer(signal.ITIMER_PROF, SECONDS)
            signal.alarm(20 * SECONDS)
            Path("/proc/self/clear_refs").write_text("5")  # the peak of memory is that from now on
            before = resident("VmRSS")
            why = ""
            try:
                refused += damage.error_of(name, path) is not None
            except BaseException:  # noqa: BLE001 - what it is, is for the one who reads it
                why = traceback.format_exc()
            if (grown := resident("VmHWM") - before) > GROWTH_NBYTES:
                why += f"it grew by {grown} bytes\n"
            if why:
                keep(data, path.suffix, folder, why)
            done, kept = done + 1, kept + bool(why)
            shared[:24] = b"".join(n.to_bytes(8, "little") for n in (done, refused, kept))
    finally:
        os._exit(0)


def keep(data: bytes, suffix: str, folder: Path, why: str) -> None:
    path = folder / f"{hash(data) % 2**32:08x}{suffix}"
    path.write_bytes(data)
    path.with_suffix(".txt").write_text(why)


def main() -> None:
    """See the module's text."""
    name, seconds, seed, kept = sys.argv[1:]
    folder = Path(kept)
    folder.mkdir(parents=True, exist_ok=True)
    make = INPUTS[name](random.Random(int(seed)))
    counts: Counter[str] = Counter()
    end = time.monotonic() + float(seconds)
    with tempfile.TemporaryDirectory() as temporary:
        path = Path(temporary) / f"x{SUFFIXES[name]}"
        while time.monotonic() < end:
            inputs = [make() for _ in range(PER_CHILD)]
            shared = mmap.mmap(-1, 24)
            while (done := int.from_bytes(shared[:8], "little")) < len(inputs):
                pid = os.fork()
                if not pid:
                    _child(name, inputs, path, folder, shared)
                _, status = os.waitpid(pid, 0)
                if os.WIFSIGNALED(status):
                    done = int.from_bytes(shared[:8], "little")
                    counts[f"signal {os.WTERMSIG(status)}"] += 1
                    keep(inputs[done], path.suffix, folder, f"signal {os.WTERMSIG(status)}\n")
                    shared[:8] = (done + 1).to_bytes(8, "little")
            counts["inputs"] += len(inputs)
            counts["refused"] += int.from_bytes(shared[8:16], "little")
            counts["raised or grew"] += int.from_bytes(shared[16:24], "little")
    sys.stdout.write(json.dumps(counts) + "\n")


if __name__ == "__main__":
    main()
