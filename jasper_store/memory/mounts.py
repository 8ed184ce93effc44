"""The mount table: which file system a path lies on, and whether reading it goes over a network."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

import psutil

__all__ = ["Mount", "file_system", "parse_mountinfo", "read_mountinfo"]

# Random page faults cost a round trip each on these, and madvise often does nothing there.
NETWORK = frozenset(
    {
        "9p", "acfs", "afs", "afpfs", "beegfs", "beegfs_nodev", "ceph", "cifs", "coda", "davfs", "fuse", "gfs", "gfs2",
        "glusterfs", "gpfs", "lustre", "mmfs", "ncpfs", "nfs", "nfs3", "nfs4", "ocfs2", "orangefs", "panfs", "pvfs2",
        "smb2", "smb3", "smbfs", "vboxsf", "virtiofs", "webdav", "wekafs",
    }
)  # fmt: skip
# FUSE file systems over a local disk; every other one is taken for a remote service.
LOCAL_FUSE = frozenset({"fuse.ntfs", "fuse.ntfs-3g", "fuse.exfat", "fuse.mergerfs", "fuse.bindfs", "fuse.lxcfs"})
_OCTAL = re.compile(r"\\([0-7]{3})")


@dataclass(frozen=True, slots=True)
class Mount:
    """One line of ``/proc/self/mountinfo``.

    Attributes:
        root: directory of the file system that is mounted (``/`` unless bound or in a container).
        point: where it is mounted.
        fstype: e.g. ``"ext4"``, ``"cgroup"``, ``"nfs4"``.
        options: the file system's own options; a cgroup v1 mount lists its controllers here.
    """

    root: str
    point: str
    fstype: str
    options: tuple[str, ...]


def parse_mountinfo(text: str) -> list[Mount]:
    """Parse the text of ``/proc/self/mountinfo`` (proc(5)); lines that are not of its form are left out."""
    mounts = []
    for line in text.splitlines():
        before, dash, after = line.partition(" - ")
        left, right = before.split(" "), after.split(" ")
        if dash and len(left) >= 6 and len(right) >= 3:
            mounts.append(Mount(_unescape(left[3]), _unescape(left[4]), right[0], tuple(right[2].split(","))))
    return mounts


def _unescape(field: str) -> str:
    """Undo the kernel's octal escapes of space, tab, newline and backslash."""
    return _OCTAL.sub(lambda match: chr(int(match[1], 8)), field)


def read_mountinfo(proc: Path = Path("/proc")) -> list[Mount]:
    """The mount table of this process; empty where the system has none."""
    try:
        return parse_mountinfo((proc / "self" / "mountinfo").read_text(errors="surrogateescape"))
    except OSError:
        return []


def file_system(path: str | os.PathLike[str], *, proc: Path = Path("/proc")) -> tuple[str, bool]:
    """File system type of a path, and whether it is reached over a network (or another process, as FUSE is).

    Symbolic links are followed; a path that does not exist yet counts as lying in its nearest parent. Outside
    Linux psutil's table of partitions is asked. ``("", False)`` where neither knows the path.
    """
    real = os.path.realpath(path)
    table = [(mount.point, mount.fstype) for mount in read_mountinfo(proc)]
    if not table:
        table = [(part.mountpoint, part.fstype.lower()) for part in psutil.disk_partitions(all=True)]
    best, fstype = -1, ""
    for point, kind in table:
        prefix = point.rstrip("/\\")
        # A later mount on the same point covers the earlier one.
        if len(prefix) >= best and (real in {point, prefix} or real.startswith((prefix + "/", prefix + "\\"))):
            best, fstype = len(prefix), kind
    network = fstype in NETWORK or (fstype.startswith("fuse.") and fstype not in LOCAL_FUSE)
    return fstype, network
