"""Opens patched copies of an HDF5 file, say with one bit flipped, in a child process that may crash.

``python -m tests.formats.flips FILE`` reads a JSON list of patches, each an offset and the bytes in hexadecimal that lie
there in one copy, and prints what became of the copies as one JSON object. A child opens one copy after another; where
it crashes, the next child goes on behind that copy. With ``verify`` behind the file, a copy that opens with other values
than the file's must be found by ``verify``.

``python -m tests.formats.flips --all LIBVER SHARE OF`` verifies all copies of :func:`sample` with one bit flipped, or one of
so many shares of them. A copy takes some 30 ms; an odd number of shares gives each of them every bit of a byte.
"""

from __future__ import annotations

import json
import mmap
import os
import signal
import subprocess
import sys
import tempfile
import traceback
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NoReturn

import h5py
import numpy as np
import torch

from jasper_store.conversion.checksum import Hasher, checksum
from jasper_store.conversion.verify import verify_files
from jasper_store.files.fingerprint import FileFingerprint
from jasper_store.formats.base import Schema
from jasper_store.formats.files import dtype_name
from jasper_store.formats.registry import FORMATS
from jasper_store.store.manifest import FileEntry, Manifest, TensorEntry
from jasper_store.store.manifest_file import write
from tests.formats import damage
from tests.formats.confined import confine

if TYPE_CHECKING:
    from collections.abc import Callable

    from jasper_store.formats.base import TensorSpec

Patch = tuple[int, str]
SECONDS = 10
NBYTES = 2 << 30
_WAITING_SECONDS = 3600
"""For a copy that waits instead of working: long, because a machine may stand still for minutes."""
OUTCOMES = ("refused", "opened", "unchanged", "found")
_SILENT = 3
"""Status of a child that opened other values than the file's, which verify did not find."""


def sample(path: Path, libver: Literal["earliest", "latest"]) -> Path:
    """A file of some 34 KB with every layout and filter, and with fill values that are read."""
    with h5py.File(path, "w", libver=libver) as file:
        file["group/matrix"] = np.arange(1800.0).reshape(600, 3)
        file["flag"] = np.array([True, False])
        file["scalar"] = np.float32(2.5)
        file.create_dataset("unwritten", shape=(30, 2), dtype="f4", fillvalue=2.5)
        file.create_dataset("unwritten_scalar", shape=(), dtype="f4", fillvalue=1.5)
        gzip = file.create_dataset(
            "gzip", shape=(20, 3), dtype="i8", chunks=(4, 2), compression=4, shuffle=True, fillvalue=7
        )
        gzip[4:12] = np.arange(24).reshape(8, 3)
        lzf = file.create_dataset("lzf", shape=(60,), chunks=(16,), dtype="f8", compression="lzf", fillvalue=0.5)
        lzf[20:] = 1
        file.create_dataset("summed", data=np.arange(60.0), compression="gzip", fletcher32=True)
        file.create_dataset("marked", data=np.arange(5, dtype="u2")).attrs["torch_dtype"] = "bfloat16"
        compact = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        compact.set_layout(h5py.h5d.COMPACT)
        file.create_dataset("compact", data=np.arange(4.0), dcpl=compact)
        for i in range(3):
            file[f"ids/{i}"] = np.arange(i)
        variable = file.create_dataset("variable", shape=(2,), dtype=h5py.vlen_dtype(np.int32))
        variable[0], variable[1] = [1, 2], [3]
    return path


def bytes_of(content: bytes, first: int = 0, step: int = 1) -> list[Patch]:
    """Every byte, or one of ``step``, inverted."""
    return [(at, f"{content[at] ^ 0xFF:02x}") for at in range(first, len(content), step)]


