"""The mount table: parsing, the longest prefix, network file systems."""

from __future__ import annotations

from types import SimpleNamespace

import psutil
import pytest
from hypothesis import given, strategies as st

from jasper_store.memory.mounts import Mount, file_system, parse_mountinfo

TABLE = """\
27 1 254:0 / / rw,relatime - ext4 /dev/vda rw,discard
36 27 0:40 / /data rw,relatime shared:5 master:3 - nfs4 server:/export rw,vers=4.2
37 27 0:41 / /data/local\\040disk rw,relatime - xfs /dev/vdb rw
38 27 0:42 / /bucket rw - fuse.s3fs s3fs rw
39 27 0:43 / /usb rw - fuse.ntfs-3g /dev/sdb rw
40 27 0:44 / /over rw - ext4 /dev/sdc rw
41 27 0:45 / /over rw - cifs //host/share rw
"""


@pytest.fixture
def proc(tmp_path):
    (tmp_path / "proc" / "self").mkdir(parents=True)
    (tmp_path / "proc" / "self" / "mountinfo").write_text(TABLE)
    return tmp_path / "proc"


def test_lines_are_parsed():
    parsed = parse_mountinfo(TABLE)
    assert parsed[0] == Mount("/", "/", "ext4", ("rw", "discard"))
    assert parsed[2].point == "/data/local disk"
    assert len(parsed) == 7


@given(st.text())
def test_any_text_parses(text):
    assert all(isinstance(mount, Mount) for mount in parse_mountinfo(text))


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("/", ("ext4", False)),
        ("/somewhere/new", ("ext4", False)),
        ("/data", ("nfs4", True)),
        ("/data/set", ("nfs4", True)),
        ("/database", ("ext4", False)),
        ("/data/local disk/x", ("xfs", False)),
        ("/bucket/x", ("fuse.s3fs", True)),
        ("/usb/x", ("fuse.ntfs-3g", False)),
        ("/over/x", ("cifs", True)),
    ],
)
def test_the_mount_that_a_path_lies_on(proc, path, expected):
    assert file_system(path, proc=proc) == expected


def test_links_are_followed(proc, tmp_path):
    (tmp_path / "link").symlink_to("/data/set")
    assert file_system(tmp_path / "link", proc=proc) == ("nfs4", True)


def test_without_a_table_psutil_is_asked(tmp_path, monkeypatch):
    parts = [SimpleNamespace(mountpoint="/", fstype="APFS"), SimpleNamespace(mountpoint="/Volumes/x", fstype="smbfs")]
    monkeypatch.setattr(psutil, "disk_partitions", lambda **_: parts)
    assert file_system("/Volumes/x/data", proc=tmp_path) == ("smbfs", True)
    assert file_system("/tmp", proc=tmp_path)[1] is False
    monkeypatch.setattr(psutil, "disk_partitions", lambda **_: [])
    assert file_system("/tmp", proc=tmp_path) == ("", False)
