"""Made the files under ``golden/``: one of every form that must stay readable, written by the libraries named.

``python -m tests.formats.make_golden FOLDER``. The files are kept rather than made by the tests, so that what
was written by the versions of today is read by those of tomorrow. Add files; never replace one.

Written with torch 2.13, numpy 2.4, safetensors 0.6, h5py 3.16 (HDF5 2.0) and jasper_store 0.1.
"""

from __future__ import annotations

import sys
from pathlib import Path

import h5py
import numpy as np
import safetensors.torch
import torch

from jasper_store.formats.base import FormatName, Schema
from jasper_store.formats.registry import FORMATS
from tests.formats.conformance import write

MATRIX = torch.arange(6.0).reshape(3, 2) / 4
COUNTS = torch.tensor([1, -2, 3])
ROWS = [[1, 70000], [], [3]]


def by_this_library(folder: Path) -> None:
    """``ours-*``: what our own writers make."""
    names: tuple[FormatName, ...] = ("safetensors", "npy", "pt")
    for name in names:
        for tensor, kind in ((MATRIX, "float32"), (MATRIX.bfloat16(), "bfloat16")):
            writer = FORMATS[name].writer(folder / f"ours-{kind}{FORMATS[name].suffixes[0]}", Schema())
            write(writer, "x", tensor)
            writer.close()
    for compression in (None, "gzip", "lzf"):
        writer = FORMATS["hdf5"].writer(folder / f"ours-{compression}.h5", Schema(), compression=compression)
        write(writer, "matrix", MATRIX.bfloat16())
        write(writer, "counts", COUNTS)
        write(writer, "flag", torch.tensor([True, False]))
        writer.close()


def by_others(folder: Path) -> None:
    """What the formats' own libraries make."""
    safetensors.torch.save_file({"matrix": MATRIX, "counts": COUNTS}, folder / "two.safetensors", {"by": "safetensors"})
    np.save(folder / "fortran.npy", np.asfortranarray(MATRIX.numpy()))
    for version in ((1, 0), (2, 0), (3, 0)):
        with (folder / f"version-{version[0]}.npy").open("wb") as file:
            np.lib.format.write_array(file, MATRIX.numpy(), version=version)
    torch.save(MATRIX, folder / "tensor.pt")
    torch.save(MATRIX.t(), folder / "view.pt")
    torch.save(torch.nn.Parameter(MATRIX), folder / "parameter.pt")
    torch.save({"matrix": MATRIX, "counts": COUNTS}, folder / "dict.pt")
    torch.save(ROWS, folder / "rows.pt")
    torch.save([torch.tensor(row, dtype=torch.int64) for row in ROWS], folder / "rows-of-tensors.pt")
    for libver in ("earliest", "latest"):
        with h5py.File(folder / f"h5py-{libver}.h5", "w", libver=libver) as file:
            file["matrix"] = MATRIX.numpy()
            file.create_dataset("gzip", data=MATRIX.numpy(), compression="gzip")
            file.create_dataset("shuffled", data=MATRIX.numpy(), compression="gzip", shuffle=True, chunks=(2, 1))
            for i, row in enumerate(ROWS):
                file[f"ids/{i}"] = row
            variable = file.create_dataset("variable", shape=(3,), dtype=h5py.vlen_dtype(np.int64))
            for i, row in enumerate(ROWS):
                variable[i] = row


if __name__ == "__main__":
    golden = Path(sys.argv[1])
    golden.mkdir()
    by_this_library(golden)
    by_others(golden)
