"""Opens HDF5 files and datasets through the library, with every failure as an error of ours.

Nothing else here hands a path or a dataset's name to h5py for reading.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NoReturn

from jasper_store.errors import CorruptFileError, JasperStoreError
from jasper_store.formats.files import open_for_reading
from jasper_store.formats.hdf5.header import Headers, ObjectHeader

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

__all__ = ["corrupt", "describe_filters", "open_dataset", "open_file", "translated"]

_FILTERS = {1: "gzip", 2: "shuffle", 3: "fletcher32", 4: "szip", 5: "nbit", 6: "scaleoffset", 32000: "lzf"}
_PLUGINS = {32001: "blosc", 32004: "lz4", 32008: "bitshuffle", 32015: "zstd", 32026: "blosc2"}


@contextmanager
def translated(path: Path) -> Iterator[None]:
    """Whatever h5py raises on a damaged file, as CorruptFileError."""
    try:
        yield
    except JasperStoreError:
        raise
    # h5py has no error tree of its own: each of these was seen on a file with flipped bytes.
    except (
        OSError,
        RuntimeError,
        LookupError,
        ValueError,
        TypeError,
        AttributeError,
        ArithmeticError,
        MemoryError,
    ) as exc:
        corrupt(path, f"{type(exc).__name__}: {exc!s:.200}.", cause=exc)


def corrupt(path: Path, what: str, *, cause: BaseException | None = None, tensor: str | None = None) -> NoReturn:
    """Raise CorruptFileError about a file."""
    msg = f"{path}: not an HDF5 file that can be read: {what} Write or convert it again."
    raise CorruptFileError(msg, path=path, tensor=tensor) from cause


@contextmanager
def open_file(path: Path) -> Iterator[tuple[Any, int]]:
    """Open an HDF5 file read-only and yield it with its size, also on file systems that have no locks.

    Raises:
        DatasetNotFoundError: there is no such file, or it may not be read.
        CorruptFileError: anything else that h5py stumbles over, also inside the ``with`` block.
    """
    with open_for_reading(path) as (_, size):
        pass  # only for its errors: h5py's do not tell a missing file from a damaged one
    with translated(path):
        file = _open(path)
        try:
            yield file, size
        finally:
            file.close()


def open_dataset(file: Any, path: Path, key: str) -> tuple[Any, ObjectHeader]:
    """A dataset of an open file and its header, reached by hard links only and checked before the library opens it.

    Raises:
        CorruptFileError: a link on the way is another kind of link, or the header is refused.
        LookupError: there is none.
    """
    group, _, name = f"/{key}".rpartition("/")
    parent = file
    with open_for_reading(path) as (raw, size):
        headers = Headers(path, raw, size)
        for part in filter(None, group.split("/")):
            headers.read(_address(parent, part, path), key)
            parent = parent[part]
        header = headers.read(_address(parent, name, path), key)
    return parent[name], header


def _address(group: Any, name: str, path: Path) -> int:
    """Where the object lies that a hard link leads to."""
    import h5py

    link = group.id.links.get_info(name.encode("utf-8", "surrogateescape"))
    if link.type != h5py.h5l.TYPE_HARD:
        corrupt(path, f"{name!r:.100} is a link to another place, where a dataset was.")
    return int(link.u)


def _open(path: Path) -> Any:
    import h5py

    # The library's own default first. It fails on NFS without a lock daemon; and a file that this process has open
    # already must be opened with the same choice.
    *choices, last = None, False, True
    for locking in choices:
        try:
            return h5py.File(path, "r", locking=locking)
        except OSError as exc:  # noqa: PERF203 - three times at most
            _refuse_busy(path, exc)
            if "lock" not in str(exc):
                raise
    return h5py.File(path, "r", locking=last)


def _refuse_busy(path: Path, exc: OSError) -> None:
    if isinstance(exc, BlockingIOError):
        raise CorruptFileError(
            f"{path}: another process has it open for writing; wait until it has finished.", path=path
        ) from exc
    if "already open for write" in str(exc):
        raise CorruptFileError(
            f"{path}: its writer was killed, or is still at work; wait for it, or write the file again.", path=path
        ) from exc


def describe_filters(plist: Any) -> str:
    """The filter pipeline of a dataset, in the order it is applied on writing, e.g. ``"shuffle+gzip(4)"``."""
    words = []
    for i in range(plist.get_nfilters()):
        code, _, values, name = plist.get_filter(i)
        word = _FILTERS.get(code) or _PLUGINS.get(code) or name.decode("utf-8", "replace") or str(code)
        words.append(f"{word}({values[0]})" if word == "gzip" and values else word)
    return "+".join(words)
