"""Whether files still are what was written: headers, sizes, and the checksums of all values.

Only the bytes are looked at here. What the values mean (indices in range, splits that overlap) is checked by the
layer that knows the names, whose findings go into the same report.
"""

from __future__ import annotations

import re
import struct
import threading
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from jasper_store.conversion.checksum import checksum
from jasper_store.conversion.verify_parts import part_headers
from jasper_store.errors import CorruptFileError, DatasetNotFoundError, JasperStoreError
from jasper_store.formats.base import Chunked, Schema
from jasper_store.formats.files import dtype_name, is_file, system_refusals
from jasper_store.formats.flat import stem_of
from jasper_store.formats.parts import join
from jasper_store.formats.protocols import SupportsReference
from jasper_store.formats.registry import FORMATS, base_name, format_for, skipped_in
from jasper_store.formats.texts import text_names
from jasper_store.memory import budget
from jasper_store.store.manifest import MANIFEST_NAME, FileEntry, Manifest, TensorEntry
from jasper_store.store.manifest_file import read

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Iterable, Sequence

    import torch

    from jasper_store.formats.base import Skipped, TensorSpec
    from jasper_store.formats.generation import Generation
    from jasper_store.formats.protocols import ReadFormat

__all__ = ["Finding", "Severity", "VerifyReport", "Visitor", "verify_files"]

Severity = Literal["error", "warning", "fact"]


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was found.

    Attributes:
        severity: ``"error"`` (do not train on it), ``"warning"`` (know about it), ``"fact"`` (it was checked).
        tensor: name of the tensor, or of the file where no tensor is meant; ``None`` for the whole dataset.
        check: short name of the check, e.g. ``"checksum"``.
        message: what was expected, what was found, what to do.
        position: first row concerned, where there is one.
    """

    severity: Severity
    tensor: str | None
    check: str
    message: str
    position: int | None = None


class Visitor(Protocol):
    """Looks at the values of one tensor while they are read for their checksum; used by one thread at a time."""

    def visit(self, start: int, rows: torch.Tensor) -> None:
        """See rows ``start`` to ``start + len(rows)``; they are valid during the call."""

    def findings(self) -> list[Finding]:
        """What was found, after the last block."""


@dataclass(slots=True)
class VerifyReport:
    """What was found in a dataset. ``str(report)`` is for people, :meth:`to_dict` for machines.

    Attributes:
        path: what was verified.
        errors: findings that make the data untrustworthy.
        warnings: findings that one should know.
        facts: what was checked and held.
    """

    path: Path
    errors: list[Finding] = field(default_factory=list)
    warnings: list[Finding] = field(default_factory=list)
    facts: list[Finding] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether there is no error; warnings are allowed."""
        return not self.errors

    def add(self, findings: Iterable[Finding]) -> None:
        """Add findings, each to the list of its severity."""
        for finding in findings:
            {"error": self.errors, "warning": self.warnings, "fact": self.facts}[finding.severity].append(finding)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {
            "path": str(self.path),
            "ok": self.ok,
            "errors": [asdict(finding) for finding in self.errors],
            "warnings": [asdict(finding) for finding in self.warnings],
            "facts": [asdict(finding) for finding in self.facts],
        }

    def __str__(self) -> str:
        lines = [f"{self.path}: {_count(self.errors, 'error')}, {_count(self.warnings, 'warning')}"]
        for mark, findings in (("ERROR", self.errors), ("warning", self.warnings), ("ok", self.facts)):
            for found in findings:
                at = f" (row {found.position})" if found.position is not None else ""
                lines.append(f"  {mark:7}  {found.check}: {found.message}{at}")
        return "\n".join(lines)


def _count(findings: list[Finding], word: str) -> str:
    return f"{len(findings)} {word}{'' if len(findings) == 1 else 's'}"


