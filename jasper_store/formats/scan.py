"""The tensors of some files of one format: each file alone, files that are numbered, and shards that an index names."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from jasper_store.errors import CorruptFileError, DatasetNotFoundError, IncompatibleOptionsError
from jasper_store.formats.flat import stem_of
from jasper_store.formats.numbered import INDEX_SUFFIX, Numbered, group, merge, pick, read_index
from jasper_store.formats.protocols import SupportsKeys

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence

    from jasper_store.errors import JasperStoreError
    from jasper_store.formats.base import Schema, TensorSpec
    from jasper_store.formats.protocols import ReadFormat

__all__ = ["Scan", "base_name", "one_error", "scan_files", "with_stem"]


def base_name(name: str) -> str:
    """The name of the whole tensor: ``X`` for the parts ``X.values`` and ``X.offsets`` of a ragged one."""
    base, dot, part = name.rpartition(".")
    return base if dot and part in {"values", "offsets"} else name


@dataclass
class Scan:
    """The files of one format in a directory, located.

    Attributes:
        specs: tensors by name.
        errors: what is wrong with files that cannot be read, by their names without suffix.
        failed: the paths of these.
    """

    specs: dict[str, TensorSpec] = field(default_factory=dict)
    errors: dict[str, JasperStoreError] = field(default_factory=dict)
    failed: set[str] = field(default_factory=set)

    def names(self) -> set[str]:
        """Base names of all tensors; a file that cannot be read counts by its name, so that it is not passed over.

        One half of a ragged tensor is no whole one, and counts by its own name.
        """
        return {self._counted(name) for name in self.specs} | self.errors.keys()

    def drop_halves(self, whole: Collection[str]) -> None:
        """Forget halves of ragged tensors that another format has whole: a conversion beside it is under way."""
        for name in [name for name in self.specs if self._counted(name) == name != base_name(name)]:
            if base_name(name) in whole:
                del self.specs[name]

    def _counted(self, name: str) -> str:
        base = base_name(name)
        return base if {f"{base}.values", f"{base}.offsets"} <= self.specs.keys() else name

    def take(self, wanted: Iterable[str]) -> list[TensorSpec]:
        """The specs of these names, as :meth:`names` has them; raises the errors of those that cannot be read, all in one."""
        wanted = set(wanted)
        unreadable = sorted(wanted & self.errors.keys())
        if unreadable:
            raise one_error([self.errors[name] for name in unreadable])
        return [spec for name, spec in self.specs.items() if self._counted(name) in wanted]


def one_error(errors: list[JasperStoreError]) -> JasperStoreError:
    """One error that says what several say."""
    if len(errors) == 1:
        return errors[0]
    text = f"{len(errors)} files cannot be read. " + " ".join(str(error) for error in errors)
    return CorruptFileError(text, path=errors[0].path, tensor=errors[0].tensor)


def scan_files(fmt: ReadFormat, files: Mapping[Path, str], schema: Schema) -> Scan:
    """Locate the tensors of some files, each given with its name without suffix.

    Raises:
        CorruptFileError: two files hold the same tensor, a number is missing, or the one file of the format is damaged.
            What is wrong with any other file is kept in the result.
    """
    found = Scan()
    for stem, located in _units(fmt, files, schema):
        try:
            specs = located()
        except (CorruptFileError, DatasetNotFoundError, IncompatibleOptionsError) as exc:
            if exc.path is not None and fmt.one_file == Path(exc.path).name:
                raise
            found.errors[base_name(stem)] = exc
            found.failed.add(str(exc.path))
            continue
        for spec in specs:
            if spec.name in found.specs:
                raise CorruptFileError(
                    f"{spec.path}: holds the tensor {spec.name!r}, and so does {found.specs[spec.name].path}; remove one.",
                    path=spec.path,
                    tensor=spec.name,
                )
            found.specs[spec.name] = spec
    for name in [name for name in found.specs if name != base_name(name) and base_name(name) in found.specs]:
        raise CorruptFileError(
            f"{found.specs[name].path}: holds the ragged tensor {name!r}, and {found.specs[base_name(name)].path} a "
            "plain one of that name; remove one.",
            path=found.specs[name].path,
            tensor=name,
        )
    return found


def _units(
    fmt: ReadFormat, files: Mapping[Path, str], schema: Schema
) -> Iterator[tuple[str, Callable[[], Sequence[TensorSpec]]]]:
    """What is read as one: a name, and what locates its tensors. A file, numbered files, or what an index names."""
    files = dict(files)
    if fmt.name == "safetensors":
        for index in sorted({path.parent for path in files}):
            for path in sorted(index.glob(f"*{INDEX_SUFFIX}")):
                named = read_index(path)
                shards = list(dict.fromkeys(named.values()))
                for shard in shards:
                    files.pop(shard, None)
                yield path.name.removesuffix(INDEX_SUFFIX), partial(_indexed, fmt, path, named, shards)
    groups, rest = group(files)
    for numbered in groups:
        yield numbered.base, partial(_numbered, fmt, numbered, schema)
    for path, stem in rest.items():
        yield stem, partial(fmt.locate, path, schema)


def _numbered(fmt: ReadFormat, numbered: Numbered, schema: Schema) -> list[TensorSpec]:
    return merge(numbered, [with_stem(fmt, path, schema) for path in numbered.files])


def _indexed(fmt: ReadFormat, index: Path, named: Mapping[str, Path], shards: Sequence[Path]) -> list[TensorSpec]:
    assert isinstance(fmt, SupportsKeys)
    return pick(index, named, [spec for shard in shards for spec in fmt.locate_keys(shard)])


def with_stem(fmt: ReadFormat, path: Path, schema: Schema) -> tuple[str, list[TensorSpec]]:
    """A numbered file's name without suffix, and its tensors by the names that it has for them."""
    stem = stem_of(path, fmt.suffixes)
    return stem, fmt.locate_keys(path) if isinstance(fmt, SupportsKeys) else fmt.locate(path, schema)
