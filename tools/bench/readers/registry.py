"""The readers by key, in the order of the tables."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tools.bench.readers.h5py_rows import H5pyRows
from tools.bench.readers.hf_datasets import HfDatasets
from tools.bench.readers.lance_take import LanceTake
from tools.bench.readers.numpy_map import NumpyMap
from tools.bench.readers.ours import OursArrow, OursHdf5, OursNpy, OursParts, OursPt, OursSafetensors
from tools.bench.readers.safetensors_map import SafetensorsMap
from tools.bench.readers.tensordict_map import TensordictMap
from tools.bench.readers.tensorstore_zarr import TensorstoreZarr
from tools.bench.readers.torch_map import TorchMap

if TYPE_CHECKING:
    from collections.abc import Collection

    from tools.bench.readers.base import Reader

__all__ = ["MAIN", "READERS", "chosen", "peers"]

MAIN = OursSafetensors.key

READERS: dict[str, type[Reader]] = {
    reader.key: reader
    for reader in (
        OursSafetensors,
        OursNpy,
        OursPt,
        OursHdf5,
        OursParts,
        OursArrow,
        LanceTake,
        TorchMap,
        SafetensorsMap,
        NumpyMap,
        H5pyRows,
        TensordictMap,
        HfDatasets,
        TensorstoreZarr,
    )
}


def chosen(keys: Collection[str]) -> list[type[Reader]]:
    """The installed readers of these keys and this library's main one; all installed ones if no key is given."""
    return [
        reader for key, reader in READERS.items() if not reader.missing() and (not keys or key in keys or key == MAIN)
    ]


def peers() -> list[type[Reader]]:
    """Everybody else."""
    return [reader for reader in READERS.values() if not reader.ours]