def verify_files(
    path: str | os.PathLike[str],
    *,
    schema: Schema | None = None,
    visitor: Callable[[str], Visitor | None] | None = None,
    progress: Callable[[str, int, int], None] | None = None,
    threads: int = 2,
) -> VerifyReport:
    """Check the files of a dataset directory, or one file, against the manifest.

    Every tensor that the manifest knows is read whole and its checksum compared; memory stays at a few blocks per
    thread. Files without an entry are checked as far as they carry checks of their own: headers, the CRCs of
    ``.pt`` records, and whether compressed HDF5 chunks decompress; the report says so.

    Args:
        path: directory or file.
        schema: names and HDF5 paths.
        visitor: makes the :class:`Visitor` of a tensor by its name, or ``None``; called once per file that holds it.
        progress: called as ``progress(tensor, done_bytes, total_bytes)``, from one thread at a time.
        threads: tensors that are read at the same time.

    Raises:
        DatasetNotFoundError: there is nothing of that name, or no file of a known format in it.
    """
    path = Path(path)
    report = VerifyReport(path)
    check = _Check(path, Schema() if schema is None else schema, visitor or (lambda _: None), report)
    check.headers()
    check.contents(progress, threads)
    return report


@dataclass(frozen=True)
class _Job:
    """A tensor to be read whole; without an entry to see that it can be read, or for its visitor."""

    spec: TensorSpec
    entry: TensorEntry | None
    visitor: Visitor | None
    parts: tuple[tuple[TensorSpec, str | None], ...] = ()  # in their order, each with its checksum

    @property
    def pieces(self) -> tuple[tuple[TensorSpec, str | None], ...]:
        """What has a checksum: the parts, or the tensor."""
        return self.parts or ((self.spec, self.entry.xxh3_128 if self.entry is not None else None),)


