"""Files kept as texts are the sequence of their paths."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest

from jasper_store.formats.file_list import FileList, texts_of

PATHS = (Path("a/x-0.npy"), Path("a/x-1.npy"), Path("/b/x-2.npy"))


def test_it_is_the_sequence_of_its_paths() -> None:
    files = FileList(map(str, PATHS))
    assert tuple(files) == PATHS
    assert (len(files), files[0], files[-1]) == (3, PATHS[0], PATHS[2])
    assert tuple(files[1:]) == PATHS[1:]
    assert PATHS[1] in files
    assert Path("a/y.npy") not in files
    assert files.index(PATHS[2]) == 2
    with pytest.raises(IndexError):
        files[3]


def test_equal_is_what_has_the_same_paths() -> None:
    files = FileList(map(str, PATHS))
    assert files == FileList(texts_of(files))
    assert hash(files) == hash(FileList(texts_of(files)))
    assert files == PATHS
    assert files != PATHS[:2]
    assert files != "a/x-0.npy"
    assert texts_of(PATHS) == texts_of(files)


def test_it_travels() -> None:
    files = FileList(map(str, PATHS))
    assert pickle.loads(pickle.dumps(files)) == files
