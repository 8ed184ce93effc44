"""DirectoryWriter: any order, unknown sizes, published whole or not at all."""

from __future__ import annotations

import gc
import json
import os
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch

from jasper_store.conversion.checksum import checksum_of
from jasper_store.conversion.verify import verify_files
from jasper_store.conversion.writer import DirectoryWriter
from jasper_store.errors import (
    ClosedError,
    ConversionError,
    DatasetNotFoundError,
    IncompatibleOptionsError,
    IntegrityError,
    UnknownNameError,
)
from jasper_store.files import atomic
from jasper_store.store import manifest_file
from jasper_store.store.manifest import MANIFEST_NAME
from tests.conversion.samples import FORMAT_NAMES, SCHEMA, expected, read_by_others, same_bits

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from jasper_store.formats.base import TensorSpec


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


@pytest.mark.parametrize("fmt", FORMAT_NAMES)
def test_blocks_in_any_order_make_the_dataset(tmp_path, fmt):
    values = {name: value for name, value in expected().items() if not name.startswith("words.")}
    ragged = [[3, 1], [], [2**40], [0, 0, 7]]
    with DirectoryWriter(tmp_path / "set", fmt, schema=SCHEMA, config={"answer": 42}) as writer:
        for part in range(5):
            for name, value in values.items():
                if value.ndim:
                    writer.append(name, value.tensor_split(5)[part])
                elif part == 3:
                    writer.append(name, value)
            writer.append_ragged("words", ragged[part : part + 1])
        assert names(tmp_path) == sorted([writer._staging.name, ".set.jasper_store.lock"])
    assert names(tmp_path) == ["set"]
    found = read_by_others(tmp_path / "set", fmt)
    assert found.keys() == expected().keys()
    for name, value in expected().items():
        assert same_bits(found[name], value), name
    assert json.loads((tmp_path / "set" / "config.json").read_text()) == {"answer": 42}
    recorded = manifest_file.read(tmp_path / "set")
    assert recorded is not None
    sums = {name: tensor.xxh3_128 for entry in recorded.files.values() for name, tensor in entry.tensors.items()}
    assert sums == {name: checksum_of(value) for name, value in expected().items()}
    report = verify_files(tmp_path / "set", schema=SCHEMA)
    assert report.ok
    assert not report.warnings
    assert not [name for name in names(tmp_path / "set") if name.startswith(".")]


def test_compressed_hdf5(tmp_path):
    import h5py

    with DirectoryWriter(tmp_path / "set", "hdf5", compression="gzip") as writer:
        writer.append("a", torch.zeros(1000, 4))
    with h5py.File(tmp_path / "set" / "dataset.h5") as file:
        assert file["a"].compression == "gzip"
    assert names(tmp_path / "set") == ["dataset.h5", MANIFEST_NAME]


def test_what_an_exception_leaves(tmp_path):
    def fail() -> None:
        with DirectoryWriter(tmp_path / "set") as writer:
            writer.append("a", torch.zeros(3))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert names(tmp_path) == []


def test_what_forgetting_it_leaves(tmp_path):
    writer = DirectoryWriter(tmp_path / "set")
    writer.append("a", torch.zeros(3))
    del writer
    gc.collect()
    assert names(tmp_path) == []


def test_what_a_forked_child_that_ends_leaves(tmp_path):
    writer = DirectoryWriter(tmp_path / "set")
    writer.append("a", torch.zeros(3))
    if (pid := os.fork()) == 0:
        writer._release()
        os._exit(0)
    os.waitpid(pid, 0)
    writer.close()
    assert names(tmp_path) == ["set"]


def test_use_after_the_end(tmp_path):
    writer = DirectoryWriter(tmp_path / "one")
    writer.append("a", torch.zeros(3))
    assert writer.close() == tmp_path / "one"
    assert writer.close() == tmp_path / "one"
    with pytest.raises(ClosedError, match="published"):
        writer.append("a", torch.zeros(3))
    writer = DirectoryWriter(tmp_path / "two")
    writer.abandon()
    writer.abandon()
    for use in (writer.close, lambda: writer.append("a", [1]), lambda: writer.append_ragged("a", [[1]])):
        with pytest.raises(ClosedError, match="abandoned"):
            use()
    assert writer.closed
    assert names(tmp_path) == ["one"]


def test_nothing_appended_is_nothing_published(tmp_path):
    with pytest.raises(ConversionError, match="at least one tensor"):
        DirectoryWriter(tmp_path / "set").close()
    assert names(tmp_path) == []


