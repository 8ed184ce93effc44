"""The budget: cgroup trees of every kind, schedulers' variables, ranks, and values that make no sense."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import psutil
import pytest
import torch
from hypothesis import given, strategies as st

from jasper_store.errors import IncompatibleOptionsError
from jasper_store.memory.budget import Bound, Budget, device_budget, format_bytes, measure

GIB = 1 << 30
V1_UNLIMITED = "9223372036854771712"


class Machine:
    """A fake /proc and /sys/fs/cgroup below a directory."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.proc = root / "proc"
        (self.proc / "self").mkdir(parents=True)
        self.mounts: list[str] = []
        self.cgroups: list[str] = []

    def mount(self, name: str, fstype: str, options: str, root: str = "/") -> Path:
        point = self.root / name
        point.mkdir(parents=True, exist_ok=True)
        self.mounts.append(f"40 27 0:33 {root} {point} rw,relatime - {fstype} {fstype} rw,{options}\n")
        return point

    def member(self, line: str) -> None:
        self.cgroups.append(line + "\n")

    def measure(self, memory_limit: int | None = None, **environ: str) -> Budget:
        (self.proc / "self" / "mountinfo").write_text("".join(self.mounts))
        (self.proc / "self" / "cgroup").write_text("".join(self.cgroups))
        return measure(memory_limit, environ=environ, proc=self.proc, host_available=lambda: 100 * GIB)


def v1(folder: Path, limit: int | str, usage: int = 0, inactive_file: int = 0) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "memory.limit_in_bytes").write_text(f"{limit}\n")
    (folder / "memory.usage_in_bytes").write_text(f"{usage}\n")
    (folder / "memory.stat").write_text(f"cache 1\ninactive_file 1\ntotal_inactive_file {inactive_file}\n")


def v2(folder: Path, limit: int | str, usage: int = 0, inactive_file: int = 0, high: int | str = "max") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "memory.max").write_text(f"{limit}\n")
    (folder / "memory.high").write_text(f"{high}\n")
    (folder / "memory.current").write_text(f"{usage}\n")
    (folder / "memory.stat").write_text(f"anon 5\ninactive_file {inactive_file}\n")


@pytest.fixture
def machine(tmp_path):
    return Machine(tmp_path)


def by_name(found: Budget) -> dict[str, int]:
    return {bound.name: bound.nbytes for bound in found.bounds if bound.name != "address space limit"}


def test_nothing_but_the_host(machine):
    found = machine.measure()
    assert by_name(found) == {"host memory available": 100 * GIB}
    assert found.nbytes == int(100 * GIB * 0.8)
    assert found.ranks == 1
    assert "-> host memory available" in found.explain()


def test_no_proc_at_all(tmp_path):
    found = measure(environ={}, proc=tmp_path / "none", host_available=lambda: GIB)
    assert by_name(found) == {"host memory available": GIB}


def test_v1_every_ancestor_counts(machine):
    point = machine.mount("cgroup/memory", "cgroup", "memory")
    machine.mount("cgroup/cpu", "cgroup", "cpu")
    machine.member("9:name=systemd:/")
    machine.member("4:memory:/job/step")
    machine.member("0::/")
    v1(point, V1_UNLIMITED, 50 * GIB)
    v1(point / "job", 8 * GIB, 5 * GIB, 2 * GIB)
    v1(point / "job" / "step", 20 * GIB, GIB)
    found = machine.measure()
    assert by_name(found) == {
        "host memory available": 100 * GIB,
        "cgroup /job/step": 19 * GIB,
        "cgroup /job": 5 * GIB,
    }
    assert found.winner.name == "cgroup /job"
    assert "8.00 GiB - in use 5.00 GiB + inactive file pages 2.00 GiB" in found.winner.detail
    assert not found.notes


def test_v1_joint_controllers(machine):
    point = machine.mount("cgroup/both", "cgroup", "cpu,memory")
    machine.member("4:cpu,memory:/a")
    v1(point / "a", GIB)
    assert machine.measure().winner == Bound("cgroup /a", GIB, "limit 1.00 GiB - in use 0 B + inactive file pages 0 B")


def test_v2_max_and_high_of_every_ancestor(machine):
    point = machine.mount("cgroup", "cgroup2", "nsdelegate")
    machine.member("0::/user.slice/app.scope")
    v2(point / "user.slice", "max", 3 * GIB, high=10 * GIB)
    v2(point / "user.slice" / "app.scope", 9 * GIB, 3 * GIB, GIB)
    found = machine.measure()
    assert by_name(found) == {
        "host memory available": 100 * GIB,
        "cgroup /user.slice/app.scope": 7 * GIB,
        "cgroup /user.slice": 7 * GIB,
    }


def test_hybrid_asks_both(machine):
    old = machine.mount("cgroup/memory", "cgroup", "memory")
    new = machine.mount("cgroup/unified", "cgroup2", "nsdelegate")
    machine.member("4:memory:/old")
    machine.member("0::/new")
    v1(old / "old", 3 * GIB)
    (new / "new").mkdir()
    assert machine.measure().winner.nbytes == 3 * GIB


