"""``jasper_store.json``: what a dataset's files were when they were written or checked.

It lies in the dataset's directory, is read on opening, and saves two things: a file that is not the one that was
written is refused before anybody trains on it, and a check that passed once is not repeated.

How a file is recognised. A *stamp* is its size, its modification time in nanoseconds, and a hash of a 1 MiB
sample: 16 windows of 64 KiB spread over the file. Size and time are compared first, which costs a microsecond.

* The size differs: the file was truncated or replaced. ``CorruptFileError``.
* Only the time differs: the dataset was copied (``cp`` without ``-p``, a download, an unpacked archive), which is
  legitimate, or a file was replaced by one of the same shape, which is not. The sample tells them apart in a few
  milliseconds at any size: equal means a copy, and all that was vouched for still is; different is refused with
  ``CorruptFileError``. Damage that the sample misses is what ``verify`` finds, by the checksums of all values.
* The file has no entry: nobody vouches for it; it is opened and validated as if there were no manifest.

A manifest that is there and cannot be understood is refused, never ignored: it may be the only sign that
something is wrong. One that is missing, or a directory that cannot be written, is no error.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import time
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from jasper_store.errors import CorruptFileError
from jasper_store.files.fingerprint import FileFingerprint

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from jasper_store.formats.base import TensorSpec

__all__ = [
    "FORMAT_VERSION",
    "MANIFEST_NAME",
    "FileEntry",
    "FileFingerprint",
    "Manifest",
    "Source",
    "TensorEntry",
    "dtype_name",
    "read",
    "remember",
    "update",
]

MANIFEST_NAME = "jasper_store.json"
FORMAT_VERSION = 1
_LOCK_SECONDS = 5.0


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor of a file, as it was written.

    Attributes:
        dtype: torch's name without the prefix, e.g. ``"bfloat16"``.
        shape: sizes.
        xxh3_128: hex of the hash of its values, C order, little-endian; ``None`` where it was not computed.
    """

    dtype: str
    shape: tuple[int, ...]
    xxh3_128: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {"dtype": self.dtype, "shape": list(self.shape), "xxh3_128": self.xxh3_128}


@dataclass(frozen=True, slots=True)
class Source:
    """A file that another was made from.

    Attributes:
        path: relative to the dataset's directory, with forward slashes; absolute where it lies on another drive.
        stamp: what it was when it was read.
    """

    path: str
    stamp: FileFingerprint

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {"path": self.path, **self.stamp.to_json()}


@dataclass(frozen=True, slots=True)
class FileEntry:
    """One file of the dataset.

    Attributes:
        stamp: what it was when it was written.
        tensors: the tensors in it by name.
        made_from: the files that it was converted from; empty if it was written from memory.
    """

    stamp: FileFingerprint
    tensors: Mapping[str, TensorEntry] = field(default_factory=dict)
    made_from: tuple[Source, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            **self.stamp.to_json(),
            "tensors": {name: entry.to_json() for name, entry in self.tensors.items()},
            "made_from": [source.to_json() for source in self.made_from],
        }


