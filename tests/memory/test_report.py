"""The memory report: the split, the tree of processes, other systems."""

from __future__ import annotations

import mmap
import os
import sys
from types import SimpleNamespace

import psutil
import pytest
import torch

from jasper_store.errors import JasperStoreError
from jasper_store.memory.report import memory_report
from jasper_store.paging.mapping import FileMap
from jasper_store.paging.preload import empty

MIB = 1 << 20
linux = pytest.mark.skipif(sys.platform != "linux", reason="needs Linux")


@linux
def test_file_pages_are_not_taken_for_memory_of_ones_own(tmp_path):
    path = tmp_path / "data"
    path.write_bytes(bytes(16 * MIB))
    fmap = FileMap(path)
    before = memory_report()
    fmap.bytes.sum()
    mapped = memory_report()
    assert mapped.file - before.file >= 15 * MIB
    assert mapped.anonymous - before.anonymous < 8 * MIB
    block = empty((16 * MIB,), torch.uint8).fill_(1)
    held = memory_report()
    assert held.anonymous - mapped.anonymous >= 15 * MIB
    assert held.total_rss == held.anonymous + held.file + held.shared
    assert "anonymous" in str(held)
    del block


@linux
def test_shared_memory_is_named():
    before = memory_report()
    shared = mmap.mmap(-1, 16 * MIB)
    shared.write(b"1" * (16 * MIB))
    assert memory_report().shared - before.shared >= 15 * MIB
    shared.close()


@linux
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_worker_shares_what_it_only_reads():
    block = torch.ones(32 * MIB, dtype=torch.uint8)
    done, go = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(go)
        os.read(done, 1)
        os._exit(0)
    try:
        own, worker = memory_report(), memory_report(child)
        assert worker.anonymous >= 30 * MIB
        assert worker.private < 16 * MIB
        assert own.proportional + worker.proportional < own.total_rss + worker.total_rss - 30 * MIB
    finally:
        os.close(go)
        os.waitpid(child, 0)
    assert block[0] == 1


def test_other_systems(tmp_path):
    found = memory_report(proc=tmp_path)
    assert found.source == "psutil"
    assert found.total_rss == found.anonymous + found.file
    assert 0 < found.private <= found.total_rss


def test_systems_that_do_not_tell_private_memory(tmp_path, monkeypatch):
    class Process:
        def __init__(self, pid=None):
            self.pid = pid or 1

        def memory_info(self):
            return SimpleNamespace(rss=100)

        def memory_full_info(self):
            raise psutil.AccessDenied

    monkeypatch.setattr(psutil, "Process", Process)
    assert memory_report(5, proc=tmp_path).anonymous == 100


def test_a_process_that_does_not_exist():
    with pytest.raises(JasperStoreError, match="running process"):
        memory_report(2**22 + 12345)
