"""What a run measures with: sizes, bounds and where the data lies. Passed whole."""

from __future__ import annotations

import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

__all__ = ["LEAST_CAP", "MIB", "Settings", "quick"]

MIB = 1 << 20
LEAST_CAP = 96 * MIB
"""A process with less memory than this is killed before it reads anything, so no case caps lower."""


@dataclass(frozen=True)
class Settings:
    """Options of one run.

    Attributes:
        data_dir: where generated data is kept between runs; ``clean`` removes it.
        rows: rows of the plain row files.
        dim: float32 values a row.
        pairs: pairs of the generated JASPER dataset.
        packed_pairs: pairs of the dataset that is packed.
        n_neg: hard negatives a pair.
        generic_rows: rows of the generated dataset of embeddings and labels.
        batches: batch sizes of the row readers.
        loader_batches: batch sizes of the loaders.
        lookahead: rows that this library announces ahead of the batch that it reads; at least one batch.
        cap_fraction: memory limit of the cold cases over the size of the data they read.
        seconds: bound on the timed part of one reader's run.
        max_rows: bound on the rows that one reader reads in it.
        repeats: interleaved repeats; tables show the median.
        seed: of all generated data and of all orders.
        disk_budget: bytes that generated data may take at any moment.
        sparse_gib: size of the sparse dataset of the case ``open``.
        growth_pairs: pairs of the sparse datasets of the case ``growth``.
        convert_gb: sizes of the row files of the memory bound of ``convert``.
        real_dir: a real JASPER dataset in ``.pt`` files to measure beside the generated one, if any.
        readers: keys of the row readers to measure beside this library's own; all of them if empty.
        fio: whether fio is asked for the disk's limit too where it is installed.
    """

    data_dir: Path = Path(tempfile.gettempdir()) / "jasper-bench"
    rows: int = 2_000_000
    dim: int = 384
    pairs: int = 200_000
    packed_pairs: int = 350_000
    n_neg: int = 5
    generic_rows: int = 1_000_000
    batches: tuple[int, ...] = (256, 2048)
    loader_batches: tuple[int, ...] = (32, 256, 2048)
    lookahead: int = 1024
    cap_fraction: float = 1 / 3
    seconds: float = 3.0
    max_rows: int = 400_000
    repeats: int = 3
    seed: int = 20
    disk_budget: int = 12_000_000_000
    sparse_gib: int = 60
    growth_pairs: tuple[int, ...] = (1_000_000, 10_000_000, 100_000_000)
    convert_gb: tuple[float, ...] = (1.0, 4.0)
    real_dir: Path | None = None
    fio: bool = True
    readers: tuple[str, ...] = ()

    @property
    def row_nbytes(self) -> int:
        """Bytes of one float32 row."""
        return self.dim * 4

    @property
    def cap(self) -> int:
        """Memory limit of the cold row readers: the fraction, and never so little that no library could run in it."""
        return max(int(self.rows_nbytes * self.cap_fraction), LEAST_CAP)

    @property
    def rows_nbytes(self) -> int:
        """Bytes of the plain row data."""
        return self.rows * self.row_nbytes

    def to_dict(self) -> dict[str, Any]:
        """For the JSON: everything that changes figures, and no path of the machine."""
        facts = asdict(self)
        facts["real_dir"] = self.real_dir.name if self.real_dir else None
        del facts["data_dir"]
        return facts


def quick(settings: Settings) -> Settings:
    """The same run over data small enough for continuous integration: it shows that the harness works, no more."""
    return replace(
        settings,
        rows=60_000,
        pairs=8_000,
        packed_pairs=8_000,
        generic_rows=20_000,
        loader_batches=(32, 256),
        seconds=0.6,
        max_rows=30_000,
        repeats=1,
        sparse_gib=2,
        growth_pairs=(20_000, 100_000),
        convert_gb=(0.1,),
        disk_budget=2_000_000_000,
    )
