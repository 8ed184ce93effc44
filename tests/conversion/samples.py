"""Small datasets of every dtype and odd shape, and how other libraries read what was written from them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import safetensors.torch
import torch

from jasper_store.conversion.checksum import checksum
from jasper_store.formats.base import Schema
from jasper_store.formats.files import tensor_bytes
from jasper_store.formats.registry import FORMATS, locate

FORMAT_NAMES = tuple(FORMATS)
SCHEMA = Schema(hdf5_paths={"embs": "embeddings/all", "words": "pairs/words"})
RAGGED = [[3, 1], [], [2**40], [0, 0, 7]]


def tensors() -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    floats = torch.randn(33, 7, generator=g)
    whole = torch.randint(-100, 100, (33, 2), generator=g)
    return {
        "embs": floats,
        "half": floats.half(),
        "brain": floats.bfloat16(),
        "double": floats.double(),
        "i8": whole.to(torch.int8),
        "i16": whole.to(torch.int16),
        "i32": whole.to(torch.int32),
        "i64": whole,
        "u8": whole.to(torch.uint8),
        "flags": whole > 0,
        "empty": torch.empty(0, 5),
        "hollow": torch.empty(4, 0),
        "scalar": torch.tensor(2.5),
        "one_row": torch.ones(1, 3),
        "deep": torch.arange(2 * 3 * 4 * 5).reshape(2, 3, 4, 5).float(),
        "special": torch.tensor([float("nan"), float("inf"), -float("inf"), -0.0]),
    }


def write_pt(directory: Path, values: dict[str, Any] | None = None) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    if values is None:
        values = {**tensors(), "words": RAGGED}
        # A view: its bytes do not lie in order.
        torch.save(values["embs"].t().contiguous().t(), directory / "fortran.pt")
    for name, value in values.items():
        torch.save(value, directory / f"{name}.pt")
    (directory / "config.json").write_text(json.dumps({"answer": 42}))
    return directory


def expected() -> dict[str, torch.Tensor]:
    values = tensors()
    flat = [v for row in RAGGED for v in row]
    offsets = np.cumsum([0, *map(len, RAGGED)])
    return {
        **values,
        "fortran": values["embs"],
        "words.values": torch.tensor(flat),
        "words.offsets": torch.from_numpy(offsets),
    }


def checksums(directory: Path, fmt: str = "auto", schema: Schema = SCHEMA) -> dict[str, str]:
    return {spec.name: checksum(spec) for spec in locate(directory, fmt, schema).specs}


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    return bool((tensor_bytes(one) == tensor_bytes(other)).all())


def read_by_others(directory: Path, fmt: str) -> dict[str, torch.Tensor]:
    """Every tensor of a directory as the format's own library reads it, without a line of ours."""
    if fmt == "safetensors":
        found = {}
        for path in directory.glob("*.safetensors"):
            (value,) = safetensors.torch.load_file(path).values()
            found[path.name.removesuffix(".safetensors")] = value
        return found
    if fmt == "npy":
        return {path.name.removesuffix(".npy"): _from_numpy(np.load(path)) for path in directory.glob("*.npy")}
    if fmt == "pt":
        found = {}
        for path in directory.glob("*.pt"):
            value = torch.load(path, weights_only=True)
            if isinstance(value, list):
                found[f"{path.stem}.values"] = torch.tensor([v for row in value for v in row])
                found[f"{path.stem}.offsets"] = torch.from_numpy(np.cumsum([0, *map(len, value)]))
            else:
                found[path.name.removesuffix(".pt")] = value
        return found
    return _read_hdf5(directory / "dataset.h5")


def _read_hdf5(path: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    names = {"embeddings/all": "embs", "pairs/words/values": "words.values", "pairs/words/offsets": "words.offsets"}

    def visit(key: str, item: Any) -> None:
        if isinstance(item, h5py.Dataset):
            value = torch.from_numpy(np.array(item[()]))
            marked = item.attrs.get("torch_dtype") in {"bfloat16", b"bfloat16"}
            found[names.get(key, key)] = value.view(torch.bfloat16) if marked else value

    with h5py.File(path, "r") as file:
        file.visititems(visit)
    return found


def _from_numpy(array: np.ndarray[Any, Any]) -> torch.Tensor:
    if array.dtype.names == ("bfloat16",):
        return torch.from_numpy(array["bfloat16"].copy()).view(torch.bfloat16)
    return torch.from_numpy(np.array(array))
