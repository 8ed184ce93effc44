"""The whole way of a dataset on a system that is not Linux: run as ``python -m tests.elsewhere SYSTEM DIR``.

Takes away what Windows or macOS lack before jasper_store is imported, refuses what they refuse, then opens, plans,
serves, converts, verifies and warms a dataset, and prints what was served as JSON. PyTorch, h5py and psutil were
imported before, since they are this system's builds and need what it has.
"""

from __future__ import annotations

import builtins
import contextlib
import ctypes
import fcntl
import hashlib
import io
import json
import mmap
import multiprocessing.context  # noqa: F401
import os
import shutil
import signal
import sys
import tempfile
import types
import warnings
from pathlib import Path
from types import FrameType
from typing import Any

import h5py  # noqa: F401
import psutil  # noqa: F401
import torch
import torch.utils.data

from tests.builders import build_pt_dataset

real_open, real_listdir, real_readlink = builtins.open, os.listdir, os.readlink

# What os has on Linux and not there.
_NOT_ON_MACOS = """
O_DIRECT posix_fadvise POSIX_FADV_DONTNEED POSIX_FADV_WILLNEED posix_fallocate sched_getaffinity copy_file_range
memfd_create fdatasync RWF_NOWAIT eventfd
"""
_NOT_ON_WINDOWS = f"""
{_NOT_ON_MACOS}
pread pwrite preadv pwritev fork register_at_fork getuid fchmod mkfifo uname getloadavg sysconf getpgid killpg wait3
WIFSIGNALED O_NOFOLLOW O_CLOEXEC O_NONBLOCK O_DIRECTORY O_SYNC
"""


def take_away(system: str) -> None:
    """Make this process look like one on ``system`` ("darwin" or "win32") to whoever is imported from now on."""
    windows = system == "win32"
    for name in (_NOT_ON_WINDOWS if windows else _NOT_ON_MACOS).split():
        if hasattr(os, name):
            delattr(os, name)
    for name in [name for name in dir(mmap) if name.startswith("MADV_" if not windows else ("MADV_", "MAP_", "PROT_"))]:
        delattr(mmap, name)
    for name in ("MAP_NORESERVE", "MAP_POPULATE", "MAP_HUGETLB"):
        if hasattr(mmap, name):
            delattr(mmap, name)
    _hide_proc()
    _no_library(windows)
    if windows:
        for module in ("fcntl", "resource", "pwd", "grp"):
            sys.modules[module] = None  # type: ignore[assignment]  # the import system's way to say that there is none
        sys.modules["msvcrt"] = _msvcrt()
        for name in ("SIGKILL", "SIGHUP", "SIGBUS", "pthread_sigmask", "alarm", "setitimer"):
            if hasattr(signal, name):
                delattr(signal, name)
        setattr(mmap, "mmap", _WindowsMap)  # noqa: B010 (mypy knows that it is a class)
        _refuse_open_files()
    sys.platform = system


class _WindowsMap(mmap.mmap):
    """Python's mmap of Windows has other parameters."""

    def __new__(cls, fileno: int, length: int, tagname: None = None, access: int = 0, offset: int = 0) -> Any:
        return super().__new__(cls, fileno, length, access=access, offset=offset)

    madvise = property()  # hasattr() says no


def _msvcrt() -> types.ModuleType:
    """What locks bytes of a file there."""
    made = types.ModuleType("msvcrt")

    def locking(fd: int, mode: int, _nbytes: int) -> None:
        fcntl.flock(fd, fcntl.LOCK_UN if mode == 0 else fcntl.LOCK_EX | fcntl.LOCK_NB)

    made.LK_UNLCK, made.LK_NBLCK, made.locking = 0, 2, locking  # type: ignore[attr-defined]
    return made


def _ours() -> bool:
    """Whether this library asks, and not psutil or Python on their own behalf."""
    frame: FrameType | None = sys._getframe(2)
    depth = 0
    while frame is not None and depth < 12:
        module = str(frame.f_globals.get("__name__"))
        if module.startswith(("psutil", "torch", "multiprocessing", "tests.elsewhere")) and depth:
            return False
        if module.startswith("jasper_store"):
            return True
        frame, depth = frame.f_back, depth + 1
    return False


def _hide_proc() -> None:
    def guarded(call: Any) -> Any:
        def refuse(path: Any, *args: Any, **kwargs: Any) -> Any:
            if isinstance(path, (str, os.PathLike)) and str(path).startswith(("/proc", "/sys")) and _ours():
                raise FileNotFoundError(2, "No such file or directory", str(path))
            return call(path, *args, **kwargs)

        return refuse

    builtins.open = guarded(builtins.open)
    io.open = builtins.open
    for name in ("open", "stat", "listdir", "scandir", "readlink"):
        setattr(os, name, guarded(getattr(os, name)))