def bits_of(content: bytes, first: int = 0, step: int = 1) -> list[Patch]:
    """Every bit, or one of ``step``, inverted."""
    return [(i // 8, f"{content[i // 8] ^ 1 << i % 8:02x}") for i in range(first, 8 * len(content), step)]


def _opened(copy: Path) -> str:
    return damage.opened("hdf5", copy)


def verifier(source: Path) -> Callable[[Path], str]:
    """Tells a copy with other values than ``source`` from one with the same; the manifest beside the copies knows them."""
    before = _tensors(source)

    def judge(copy: Path) -> str:
        now: dict[str, TensorEntry] = {}

        def see(spec: TensorSpec, values: torch.Tensor) -> None:
            hasher = Hasher()
            hasher.update(values)
            now[spec.name] = TensorEntry(dtype_name(spec.dtype), spec.shape, hasher.hexdigest())

        if damage.error_of("hdf5", copy, see) is not None:
            return "refused"
        if now == before:
            return "unchanged"
        return "silent" if verify_files(copy.parent).ok else "found"

    return judge


def _tensors(path: Path) -> dict[str, TensorEntry]:
    specs = FORMATS["hdf5"].locate(path, Schema())
    return {spec.name: TensorEntry(dtype_name(spec.dtype), spec.shape, checksum(spec)) for spec in specs}


def _child(content: bytes, todo: list[Patch], shared: mmap.mmap, copy: Path, judge: Callable[[Path], str]) -> NoReturn:
    """Open copies until all are done or one ends the process, counting them in ``shared``."""
    status = 0
    try:
        confine(SECONDS, NBYTES)
        with copy.open("r+b", buffering=0) as file:
            for at, patch in todo:
                new = bytes.fromhex(patch)
                os.pwrite(file.fileno(), new, at)
                signal.setitimer(signal.ITIMER_PROF, SECONDS)
                signal.alarm(_WAITING_SECONDS)
                outcome = judge(copy)
                if outcome == "silent":
                    os._exit(_SILENT)
                os.ftruncate(file.fileno(), len(content))
                os.pwrite(file.fileno(), content[at : at + len(new)], at)
                place = 8 * OUTCOMES.index(outcome)
                shared[place : place + 8] = (int.from_bytes(shared[place : place + 8], "little") + 1).to_bytes(
                    8, "little"
                )
    except BaseException:  # noqa: BLE001 - whatever it is, the parent hears of it
        traceback.print_exc()
        status = 1
    # The destructors of a damaged library's objects do not run.
    os._exit(status)


def run(source: Path, todo: list[Patch], *, verify: bool = False) -> dict[str, Any]:
    """Open every copy, and return how many had which of ``OUTCOMES``, and which ended a child and how."""
    content = source.read_bytes()
    outcomes: Counter[str] = Counter()
    ended = []
    shm = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=shm if shm.is_dir() else None) as folder:
        copy = Path(folder) / source.name
        judge: Callable[[Path], str] = _opened
        if verify:
            judge = verifier(source)
            entry = FileEntry(FileFingerprint.of(source), _tensors(source))
            write(Manifest(Path(folder), {source.name: entry}))
        while todo:
            copy.write_bytes(content)
            shared = mmap.mmap(-1, 8 * len(OUTCOMES))
            pid = os.fork()
            if not pid:
                _child(content, todo, shared, copy, judge)
            _, status = os.waitpid(pid, 0)
            counts = [int.from_bytes(shared[8 * n : 8 * n + 8], "little") for n in range(len(OUTCOMES))]
            done = sum(counts)
            outcomes.update(dict(zip(OUTCOMES, counts, strict=True)))
            if status:
                how = f"signal {os.WTERMSIG(status)}" if os.WIFSIGNALED(status) else "an error that is not ours"
                how = "other values, silently" if os.waitstatus_to_exitcode(status) == _SILENT else how
                ended.append((todo[done], how))
                done += 1
            todo = todo[done:]
    shown = ("refused", "unchanged", "found") if verify else ("refused", "opened")
    return {**{name: outcomes[name] for name in shown}, "ended": ended}


def run_apart(source: Path, patches: list[Patch], timeout: float, *, verify: bool = False) -> dict[str, Any]:
    """:func:`run` in a process without threads, which may fork; no copy may have ended it."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.formats.flips", str(source), *(["verify"] if verify else [])],
        check=False,
        input=json.dumps(patches),
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = json.loads(done.stdout)
    assert not found["ended"], f"{found}\n{done.stderr[-3000:]}"
    return found


def main() -> None:
    """See the module's text."""
    if sys.argv[1] == "--all":
        libver, share, of = sys.argv[2:]
        with tempfile.TemporaryDirectory() as folder:
            source = sample(Path(folder) / "x.h5", libver)  # type: ignore[arg-type]
            found = run(source, bits_of(source.read_bytes(), int(share), int(of)), verify=True)
    else:
        found = run(Path(sys.argv[1]), json.load(sys.stdin), verify="verify" in sys.argv[2:])
    sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
