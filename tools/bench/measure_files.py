"""What runs inside the child for whole files: opening, preloading, warming, converting, verifying, and their peers."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tools.bench import pagecache
from tools.bench.library import library
from tools.bench.row_files import RowSource, write_numbered

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = [
    "convert",
    "copy",
    "h5py_gzip",
    "open_dataset",
    "open_parts",
    "preload",
    "torch_load",
    "verify",
    "vmtouch",
    "warm_up",
    "write_parts",
]


@contextmanager
def _timed(facts: dict[str, Any]) -> Iterator[None]:
    began, begin = time.monotonic(), time.perf_counter()
    yield
    facts["seconds"] = time.perf_counter() - begin
    facts["window"] = (began, time.monotonic())


def _state(files: list[Path], *, cold: bool) -> None:
    if cold:
        pagecache.evict(files)
    else:
        pagecache.warm(files)


def _tensors(path: Path) -> list[Path]:
    """Every file but the configuration."""
    return [file for file in pagecache.files_under(path) if file.suffix != ".json"]


def _dense(path: Path) -> list[Path]:
    """Those without the ragged lists, which h5py cannot write in one call."""
    return [file for file in _tensors(path) if "keyword_ids" not in file.name]


def preload(path: str, *, cold: bool) -> dict[str, Any]:
    """Open with everything in memory, ragged lists of keyword ids included."""
    js = library()

    files = _tensors(Path(path))
    _state(files, cold=cold)
    facts: dict[str, Any] = {"nbytes": sum(file.stat().st_size for file in files)}
    with _timed(facts):
        store = js.open(path, use_mmap=False)
        tensors = [store[name].tensor() for name in store]
    facts["tensors"] = len(tensors)
    return facts


def torch_load(path: str, *, cold: bool) -> dict[str, Any]:
    """``torch.load`` of the same files, one after the other, all kept; the lists of keyword ids as lists."""
    import torch

    files = _tensors(Path(path))
    _state(files, cold=cold)
    facts: dict[str, Any] = {"nbytes": sum(file.stat().st_size for file in files)}
    with _timed(facts):
        tensors = [torch.load(file, weights_only=True) for file in files]
    facts["tensors"] = len(tensors)
    return facts


def warm_up(path: str) -> dict[str, Any]:
    """``js.warm_up`` of a cold file."""
    js = library()

    files = pagecache.files_under(Path(path))
    store = js.open(path, use_mmap=True)
    _state(files, cold=True)
    facts: dict[str, Any] = {"nbytes": sum(file.stat().st_size for file in files)}
    with _timed(facts):
        js.warm_up(store)
    facts["resident"] = pagecache.resident_fraction(files)
    return facts


def vmtouch(path: str) -> dict[str, Any]:
    """``vmtouch -t`` of a cold file."""
    files = pagecache.files_under(Path(path))
    _state(files, cold=True)
    facts: dict[str, Any] = {"nbytes": sum(file.stat().st_size for file in files)}
    with _timed(facts):
        subprocess.run(["vmtouch", "-q", "-t", path], check=True, stdout=subprocess.DEVNULL)
    facts["resident"] = pagecache.resident_fraction(files)
    return facts


def convert(src: str, dst: str, layout: str, compression: str | None = None, *, cold: bool = False) -> dict[str, Any]:
    """``js.convert`` to a new directory, durable at the end by its own doing; then forgotten again."""
    js = library()
    if layout == "hdf5":
        # As its peer has h5py before its clock starts.
        import h5py  # noqa: F401

        import jasper_store.formats.hdf5.chunks
        import jasper_store.formats.hdf5.writer  # noqa: F401

    files = pagecache.files_under(Path(src))
    _fresh(Path(dst))
    _state(files, cold=cold)
    facts: dict[str, Any] = {"nbytes": sum(file.stat().st_size for file in files)}
    with _timed(facts):
        js.convert(src, dst, format=layout, compression=compression)
    facts["written"] = sum(file.stat().st_size for file in pagecache.files_under(Path(dst)))
    return facts


def copy(src: str, dst: str, *, cold: bool = False) -> dict[str, Any]:
    """``cp -r`` of the same directory, then everything written on the disk, as a conversion leaves it."""
    files = pagecache.files_under(Path(src))
    _fresh(Path(dst))
    _state(files, cold=cold)
    facts: dict[str, Any] = {"nbytes": sum(file.stat().st_size for file in files)}
    with _timed(facts):
        subprocess.run(["cp", "-r", src, dst], check=True)
        for file in pagecache.files_under(Path(dst)):
            with file.open("rb") as handle:
                os.fsync(handle.fileno())
    facts["written"] = sum(file.stat().st_size for file in pagecache.files_under(Path(dst)))
    return facts


def h5py_gzip(src: str, dst: str) -> dict[str, Any]:
    """``create_dataset(compression="gzip")`` of every tensor of a ``.pt`` directory, the way the documentation shows."""
    import h5py
    import torch

    tensors = {file.stem: torch.load(file, weights_only=True).numpy() for file in _dense(Path(src))}
    _fresh(Path(dst))
    facts: dict[str, Any] = {"nbytes": sum(values.nbytes for values in tensors.values())}
    target = Path(dst) / "dataset.h5"
    target.parent.mkdir(parents=True)
    with _timed(facts):
        with h5py.File(target, "w") as file:
            for name, values in tensors.items():
                file.create_dataset(name, data=values, compression="gzip")
        with target.open("rb") as handle:
            os.fsync(handle.fileno())
    facts["written"] = target.stat().st_size
    return facts


def verify(path: str, *, cold: bool) -> dict[str, Any]:
    """``js.verify`` of a dataset that has its checksums."""
    js = library()

    files = pagecache.files_under(Path(path))
    _state(files, cold=cold)
    facts: dict[str, Any] = {"nbytes": sum(file.stat().st_size for file in files)}
    with _timed(facts):
        report = js.verify(path)
    facts["ok"] = bool(report.ok)
    return facts


def write_parts(path: str, parts: int, rows: int, dim: int, seed: int) -> dict[str, Any]:
    """Many small files that are one tensor."""
    write_numbered(Path(path), RowSource(rows, dim, seed), parts)
    return {}


def open_parts(path: str, *, check: bool) -> dict[str, Any]:
    """Open a tensor of many parts some times, and take a batch each time; or verify it, so that it is known."""
    js = library()
    if check:
        js.verify(path)
    opened, taken = [], []
    for _ in range(5):
        begin = time.perf_counter()
        store = js.open(path, use_mmap=True)
        opened.append(time.perf_counter() - begin)
        (name,) = store
        begin = time.perf_counter()
        store[name].take(range(0, len(store[name]), max(len(store[name]) // 256, 1)))
        taken.append(time.perf_counter() - begin)
        store.close()
    return {"seconds": opened, "take_seconds": taken}


def open_dataset(path: str, times: int = 5) -> dict[str, Any]:
    """Open a dataset again and again, as a training script does: configuration, tensors, validation."""
    js = library()

    seconds = []
    began = time.monotonic()
    for _ in range(times):
        begin = time.perf_counter()
        dataset = js.JASPERSteeringDataset(path, "train", use_mmap=True)
        seconds.append(time.perf_counter() - begin)
        dataset.close()
    store_seconds = []
    for _ in range(times):
        begin = time.perf_counter()
        with js.open(path, use_mmap=True) as store:
            nbytes = store.nbytes
        store_seconds.append(time.perf_counter() - begin)
    return {"seconds": seconds, "store_seconds": store_seconds, "nbytes": nbytes, "window": (began, time.monotonic())}


def _fresh(path: Path) -> None:
    if path.exists():
        shutil.rmtree(path)