def _no_library(windows: bool) -> None:
    """The C library has none of Linux's calls; on Windows it is not to be had by the name of nobody at all."""
    real = ctypes.CDLL

    everywhere = {"madvise": real(None).madvise, "mincore": real(None).mincore}

    class Empty:
        def __getattr__(self, name: str) -> Any:
            if name not in everywhere:
                raise AttributeError(name)
            return everywhere[name]

    def load(name: Any, *args: Any, **kwargs: Any) -> Any:
        if name is None and _ours():
            if windows:
                raise TypeError("LoadLibrary() argument 1 must be str, not None")
            return Empty()
        return real(name, *args, **kwargs)

    ctypes.CDLL = load  # type: ignore[misc, assignment]


def _refuse_open_files() -> None:
    """On Windows a file that is open, and a directory that holds one, can be neither replaced, renamed nor removed."""
    plain_open = os.open

    def busy(path: Any) -> bool:
        # As the kernel knows it; by the calls of before, which are allowed to look.
        wanted = str(Path(path).absolute())
        names = []
        for number in real_listdir("/proc/self/fd"):
            with contextlib.suppress(OSError):
                names.append(real_readlink(f"/proc/self/fd/{number}"))
        with real_open("/proc/self/maps") as maps:
            names += [line.split(maxsplit=5)[5].rstrip("\n") for line in maps if "/" in line]
        return any(name == wanted or name.startswith(wanted + os.sep) for name in names)

    def guarded(call: Any, ends: int) -> Any:
        def refuse(*args: Any, **kwargs: Any) -> Any:
            held = [path for path in args[:ends] if os.path.lexists(path) and busy(path)]
            if held:
                raise PermissionError(13, "The process cannot access the file because it is in use", str(held[0]))
            return call(*args, **kwargs)

        return refuse

    def no_directories(path: Any, *args: Any, **kwargs: Any) -> int:
        if Path(path).is_dir():
            raise PermissionError(13, "Permission denied", str(path))
        return int(plain_open(path, *args, **kwargs))

    for name, ends in (("replace", 2), ("rename", 2), ("unlink", 1), ("remove", 1)):
        setattr(os, name, guarded(getattr(os, name), ends))
    os.open = no_directories
    shutil._use_fd_functions = False  # type: ignore[attr-defined]  # rmtree as it is there


def served(path: Path, **options: Any) -> str:
    """What a loader serves in an epoch, as a digest."""
    import jasper_store as js

    digest = hashlib.sha256()
    loader = js.create_loader(path, "train", batch_size=8, epoch=3, **options)
    for batch in loader:
        for name in sorted(batch):
            if isinstance(batch[name], torch.Tensor):
                digest.update(name.encode() + batch[name].contiguous().numpy().tobytes())
    return digest.hexdigest()


def whole_way(directory: Path) -> dict[str, Any]:
    """Open, plan, serve, convert, verify, warm and write; what was found."""
    import jasper_store as js

    source = build_pt_dataset(directory / "pt", seed=5)
    found: dict[str, Any] = {"plan": sorted(entry.name for entry in js.plan(source).entries)}
    found["mapped"], found["preloaded"] = served(source, use_mmap=True), served(source, use_mmap=False)
    for name in ("safetensors", "npy", "hdf5", "pt"):
        target = directory / name
        start = source if name != "pt" else directory / "npy"
        for _ in range(2):  # the second time finds it done
            js.convert(start, target, format=name, compression="gzip" if name == "hdf5" else None)
        report = js.verify(target)
        assert report.ok, report
        found[name] = served(target)
        with js.open(target, memory_limit=4096) as store:
            assert store["source_embs"].take([3, 1, 3]).shape[0] == 3
            assert js.warm_up(store).seconds >= 0
            store.release()
            assert str(store.memory_report())
    with js.DatasetWriter(directory / "written") as writer:
        writer.append("a", torch.arange(12.0).reshape(3, 4))
    with js.DatasetWriter(directory / "written", overwrite=True) as writer:
        writer.append("a", torch.arange(8.0).reshape(2, 4))
    with js.open(directory / "written") as store:
        found["written"] = store["a"].tensor().tolist()
    found["left"] = sorted(path.name for path in directory.iterdir() if not path.name.endswith(".lock"))
    return found


def main() -> None:
    """Be elsewhere, go the whole way, print what was found."""
    system, directory = sys.argv[1:]
    warnings.simplefilter("error")
    tempfile.gettempdir()
    if system != "linux":
        take_away(system)
    result = whole_way(Path(directory))
    sys.stdout.write(json.dumps(result))


if __name__ == "__main__":
    main()