@dataclass(frozen=True, slots=True)
class Manifest:
    """The manifest of one directory, as values. Immutable; change it through :func:`update`.

    Attributes:
        directory: where it lies.
        files: file name (relative, forward slashes) to what was written there.
        verified: name of a check to the files that passed it together, with their stamps then.
    """

    directory: Path
    files: Mapping[str, FileEntry] = field(default_factory=dict)
    verified: Mapping[str, Mapping[str, FileFingerprint]] = field(default_factory=dict)

    def check(self, specs: Sequence[TensorSpec]) -> list[str]:
        """Compare files with their entries; milliseconds, whatever their size.

        Args:
            specs: the tensors that are about to be opened.

        Returns:
            Texts for StaleDataWarning: files whose source has changed since they were made.

        Raises:
            CorruptFileError: a file is not the one that was written.
        """
        stale = []
        for path in dict.fromkeys(spec.path for spec in specs):
            entry = self.files.get(_key(self.directory, path) or "")
            if entry is None:
                continue
            if not entry.stamp.matches(path):
                raise _replaced(path, entry.stamp)
            stale += [text for source in entry.made_from if (text := self._stale(path, source))]
            for spec in specs:
                if spec.path == path:
                    _compare(spec, entry.tensors.get(spec.name))
        return stale

    def _stale(self, path: Path, source: Source) -> str:
        origin = self.directory / source.path
        try:
            if source.stamp.matches(origin):
                return ""
        except OSError:
            return ""  # the source may be gone: that is what conversion is for
        return (
            f"{path.name} was made from {origin}, which has changed since; convert it again (jasper-store convert), "
            "or choose the source's format"
        )

    def made_from_is_known(self, path: Path) -> bool:
        """Whether the manifest knows what a file was made from, so that file times need not be guessed from."""
        entry = self.files.get(_key(self.directory, path) or "")
        return entry is not None and bool(entry.made_from)

    def checksum(self, spec: TensorSpec) -> str | None:
        """xxh3-128 of a tensor's values as they were written, in hex; ``None`` where the manifest has none."""
        entry = self.files.get(_key(self.directory, spec.path) or "")
        tensor = entry.tensors.get(spec.name) if entry else None
        return tensor.xxh3_128 if tensor else None

    def is_verified(self, specs: Sequence[TensorSpec], check: str) -> bool:
        """Whether all files of these tensors passed ``check`` together and have not changed since."""
        marks = self.verified.get(check, {})
        for path in dict.fromkeys(spec.path for spec in specs):
            stamp = marks.get(_key(self.directory, path) or "")
            try:
                if stamp is None or not stamp.matches(path):
                    return False
            except OSError:
                return False
        return True

    def to_json(self) -> dict[str, Any]:
        """Plain values, with the format version."""
        return {
            "format_version": FORMAT_VERSION,
            "files": {name: entry.to_json() for name, entry in sorted(self.files.items())},
            "verified": {
                check: {name: stamp.to_json() for name, stamp in sorted(marks.items())}
                for check, marks in sorted(self.verified.items())
            },
        }

    def write(self) -> None:
        """Write it beside the data: temporary name, fsync, atomic replace, directory fsync.

        Raises:
            OSError: the directory cannot be written; the old manifest, if any, is untouched.
        """
        target = self.directory / MANIFEST_NAME
        temporary = self.directory / f".{MANIFEST_NAME}.{os.getpid()}.tmp"
        try:
            with temporary.open("w", encoding="utf-8") as file:
                json.dump(self.to_json(), file, indent=1)
                file.write("\n")
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(target)
        except BaseException:
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise
        with contextlib.suppress(OSError):  # directories cannot be opened or synced everywhere
            fd = os.open(self.directory, os.O_RDONLY)
            try:
                os.fsync(fd)
            finally:
                os.close(fd)


def _key(directory: Path, path: Path) -> str | None:
    """Name of a file in the manifest; ``None`` for one outside its directory."""
    try:
        return path.relative_to(directory).as_posix()
    except ValueError:
        return None


def _replaced(path: Path, stamp: FileFingerprint) -> CorruptFileError:
    facts = path.stat()
    if facts.st_size < stamp.size:
        what = f"it is truncated: expected {stamp.size:,} bytes, found {facts.st_size:,}"
    elif facts.st_size > stamp.size:
        what = f"it was replaced or appended to: expected {stamp.size:,} bytes, found {facts.st_size:,}"
    else:
        what = "it was replaced: its size is as expected, its time and its content are not"
    msg = (
        f"{path}: not the file that {MANIFEST_NAME} vouches for; {what}. Copy or convert the dataset again; if the "
        f"change was meant, delete {path.parent / MANIFEST_NAME} and run jasper-store verify"
    )
    return CorruptFileError(msg, path=path)


def _compare(spec: TensorSpec, entry: TensorEntry | None) -> None:
    """Dtype and shape as in the manifest; a tensor that it does not list is nobody's business."""
    if entry is not None and (entry.dtype != dtype_name(spec.dtype) or entry.shape != spec.shape):
        msg = (
            f"{spec.path}: {spec.name} was written as {entry.dtype} {list(entry.shape)}, its header now says "
            f"{dtype_name(spec.dtype)} {list(spec.shape)}: the file was replaced or damaged; copy or convert it again"
        )
        raise CorruptFileError(msg, path=spec.path, tensor=spec.name)


def dtype_name(dtype: object) -> str:
    """``torch.bfloat16`` as ``"bfloat16"``."""
    return str(dtype).removeprefix("torch.")


def read(directory: str | os.PathLike[str]) -> Manifest | None:
    """The manifest of a directory; ``None`` if there is none.

    Raises:
        CorruptFileError: it is there and cannot be understood.
    """
    directory = Path(directory)
    path = directory / MANIFEST_NAME
    try:
        text = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as exc:
        msg = f"{path}: cannot be read ({exc.strerror or exc}); make it readable, or delete it and run jasper-store verify"
        raise CorruptFileError(msg, path=path) from exc
    try:
        return _parse(directory, json.loads(text))
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as exc:
        detail = f"missing {exc}" if isinstance(exc, KeyError) else str(exc)
        msg = f"{path}: not a manifest that this release understands ({detail}); delete it and run jasper-store verify"
        raise CorruptFileError(msg, path=path) from exc


