"""What packing did."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jasper_store.memory.sizes import format_bytes

__all__ = ["PackReport"]


@dataclass(frozen=True)
class PackReport:
    """What packing did. ``str(report)`` is for people, :meth:`to_dict` for machines.

    Attributes:
        path: the packed dataset's directory.
        generation: its generation: 1, and one more after each time that columns were packed again.
        samples: samples of each split, by its name; ``""`` without splits.
        block: samples per block.
        window: blocks whose samples a loader mixes with each other.
        sample_nbytes: bytes that a sample takes, on average.
        nbytes: bytes that were written.
        nbytes_read: bytes of rows that were read from the source.
        seconds: time taken.
        columns: bytes of each tensor that was written.
        max_error: of each tensor that was narrowed, the largest difference from the source.
        resumed: whether an earlier run, which was killed, was continued.
    """

    path: Path
    generation: int
    samples: Mapping[str, int]
    block: int
    window: int
    sample_nbytes: float
    nbytes: int
    nbytes_read: int
    seconds: float
    columns: Mapping[str, int]
    max_error: Mapping[str, float]
    resumed: bool

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        facts = {name: dict(getattr(self, name)) for name in ("samples", "columns", "max_error")}
        return {**self.__dict__, **facts, "path": str(self.path)}

    def __str__(self) -> str:
        splits = ", ".join(f"{name} {count:,}" if name else f"{count:,}" for name, count in self.samples.items())
        rate = format_bytes(int(self.nbytes / max(self.seconds, 1e-9)))
        block = f"blocks of {self.block} ({format_bytes(round(self.block * self.sample_nbytes))}), {self.window} mixed"
        cost = f"{format_bytes(self.nbytes)} written from {format_bytes(self.nbytes_read)} read in {self.seconds:.1f} s"
        lines = [
            f"{self.path}: {splits} samples of {format_bytes(round(self.sample_nbytes))}, in {block}",
            f"{cost} ({rate}/s){', an earlier run continued' if self.resumed else ''}",
        ]
        lines += [f"{name}: largest error {error:.3g}" for name, error in self.max_error.items()]
        return "\n".join(lines)
