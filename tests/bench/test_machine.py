"""The knobs: memory cgroups on fake trees, read-ahead that is always put back, files that are really cold."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest

from tools.bench import aio, block_device, cgroup, disk, pagecache, spawn
from tools.bench.block_device import BlockDevice, Counters
from tools.bench.cgroup import Cap, Mounted

V1 = "26 25 0:22 / {root} rw,nosuid - cgroup cgroup rw,memory\n"
V2 = "30 25 0:26 / {root} rw,nosuid - cgroup2 cgroup2 rw\n"
OTHER = "20 1 254:0 / / rw - ext4 /dev/vda rw\n21 1 0:9 / /x rw - cgroup cgroup rw,cpu,cpuacct\nshort line\n"


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    root = tmp_path / "cgroup"
    root.mkdir()
    (root / "cgroup.controllers").write_text("cpu io memory pids\n")
    (root / "cgroup.subtree_control").write_text("cpu\n")
    return root


def mountinfo(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "mountinfo"
    path.write_text(text)
    return path


def test_find_v1_and_v2(tree: Path, tmp_path: Path) -> None:
    assert cgroup.find(mountinfo(tmp_path, OTHER + V2.format(root=tree))) == Mounted(2, tree)
    hybrid = OTHER + V2.format(root=tree) + V1.format(root="/somewhere\\040else")
    assert cgroup.find(mountinfo(tmp_path, hybrid)) == Mounted(1, Path("/somewhere else"))


def test_no_memory_controller_is_said(tree: Path, tmp_path: Path) -> None:
    (tree / "cgroup.controllers").write_text("cpu\n")
    with pytest.raises(cgroup.CannotCapError, match="no memory cgroup"):
        cgroup.find(mountinfo(tmp_path, OTHER + V2.format(root=tree)))
    with pytest.raises(cgroup.CannotCapError, match="no mount table"):
        cgroup.find(tmp_path / "absent")


def test_create_v2_on_a_fake_tree(tree: Path) -> None:
    cap = cgroup.create(1 << 20, "bench", Mounted(2, tree))
    assert (tree / "cgroup.subtree_control").read_text() == "+memory"
    assert (tree / "bench" / "memory.max").read_text() == str(1 << 20)
    cap.join(4321)
    assert (tree / "bench" / "cgroup.procs").read_text() == "4321"
    assert cap.peak() is None
    (tree / "bench" / "memory.peak").write_text("77\n")
    assert cap.peak() == 77
    assert Cap.from_dict(cap.to_dict()) == cap


def test_create_v1_on_a_fake_tree(tree: Path) -> None:
    cap = cgroup.create(1 << 20, "bench", Mounted(1, tree))
    assert (cap.path / "memory.limit_in_bytes").read_text() == str(1 << 20)


def test_a_cgroup_that_cannot_be_made_says_why(tree: Path) -> None:
    (tree / "bench").mkdir()
    with pytest.raises(cgroup.CannotCapError, match="takes root"):
        cgroup.create(1 << 20, "bench", Mounted(2, tree))


def test_remove_waits_and_then_complains(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cgroup, "PATIENCE_S", 0.0)
    cap = cgroup.create(1 << 20, "bench", Mounted(2, tree))
    with pytest.raises(OSError, match="not empty"):
        cap.remove()  # a fake tree's files are real ones
    (cap.path / "memory.max").unlink()
    monkeypatch.setattr(cgroup, "PATIENCE_S", 5.0)
    cap.remove()
    assert not cap.path.exists()


@pytest.mark.root
def test_a_real_cap_holds_a_real_process() -> None:
    try:
        cap = cgroup.create(64 << 20, f"jasper-bench-test-{os.getpid()}")
    except cgroup.CannotCapError as exc:
        pytest.skip(str(exc))
    try:
        assert spawn.call("tests.bench.children:join_and_hold", cap=cap.to_dict(), nbytes=8 << 20).value["held"]
        with pytest.raises(spawn.ChildError, match="more memory than it was given"):
            spawn.call("tests.bench.children:join_and_hold", cap=cap.to_dict(), nbytes=256 << 20)
    finally:
        cap.remove()


@pytest.fixture
def device(tmp_path: Path) -> BlockDevice:
    node = tmp_path / "devices" / "vda"
    (node / "queue").mkdir(parents=True)
    (node / "queue" / "read_ahead_kb").write_text("8192\n")
    (node / "stat").write_text("  100 5 800 7 0 0 0 0 0 0 0\n")
    (node / "vda1" / "partition").mkdir(parents=True)
    return BlockDevice(node)


def test_device_of_a_partition(device: BlockDevice, tmp_path: Path) -> None:
    number = tmp_path.stat().st_dev
    links = tmp_path / "block"
    links.mkdir()
    assert block_device.device_of(tmp_path, links) is None
    (links / f"{os.major(number)}:{os.minor(number)}").symlink_to(device.path / "vda1")
    assert block_device.device_of(tmp_path, links) == device
    assert device.name == "vda"
    assert device.counters().since(Counters(40, 0)) == Counters(60, 800 * 512)


def test_read_ahead_is_put_back_after_an_exception(device: BlockDevice, tmp_path: Path) -> None:
    def fail() -> None:
        with block_device.read_ahead(device, 128, tmp_path):
            assert device.read_ahead_kib == 128
            raise KeyError("inside")

    with pytest.raises(KeyError, match="inside"):
        fail()
    assert device.read_ahead_kib == 8192
    assert block_device.restore(tmp_path) is None


def test_a_killed_run_is_put_right_by_the_next(device: BlockDevice, tmp_path: Path) -> None:
    receipt = {"device": str(device.path), "kib": 8192}
    (tmp_path / block_device.RECEIPT).write_text(json.dumps(receipt))
    device.set_read_ahead(128)
    assert block_device.restore(tmp_path) == "read-ahead of vda put back to 8192 KiB"
    assert device.read_ahead_kib == 8192
    assert block_device.restore(tmp_path) is None


@pytest.fixture
def blob(tmp_path: Path) -> Path:
    path = tmp_path / "blob.bin"
    path.write_bytes(os.urandom(2 << 20))
    return path


def test_evict_makes_cold_and_warm_makes_resident(blob: Path) -> None:
    try:
        assert pagecache.evict([blob]) in {"posix_fadvise", "drop_caches"}
    except pagecache.NotColdError:
        pytest.skip("this file system keeps its pages (tmpfs)")
    assert pagecache.resident_fraction([blob]) < pagecache.COLD
    pagecache.warm([blob])
    assert pagecache.resident_fraction([blob]) == 1.0


def test_a_file_that_stays_is_an_error(blob: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pagecache, "resident_fraction", lambda _: 0.25)
    monkeypatch.setattr(pagecache, "DROP_CACHES", tmp_path / "absent")
    with pytest.raises(pagecache.NotColdError, match=r"25\.0% of the pages of 1 files stayed"):
        pagecache.evict([blob])


def test_empty_files_and_directories(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "empty").touch()
    assert pagecache.files_under(tmp_path) == [tmp_path / "a" / "empty"]
    assert pagecache.resident_fraction([tmp_path / "a" / "empty"]) == 0.0


@pytest.mark.parametrize("random", [True, False])
def test_probes_read(blob: Path, *, random: bool) -> None:
    rate = disk._threads(blob, 4096, 2, 0.05, random=random, seed=0)
    assert rate.reads_per_s > 0
    assert rate.bytes_per_s == pytest.approx(rate.reads_per_s * 4096)
    try:
        rate = aio.read_rate(blob, block=4096, depth=8, seconds=0.05, random=random)
    except aio.AioUnavailableError as exc:
        pytest.skip(f"no Linux AIO here: {exc}")
    assert rate.bytes_per_s == pytest.approx(rate.reads_per_s * 4096)


def test_a_file_smaller_than_a_block_is_said(tmp_path: Path) -> None:
    (tmp_path / "tiny").write_bytes(b"x")
    with pytest.raises(aio.AioUnavailableError, match="smaller than one block"):
        aio.read_rate(tmp_path / "tiny", block=4096, depth=2, seconds=0.01, random=True)


def test_child_returns_and_is_watched() -> None:
    found = spawn.call("tests.bench.children:hold", nbytes=64 << 20, seconds=0.5)
    assert found.value == {"held": 64 << 20}
    assert found.grown > 48 << 20
    assert found.peak.anonymous >= found.start.anonymous
    assert 0.0 <= found.foreign <= 1.0


def test_child_that_raises_tells_its_last_line() -> None:
    with pytest.raises(spawn.ChildError, match="LookupError: nothing here"):
        spawn.call("tests.bench.children:fail")


def test_child_that_hangs_is_ended_with_its_own_children() -> None:
    with pytest.raises(spawn.ChildError, match="ran past"):
        spawn.call("tests.bench.children:hang", timeout=1.5)


def test_child_that_dies_is_said() -> None:
    with pytest.raises(spawn.ChildError, match="killed"):
        spawn.call("tests.bench.children:die", signal=int(signal.SIGKILL))
