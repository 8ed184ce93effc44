"""What a build did, for people and for machines."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from jasper_store.memory.sizes import format_bytes

__all__ = ["BuildReport", "StageReport"]


@dataclass(frozen=True, slots=True)
class StageReport:
    """One stage of a build.

    Attributes:
        name: ``"read"``, ``"clusters"``, ``"mine"``, ``"splits"`` or ``"write"``.
        rows: rows that it went through: of questions, sources and keywords, of sources, or of pairs.
        seconds: time it took.
        kept: an earlier build, which was interrupted, had finished it.
    """

    name: str
    rows: int
    seconds: float
    kept: bool = False


@dataclass(frozen=True, slots=True)
class BuildReport:
    """What ``build`` did. ``str(report)`` is for people.

    Attributes:
        path: the dataset.
        format: storage format.
        nbytes: bytes of its tensors.
        counts: questions, sources, pairs, keywords, clusters, dimensions, negatives of each pair, and rows that equal an
            earlier one.
        splits: pairs of each split.
        mining: what the miner counted.
        settings: what the dataset was built with, as in ``config.json``.
        stages: times.
        notes: what should be known about the dataset.
        existed: the dataset was there already, built from the same inputs with the same settings; nothing was written.
    """

    path: Path
    format: str
    nbytes: int
    counts: dict[str, int]
    splits: dict[str, int]
    mining: dict[str, Any]
    settings: dict[str, Any]
    stages: tuple[StageReport, ...]
    notes: tuple[str, ...] = field(default=())
    existed: bool = False

    @property
    def seconds(self) -> float:
        """Time in all."""
        return sum(stage.seconds for stage in self.stages)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {**asdict(self), "path": str(self.path), "seconds": self.seconds}

    def __str__(self) -> str:
        counts = ", ".join(f"{count:,} {what.replace('_', ' ')}" for what, count in self.counts.items() if count)
        splits = ", ".join(f"{name} {size:,}" for name, size in self.splits.items())
        lines = [
            f"{self.path} ({self.format}, {format_bytes(self.nbytes)}): {counts}",
            f"splits: {splits}",
        ]
        if self.existed:
            lines.append("it was there already, built from the same inputs with the same settings; nothing was written")
        for stage in self.stages:
            rate = f", {stage.rows / stage.seconds:,.0f} rows/s" if stage.seconds > 0 and not stage.kept else ""
            kept = ", kept from an earlier build" if stage.kept else ""
            lines.append(f"{stage.name:<9} {stage.seconds:8.2f} s  {stage.rows:,} rows{rate}{kept}")
        lines.extend(f"mining, {what.replace('_', ' ')}: {value}" for what, value in self.mining.items() if value)
        return "\n".join([*lines, *self.notes])
