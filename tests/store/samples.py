"""One set of awkward tensors, written in every format by that format's own library."""

from __future__ import annotations

import json
import struct

import h5py
import numpy as np
import torch
from safetensors.torch import save_file


def tensors() -> dict[str, torch.Tensor]:
    """Every shape and dtype that has a way of its own through the code."""
    g = torch.Generator().manual_seed(7)
    return {
        "embs": torch.randn(50, 16, generator=g),
        "half": torch.randn(12, 3, 2, generator=g).half(),
        "brain": torch.randn(30, 5, generator=g).bfloat16(),
        "double": torch.randn(9, 2, generator=g).double(),
        "scores": torch.rand(40, generator=g),
        "rows": torch.randint(-(2**60), 2**60, (33, 2), generator=g),
        "tiers": torch.randint(0, 5, (21, 3), generator=g).to(torch.int8),
        "bytes": torch.randint(0, 256, (17,), generator=g).to(torch.uint8),
        "words": torch.randint(0, 2**16, (19,), generator=g).to(torch.uint16),
        "wide_words": torch.randint(0, 2**31, (11, 2), generator=g).to(torch.uint32),
        "flags": torch.rand(25, generator=g) > 0.5,
        "one": torch.randn(1, 7, generator=g),
        "empty": torch.empty(0, 4),
        "hollow": torch.empty(6, 0),
        "scalar": torch.tensor(3.25),
    }


def as_numpy(tensor: torch.Tensor) -> np.ndarray:
    return tensor.view(torch.uint16).numpy() if tensor.dtype == torch.bfloat16 else tensor.numpy()


def write_pt(directory, values):
    for name, tensor in values.items():
        torch.save(tensor, directory / f"{name}.pt")


def write_safetensors(directory, values):
    for name, tensor in values.items():
        save_file({name: tensor}, directory / f"{name}.safetensors")


def write_npy(directory, values):
    for name, tensor in values.items():
        array = as_numpy(tensor)
        if tensor.dtype == torch.bfloat16:
            array = array.view([("bfloat16", "<u2")])
        np.save(directory / f"{name}.npy", array)


def write_hdf5(directory, values, **options):
    with h5py.File(directory / "dataset.h5", "w") as file:
        for name, tensor in values.items():
            chunked = options if tensor.ndim and tensor.numel() else {}
            dataset = file.create_dataset(name, data=as_numpy(tensor), **chunked)
            if tensor.dtype == torch.bfloat16:
                dataset.attrs["torch_dtype"] = "bfloat16"


def write_gzip(directory, values):
    write_hdf5(directory, values, compression="gzip", shuffle=True, chunks=True)


def write_misaligned(directory, values):
    """Valid safetensors files whose data begins at an odd byte."""
    for name, tensor in values.items():
        raw = tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""
        word = {
            "float32": "F32", "float16": "F16", "bfloat16": "BF16", "float64": "F64", "int64": "I64", "int8": "I8",
            "uint8": "U8", "uint16": "U16", "uint32": "U32", "bool": "BOOL",
        }[str(tensor.dtype).removeprefix("torch.")]  # fmt: skip
        header = json.dumps({name: {"dtype": word, "shape": list(tensor.shape), "data_offsets": [0, len(raw)]}})
        header += " " * ((len(header) + 8) % 2 == 0)
        (directory / f"{name}.safetensors").write_bytes(struct.pack("<Q", len(header)) + header.encode() + raw)


def write_strided(directory, values):
    """``.npy`` files in Fortran order."""
    for name, tensor in values.items():
        array = as_numpy(tensor).copy(order="F")
        if tensor.dtype == torch.bfloat16:
            array = array.view([("bfloat16", "<u2")])
        np.save(directory / f"{name}.npy", array)


def write_parts(directory, values):
    """Three safetensors files for each tensor that has rows, the middle one without any."""
    for name, tensor in values.items():
        if not tensor.ndim:
            save_file({name: tensor}, directory / f"{name}.safetensors")
            continue
        middle = len(tensor) // 3
        for number, part in enumerate((tensor[:middle], tensor[middle:middle], tensor[middle:])):
            save_file({name: part.clone()}, directory / f"{name}-{number:05d}-of-00003.safetensors")


WRITERS = {
    "pt": write_pt,
    "safetensors": write_safetensors,
    "npy": write_npy,
    "hdf5": write_hdf5,
    "gzip": write_gzip,
    "misaligned": write_misaligned,
    "strided": write_strided,
    "parts": write_parts,
}