def test_a_block_must_be_like_the_first(tmp_path):
    with DirectoryWriter(tmp_path / "set") as writer:
        writer.append("a", torch.zeros(3, 4))
        with pytest.raises(IntegrityError, match=r"expected torch.float32 \[n, 4\].* found torch.float64 \[3, 4\]"):
            writer.append("a", torch.zeros(3, 4, dtype=torch.float64))
        with pytest.raises(IntegrityError, match=r"\[3, 5\]"):
            writer.append("a", torch.zeros(3, 5))
        with pytest.raises(IntegrityError, match=r"\[\]"):
            writer.append("a", torch.tensor(1.0))
        writer.append("s", 5)
        with pytest.raises(IntegrityError, match="one block only"):
            writer.append("s", 5)
        with pytest.raises(IntegrityError, match="make a tensor"):
            writer.append("t", [["text"]])
        with pytest.raises(IncompatibleOptionsError, match="cannot name"):
            writer.append("../up", torch.zeros(1))
        writer.append_ragged("r", [[1]])
        with pytest.raises(IntegrityError, match="cannot mix"):
            writer.append("r", torch.zeros(1))
        with pytest.raises(IntegrityError, match="cannot mix"):
            writer.append("r.values", torch.zeros(1))
        with pytest.raises(IntegrityError, match="cannot mix"):
            writer.append_ragged("a", [[1]])
        with pytest.raises(IntegrityError, match="row 1 to be a list of ints"):
            writer.append_ragged("r", [[1], [1.5]])  # type: ignore[list-item]
    found = read_by_others(tmp_path / "set", "safetensors")
    assert found["a"].shape == (3, 4)
    assert found["r.values"].tolist() == [1]
    assert found["r.offsets"].tolist() == [0, 1]


def test_what_a_format_cannot_hold_is_refused_at_once(tmp_path):
    with DirectoryWriter(tmp_path / "set", "hdf5") as writer:
        with pytest.raises(IncompatibleOptionsError, match="cannot hold"):
            writer.append("a", torch.zeros(2, dtype=torch.complex64))
        writer.append("a", torch.zeros(2))
    assert read_by_others(tmp_path / "set", "hdf5")["a"].tolist() == [0, 0]


def test_anything_array_like(tmp_path):
    array = np.arange(6.0).reshape(3, 2)
    array.flags.writeable = False
    with DirectoryWriter(tmp_path / "set") as writer:
        writer.append("a", array)
        writer.append("a", array[::-1])
        writer.append("b", [[1, 2], [3, 4]])
        writer.append("c", torch.arange(8).view(2, 4).t())
        writer.append("d", torch.ones(2, requires_grad=True))
        writer.append_ragged("r", [torch.tensor([1, 2], dtype=torch.int32), [], torch.tensor([], dtype=torch.int64)])
    found = read_by_others(tmp_path / "set", "safetensors")
    assert torch.equal(found["a"], torch.from_numpy(np.concatenate([array, array[::-1]])))
    assert found["b"].tolist() == [[1, 2], [3, 4]]
    assert torch.equal(found["c"], torch.arange(8).view(2, 4).t())
    assert found["r.offsets"].tolist() == [0, 2, 2, 2]


def test_an_old_dataset_is_replaced_only_on_request(tmp_path):
    with DirectoryWriter(tmp_path / "set") as writer:
        writer.append("a", torch.zeros(3))
    with pytest.raises(ConversionError, match="overwrite=True"):
        DirectoryWriter(tmp_path / "set")
    with DirectoryWriter(tmp_path / "set", "npy", overwrite=True) as writer:
        writer.append("b", torch.zeros(3))
        assert names(tmp_path / "set") == ["a.safetensors", MANIFEST_NAME]
    assert names(tmp_path / "set") == ["b.npy", MANIFEST_NAME]
    assert names(tmp_path) == ["set"]


def test_an_empty_directory_is_no_dataset(tmp_path):
    (tmp_path / "set").mkdir()
    with DirectoryWriter(tmp_path / "set") as writer:
        writer.append("a", torch.zeros(3))
    assert names(tmp_path) == ["set"]


def test_what_is_not_ours_is_never_replaced(tmp_path):
    target = tmp_path / "set"
    target.mkdir()
    (target / "thesis.tex").write_text("precious")
    with pytest.raises(ConversionError, match=r"found thesis\.tex"):
        DirectoryWriter(target, overwrite=True)
    (target / "thesis.tex").unlink()
    writer = DirectoryWriter(target, overwrite=True)
    writer.append("a", torch.zeros(3))
    (target / "notes").mkdir()  # it came while the writer was at work
    with pytest.raises(ConversionError, match="found notes"):
        writer.close()
    assert names(tmp_path) == ["set"]
    assert names(target) == ["notes"]
    (tmp_path / "file").write_text("x")
    with pytest.raises(ConversionError, match="found a file"):
        DirectoryWriter(tmp_path / "file", overwrite=True)