class _Check:
    """One verification: headers first, then the values."""

    def __init__(
        self, path: Path, schema: Schema, visitor: Callable[[str], Visitor | None], report: VerifyReport
    ) -> None:
        self.schema = schema
        self.visitor = visitor
        self.report = report
        self.path = path
        self.root = path if path.is_dir() else path.parent
        self.manifest = self._read_manifest()
        grown = self.manifest.generation if path.is_dir() else None
        if grown is not None:
            self.files, listed = [], [self.root / name for name in grown.files.names]
        elif path.is_dir():
            self.files = _data_files(path)
            listed = [self.root / name for name in self.manifest.files]
        else:
            self.files = listed = [path]
        if not path.exists() or not (self.files or listed):
            msg = f"{path}: expected a dataset directory or one file of a known format, found nothing of the kind"
            raise DatasetNotFoundError(msg, path=path)
        listed_names = self.manifest.files if path.is_dir() and grown is None else ()
        self.missing = [name for name in listed_names if not is_file(self.root / name)]
        self.grown = grown
        self.skipped: list[Skipped] = []
        self.jobs: list[_Job] = []
        self.archives: list[Path] = []

    def _read_manifest(self) -> Manifest:
        try:
            found = read(self.root)
        except CorruptFileError as exc:
            self._add("error", None, "manifest", str(exc))
            found = None
        else:
            if found is None:
                text = (
                    f"no {MANIFEST_NAME}: the values were not recorded, so only the structure of the files is "
                    "checked. js.convert and js.DatasetWriter write one"
                )
                self._add("warning", None, "manifest", text)
        if found is not None and found.pending:
            text = f"{self.root}: a conversion into it was not finished ({', '.join(found.pending[:5])}); run it again"
            self._add("error", None, "manifest", text)
        return found or Manifest(self.root)

    def _add(self, severity: Severity, tensor: str | None, check: str, message: str) -> None:
        self.report.add([Finding(severity, tensor, check, message)])

    # ---- headers

    def headers(self) -> None:
        """Locate every file and compare it with its entry."""
        if self.grown is not None:
            self._parts(self.grown)
            return
        names: set[str] = set()
        every: list[TensorSpec] = []
        for file in self.files:
            specs = self._locate(file)
            if specs is None:
                continue
            names |= {spec.name for spec in specs}
            every += specs
            entry = self.manifest.files.get(file.name)
            if entry is not None:
                self._compare(file, entry, specs)
            elif specs:
                if self.manifest.files:
                    text = f"{file}: the manifest has no entry for it, so only its structure is checked"
                    self._add("warning", file.name, "manifest", text)
                self._structure(file, specs)
        self._name_skipped(every)
        for name in self.missing:
            lost = self.manifest.files[name].tensors.keys() - names
            text = f"{self.root / name}: the manifest lists it, and it is not there"
            if lost:
                self._add("error", name, "missing", f"{text}; no other file holds {', '.join(sorted(lost))}")
            else:
                self._add("warning", name, "missing", f"{text}; other files hold its tensors")

    def _parts(self, generation: Generation) -> None:
        """Compare the headers of all files with what the manifest says of the parts in them."""
        held, problems = part_headers(generation, self.root, self.schema)
        for problem in problems:
            self._add("error", *problem)
        for name, parts in held.items():
            spec = parts[0][0] if len(parts) == 1 else join(name, [spec for spec, _ in parts])
            self.jobs.append(_Job(spec, TensorEntry(dtype_name(spec.dtype), spec.shape), self.visitor(name), parts))

    def _name_skipped(self, specs: Sequence[TensorSpec]) -> None:
        """Say what is no tensor, unless it was kept: then it is there as a text of its name."""
        kept = text_names(specs)
        skipped = [skip for skip in self.skipped if skip.name not in kept]
        if skipped and not specs and not self.report.errors:
            text = (
                f"{self.path}: expected tensors, found none beside what is skipped: {'; '.join(map(str, skipped[:5]))}"
            )
            raise DatasetNotFoundError(text, path=self.path)
        for skip in skipped:
            self._add("warning", skip.name, "skipped", str(skip))

    def _locate(self, file: Path) -> list[TensorSpec] | None:
        fmt = format_for(file)
        if fmt is None:
            self._add("error", file.name, "header", f"{file}: its name does not say its format")
            return None
        try:
            specs = fmt.locate(file, self.schema)
            self.skipped += skipped_in(fmt, file, self.schema)
            differences = fmt.compare_with_reference(file) if isinstance(fmt, SupportsReference) else []
        except JasperStoreError as exc:
            if self._is_wanted(file, fmt):
                self._add("error", file.name, "header", str(exc))
            else:
                self._add("warning", file.name, "header", f"{file.name} is not part of the dataset: {exc}")
            return None
        for text in differences:
            self._add("error", file.name, "reference", f"{file}: {text}; convert it again")
        return specs

    def _is_wanted(self, file: Path, fmt: ReadFormat) -> bool:
        """Whether a file that cannot be read is missed: opening skips, by the same rule, what no name asks for."""
        known = self.schema.required | self.schema.optional
        if not self.schema.required or file.name in self.manifest.files or fmt.one_file == file.name:
            return True
        stem = base_name(stem_of(file, fmt.suffixes))
        return any(stem == name or re.fullmatch(rf"{re.escape(name)}[._-]\d[\w-]*", stem) for name in known)

    def _compare(self, file: Path, entry: FileEntry, specs: list[TensorSpec]) -> None:
        size = file.stat().st_size
        if size != entry.fingerprint.size:
            text = f"{file}: expected {entry.fingerprint.size:,} bytes, found {size:,}; restore the file or convert it again"
            self._add("error", file.name, "size", text)
        found = {spec.name: spec for spec in specs}
        for name in entry.tensors.keys() - found.keys():
            self._add("error", name, "header", f"{file}: {name} was written to it and is not in it now")
        for name, spec in found.items():
            tensor = entry.tensors.get(name)
            if tensor is None:
                self._add("warning", name, "manifest", f"{file}: {name} is in the file and not in the manifest")
            elif (tensor.dtype, tensor.shape) != (dtype_name(spec.dtype), spec.shape):
                text = (
                    f"{file}: {name} was written as {tensor.dtype} {list(tensor.shape)}, its header now says "
                    f"{dtype_name(spec.dtype)} {list(spec.shape)}; restore the file or convert it again"
                )
                self._add("error", name, "header", text)
            else:
                self.jobs.append(_Job(spec, tensor, self.visitor(name)))

    def _structure(self, file: Path, specs: list[TensorSpec]) -> None:
        """What a file without an entry offers to be checked."""
        if zipfile.is_zipfile(file):
            self.archives.append(file)
        for spec in specs:
            visitor = self.visitor(spec.name)
            if visitor is not None or isinstance(spec.location, Chunked):
                self.jobs.append(_Job(spec, None, visitor))

    # ---- contents

    def contents(self, progress: Callable[[str, int, int], None] | None, threads: int) -> None:
        """Read what was listed for reading, the largest first, a few at a time."""
        jobs = sorted(self.jobs, key=lambda job: job.spec.nbytes, reverse=True)
        total = sum(job.spec.nbytes for job in jobs) + sum(file.stat().st_size for file in self.archives)
        drop = total > budget.measure().nbytes // 2
        lock = threading.Lock()
        done = 0

        def advance(name: str, nbytes: int) -> None:
            nonlocal done
            with lock:
                done += nbytes
                if progress is not None:
                    progress(name, done, total)

        with system_refusals(self.path), ThreadPoolExecutor(max(threads, 1), "verify") as pool:
            try:
                found = [
                    *pool.map(lambda job: _verify_values(job, advance, drop=drop), jobs),
                    *pool.map(lambda file: _verify_records(file, advance), self.archives),
                ]
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        self.report.add(finding for finding in found if finding is not None)
        for job in jobs:
            self.report.add(job.visitor.findings() if job.visitor is not None else ())
        good = sum(1 for job, finding in zip(jobs, found, strict=False) if finding is None and job.entry is not None)
        if good:
            nbytes = sum(job.spec.nbytes for job in jobs if job.entry is not None)
            text = f"{good} of {len(jobs)} tensors read hold the values that were written ({nbytes:,} bytes)"
            self._add("fact", None, "checksum", text)
        if self.archives:
            self._add("fact", None, "records", f"the CRCs of {len(self.archives)} .pt files were compared")


