"""The disk under a directory: its read-ahead, which a run may change and always puts back, and its counters."""

from __future__ import annotations

import atexit
import json
import os
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["BlockDevice", "Counters", "device_of", "read_ahead", "restore"]

SYS_BLOCK = Path("/sys/dev/block")
RECEIPT = "read-ahead.json"


@dataclass(frozen=True)
class Counters:
    """What the disk has done so far, for the whole machine: finished reads and bytes read."""

    reads: int
    nbytes: int

    def since(self, before: Counters) -> Counters:
        """What it did between two looks."""
        return Counters(self.reads - before.reads, self.nbytes - before.nbytes)


@dataclass(frozen=True)
class BlockDevice:
    """A disk in sysfs."""

    path: Path

    @property
    def name(self) -> str:
        """The kernel's name, e.g. ``vda``."""
        return self.path.name

    @property
    def read_ahead_kib(self) -> int:
        """Read-ahead in KiB; files opened from now on use it."""
        return int((self.path / "queue" / "read_ahead_kb").read_text(encoding="ascii"))

    def set_read_ahead(self, kib: int) -> None:
        """Change it; takes root."""
        (self.path / "queue" / "read_ahead_kb").write_text(f"{kib}\n", encoding="ascii")

    def counters(self) -> Counters:
        """Reads finished so far."""
        fields = (self.path / "stat").read_text(encoding="ascii").split()
        return Counters(int(fields[0]), int(fields[2]) * 512)


def device_of(path: Path, sys_block: Path = SYS_BLOCK) -> BlockDevice | None:
    """The disk that holds ``path``, or None where there is no such thing (tmpfs, overlay, network)."""
    number = path.stat().st_dev
    node = sys_block / f"{os.major(number)}:{os.minor(number)}"
    if not node.exists():
        return None
    node = node.resolve()
    if (node / "partition").exists():
        node = node.parent
    return BlockDevice(node) if (node / "queue" / "read_ahead_kb").exists() else None


@contextmanager
def read_ahead(device: BlockDevice, kib: int, receipt_dir: Path) -> Iterator[None]:
    """Set the disk's read-ahead for a while and put it back whatever happens.

    A receipt on disk lets :func:`restore` put it back even after a run that was killed with SIGKILL.
    """
    before = device.read_ahead_kib
    receipt = receipt_dir / RECEIPT
    receipt.write_text(json.dumps({"device": str(device.path), "kib": before}), encoding="utf-8")

    def put_back() -> None:
        device.set_read_ahead(before)
        receipt.unlink(missing_ok=True)

    atexit.register(put_back)
    try:
        device.set_read_ahead(kib)
        yield
    finally:
        put_back()
        atexit.unregister(put_back)


def restore(receipt_dir: Path) -> str | None:
    """Undo what a killed run left changed; returns what was done, None where nothing was left."""
    receipt = receipt_dir / RECEIPT
    if not receipt.exists():
        return None
    facts = json.loads(receipt.read_text(encoding="utf-8"))
    device = BlockDevice(Path(facts["device"]))
    device.set_read_ahead(int(facts["kib"]))
    receipt.unlink()
    return f"read-ahead of {device.name} put back to {facts['kib']} KiB"
