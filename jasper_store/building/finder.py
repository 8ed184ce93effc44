"""What ``build`` is given, found and opened: arrays, tensors, files, directories, tensors of a store, columns, ids."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Mapping, Sequence
from os import PathLike, fspath
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

from jasper_store.building.ids import ListedIds, read_strings
from jasper_store.building.rows import Matrix
from jasper_store.errors import IntegrityError, JasperStoreWarning, UnknownNameError
from jasper_store.jasper import api
from jasper_store.store.ids import Ids
from jasper_store.store.ragged import RaggedTensor
from jasper_store.store.store import TensorStore
from jasper_store.store.tensors import StoredTensor

__all__ = ["Finder", "Ragged", "split_column"]

Array: TypeAlias = "torch.Tensor | NDArray[Any] | StoredTensor"


class Ragged:
    """Rows of different lengths: int64 values, and int64 offsets [rows + 1], both in memory or in a file."""

    def __init__(self, values: Matrix, offsets: Matrix) -> None:
        self.values = values
        self.offsets = offsets

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def part(self, start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Values (int64) of rows start to stop, and the length of each of these rows."""
        offsets = self.offsets.part(start, stop + 1).long()
        return self.values.part(int(offsets[0]), int(offsets[-1])).long(), offsets.diff()


class Finder:
    """Finds inputs; files that it opens are closed with the stack.

    Args:
        stack: closes what was opened.
    """

    def __init__(self, stack: contextlib.ExitStack) -> None:
        self._stack = stack

    def matrix(self, role: str, given: object, known: str | None = None) -> Matrix:
        """An input as rows.

        Args:
            role: the argument it came by.
            given: an array, a tensor, a tensor of a store, numbers in lists, a path, ``"path:name"``, or (path, name).
            known: name of the tensor that is taken from a directory that has several.

        Raises:
            DatasetNotFoundError, CorruptFileError: the file.
            UnknownNameError: the file has several tensors, and none of them was named; or lacks that one.
            IntegrityError: what is no array of numbers.
        """
        if isinstance(given, (StoredTensor, torch.Tensor)):
            return Matrix(role, given)
        place = _place(given)
        if place is not None:
            return Matrix(role, self._tensor(role, *place, known))
        try:
            array = np.asarray(given)
        except ValueError:  # lists of different lengths
            array = np.empty(0, object)
        if array.dtype.kind not in "fiub" or array.dtype.itemsize > 8 or not array.dtype.isnative:
            raise IntegrityError(
                f"{role}: expected an array of numbers, a tensor or a path, found {type(given).__name__} of {array.dtype}; "
                "convert it (.astype(np.float32))",
                tensor=role,
            )
        return Matrix(role, array)

    def ragged(self, role: str, given: object, known: str) -> Ragged:
        """An input as rows of different lengths.

        Args:
            role: the argument it came by.
            given: a list of lists of ints, (values, offsets), a ragged tensor of a store, an array [rows, k], or a place
                as for :meth:`matrix`.
            known: base name of the ragged tensor that is taken from a directory that has several.

        Raises:
            DatasetNotFoundError, CorruptFileError, UnknownNameError, IntegrityError: as :meth:`matrix`.
        """
        place = _place(given)
        if place is not None:
            given = self._ragged(role, *place, known)
        if isinstance(given, RaggedTensor):
            return Ragged(Matrix(role, given.values), Matrix(role, given.offsets))
        if isinstance(given, tuple) and len(given) == 2 and all(np.ndim(part) == 1 for part in given):
            return Ragged(self.matrix(role, given[0]), self.matrix(role, given[1]))
        if isinstance(given, (np.ndarray, torch.Tensor, StoredTensor)):
            return _of_one_length(self.matrix(role, given))
        return _listed(role, given)

    def ids(self, role: str, given: object) -> Ids | ListedIds:
        """Ids by which rows are found.

        Args:
            role: the argument they came by.
            given: strings, ``store.ids(name)``, a file of strings (``.npy``, ``.pt``, ``.txt`` with one on each line), or
                ``"path:name"`` of the strings in a dataset.

        Raises:
            DatasetNotFoundError, CorruptFileError, UnknownNameError: the file.
            IntegrityError: what is no string, or is there twice.
        """
        if isinstance(given, Ids):
            return given
        place = _place(given)
        if place is None:
            return ListedIds(role, list(_strings(role, given)))
        path, name = place
        if path.is_file() and name is None:
            listed = read_strings(role, path)
            if listed is not None:
                return ListedIds(role, listed)
        store = self._open(path)
        texts = sorted({column.removesuffix(".order") for column in store if column.endswith(".order")})
        name = name or (texts[0] if len(texts) == 1 else None)
        if name is None or f"{name}.values" not in store:
            raise UnknownNameError(
                f"{role}: expected the name of strings in {path}, found {name!r}; pass '{path}:NAME' with one of "
                f"{', '.join(texts) or 'none: it holds no strings'}",
                path=path,
                tensor=name,
            )
        return store.ids(name)

    def _open(self, path: Path) -> TensorStore:
        with warnings.catch_warnings():
            # What is said of training from a file is of no interest here.
            warnings.simplefilter("ignore", JasperStoreWarning)
            return self._stack.enter_context(api.open(path, use_mmap=True))

    def _tensor(self, role: str, path: Path, name: str | None, known: str | None) -> StoredTensor:
        store = self._open(path)
        return store[_chosen(role, path, name, known, list(store))]

    def _ragged(self, role: str, path: Path, name: str | None, known: str) -> RaggedTensor | StoredTensor:
        store = self._open(path)
        ragged = [column.removesuffix(".offsets") for column in store if column.endswith(".offsets")]
        if name is not None and name in store:
            return store[name]
        return store.ragged(_chosen(role, path, name, known, ragged))