def _data_files(root: Path) -> list[Path]:
    """Files of a directory that hold its tensors; what is only read counts where nothing else is."""
    known = [
        (path, fmt)
        for path in sorted(root.iterdir())
        if path.name[0] not in "._" and not path.is_dir() and (fmt := format_for(path)) is not None
    ]
    written = [path for path, fmt in known if fmt.name in FORMATS]
    return written or [path for path, _ in known]


def _verify_values(job: _Job, advance: Callable[[str, int], None], *, drop: bool) -> Finding | None:
    """Read a tensor whole, part by part, and compare checksums, where they are known."""
    row = 0  # at which the piece begins
    for spec, expected in job.pieces:

        def look(start: int, rows: torch.Tensor, first: int = row, name: str = job.spec.name) -> None:
            if job.visitor is not None:
                job.visitor.visit(first + start, rows)
            advance(name, rows.nbytes)

        try:
            found = checksum(spec, look, drop=drop)
        except (JasperStoreError, OSError) as exc:
            return Finding("error", spec.name, "read", f"{spec.path}: {spec.name} cannot be read whole: {exc}")
        if expected is not None and found != expected:
            text = (
                f"{spec.path}: the values of {spec.name} have changed since they were written (xxh3-128 expected "
                f"{expected}, found {found}); restore the file or convert it again"
            )
            return Finding("error", spec.name, "checksum", text)
        row += spec.n_rows
    return None


def _verify_records(file: Path, advance: Callable[[str, int], None]) -> Finding | None:
    """Compare the CRCs that a ``.pt`` carries; torch can be told not to write them, and then writes 0."""
    try:
        with zipfile.ZipFile(file) as archive:
            for info in archive.infolist():
                if info.CRC == 0 and info.file_size:
                    continue
                with archive.open(info) as record:
                    while data := record.read(1 << 20):
                        advance(file.name, len(data))
    # zipfile's own errors, and whatever else it meets in a directory that makes no sense.
    except (
        zipfile.BadZipFile,
        zipfile.LargeZipFile,
        zlib.error,
        struct.error,
        OSError,
        EOFError,
        RuntimeError,
        ValueError,
        KeyError,
        OverflowError,
    ) as exc:
        text = f"{file}: its bytes have changed since it was saved ({exc}); restore the file"
        return Finding("error", file.name, "records", text)
    return None