def test_a_container_sees_its_own_root(machine):
    # Without a cgroup namespace: the path is the host's, and the mount shows the container's own cgroup.
    point = machine.mount("cgroup/memory", "cgroup", "memory", root="/docker/abc")
    machine.member("4:memory:/docker/abc")
    v1(point, 2 * GIB, GIB)
    assert by_name(machine.measure())["cgroup /docker/abc"] == GIB


def test_a_container_and_a_group_inside(machine):
    point = machine.mount("cgroup/memory", "cgroup", "memory", root="/docker/abc")
    machine.member("4:memory:/docker/abc/inner")
    v1(point, 2 * GIB, GIB)
    v1(point / "inner", GIB // 2)
    assert machine.measure().winner == Bound(
        "cgroup /docker/abc/inner", GIB // 2, "limit 512.00 MiB - in use 0 B + inactive file pages 0 B"
    )
    assert by_name(machine.measure())["cgroup /docker/abc"] == GIB


@pytest.mark.parametrize("path", ["/elsewhere/job", "/../../other", "/docker/abcdef"])
def test_a_path_outside_of_what_is_mounted_falls_back_to_the_mounts_root(machine, path):
    point = machine.mount("cgroup", "cgroup2", "nsdelegate", root="/docker/abc")
    machine.member(f"0::{path}")
    v2(point, 4 * GIB, GIB)
    assert machine.measure().winner.nbytes == 3 * GIB


def test_a_group_that_is_gone_falls_back_to_the_mounts_root(machine):
    point = machine.mount("cgroup", "cgroup2", "nsdelegate")
    machine.member("0::/removed")
    v2(point, 4 * GIB)
    assert machine.measure().winner.nbytes == 4 * GIB


def test_the_same_group_mounted_twice_counts_once(machine):
    point = machine.mount("cgroup", "cgroup2", "nsdelegate")
    machine.mount("cgroup", "cgroup2", "nsdelegate")
    machine.member("0::/a")
    v2(point / "a", GIB)
    assert [bound.name for bound in machine.measure().bounds].count("cgroup /a") == 1


def test_more_in_use_than_allowed_leaves_nothing(machine):
    point = machine.mount("cgroup", "cgroup2", "nsdelegate")
    machine.member("0::/a")
    v2(point / "a", GIB, 5 * GIB)
    assert machine.measure().nbytes == 0


def test_cache_never_lifts_a_bound_above_its_limit(machine):
    point = machine.mount("cgroup", "cgroup2", "nsdelegate")
    machine.member("0::/a")
    v2(point / "a", GIB, GIB // 4, GIB)
    assert machine.measure().winner.nbytes == GIB


def test_nonsense_in_cgroup_files_is_left_out_and_named(machine):
    point = machine.mount("cgroup", "cgroup2", "nsdelegate")
    machine.member("0::/a")
    machine.member("not a cgroup line")
    v2(point / "a", "lots", 0, 0, high=-5)
    v2(point, 4 * GIB)
    (point / "memory.stat").write_text("inactive_file many\n")
    found = machine.measure()
    assert found.winner.nbytes == 4 * GIB
    assert len(found.notes) == 3
    assert "'lots'" in found.explain()
    assert "'-5'" in found.explain()
    assert "'many'" in found.explain()


def test_a_cgroup_file_that_cannot_be_read_is_named(machine):
    point = machine.mount("cgroup", "cgroup2", "nsdelegate")
    machine.member("0::/a")
    (point / "a" / "memory.max").mkdir(parents=True)
    (point / "memory.max").write_bytes(b"\xff\xfe")
    found = machine.measure()
    assert len(found.notes) == 2
    assert found.winner.name == "host memory available"


@given(text=st.text(max_size=60))
def test_any_cgroup_membership_parses(tmp_path_factory, text):
    proc = tmp_path_factory.mktemp("proc")
    (proc / "self").mkdir()
    (proc / "self" / "cgroup").write_text(text, errors="surrogatepass")
    (proc / "self" / "mountinfo").write_text(f"40 27 0:33 / {proc} rw - cgroup2 cgroup2 rw\n")
    assert measure(environ={}, proc=proc, host_available=lambda: GIB).winner.nbytes <= GIB


# ------------------------------------------------------------------------------------------------ schedulers, ranks


@pytest.mark.parametrize(
    ("environ", "name", "nbytes"),
    [
        ({"SLURM_MEM_PER_NODE": "2048"}, "SLURM_MEM_PER_NODE", 2 * GIB),
        ({"SLURM_MEM_PER_CPU": "512", "SLURM_CPUS_ON_NODE": "8"}, "SLURM_MEM_PER_CPU", 4 * GIB),
        ({"SLURM_MEM_PER_CPU": "512", "SLURM_JOB_CPUS_PER_NODE": "6(x2),3"}, "SLURM_MEM_PER_CPU", 3 * GIB),
        ({"SLURM_MEM_PER_GPU": "1024", "SLURM_GPUS_ON_NODE": "4"}, "SLURM_MEM_PER_GPU", 4 * GIB),
    ],
)
def test_the_schedulers_allotment(machine, environ, name, nbytes):
    found = machine.measure(**environ)
    assert found.winner == Bound(name, nbytes, found.winner.detail)
    assert not found.notes


def test_memory_0_means_the_whole_node(machine):
    found = machine.measure(SLURM_MEM_PER_NODE="0")
    assert found.winner.name == "host memory available"
    assert "whole node" in found.explain()


def test_memory_per_cpu_without_a_count_is_named(machine):
    assert "SLURM_CPUS_ON_NODE" in machine.measure(SLURM_MEM_PER_CPU="512").explain()


@pytest.mark.parametrize(
    ("environ", "ranks"),
    [
        ({}, 1),
        ({"LOCAL_WORLD_SIZE": "4", "SLURM_NTASKS_PER_NODE": "8"}, 4),
        ({"SLURM_NTASKS_PER_NODE": "8"}, 8),
        ({"SLURM_NTASKS_PER_NODE": "2(x3),1"}, 2),
        ({"OMPI_COMM_WORLD_LOCAL_SIZE": "3", "SLURM_NTASKS_PER_NODE": "1"}, 3),
        ({"LOCAL_WORLD_SIZE": " ", "MPI_LOCALNRANKS": "2"}, 2),
    ],
)
def test_ranks_share_the_budget(machine, environ, ranks):
    found = machine.measure(**environ)
    assert found.ranks == ranks
    assert found.nbytes == int(100 * GIB * 0.8 / ranks)
    assert ("ranks" in found.explain()) == (ranks > 1)


@given(text=st.text(max_size=12), name=st.sampled_from(["LOCAL_WORLD_SIZE", "SLURM_MEM_PER_NODE", "SLURM_MEM_PER_CPU"]))
def test_any_variable_is_understood_or_named(text, name):
    found = measure(environ={name: text}, proc=Path("/nonexistent"), host_available=lambda: GIB)
    plain = re.fullmatch(r"([0-9]{1,30})(\([x][0-9]+\))?(,.*)?", text.strip())
    if text.strip() and (plain is None or int(plain[1]) == 0):
        assert any(note.startswith(name) for note in found.notes)
        assert found.ranks == 1
        assert found.winner.name == "host memory available"


@pytest.mark.parametrize("text", ["-3", "4.5", "two", "0", "1e3", "٣", "9" * 40, "4(x", "(x2)"])
def test_nonsense_variables_are_left_out_and_named(machine, text):
    found = machine.measure(LOCAL_WORLD_SIZE=text, SLURM_MEM_PER_CPU=text)
    assert found.ranks == 1
    assert found.winner.name == "host memory available"
    assert "left out: LOCAL_WORLD_SIZE" in found.explain()
    assert "left out: SLURM_MEM_PER_CPU" in found.explain()


# ------------------------------------------------------------------------------------------------ the caller's limit


def test_memory_limit(machine):
    assert machine.measure(GIB).winner == Bound("memory_limit", GIB, "asked for by the caller")
    assert machine.measure(0).nbytes == 0


@pytest.mark.parametrize("limit", [-1, 1.5, "8 elephants", True])
def test_a_limit_that_is_none(limit):
    with pytest.raises(IncompatibleOptionsError, match="memory_limit"):
        measure(limit)


@pytest.mark.skipif(sys.platform == "win32", reason="needs resource limits")
def test_the_address_space_limit_counts(machine, monkeypatch):
    import resource

    monkeypatch.setattr(resource, "getrlimit", lambda _: (3 * GIB, 3 * GIB))
    (machine.proc / "self" / "statm").write_text(f"{GIB // resource.getpagesize()} 1 1 1\n")
    found = machine.measure()
    assert found.winner == Bound("address space limit", 2 * GIB, "ulimit -v 3.00 GiB - in use 1.00 GiB")
    (machine.proc / "self" / "statm").write_text("")
    assert machine.measure().winner.nbytes == 3 * GIB


def test_this_machine():
    found = measure()
    assert 0 < found.nbytes <= psutil.virtual_memory().total
    assert found.explain()


# ------------------------------------------------------------------------------------------------ devices


def test_device_budget(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (10 * GIB, 16 * GIB))
    found = device_budget("cuda:1")
    assert found.winner == Bound("GPU memory free", 10 * GIB, "of 16.00 GiB on cuda:1")
    assert found.nbytes == 8 * GIB


def test_device_budget_elsewhere():
    with pytest.raises(IncompatibleOptionsError, match="CUDA"):
        device_budget("cpu")
    with pytest.raises(IncompatibleOptionsError, match="nonsense"):
        device_budget("nonsense")
    if not torch.cuda.is_available():
        with pytest.raises(IncompatibleOptionsError, match="free memory"):
            device_budget("cuda")


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1024, "1.00 KiB"), (3 * GIB // 2, "1.50 GiB"), (1 << 50, "1024.00 TiB")],
)
def test_bytes_for_people(nbytes, text):
    assert format_bytes(nbytes) == text
