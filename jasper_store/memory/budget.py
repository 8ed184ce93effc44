"""How much memory this process may really use: the smallest of several bounds, each named.

psutil reports the host. A container, a scheduler or the user may allow less, so every ancestor memory cgroup
(version 1, version 2, or both at once), the SLURM variables, the address-space limit and an explicit limit are
asked too. Page cache that the kernel would give back counts as available, as it does on the host.
"""

from __future__ import annotations

import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

import psutil
import torch

from jasper_store.errors import IncompatibleOptionsError
from jasper_store.memory.mounts import read_mountinfo
from jasper_store.memory.sizes import format_bytes, nbytes_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from jasper_store.memory.mounts import Mount

__all__ = ["FRACTION", "Bound", "Budget", "device_budget", "format_bytes", "measure"]

FRACTION = 0.8
"""Share of the winning bound that is used; the rest is for the model's batches, Python and estimation errors."""

_MIB = 1 << 20
# Version 1 writes the largest page-aligned int64 for "no limit". No machine has an exbibyte.
_UNLIMITED = 1 << 60
# (what, limit file, usage file, key in memory.stat of the page cache that can be reclaimed at once)
_V1: tuple[tuple[str, str, str, str], ...] = (
    ("limit", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)
_V2: tuple[tuple[str, str, str, str], ...] = (
    ("max", "memory.max", "memory.current", "inactive_file"),
    ("high", "memory.high", "memory.current", "inactive_file"),
)
# First that is set wins. torchrun sets the first; the others are MPI launchers' and SLURM's.
_RANK_VARIABLES = (
    "LOCAL_WORLD_SIZE",
    "OMPI_COMM_WORLD_LOCAL_SIZE",
    "MPI_LOCALNRANKS",
    "PMI_LOCAL_SIZE",
    "SLURM_NTASKS_PER_NODE",
)
_PER_NODE = re.compile(r"(\d+)(?:\(x\d+\))?(?:,.*)?")


@dataclass(frozen=True, slots=True)
class Bound:
    """One upper bound on the bytes that may be used.

    Attributes:
        name: short, e.g. ``"host memory available"`` or ``"cgroup /docker/abc"``.
        nbytes: the bound, 0 or more.
        detail: how it came about, with the numbers.
    """

    name: str
    nbytes: int
    detail: str


@dataclass(frozen=True, slots=True)
class Budget:
    """What may be held in memory, and why.

    Attributes:
        bounds: every bound found, in the order they were looked up; at least one.
        fraction: share of the smallest bound that is used.
        ranks: processes on this node that each hold a copy.
        notes: values that were found and could not be understood, and so were left out.
    """

    bounds: tuple[Bound, ...]
    fraction: float = FRACTION
    ranks: int = 1
    notes: tuple[str, ...] = ()

    @property
    def winner(self) -> Bound:
        """The smallest bound; the first of equals."""
        return min(self.bounds, key=lambda bound: bound.nbytes)

    @property
    def nbytes(self) -> int:
        """Bytes that this process may hold."""
        return int(self.winner.nbytes * self.fraction / self.ranks)

    def explain(self) -> str:
        """A few lines: the result, every bound with the deciding one marked, and what was left out."""
        winner = self.winner
        shared = f" / {self.ranks} ranks on this node" if self.ranks > 1 else ""
        lines = [f"budget {format_bytes(self.nbytes)} = {format_bytes(winner.nbytes)} x {self.fraction:g}{shared}"]
        for bound in self.bounds:
            mark = "->" if bound is winner else "  "
            lines.append(f"{mark} {bound.name}: {format_bytes(bound.nbytes)} ({bound.detail})")
        lines.extend(f"   left out: {note}" for note in self.notes)
        return "\n".join(lines)


def measure(
    memory_limit: int | str | None = None,
    *,
    environ: Mapping[str, str] | None = None,
    proc: Path = Path("/proc"),
    host_available: Callable[[], int] | None = None,
) -> Budget:
    """Measure the host memory that this process may use now.

    Args:
        memory_limit: the user's own limit: bytes, or a text such as ``"8GiB"``; 0 allows nothing.
        environ: environment variables; ``os.environ`` by default.
        proc: where the proc file system is.
        host_available: bytes available on the host; psutil's figure by default.

    Raises:
        IncompatibleOptionsError: ``memory_limit`` is not a size.
    """
    limit = None if memory_limit is None else nbytes_of(memory_limit, "memory_limit")
    env = os.environ if environ is None else environ
    notes: list[str] = []
    available = int(psutil.virtual_memory().available) if host_available is None else host_available()
    bounds = [Bound("host memory available", max(available, 0), "free memory and page cache that can be reclaimed")]
    bounds.extend(_cgroup_bounds(proc, notes))
    bounds.extend(_slurm_bounds(env, notes))
    bounds.extend(_address_space_bounds(proc))
    if limit is not None:
        bounds.append(Bound("memory_limit", limit, "asked for by the caller"))
    return Budget(tuple(bounds), FRACTION, _ranks(env, notes), tuple(notes))


def device_budget(device: str | torch.device) -> Budget:
    """What may be held on a CUDA device: its free memory now, of which the fraction is for data.

    Raises:
        IncompatibleOptionsError: it is not a CUDA device, or this machine has no such device.
    """
    name = str(device)
    try:
        if torch.device(device).type != "cuda":
            msg = f"device_budget: expected a CUDA device, got {name!r}"
            raise IncompatibleOptionsError(msg)
        free, total = torch.cuda.mem_get_info(device)
    except (RuntimeError, AssertionError, ValueError) as exc:
        if isinstance(exc, IncompatibleOptionsError):
            raise
        reason = str(exc).partition("\n")[0]
        msg = f"{name}: cannot ask the device for its free memory ({reason}); use device='cpu' or leave it out"
        raise IncompatibleOptionsError(msg) from exc
    return Budget((Bound("GPU memory free", int(free), f"of {format_bytes(int(total))} on {name}"),))


def _cgroup_bounds(proc: Path, notes: list[str]) -> Iterator[Bound]:
    """One bound per limit of each memory cgroup that this process is in, from its own up to the mounted root."""
    try:
        lines = (proc / "self" / "cgroup").read_text(errors="surrogateescape").splitlines()
    except OSError:
        return
    mounts = read_mountinfo(proc)
    for line in lines:
        hierarchy, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if "memory" in controllers.split(","):
            found = [m for m in mounts if m.fstype == "cgroup" and "memory" in m.options]
            kinds = _V1
        elif hierarchy == "0" and not controllers:
            found = [m for m in mounts if m.fstype == "cgroup2"]
            kinds = _V2
        else:
            continue
        for directory, name in _directories(path, found):
            for kind in kinds:
                yield from _cgroup_bound(directory, name, kind, notes)


def _directories(path: str, mounts: list[Mount]) -> Iterator[tuple[Path, str]]:
    """Directories of a cgroup and its ancestors as far as they are mounted, with the names to show for them."""
    seen: set[Path] = set()
    for mount in mounts:
        point = Path(mount.point)
        cgroup, root = PurePosixPath(path), PurePosixPath(mount.root)
        # In a container without a cgroup namespace the path is the host's while the mount shows one subtree of
        # it; where the path is not below the mount's root, that subtree's own root is what binds us.
        inside = ".." not in cgroup.parts and (cgroup == root or root in cgroup.parents)
        relative = cgroup.relative_to(root) if inside else PurePosixPath()
        if not (point / relative).is_dir():
            relative = PurePosixPath()
        for part in (relative, *relative.parents):
            directory = point / part
            if directory not in seen:
                seen.add(directory)
                yield directory, str(root / part)


def _cgroup_bound(directory: Path, name: str, kind: tuple[str, str, str, str], notes: list[str]) -> Iterator[Bound]:
    what, limit_file, usage_file, cache_key = kind
    limit = _read_number(directory / limit_file, notes)
    if limit is None or limit >= _UNLIMITED:
        return
    usage = _read_number(directory / usage_file, notes) or 0
    cache = _read_stat(directory / "memory.stat", cache_key, notes)
    free = min(max(limit - usage + cache, 0), limit)
    detail = f"{what} {format_bytes(limit)} - in use {format_bytes(usage)} + inactive file pages {format_bytes(cache)}"
    yield Bound(f"cgroup {name}", free, detail)


def _read_number(path: Path, notes: list[str]) -> int | None:
    """A cgroup file with one number; None where it is not there, says ``max``, or makes no sense (noted)."""
    try:
        text = path.read_text().strip()
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as exc:
        notes.append(f"{path}: {exc}")
        return None
    if text == "max":
        return None
    value = _whole_number(text)
    if value is None:
        notes.append(f"{path}: expected a number of bytes or 'max', found {text[:40]!r}")
    return value


def _read_stat(path: Path, key: str, notes: list[str]) -> int:
    """One line of a memory.stat file; 0 where it is missing."""
    try:
        text = path.read_text()
    except FileNotFoundError:
        return 0
    except (OSError, ValueError) as exc:
        notes.append(f"{path}: {exc}")
        return 0
    for line in text.splitlines():
        name, _, value = line.partition(" ")
        if name == key:
            number = _whole_number(value.strip())
            if number is None:
                notes.append(f"{path}: expected a number after {key}, found {value[:40]!r}")
            return number or 0
    return 0


def _whole_number(text: str) -> int | None:
    # isdigit alone accepts other scripts' digits, and int() refuses very long ones.
    return int(text) if text.isascii() and text.isdigit() and len(text) <= 30 else None


def _variable(env: Mapping[str, str], name: str, notes: list[str], *, zero: str | None = None) -> int | None:
    """A positive whole number from the environment, ``"16(x2)"`` counting as 16; None if unset or not understood."""
    text = env.get(name, "").strip()
    if not text:
        return None
    match = _PER_NODE.fullmatch(text) if text.isascii() else None
    value = _whole_number(match[1]) if match else None
    if value is None or (value == 0 and zero is None):
        notes.append(f"{name}: expected a whole number above 0, found {text[:40]!r}")
        return None
    if value == 0:
        notes.append(f"{name} = 0: {zero}")
        return None
    return value


def _slurm_bounds(env: Mapping[str, str], notes: list[str]) -> Iterator[Bound]:
    """The scheduler's allotment on this node; SLURM's figures are MiB."""
    whole_node = "SLURM gives the job the whole node's memory"
    per_node = _variable(env, "SLURM_MEM_PER_NODE", notes, zero=whole_node)
    if per_node is not None:
        yield Bound("SLURM_MEM_PER_NODE", per_node * _MIB, f"{per_node} MiB")
    for name, counts in (
        ("SLURM_MEM_PER_CPU", ("SLURM_CPUS_ON_NODE", "SLURM_JOB_CPUS_PER_NODE")),
        ("SLURM_MEM_PER_GPU", ("SLURM_GPUS_ON_NODE", "SLURM_GPUS_PER_NODE")),
    ):
        each = _variable(env, name, notes, zero=whole_node)
        if each is None:
            continue
        for source in counts:
            count = _variable(env, source, notes)
            if count is not None:
                yield Bound(name, each * count * _MIB, f"{each} MiB x {count} ({source})")
                break
        else:
            notes.append(f"{name} = {each}: none of {', '.join(counts)} says how many there are on this node")


def _address_space_bounds(proc: Path) -> Iterator[Bound]:
    """``ulimit -v`` minus what is in use; preloading past it fails however much memory is free."""
    if sys.platform == "win32":
        return
    import resource

    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    if limit == resource.RLIM_INFINITY or limit < 0:
        return
    try:
        pages = int((proc / "self" / "statm").read_text().split()[0])
    except (OSError, ValueError, IndexError):
        pages = 0
    used = pages * resource.getpagesize()
    detail = f"ulimit -v {format_bytes(limit)} - in use {format_bytes(used)}"
    yield Bound("address space limit", max(limit - used, 0), detail)


def _ranks(env: Mapping[str, str], notes: list[str]) -> int:
    """Processes of this job on this node; 1 where nothing says."""
    for name in _RANK_VARIABLES:
        value = _variable(env, name, notes)
        if value is not None:
            return value
    return 1