def split_column(given: str) -> tuple[Path, str | None]:
    """A path, and the column behind a colon, as far as what lies before the colon is there: ``raw.h5:group/q``."""
    if not Path(given).exists():
        colons = [place for place, letter in enumerate(given) if letter == ":"]
        for place in reversed(colons):
            head, tail = given[:place], given[place + 1 :]
            if head and tail and Path(head).exists():
                return Path(head), tail
    return Path(given), None


def _place(given: object) -> tuple[Path, str | None] | None:
    if isinstance(given, str):
        return split_column(given)
    if isinstance(given, PathLike):
        return Path(fspath(given)), None
    if isinstance(given, tuple) and len(given) == 2:
        path, name = given
        if isinstance(path, (str, PathLike)) and isinstance(name, str):
            return Path(fspath(path)), name
    return None


def _chosen(role: str, path: Path, name: str | None, known: str | None, names: Sequence[str]) -> str:
    """The tensor that is meant: the one named, that of JASPER's name, or the only one."""
    if name is None and known in names:
        return str(known)
    if name is None and len(names) == 1:
        return names[0]
    if name is None or name not in names:
        found = f"{len(names)} tensors and no name" if name is None else f"no tensor {name!r}"
        listed = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
        raise UnknownNameError(
            f"{role}: expected one tensor of {path}, found {found}; pass '{path}:NAME' with one of {listed or 'none'}",
            path=path,
            tensor=name,
        )
    return name


def _strings(role: str, given: object) -> Iterator[str]:
    if isinstance(given, np.ndarray):
        given = given.tolist()
    if not isinstance(given, Sequence):
        raise IntegrityError(f"{role}: expected a list of strings, found {type(given).__name__}", tensor=role)
    for position, text in enumerate(given):
        if not isinstance(text, str):
            raise IntegrityError(
                f"{role}: expected strings, found {type(text).__name__} at position {position}", tensor=role
            )
        yield text


def _of_one_length(matrix: Matrix) -> Ragged:
    if len(matrix.shape) != 2:
        raise IntegrityError(
            f"{matrix.role}: expected rows [n, k] or a list of lists, found shape {list(matrix.shape)}",
            tensor=matrix.role,
        )
    values = torch.cat([*matrix.blocks(1 << 16), torch.empty((0, matrix.shape[1]), dtype=matrix.dtype)])
    offsets = torch.arange(len(matrix) + 1) * matrix.shape[1]
    return Ragged(Matrix(matrix.role, values.reshape(-1)), Matrix(matrix.role, offsets))


def _listed(role: str, given: object) -> Ragged:
    from jasper_store.conversion.coerce import flatten

    if not isinstance(given, Sequence) or isinstance(given, (str, Mapping)):
        raise IntegrityError(f"{role}: expected a list of lists of rows, found {type(given).__name__}", tensor=role)
    try:
        values, lengths = flatten(role, given)
    except TypeError as exc:
        raise IntegrityError(f"{role}: expected a list of lists of rows, found {exc}", tensor=role) from exc
    offsets = torch.cat((torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)))
    return Ragged(Matrix(role, values), Matrix(role, offsets))
