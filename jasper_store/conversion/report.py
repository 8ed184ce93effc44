"""What a conversion did, for people and for machines."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from jasper_store.memory.budget import format_bytes

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["ConversionReport", "TensorReport"]


@dataclass(frozen=True, slots=True)
class TensorReport:
    """One tensor of a conversion.

    Attributes:
        name: the tensor.
        file: name of the file it was written to.
        dtype: dtype in the source, e.g. ``"float32"``.
        written_as: dtype in the target.
        shape: sizes.
        bytes_in: bytes of its values in the source.
        bytes_out: bytes that its values take in the target, after compression.
        seconds: time it took; 0.0 if it was skipped.
        checksum: xxh3-128 of the values in the target, in hex: computed while writing, and again from the file.
        max_error: largest absolute error that narrowing made; ``None`` if the values are bit-equal.
        skipped: the target already held these values.
    """

    name: str
    file: str
    dtype: str
    written_as: str
    shape: tuple[int, ...]
    bytes_in: int
    bytes_out: int
    seconds: float
    checksum: str
    max_error: float | None = None
    skipped: bool = False


@dataclass(frozen=True, slots=True)
class ConversionReport:
    """What ``convert`` did. ``str(report)`` is a table.

    Attributes:
        source: directory or file that was read.
        destination: directory that was written to.
        source_format: format of most of the source's tensors.
        format: format that was written.
        compression: as asked for.
        tensors: one row per tensor, in the order of names.
        seconds: time in all.
        proof: how the target's values were read back: ``"disk"`` if its pages had been dropped, else ``"page cache"``.
        copied: names of other files copied along (``config.json``).
        notes: what the user should know about the choice of sources.
    """

    source: Path
    destination: Path
    source_format: str
    format: str
    compression: str | None
    tensors: tuple[TensorReport, ...]
    seconds: float
    proof: str
    copied: tuple[str, ...] = ()
    notes: tuple[str, ...] = field(default=())

    @property
    def bytes_in(self) -> int:
        """Bytes of values in the source, skipped tensors included."""
        return sum(row.bytes_in for row in self.tensors)

    @property
    def bytes_out(self) -> int:
        """Bytes of values in the target, skipped tensors included."""
        return sum(row.bytes_out for row in self.tensors)

    @property
    def saving(self) -> float:
        """Share of the source's bytes that the target does not need; negative if it needs more."""
        return 1 - self.bytes_out / self.bytes_in if self.bytes_in else 0.0

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {
            **asdict(self),
            "source": str(self.source),
            "destination": str(self.destination),
            "bytes_in": self.bytes_in,
            "bytes_out": self.bytes_out,
            "saving": self.saving,
        }

    def __str__(self) -> str:
        head = ("tensor", "dtype", "shape", "in", "out", "seconds", "max error", "xxh3-128")
        rows = [head, *(_row(tensor) for tensor in self.tensors)]
        widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
        text = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        text.insert(1, "  ".join("-" * width for width in widths))
        return "\n".join([*text, self.summary()])

    def summary(self) -> str:
        """What was done in all, in a few lines; ``str(report)`` has a table of the tensors above them."""
        text = []
        written = sum(row.bytes_in for row in self.tensors if not row.skipped)
        compression = f" ({self.compression})" if self.compression else ""
        rate = f", {format_bytes(int(written / self.seconds))}/s" if written and self.seconds > 0 else ""
        text.append(f"{self.source} ({self.source_format}) -> {self.destination} ({self.format}{compression})")
        text.append(
            f"{format_bytes(self.bytes_in)} in, {format_bytes(self.bytes_out)} out ({self.saving:.1%} saved), "
            f"{self.seconds:.2f} s{rate}"
        )
        skipped = sum(row.skipped for row in self.tensors)
        if skipped:
            text.append(f"{skipped} of {len(self.tensors)} tensors were there already, and were not written again")
        if skipped < len(self.tensors):
            after = ", after narrowing" if any(row.max_error is not None for row in self.tensors) else ""
            text.append(f"proven: values read back from the {self.proof} have the checksums of the source's{after}")
        if self.copied:
            text.append(f"copied along: {', '.join(self.copied)}")
        return "\n".join([*text, *self.notes])


def _row(tensor: TensorReport) -> tuple[str, ...]:
    dtype = tensor.dtype if tensor.dtype == tensor.written_as else f"{tensor.dtype} -> {tensor.written_as}"
    return (
        tensor.name,
        dtype,
        str(list(tensor.shape)),
        format_bytes(tensor.bytes_in),
        format_bytes(tensor.bytes_out),
        "skipped" if tensor.skipped else f"{tensor.seconds:.2f}",
        "" if tensor.max_error is None else f"{tensor.max_error:.3g}",
        tensor.checksum,
    )
