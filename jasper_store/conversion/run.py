"""A conversion under way: what is skipped, refused, written, published and recorded.

How the files appear. Each is written under a temporary name, flushed, read back, and renamed. Where nothing is
replaced, each is published as soon as it is proven: an interrupted run leaves a part of the new files beside the
source, which readers pass over as long as the source is the more complete one, and the next run skips them.
Where files of an older dataset are replaced, all new ones are prepared first. Where the system can, a directory that has
them is then exchanged for the old one (``exchange.py``). Elsewhere the manifest is written, which is the commit: it names the new files by their fingerprints, so that until the renames that follow are done, an old file
among new ones is refused on opening instead of being mixed with them; :func:`finish_interrupted` (run by the next
conversion) completes renames that a kill has cut.
"""

from __future__ import annotations

import contextlib
import filecmp
import os
import shutil
from dataclasses import replace
from typing import TYPE_CHECKING

from jasper_store.conversion.exchange import exchanged
from jasper_store.conversion.manifest_batch import ManifestBatch
from jasper_store.conversion.narrow import saves_nothing
from jasper_store.conversion.report import ConversionReport, TensorReport
from jasper_store.conversion.transfer import Stream, compressed_nbytes, matched, write_file
from jasper_store.errors import ConversionError, CorruptFileError, DatasetNotFoundError
from jasper_store.files.atomic import (
    keep_access,
    map_os_errors,
    publish,
    remove,
    require_space,
    stale_temporaries,
    sync_directory,
    sync_file,
    temporary_name,
    untrack,
)
from jasper_store.formats.arrow.directory import lists_data_files
from jasper_store.formats.base import Chunked
from jasper_store.formats.files import dtype_name
from jasper_store.formats.numbered import INDEX_SUFFIX
from jasper_store.formats.registry import format_for
from jasper_store.store.manifest import MANIFEST_NAME, Manifest
from jasper_store.store.manifest_file import read

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from jasper_store.conversion.plan import FileTask, SourceFacts, Sources
    from jasper_store.conversion.transfer import Options
    from jasper_store.formats.base import TensorSpec
    from jasper_store.store.manifest import FileEntry

__all__ = ["Run", "finish_interrupted"]


def finish_interrupted(directory: Path) -> list[Path]:
    """Complete the renames of a conversion that was killed after its commit; the files that got their name.

    The manifest names the new files by their fingerprints. A temporary of a dead process that has the fingerprint of a file
    which is not there, or is another one, is that file.

    Raises:
        ConversionError: the directory cannot be written.
        CorruptFileError: the manifest cannot be understood.
    """
    manifest = read(directory)
    finished = []
    for name, path in stale_temporaries(directory) if manifest is not None else ():
        entry = manifest.files.get(name) if manifest is not None else None
        target = directory / name
        if entry is None or not path.is_file() or not entry.fingerprint.matches(path):
            continue
        if not target.exists() or not entry.fingerprint.matches(target):
            with map_os_errors(target):
                path.replace(target)
            finished.append(target)
    if finished:
        sync_directory(directory)
    return finished