def _parse(directory: Path, raw: Any) -> Manifest:
    version = raw["format_version"]
    if version != FORMAT_VERSION:
        msg = f"format_version {version!r}, expected {FORMAT_VERSION}"
        raise ValueError(msg)
    files = {_safe_name(name): _parse_file(entry) for name, entry in raw["files"].items()}
    verified = {
        _typed(check, str): {_safe_name(name): _parse_stamp(stamp) for name, stamp in marks.items()}
        for check, marks in raw.get("verified", {}).items()
    }
    return Manifest(directory, files, verified)


def _parse_file(raw: Any) -> FileEntry:
    tensors = {
        _typed(name, str): TensorEntry(
            _typed(entry["dtype"], str),
            tuple(_typed(n, int) for n in _typed(entry["shape"], list)),
            _hex(entry.get("xxh3_128")),
        )
        for name, entry in raw["tensors"].items()
    }
    sources = tuple(Source(_typed(s["path"], str), _parse_stamp(s)) for s in _typed(raw.get("made_from", []), list))
    return FileEntry(_parse_stamp(raw), tensors, sources)


def _parse_stamp(raw: Any) -> FileFingerprint:
    size, mtime = _typed(raw["size"], int), _typed(raw["mtime_ns"], int)
    if size < 0:
        msg = f"size {size}"
        raise ValueError(msg)
    return FileFingerprint(size, mtime, _hex(raw.get("sample")))


def _typed(value: Any, kind: type) -> Any:
    if not isinstance(value, kind) or isinstance(value, bool):
        msg = f"expected {kind.__name__}, found {value!r:.60}"
        raise TypeError(msg)
    return value


def _hex(value: Any) -> str | None:
    if value is None:
        return None
    if len(_typed(value, str)) != 32 or not set(value) <= set("0123456789abcdef"):
        msg = f"expected 32 hex digits, found {value!r:.60}"
        raise ValueError(msg)
    return str(value)


def _safe_name(name: Any) -> str:
    """A relative file name that stays inside the directory."""
    path = PurePosixPath(_typed(name, str))
    if path.is_absolute() or ".." in path.parts or not path.parts:
        msg = f"file name {name!r:.60} leaves the dataset's directory"
        raise ValueError(msg)
    return str(path)


def update(directory: str | os.PathLike[str], change: Callable[[Manifest], Manifest]) -> Manifest:
    """Read, change and write a manifest while no other process does (a lock on the directory).

    Args:
        directory: the dataset's directory, which exists.
        change: takes the manifest (empty if there was none) and returns the new one.

    Returns:
        What was written.

    Raises:
        OSError: the directory cannot be written, or another process kept the lock for 5 s (TimeoutError).
        CorruptFileError: the manifest that is there cannot be understood.
    """
    directory = Path(directory)
    with _locked(directory):
        changed = change(read(directory) or Manifest(directory))
        changed.write()
    return changed


def remember(directory: str | os.PathLike[str], specs: Sequence[TensorSpec], checks: Sequence[str]) -> bool:
    """Note that all files of these tensors passed some checks together. A convenience, so it never stands in the way.

    Returns:
        False where it could not be written (read-only or vanished directory, files outside of it, somebody else's lock).

    Raises:
        CorruptFileError: the manifest that is there cannot be understood.
    """
    directory = Path(directory)
    try:
        marks = {}
        for path in dict.fromkeys(spec.path for spec in specs):
            key = _key(directory, path)
            if key is None:
                return False
            marks[key] = FileFingerprint.of(path)
        update(directory, lambda old: replace(old, verified={**old.verified, **dict.fromkeys(checks, marks)}))
    except OSError:
        return False
    return True


@contextlib.contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """Hold the directory's advisory lock; it leaves no file behind and ends with the process."""
    try:
        import fcntl
    except ImportError:  # Windows: os.replace alone keeps the file whole
        yield
        return
    fd = os.open(directory, os.O_RDONLY)
    try:
        deadline = time.monotonic() + _LOCK_SECONDS
        while True:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    msg = f"{directory}: another process has been writing its manifest for {_LOCK_SECONDS:.0f} s"
                    raise TimeoutError(msg) from None
                time.sleep(0.01)
            except OSError as exc:
                if exc.errno not in {errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS}:
                    raise
                break  # a file system without locks
        yield
    finally:
        os.close(fd)
