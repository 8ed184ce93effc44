"""Every format's files cut short and with flipped bytes: refused, or opened with all values inside the file."""

from __future__ import annotations

import ast
import subprocess
import sys

import h5py
import numpy as np
import pytest
import safetensors.torch
import torch

from jasper_store.formats.base import FormatName, Schema
from jasper_store.formats.registry import FORMATS
from tests.formats import damage
from tests.formats.conformance import values, write


def ours(name: FormatName, compression=None):
    def make(folder):
        path = folder / f"x{FORMATS[name].suffixes[0]}"
        writer = FORMATS[name].writer(path, Schema(), compression=compression)
        write(writer, "x", values(torch.float32, (60, 7)))
        if FORMATS[name].one_file:
            write(writer, "y", values(torch.bfloat16, (5,)))
            write(writer, "z", values(torch.int64, ()))
        writer.close()
        return path

    return make


def many_safetensors(folder):
    tensors = {f"t{i}": values(torch.float32, (i, 3)) for i in range(5)}
    safetensors.torch.save_file(tensors, folder / "x.safetensors", metadata={"a": "b"})
    return folder / "x.safetensors"


def fortran(folder):
    np.save(folder / "x.npy", np.asfortranarray(np.arange(20.0).reshape(4, 5)))
    return folder / "x.npy"


def checkpoint(folder):
    base = torch.arange(24.0)
    torch.save({"a": base.reshape(4, 6).t(), "b": base[3:9], "ids": [[1, 2], [300]]}, folder / "x.pt")
    return folder / "x.pt"


def lists(folder):
    torch.save([[1, 70000], [], [-1]], folder / "x.pt")
    return folder / "x.pt"


def everything_in_hdf5(libver):
    def make(folder):
        with h5py.File(folder / "x.h5", "w", libver=libver) as file:
            file["group/matrix"] = np.arange(12.0).reshape(3, 4)
            file["flag"] = np.array([True, False])
            file["soft"] = h5py.SoftLink("/group")
            file.create_dataset("gzip", data=np.arange(60).reshape(20, 3), chunks=(4, 2), compression=4, shuffle=True)
            file.create_dataset("lzf", data=np.arange(60.0), compression="lzf", fletcher32=True)
            file.create_dataset("marked", data=np.arange(5, dtype="u2")).attrs["torch_dtype"] = "bfloat16"
            for i in range(3):
                file[f"ids/{i}"] = np.arange(i)
            variable = file.create_dataset("variable", shape=(2,), dtype=h5py.vlen_dtype(np.int32))
            variable[0], variable[1] = [1, 2], [3]
        return folder / "x.h5"

    return make


IN_PROCESS = {
    "safetensors": ours("safetensors"),
    "safetensors of several": many_safetensors,
    "npy": ours("npy"),
    "npy in Fortran order": fortran,
    "pt": ours("pt"),
    "pt of several": checkpoint,
    "pt of lists": lists,
}
# libhdf5 has crashed on damaged files before, so its files are opened in a process that may crash.
IN_A_CHILD = {
    "contiguous": ours("hdf5"),
    "gzip": ours("hdf5", "gzip"),
    "lzf": ours("hdf5", "lzf"),
    "of others, oldest form": everything_in_hdf5("earliest"),
    "of others, newest form": everything_in_hdf5("latest"),
}


@pytest.mark.parametrize("kind", IN_PROCESS)
def test_damaged_files(tmp_path, kind):
    source = IN_PROCESS[kind](tmp_path)
    outcomes = damage.run(kind.split()[0], source, tmp_path, 0, 50)
    assert sum(outcomes.values()) == 100


def check_hdf5(tmp_path, seed, count):
    sources = []
    for kind, make in IN_A_CHILD.items():
        folder = tmp_path / kind
        folder.mkdir()
        sources.append(make(folder))
    done = subprocess.run(
        [sys.executable, "-m", "tests.formats.damage", "hdf5", str(seed), str(count), *sources],
        check=False,
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, f"{done.stdout[-300:]}\n{done.stderr[-3000:]}"
    outcomes = [ast.literal_eval(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert [sum(outcome.values()) for outcome in outcomes] == [2 * count] * len(IN_A_CHILD)
    assert all(outcome["cut refused"] >= count - 1 for outcome in outcomes)


def test_damaged_hdf5(tmp_path):
    check_hdf5(tmp_path, 0, 50)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 6))
def test_damaged_hdf5_at_length(tmp_path, seed):
    check_hdf5(tmp_path, seed, 1000)


@pytest.mark.slow
@pytest.mark.parametrize("kind", IN_PROCESS)
def test_damaged_files_at_length(tmp_path, kind):
    source = IN_PROCESS[kind](tmp_path)
    assert sum(damage.run(kind.split()[0], source, tmp_path, 1, 5000).values()) == 10_000