def test_a_link_to_a_dataset_is_followed(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with DirectoryWriter(tmp_path / "link") as writer:
        writer.append("a", torch.zeros(3))
    assert (tmp_path / "link").is_symlink()
    assert "a.safetensors" in names(tmp_path / "real")


def test_two_writers_do_not_meet(tmp_path):
    with DirectoryWriter(tmp_path / "set") as writer:
        with pytest.raises(ConversionError, match=f"process {os.getpid()} on"):
            DirectoryWriter(tmp_path / "set")
        with DirectoryWriter(tmp_path / "other") as other:
            other.append("a", torch.zeros(1))
        writer.append("a", torch.zeros(1))
    assert names(tmp_path) == ["other", "set"]


def test_options_are_checked_before_the_first_block(tmp_path):
    with pytest.raises(UnknownNameError, match="'safetensors', 'npy', 'hdf5', 'pt'"):
        DirectoryWriter(tmp_path / "set", "zarr")
    with pytest.raises(IncompatibleOptionsError, match="compression"):
        DirectoryWriter(tmp_path / "set", "npy", compression="gzip")
    with pytest.raises(UnknownNameError, match="bzip2"):
        DirectoryWriter(tmp_path / "set", "hdf5", compression="bzip2")
    with pytest.raises(IncompatibleOptionsError, match="JSON"):
        DirectoryWriter(tmp_path / "set", config={"a": object()})
    assert names(tmp_path) == []


def test_what_a_killed_writer_left_is_removed_by_the_next(tmp_path):
    child = atomic.temporary_name(tmp_path / "set", "staging")
    stale = child.with_name(child.name.replace(f".{os.getpid()}-", ".999999999-"))
    stale.mkdir()
    (stale / "a.safetensors").write_bytes(b"x")
    with DirectoryWriter(tmp_path / "set") as writer:
        assert not stale.exists()
        writer.append("a", torch.zeros(1))
    assert names(tmp_path) == ["set"]


def test_values_that_changed_in_the_hidden_directory_are_noticed(tmp_path):
    writer = DirectoryWriter(tmp_path / "set", "hdf5")
    writer.append("a", torch.zeros(1000))
    with (writer._spool / "a.safetensors").open("r+b") as file:
        file.seek(5000)
        file.write(b"x")
    with pytest.raises(ConversionError, match="faulty"):
        writer.close()
    assert names(tmp_path) == []


@pytest.mark.parametrize("fmt", FORMAT_NAMES)
def test_one_value_may_have_any_strides(tmp_path, fmt):
    # A view of one row and one column keeps the strides of the whole, and still counts as contiguous.
    odd = torch.arange(6.0).reshape(2, 3)[:, :1].t()[:, :1]
    assert odd.is_contiguous()
    assert odd.stride() == (1, 3)
    with DirectoryWriter(tmp_path / "set", fmt) as writer:
        writer.append("a", odd)
    assert torch.equal(read_by_others(tmp_path / "set", fmt)["a"], torch.zeros(1, 1))


@pytest.mark.parametrize("fmt", FORMAT_NAMES)
def test_a_check_sees_what_was_written_before_it_is_published(tmp_path, fmt):
    seen: dict[str, tuple[int, ...]] = {}

    def check(specs: Sequence[TensorSpec]) -> None:
        assert not (tmp_path / "set").exists()
        assert all(spec.path.is_file() for spec in specs)
        seen.update({spec.name: spec.shape for spec in specs})

    with DirectoryWriter(tmp_path / "set", fmt, check=check) as writer:
        writer.append("a", torch.zeros(3, 2))
        writer.append_ragged("r", [[1], [2, 3]])
    assert seen == {"a": (3, 2), "r.values": (3,), "r.offsets": (3,)}


@pytest.mark.parametrize("error", [IntegrityError, DatasetNotFoundError, KeyboardInterrupt])
def test_what_a_check_refuses_is_not_published(tmp_path, error):
    with DirectoryWriter(tmp_path / "set") as writer:
        writer.append("a", torch.zeros(3))

    def refuse(specs: Sequence[TensorSpec]) -> None:
        raise error("no field of that name")

    writer = DirectoryWriter(tmp_path / "set", overwrite=True, check=refuse)
    writer.append("b", torch.zeros(3))
    with pytest.raises(error, match="no field"):
        writer.close()
    assert writer.closed
    assert names(tmp_path) == ["set"]
    assert names(tmp_path / "set") == ["a.safetensors", MANIFEST_NAME]