class Run:
    """One conversion, while its lock is held."""

    def __init__(
        self,
        src: Path,
        directory: Path,
        tasks: Sequence[FileTask],
        options: Options,
        facts: SourceFacts,
        progress: Callable[[str, int, int], None] | None,
        *,
        overwrite: bool,
        part: bool,
    ) -> None:
        self.src = src
        self.directory = directory
        self.tasks = tasks
        self.options = options
        self.facts = facts
        self.progress = progress
        self.overwrite = overwrite
        self.part = part
        self.rows: list[TensorReport] = []
        self.copied: list[str] = []
        self._done = 0
        self._total = sum(spec.nbytes for task in tasks for spec in task.specs)
        self._batch = ManifestBatch(directory)
        self._committed = False

    def do(self) -> None:
        """Skip what is right, refuse what must not be replaced, then write the rest."""
        manifest = read(self.directory) or Manifest(self.directory)
        todo = [task for task in self.tasks if not self._skip(task, manifest)]
        replaced = [task for task in todo if os.path.lexists(task.target)]
        if replaced and not self.overwrite:
            same = [task for task in replaced if self._record_if_equal(task)]
            todo = [task for task in todo if task not in same]
            self._refuse([task.target for task in replaced if task not in same])
            replaced = []
        side_files = self._side_files()
        todo = [self._with_rest(task) for task in todo]
        needed = sum(task.needed(self.options.dtype) for task in todo) + sum(path.stat().st_size for path in side_files)
        if todo or side_files:
            require_space(self.directory, needed, what=f"converting to {self.options.fmt.name}")
        try:
            if replaced and len(todo) + len(side_files) > 1:
                self._replace_all(todo, side_files)
            else:
                self._publish_each(todo, side_files, manifest)
            if manifest.pending:  # of a run that was killed: what it still lacked is there now
                self._batch.begin([])
        except BaseException:
            # What is published already is noted for the next run; the first error is the one to be seen.
            with contextlib.suppress(OSError, CorruptFileError):
                self._batch.write()
            raise
        self._batch.finish()

    # ---- what need not be written

    def _skip(self, task: FileTask, manifest: Manifest) -> bool:
        """Whether the manifest records that the target was made from these sources and holds what is asked for."""
        entry = manifest.files.get(task.target.name)
        if entry is None or not task.target.is_file() or not entry.fingerprint.matches(task.target):
            return False
        made_from = {(self.directory / source.path).resolve(): source.fingerprint for source in entry.made_from}
        for spec, dtype in task.written(self.options.dtype):
            for path in spec.paths:
                fingerprint = made_from.get(path.resolve())
                if fingerprint is None or not fingerprint.matches(path):
                    return False
            tensor = entry.tensors.get(spec.name)
            if tensor is None or tensor.xxh3_128 is None:
                return False
            if (tensor.dtype, tensor.shape) != (dtype_name(dtype), spec.shape):
                return False
        targets = self._targets(task)
        if targets is None or not self._same_layout(list(targets.values())):
            return False
        for spec in task.specs:
            self._skipped(task, spec, targets[spec.name], entry.tensors[spec.name].xxh3_128 or "")
        return True

    def _targets(self, task: FileTask) -> dict[str, TensorSpec] | None:
        """The tensors in an existing target; ``None`` where it lacks one or cannot be read."""
        try:
            located = self.options.fmt.locate(task.target, self.options.schema)
        except (CorruptFileError, DatasetNotFoundError):
            return None
        targets = matched(task, located, one_tensor=self.options.fmt.one_file is None)
        return targets if all(spec.name in targets for spec in task.specs) else None

    def _same_layout(self, targets: Sequence[TensorSpec]) -> bool:
        """Whether an existing file is compressed as asked for."""
        filters = {spec.location.filters for spec in targets if isinstance(spec.location, Chunked)}
        if self.options.compression is None:
            return not filters
        # A file of nothing but scalars and empty tensors has nothing to compress.
        return all(self.options.compression in text for text in filters) and (
            bool(filters) or all(spec.n_rows <= 1 for spec in targets)
        )

    def _record_if_equal(self, task: FileTask) -> bool:
        """Whether an existing file without an entry holds the source's values: compares all of them."""
        targets = self._targets(task)
        if targets is None or not self._same_layout(list(targets.values())):
            return False
        sums = {}
        for spec, dtype in task.written(self.options.dtype):
            target = targets[spec.name]
            if (target.dtype, target.shape) != (dtype, spec.shape):
                return False
            sums[spec.name] = Stream(spec, dtype, drop=self.options.drop).run()
            try:
                found = Stream(target, dtype, drop=self.options.drop).run()
            except CorruptFileError:
                return False
            if found != sums[spec.name]:
                return False
        self.facts.check(path for spec in task.specs for path in spec.paths)
        self._batch.add(task.target, self._batch.entry(task, task.target, sums, self.options.dtype))
        for spec in task.specs:
            self._skipped(task, spec, targets[spec.name], sums[spec.name])
        return True

    def _skipped(self, task: FileTask, spec: TensorSpec, target: TensorSpec, checksum: str) -> None:
        self._add_row(task, spec, target, checksum, 0.0, None, skipped=True)
        self._advance(spec.name, spec.nbytes)

    def _refuse(self, different: Sequence[Path]) -> None:
        if different:
            names = ", ".join(path.name for path in different[:5]) + (", ..." if len(different) > 5 else "")
            msg = (
                f"{self.directory}: expected no files there, or files with the source's values, found others in {names}; "
                "pass overwrite=True to replace them, or name another destination. Nothing was written"
            )
            raise ConversionError(msg, path=different[0])

    # ---- what is written

    def _side_files(self) -> list[Path]:
        """Other JSON files of the source's directory that are to be copied."""
        if not self.src.is_dir() or self.src.samefile(self.directory):
            return []
        found = [
            path
            for path in sorted(self.src.glob("*.json"))
            # These say where tensors lay, not where they will.
            if path.name != MANIFEST_NAME
            and path.name[0] != "."
            and not path.name.endswith(INDEX_SUFFIX)
            and not lists_data_files(path)
            and path.is_file()
        ]
        wanted = []
        for path in found:
            target = self.directory / path.name
            if not os.path.lexists(target):
                wanted.append(path)
            elif not target.is_file() or not filecmp.cmp(path, target, shallow=False):
                if not self.overwrite:
                    self._refuse([target])
                wanted.append(path)
        return wanted

    def _publish_each(self, todo: Sequence[FileTask], side_files: Sequence[Path], manifest: Manifest) -> None:
        """Nothing of another dataset is there: every file gets its name as soon as it is proven.

        The configuration comes before the first of them. In a directory that holds no data yet, the manifest says first
        which files are to come, so that the directory opens when all are there.
        """
        fresh = bool(manifest.pending) or not any(
            format_for(path) is not None and path.name[0] not in "._" for path in self.directory.iterdir()
        )
        begun = False
        for task in todo:
            with self._written(task) as (temporary, entry):
                if not begun:
                    begun = True
                    self._publish_side_files(side_files)
                    if fresh:
                        self._batch.begin([each.target.name for each in todo])
                if task.target.name in manifest.files:
                    # Its old entry would refuse the new file in the moment between the rename and the new entry.
                    self._batch.forget(task.target)
                publish(temporary, task.target)
            self._batch.add(task.target, entry)
            self._batch.write_if_due()
        if not begun:
            self._publish_side_files(side_files)

    def _publish_side_files(self, side_files: Sequence[Path]) -> None:
        for path in side_files:
            with self._copied(path) as temporary:
                publish(temporary, self.directory / path.name)

    def _replace_all(self, todo: Sequence[FileTask], side_files: Sequence[Path]) -> None:
        """Files of an older dataset are there: prepare all new ones, commit, then rename."""
        ready: list[tuple[Path, Path, FileEntry | None]] = []
        with contextlib.ExitStack() as stack:
            for task in todo:
                temporary, entry = stack.enter_context(self._written(task))
                sync_file(temporary)
                ready.append((temporary, task.target, entry))
            for path in side_files:
                temporary = stack.enter_context(self._copied(path))
                sync_file(temporary)
                ready.append((temporary, self.directory / path.name, None))
            sync_directory(self.directory)
            if not self.directory.samefile(self.src if self.src.is_dir() else self.src.parent) and exchanged(
                self.directory, ready
            ):
                return
            for _, target, known in ready:
                if known is not None:
                    self._batch.add(target, known)
            self._batch.write()
            self._committed = True
            with map_os_errors(self.directory):
                for temporary, target, _ in ready:
                    temporary.replace(target)
                sync_directory(self.directory)

    @contextlib.contextmanager
    def _written(self, task: FileTask) -> Iterator[tuple[Path, FileEntry]]:
        """Write one file under a temporary name; it is removed in the end unless it was renamed."""
        temporary = temporary_name(task.target)
        sources = [path for spec in (*task.specs, *task.kept) for path in spec.paths]
        try:
            with map_os_errors(task.target, temporary, task.needed(self.options.dtype)):
                self.facts.check(sources)
                try:
                    written = write_file(task, temporary, self.options, self._advance)
                except CorruptFileError:
                    self.facts.check(sources)  # a source that was cut meanwhile is not corrupt, it changed
                    raise
                self.facts.check(sources)
                keep_access(task.target, temporary)
                sums = {item.spec.name: item.checksum for item in written}
                entry = self._batch.entry(task, temporary, sums, self.options.dtype)
                for item in written:
                    self._add_row(task, item.spec, item.target, item.checksum, item.seconds, item.max_error)
                yield temporary, entry
        finally:
            self._leave(temporary)

    def _with_rest(self, task: FileTask) -> FileTask:
        """A file of many tensors that is replaced for some of them keeps the others."""
        if not self.part or self.options.fmt.one_file is None or not task.target.is_file():
            return task
        try:
            old = self.options.fmt.locate(task.target, self.options.schema)
        except CorruptFileError:
            return task  # a damaged file has nothing to keep
        names = {spec.name for spec in task.specs}
        rest = tuple(spec for spec in old if spec.name not in names)
        self.facts.add(path for spec in rest for path in spec.paths)
        self._total += sum(spec.nbytes for spec in rest)
        return replace(task, kept=rest)

    @contextlib.contextmanager
    def _copied(self, path: Path) -> Iterator[Path]:
        target = self.directory / path.name
        temporary = temporary_name(target)
        try:
            with map_os_errors(target, temporary, path.stat().st_size):
                shutil.copyfile(path, temporary)
                keep_access(target, temporary)
                yield temporary
            self.copied.append(path.name)
        finally:
            self._leave(temporary)

    def _leave(self, temporary: Path) -> None:
        """Remove a temporary, unless the manifest names it already: then the next run renames it."""
        if self._committed:
            untrack(temporary)
        else:
            remove(temporary)

    def _advance(self, name: str, nbytes: int) -> None:
        self._done += nbytes
        if self.progress is not None:
            self.progress(name, self._done, self._total)

    # ---- what is reported

    def _add_row(
        self,
        task: FileTask,
        spec: TensorSpec,
        target: TensorSpec,
        checksum: str,
        seconds: float,
        max_error: float | None,
        *,
        skipped: bool = False,
    ) -> None:
        row = TensorReport(
            name=spec.name,
            file=task.target.name,
            dtype=dtype_name(spec.dtype),
            written_as=dtype_name(target.dtype),
            shape=spec.shape,
            bytes_in=spec.nbytes,
            bytes_out=compressed_nbytes(target),
            seconds=seconds,
            checksum=checksum,
            max_error=max_error,
            skipped=skipped,
        )
        self.rows.append(row)

    def report(self, sources: Sources, seconds: float) -> ConversionReport:
        """The report of a run that is done."""
        return ConversionReport(
            source=self.src,
            destination=self.directory,
            source_format=sources.format,
            format=self.options.fmt.name,
            compression=self.options.compression,
            tensors=tuple(sorted(self.rows, key=lambda row: row.name)),
            seconds=seconds,
            proof="disk" if self.options.drop else "page cache",
            copied=tuple(self.copied),
            notes=(*sources.notes, *self._not_narrowed()),
        )

    def _not_narrowed(self) -> list[str]:
        """Which floats the dtype asked for would not have made smaller."""
        wanted = self.options.dtype
        if wanted is None:
            return []
        names = ", ".join(sorted(row.name for row in self.rows if saves_nothing(row.written_as, wanted)))
        return [f"written as they are, since {dtype_name(wanted)} would save nothing: {names}"] if names else []
