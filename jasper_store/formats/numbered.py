"""Files that are numbered: the parts of one dataset, or the shards of one set of tensors.

Two ways of numbering are known: ``name-00001-of-00042``, and ``name_000``, ``name.000`` or ``name-000`` with numbers of one
width of at least two digits. Numbers begin at 0 or 1, and all of them are there. Names with one digit, or with numbers of
different widths, are names like any other.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from dataclasses import dataclass
from itertools import islice, pairwise
from typing import TYPE_CHECKING, Any, Final, NoReturn

from jasper_store.errors import CorruptFileError
from jasper_store.formats.files import is_file, open_for_reading, read_at, shown
from jasper_store.formats.parts import join

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from pathlib import Path

    from jasper_store.formats.base import TensorSpec

__all__ = ["INDEX_SUFFIX", "Numbered", "group", "merge", "pick", "read_index"]

INDEX_SUFFIX: Final = ".safetensors.index.json"
_MAX_INDEX = 64 << 20
_OF = re.compile(r"(?P<base>.+?)-(?P<number>\d+)-of-(?P<total>\d+)")
_PLAIN = re.compile(r"(?P<base>.+?)(?P<separator>[._-])(?P<number>\d{2,})")


@dataclass(frozen=True)
class Numbered:
    """Files that are numbered alike, in order.

    Attributes:
        base: their name without the number.
        pattern: how they are named, for errors.
        files: the files.
    """

    base: str
    pattern: str
    files: tuple[Path, ...]

    def whole_name(self, stem: str, name: str) -> str:
        """Name in the whole of what a file whose name without suffix is ``stem`` calls ``name``."""
        own = name == stem or name.startswith(f"{stem}.")
        return self.base + name[len(stem) :] if own else name


def group(files: Mapping[Path, str], *, whole: bool = True) -> tuple[list[Numbered], dict[Path, str]]:
    """Sort files into those that are numbered, and the rest.

    Args:
        files: each with its name without suffix.
        whole: whether all numbers have to be there; if not, files are taken in the order given.

    Returns:
        The groups, and the files that are in none.

    Raises:
        CorruptFileError: a number is missing, or there twice.
    """
    found: dict[tuple[Path | None, str, str, str], list[tuple[int, Path]]] = defaultdict(list)
    rest: dict[Path, str] = {}
    for path, stem in files.items():
        where = path.parent if whole else None  # those of a list may lie in several directories
        if match := _OF.fullmatch(stem):
            key = (where, match["base"], f"-of-{match['total']}", "")
        elif match := _PLAIN.fullmatch(stem):
            key = (where, match["base"], match["separator"], f"{len(match['number'])} digits")
        else:
            rest[path] = stem
            continue
        found[key].append((int(match["number"]), path))
    groups = []
    for (_, base, how, width), members in found.items():
        total = int(how[4:]) if not width else None
        if total is None and (len(members) < 2 or (whole and min(members)[0] > 1)):
            rest.update((path, files[path]) for _, path in members)
            continue
        suffix = members[0][1].name[len(files[members[0][1]]) :]
        shown_as = f"{base}-N{how}{suffix}" if total is not None else f"{base}{how}N{suffix} with N of {width}"
        if whole:
            members.sort()
            _check_numbers(members, total, shown_as)
        groups.append(Numbered(base, shown_as, tuple(path for _, path in members)))
    return groups, rest


def _check_numbers(members: list[tuple[int, Path]], total: int | None, pattern: str) -> None:
    """Raise unless the numbers, ascending, are all from 0 or 1 on."""
    first = members[0][0]
    count = total if total is not None else members[-1][0] - first + 1
    numbers = [number for number, _ in members]
    # What a name claims may be any number, so the numbers that should be there are never listed.
    wanted = range(first, first + count)
    if first <= 1 and len(numbers) == count and all(a == b for a, b in zip(numbers, wanted, strict=True)):
        return
    path = members[0][1]
    twice = next((one for one, next_one in pairwise(numbers) if one == next_one), None)
    if twice is not None:
        found = f"number {twice} twice"
    elif first > 1:
        found = f"{first} as the first"
    else:
        there = set(numbers)
        lacking = count - sum(number in wanted for number in there)
        missing = list(islice((number for number in wanted if number not in there), 5))
        more = f" and {lacking - 5} more" if lacking > 5 else ""
        beyond = f"number {numbers[-1]}, which is too large" if not missing else ""
        found = beyond or f"none of number {', '.join(map(str, missing))}{more}"
    msg = (
        f"{path.parent}: files named {pattern} are taken as the parts of a whole, expected {count} of them from "
        f"{min(first, 1)} on, found {found}; restore what is missing. If they are no parts, name them otherwise, or open "
        "them as a list of files"
    )
    raise CorruptFileError(msg, path=path)


def merge(numbered: Numbered, located: Sequence[tuple[str, Sequence[TensorSpec]]]) -> list[TensorSpec]:
    """The tensors of numbered files.

    A tensor that is in each of them has its rows in all of them; tensors that are in one file each are whole. A file's
    only tensor that is called as the file is called like the whole.

    Args:
        numbered: the files.
        located: of each file its name without suffix, and its tensors.

    Raises:
        CorruptFileError: a tensor is in some files and not in others, or parts do not fit each other.
    """
    by_name: dict[str, list[TensorSpec]] = defaultdict(list)
    for stem, specs in located:
        for spec in specs:
            by_name[numbered.whole_name(stem, spec.name)].append(spec)
    counts = {len(specs) for specs in by_name.values()}
    if counts <= {1} and len(located) > 1:
        return [_renamed(name, specs[0]) for name, specs in by_name.items()]
    merged = []
    for name, specs in by_name.items():
        if len(specs) != len(located):
            holders = {spec.path for spec in specs}
            lacking = next((path for path in numbered.files if path not in holders), numbered.files[0])
            msg = (
                f"{lacking}: expected a part of the tensor {name!r}, which {len(specs)} of the {len(located)} files named "
                f"{numbered.pattern} hold, found none; write the file again, or remove it"
            )
            raise CorruptFileError(msg, path=lacking, tensor=name)
        merged.append(join(name, specs))
    return merged


def _renamed(name: str, spec: TensorSpec) -> TensorSpec:
    return spec if spec.name == name else type(spec)(name, spec.dtype, spec.shape, spec.location)


def read_index(path: Path) -> dict[str, Path]:
    """File of each tensor, as an index of sharded safetensors files (``*.safetensors.index.json``) says.

    Raises:
        CorruptFileError: it cannot be understood, names a file outside its directory, or one that is missing.
    """
    with open_for_reading(path) as (file, size):
        if size > _MAX_INDEX:
            _refuse(path, f"at most {_MAX_INDEX} bytes, found {size}")
        raw = read_at(file, 0, size)
    try:
        found: Any = json.loads(raw)
        names = found["weight_map"] if isinstance(found, dict) else None
    except (ValueError, KeyError, RecursionError):
        names = None
    if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
        _refuse(path, f"a JSON object with a weight_map of tensor names to file names, found {shown(raw[:60], 100)}")
    files: dict[str, Path] = {}
    for name in set(names.values()):
        if "/" in name or "\\" in name or "\0" in name or name in {"", ".", ".."}:
            _refuse(path, f"names of files in its directory, found {shown(name, 100)}")
        files[name] = path.parent / name
    for name in sorted(files):
        if not is_file(files[name]):
            _refuse(
                path,
                f"the file {name[:100]!r}, which it names, found none: the download is not complete, or it is stale",
            )
    return {tensor: files[name] for tensor, name in names.items()}


def _refuse(path: Path, expected: str) -> NoReturn:
    msg = f"{path}: expected {expected}; complete or remove it"
    raise CorruptFileError(msg, path=path)


def pick(index: Path, named: Mapping[str, Path], held: Iterable[TensorSpec]) -> list[TensorSpec]:
    """The tensors that an index names, out of those that its files hold.

    Raises:
        CorruptFileError: a file does not hold a tensor that the index says is in it.
    """
    there = {(spec.name, spec.path): spec for spec in held}
    specs = []
    for name, path in named.items():
        spec = there.get((name, path))
        if spec is None:
            _refuse(index, f"the tensor {name!r} in {path.name}, found none: the index is stale")
        else:
            specs.append(spec)
    return specs
