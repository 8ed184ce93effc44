"""Files and directories are replaced whole or not at all; what is left behind is cleaned; one writer at a time."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import shutil
import stat
import subprocess
import sys
import threading
from typing import TYPE_CHECKING

import pytest

from jasper_store.errors import ConversionError
from jasper_store.files import atomic, lock

if TYPE_CHECKING:
    from pathlib import Path


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def dead_pid() -> int:
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    return child.pid


def test_a_new_file_appears_whole(tmp_path):
    with atomic.atomic_file(tmp_path / "a.bin") as temporary:
        temporary.write_bytes(b"new")
        assert names(tmp_path) == [temporary.name]
        assert temporary.name.startswith(".a.bin.")
    assert names(tmp_path) == ["a.bin"]
    assert (tmp_path / "a.bin").read_bytes() == b"new"


@pytest.mark.parametrize("failure", [ValueError, KeyboardInterrupt, SystemExit])
def test_a_failure_leaves_the_old_file_and_nothing_else(tmp_path, failure):
    target = tmp_path / "a.bin"
    target.write_bytes(b"old")

    def fail() -> None:
        with atomic.atomic_file(target) as temporary:
            temporary.write_bytes(b"half")
            raise failure

    with pytest.raises(failure):
        fail()
    assert names(tmp_path) == ["a.bin"]
    assert target.read_bytes() == b"old"


posix = pytest.mark.skipif(sys.platform == "win32", reason="permissions of POSIX")
UMASK = os.umask(0o022)
os.umask(UMASK)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@posix
@pytest.mark.parametrize("write", ["publish", "write_bytes"])
def test_a_file_keeps_its_permissions_and_a_new_one_obeys_umask(tmp_path, write):
    def replace(path: Path) -> None:
        if write == "write_bytes":
            atomic.write_bytes(path, b"new")
        else:
            with atomic.atomic_file(path) as temporary:
                temporary.write_bytes(b"new")

    for wanted in (0o600, 0o640, 0o444):
        target = tmp_path / f"{wanted:o}"
        target.write_bytes(b"old")
        target.chmod(wanted)
        replace(target)
        assert mode(target) == wanted
    before = os.umask(0o077)
    try:
        replace(tmp_path / "new")
    finally:
        os.umask(before)
    assert mode(tmp_path / "new") == 0o600


@posix
def test_a_link_gives_its_permissions_to_nothing(tmp_path):
    (tmp_path / "secret").write_bytes(b"old")
    (tmp_path / "secret").chmod(0o600)
    (tmp_path / "a").symlink_to("secret")
    atomic.write_bytes(tmp_path / "a", b"new")
    assert mode(tmp_path / "a") == 0o666 & ~UMASK


@posix
@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root gives files away")
def test_a_file_keeps_its_owner(tmp_path):
    target = tmp_path / "a"
    target.write_bytes(b"old")
    os.chown(target, 12345, 23456)
    target.chmod(0o640)
    atomic.write_bytes(target, b"new")
    facts = target.stat()
    assert (facts.st_uid, facts.st_gid, mode(target)) == (12345, 23456, 0o640)


@posix
def test_a_group_that_cannot_be_kept_gets_what_everybody_has(tmp_path, monkeypatch):
    target = tmp_path / "a"
    target.write_bytes(b"old")
    target.chmod(0o664)

    def chown(path: Path, *to: int, **options: bool) -> None:
        raise PermissionError(errno.EPERM, "not a member")

    monkeypatch.setattr(os, "chown", chown)
    theirs = target.lstat().st_gid
    real = os.stat_result
    monkeypatch.setattr(
        type(target), "lstat", lambda path: real([*path.stat()[:5], theirs + (path == target), *path.stat()[6:]])
    )
    atomic.write_bytes(target, b"new")
    assert mode(target) == 0o644


def test_readers_of_the_old_file_keep_it(tmp_path):
    target = tmp_path / "a.bin"
    target.write_bytes(b"old")
    with target.open("rb") as reader:
        atomic.write_bytes(target, b"new")
        assert reader.read() == b"old"
    assert target.read_bytes() == b"new"


def test_a_link_is_replaced_and_what_it_points_to_is_not(tmp_path):
    elsewhere = tmp_path / "elsewhere.bin"
    elsewhere.write_bytes(b"precious")
    target = tmp_path / "dataset" / "a.bin"
    target.parent.mkdir()
    target.symlink_to(elsewhere)
    atomic.write_bytes(target, b"new")
    assert not target.is_symlink()
    assert target.read_bytes() == b"new"
    assert elsewhere.read_bytes() == b"precious"


def test_a_directory_in_the_way_is_refused(tmp_path):
    (tmp_path / "a.bin").mkdir()
    with pytest.raises(ConversionError, match="found a directory"):
        atomic.write_bytes(tmp_path / "a.bin", b"new")
    assert names(tmp_path) == ["a.bin"]


def test_flushed_before_it_is_named_and_the_directory_after(tmp_path, monkeypatch):
    events = []
    monkeypatch.setattr(atomic, "sync_file", lambda path: events.append(("file", path.exists())))
    monkeypatch.setattr(atomic, "sync_directory", lambda path: events.append(("directory", (path / "a").exists())))
    atomic.write_bytes(tmp_path / "a", b"x")
    assert events == [("file", True), ("directory", True)]


@pytest.mark.parametrize(
    ("code", "text"),
    [
        (errno.ENOSPC, r"no room to finish.*1,000 bytes of 5,000.*bytes are free"),
        (errno.EDQUOT, "no room to finish"),
        (errno.EROFS, "expected to be able to write"),
        (errno.EACCES, "choose another destination"),
        (errno.EIO, "could not be written"),
    ],
)
def test_refusals_of_the_system_are_translated_with_numbers(tmp_path, code, text):
    def fail() -> None:
        with atomic.atomic_file(tmp_path / "a.bin", needed=5000) as temporary:
            temporary.write_bytes(bytes(1000))
            raise OSError(code, os.strerror(code))

    with pytest.raises(ConversionError, match=text) as caught:
        fail()
    assert caught.value.path == tmp_path / "a.bin"
    assert isinstance(caught.value.__cause__, OSError)
    assert names(tmp_path) == []


def test_other_refusals_are_said_without_a_number(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    below = tmp_path / "file" / "below"
    with pytest.raises(ConversionError, match="Not a directory; the old file") as caught, atomic.map_os_errors(below):
        below.mkdir()
    assert "Errno" not in str(caught.value)


@pytest.mark.parametrize("error", [OSError, RuntimeError])
def test_the_number_in_an_hdf5_message_is_understood(tmp_path, error):
    with pytest.raises(ConversionError, match="no room"), atomic.map_os_errors(tmp_path / "a.h5"):
        raise error("Can't write data (file write failed: errno = 28, error message = 'No space left on device')")


def test_the_disk_is_asked_before_the_first_byte(tmp_path):
    free = shutil.disk_usage(tmp_path).free
    atomic.require_space(tmp_path, 10, what="a test")
    with pytest.raises(ConversionError, match=r"a test needs .* bytes .* found .* bytes free.* Nothing was written"):
        atomic.require_space(tmp_path, free * 2, what="a test")


def test_one_percent_is_kept_to_spare(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(0, 0, 1_000_000))
    atomic.require_space(tmp_path, 990_000, what="a test")
    with pytest.raises(ConversionError, match="9,899 too few"):
        atomic.require_space(tmp_path, 1_000_000 - 100, what="a test")


def test_temporaries_of_dead_processes_are_cleaned_and_no_others(tmp_path):
    gone = dead_pid()
    stale = [f".a.npy.{gone}-0123abcd.tmp", f".b.{gone}-0123abcd.staging", f".jasper_store.json.{gone}.tmp"]
    (tmp_path / stale[0]).write_bytes(b"x")
    (tmp_path / stale[1]).mkdir()
    (tmp_path / stale[1] / "inside").write_bytes(b"x")
    (tmp_path / stale[2]).write_bytes(b"x")
    kept = [f".a.npy.{os.getppid()}-0123abcd.tmp", ".a.npy.tmp", f"a.{gone}-0123abcd.tmp", "a.npy"]
    for name in kept:
        (tmp_path / name).write_bytes(b"x")
    mine = atomic.temporary_name(tmp_path / "mine")
    mine.write_bytes(b"x")
    try:
        assert sorted(path.name for path in atomic.clean_stale(tmp_path)) == sorted(stale)
        assert names(tmp_path) == sorted([*kept, mine.name])
    finally:
        atomic.remove(mine)


def test_only_one_targets_temporaries_are_cleaned_on_request(tmp_path):
    gone = dead_pid()
    for name in ("a", "b"):
        (tmp_path / f".{name}.{gone}-0123abcd.tmp").write_bytes(b"x")
    atomic.clean_stale(tmp_path, "a")
    assert names(tmp_path) == [f".b.{gone}-0123abcd.tmp"]


def test_a_reused_process_number_does_not_protect_a_temporary(tmp_path):
    # In a container every run may be process 1: neither the own number nor one of a younger process counts.
    own = tmp_path / f".a.{os.getpid()}-0123abcd.tmp"
    own.write_bytes(b"x")
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as young:
        other = tmp_path / f".b.{young.pid}-0123abcd.tmp"
        other.write_bytes(b"x")
        os.utime(other, (1_000_000_000, 1_000_000_000))
        assert atomic.clean_stale(tmp_path) == [own, other]


def test_a_lock_is_exclusive_names_its_holder_and_goes_away(tmp_path):
    path = tmp_path / lock.LOCK_NAME
    with lock.exclusive(path, "first"):
        with (
            pytest.raises(ConversionError, match=rf"second.*process {os.getpid()} on "),
            lock.exclusive(path, "second"),
        ):
            pass
        assert path.exists()
    assert not path.exists()
    with lock.exclusive(path, "third"):
        pass


def test_a_lock_of_a_killed_process_is_free(tmp_path):
    path = tmp_path / lock.LOCK_NAME
    code = (
        "import sys, time; from pathlib import Path; from jasper_store.files.lock import exclusive\n"
        "with exclusive(Path(sys.argv[1]), 'x'):\n    print('held', flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "held\n"
        with pytest.raises(ConversionError, match=f"process {child.pid} "), lock.exclusive(path, "second"):
            pass
        child.kill()
        child.wait()
    assert path.exists()
    lock.remove_stale(path)
    assert not path.exists()
    lock.remove_stale(path)
    with lock.exclusive(path, "third"):
        lock.remove_stale(path)
        assert path.exists()


def test_many_threads_hold_a_lock_one_at_a_time(tmp_path):
    path = tmp_path / lock.LOCK_NAME
    inside, most, entered = 0, 0, 0

    def work() -> None:
        nonlocal inside, most, entered
        for _ in range(200):
            with contextlib.suppress(ConversionError), lock.exclusive(path, "work"):
                inside += 1
                most = max(most, inside)
                entered += 1
                inside -= 1

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == 1
    assert entered > 0
    assert not path.exists()


def test_a_lock_is_waited_for(tmp_path):
    path = tmp_path / lock.LOCK_NAME
    held, release = threading.Event(), threading.Event()

    def hold() -> None:
        with lock.exclusive(path, "first"):
            held.set()
            release.wait(60)

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait(60)
    with pytest.raises(ConversionError, match="second"), lock.exclusive(path, "second", wait=0.05):
        pass
    threading.Timer(0.05, release.set).start()
    with lock.exclusive(path, "third", wait=60):
        pass
    thread.join()
    assert not path.exists()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_a_forked_child_that_ends_leaves_the_lock(tmp_path):
    path = tmp_path / lock.LOCK_NAME
    holder = lock.exclusive(path, "first")
    with holder:
        if (pid := os.fork()) == 0:
            holder.__exit__(None, None, None)
            os._exit(0)
        os.waitpid(pid, 0)
        with pytest.raises(ConversionError, match=f"process {os.getpid()} "), lock.exclusive(path, "second"):
            pass
    assert not path.exists()


@pytest.mark.parametrize("plant", ["symlink_to", "hardlink_to"])
def test_a_file_planted_at_the_locks_name_is_not_written(tmp_path, plant):
    victim, path = tmp_path / "victim", tmp_path / lock.LOCK_NAME
    victim.write_bytes(b"mine")
    getattr(path, plant)(victim)
    with pytest.raises(ConversionError), lock.exclusive(path, "work"):
        pass
    assert victim.read_bytes() == b"mine"


def test_a_small_file_is_not_written_through_a_planted_link(tmp_path, monkeypatch):
    victim = tmp_path / "victim"
    victim.write_bytes(b"mine")
    monkeypatch.setattr(secrets, "token_hex", lambda n: "0123abcd")
    temporary = atomic.temporary_name(tmp_path / "a.json")
    temporary.symlink_to(victim)
    with pytest.raises(ConversionError):
        atomic.write_bytes(tmp_path / "a.json", b"theirs")
    assert victim.read_bytes() == b"mine"
    assert names(tmp_path) == ["victim"]


@pytest.fixture(params=["exchange", "two renames"])
def swap(request, monkeypatch):
    if request.param == "two renames":
        monkeypatch.setattr(atomic, "_renameat2", lambda: None)
    return atomic.swap_directory


def test_a_directory_is_swapped_for_another(tmp_path, swap):
    target, new = tmp_path / "set", atomic.temporary_name(tmp_path / "set", "staging")
    target.mkdir()
    (target / "old").write_bytes(b"old")
    new.mkdir()
    (new / "new").write_bytes(b"new")
    swap(new, target)
    assert names(tmp_path) == ["set"]
    assert names(target) == ["new"]


@posix
def test_a_directory_keeps_its_permissions_and_those_of_its_files(tmp_path, swap):
    target, new = tmp_path / "set", atomic.temporary_name(tmp_path / "set", "staging")
    for directory in (target, new):
        directory.mkdir()
        (directory / "a").write_bytes(b"a")
    (new / "b").write_bytes(b"b")
    (target / "a").chmod(0o600)
    target.chmod(0o700)
    swap(new, target)
    assert [mode(path) for path in (target, target / "a", target / "b")] == [0o700, 0o600, 0o666 & ~UMASK]


def test_a_directory_takes_a_free_name(tmp_path, swap):
    new = atomic.temporary_name(tmp_path / "set", "staging")
    new.mkdir()
    swap(new, tmp_path / "set")
    assert names(tmp_path) == ["set"]


def test_a_swap_cut_between_its_renames_is_undone(tmp_path):
    aside = tmp_path / f".set.{dead_pid()}-0123abcd.old"
    aside.mkdir()
    (aside / "old").write_bytes(b"old")
    assert atomic.clean_stale(tmp_path) == []
    atomic.recover_directory(tmp_path / "set")
    assert names(tmp_path / "set") == ["old"]
    assert names(tmp_path) == ["set"]
