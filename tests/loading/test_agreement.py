"""Ranks that would serve different epochs are told so, all of them: real processes of torchrun, over gloo."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

import jasper_store as js
from jasper_store.errors import RankError
from jasper_store.loading import agreement
from jasper_store.loading.agreement import compare_ranks, differences, shared_store
from jasper_store.loading.ranks import Ranks
from tests.builders import build_pt_dataset
from tests.integrations.launch import Torchrun

linux = pytest.mark.skipif(sys.platform == "win32", reason="torchrun with process groups")

PROGRAM = """
import os, sys, time
import torch.distributed as dist
import jasper_store as js
from jasper_store.loading import agreement

what, data, other = sys.argv[1:]
rank = int(os.environ["RANK"])
def say(line):
    os.write(1, (line + chr(10)).encode())  # at once: ranks share the output, and print may write the line and its end apart
agreement.WAIT_SECONDS, agreement._GRACE_SECONDS = 60.0, 20.0
group = "nogroup" not in what
if group:
    dist.init_process_group("gloo")
if "dead" in what:
    agreement.WAIT_SECONDS = 2.0
    if rank == 1:
        time.sleep(8)
        os._exit(0)
options = {"seed": rank if "seed" in what else 7, "order": "block" if "order" in what and rank else "global"}
if "argument" in what:
    options |= {"rank": rank, "world_size": 3}
else:
    options["distributed"] = True
loader = js.create_loader(other if "data" in what and rank == 2 else data, "train", 4, **options)
try:
    served = sum(len(batch["relevance"]) for batch in loader)
    checks = next(agreement._CHECKS)
    js.set_epoch(loader, 1)
    served += sum(len(batch["relevance"]) for batch in loader)
    say(f"rank {rank} served {served}; checks {checks} {next(agreement._CHECKS)}")
except js.errors.RankError as exc:
    say(f"rank {rank} refused: {exc}")
if group and "dead" not in what:
    dist.barrier()
    dist.destroy_process_group()
else:
    time.sleep(1)
    os._exit(0)
"""


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    folder = tmp_path_factory.mktemp("agree")
    (folder / "program.py").write_text(PROGRAM)
    same: dict[str, Any] = {"n_pairs": 90, "dim": 4}
    return (
        folder / "program.py",
        build_pt_dataset(folder / "a", **same),
        build_pt_dataset(folder / "b", **same, n_neg=2),
    )


def run(places: tuple[Path, Path, Path], what: str, ranks: int = 3) -> list[str]:
    """Each rank's line, in order."""
    code, data, other = places
    arguments = ("--standalone", f"--nproc-per-node={ranks}", code, what, data, other)
    environ = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "0"}
    output = Torchrun(code.parent / "watch", *arguments, watched=False, **environ).wait(timeout=120)
    return sorted(re.findall(r"^rank \d .*$", output, re.MULTILINE))


@linux
@pytest.mark.parametrize("what", ["alike", pytest.param("alike nogroup", marks=pytest.mark.slow)])
def test_ranks_that_agree_compare_once(places: tuple[Path, Path, Path], what: str) -> None:
    lines = run(places, what)
    # The counter's own next numbers: one check was made before the first epoch, none before the second.
    assert [line.partition("; ")[2] for line in lines] == ["checks 1 2"] * 3
    assert {line.split()[2] for line in lines} == {"served"}


@linux
@pytest.mark.parametrize(
    ("what", "why"),
    [
        ("seed", r"seed: 0 on rank 0, 1 on rank 1, 2 on rank 2"),
        pytest.param(
            "data",
            r"fields, shapes or rows of the split: [0-9a-f]+ on ranks 0, 1, [0-9a-f]+ on rank 2",
            marks=pytest.mark.slow,
        ),
        pytest.param("seed nogroup", r"seed: 0 on rank 0, 1 on rank 1, 2 on rank 2", marks=pytest.mark.slow),
        pytest.param("order", r"order: global on rank 0, block \d+ x \d+ on ranks 1, 2", marks=pytest.mark.slow),
    ],
)
def test_what_differs_is_said_on_every_rank(places: tuple[Path, Path, Path], what: str, why: str) -> None:
    lines = run(places, what)
    assert len(lines) == 3
    for rank, line in enumerate(lines):
        assert line.startswith(
            f"rank {rank} refused: rank {rank} of 3: ranks would not serve the same epoch; they differ in "
        )
        assert re.search(why, line)


@linux
def test_a_rank_that_died_is_named_and_not_waited_for(places: tuple[Path, Path, Path]) -> None:
    lines = run(places, "dead")
    assert len(lines) == 2
    assert all("rank 1 did not reach the first batch within 2 s of rank 0" in line for line in lines)


@linux
@pytest.mark.slow
def test_ranks_that_are_given_are_not_compared(places: tuple[Path, Path, Path]) -> None:
    lines = run(places, "seed argument")
    assert ["served" in line and line.endswith("checks 0 1") for line in lines] == [True] * 3


FACTS: dict[str, Any] = {
    "samples": 9, "fingerprint": "f", "contents": "", "seed": 1, "order": "global", "epoch": 0, "consumed": 0, "batch_size": 2,
}  # fmt: skip


def said(**changes: Any) -> dict[str, str]:
    return {name: str(value) for name, value in (FACTS | changes).items()}


def test_what_one_rank_does_not_know_is_not_compared() -> None:
    assert not differences([said(contents="aa"), said(), said(contents="aa")])
    assert "recorded checksums of the tensors: aa on rank 0, bb on rank 2" in differences(
        [said(contents="aa"), said(), said(contents="bb")]
    )


def test_nothing_is_left_in_the_store(monkeypatch: pytest.MonkeyPatch) -> None:
    import threading

    store = dist.HashStore()  # type: ignore[attr-defined]
    checks = iter([5, 5, 6, 6])
    monkeypatch.setattr(agreement, "_CHECKS", checks)
    before = store.num_keys()
    threads = [threading.Thread(target=compare_ranks, args=(store, Ranks(rank, 2, "", True), FACTS)) for rank in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert store.num_keys() == before


def test_a_store_that_fails_is_named() -> None:
    class Broken:
        def set(self, key: str, value: str) -> None:
            raise RuntimeError("Connection reset by peer")

    with pytest.raises(RankError, match=r"rank 1 of 2: the store .* does not answer \(Connection reset"):
        compare_ranks(Broken(), Ranks(1, 2, "", True), FACTS)


def test_one_process_and_given_ranks_have_no_store(monkeypatch: pytest.MonkeyPatch) -> None:
    assert shared_store(Ranks()) is None
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    assert shared_store(Ranks(0, 2, "from the arguments")) is None
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with pytest.raises(RankError, match="MASTER_ADDR"):
        shared_store(Ranks(0, 2, "from RANK and WORLD_SIZE", True))
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "False")
    assert shared_store(Ranks(0, 2, "from RANK and WORLD_SIZE", True)) is None


def test_equal_copies_have_equal_contents(tmp_path: Path) -> None:
    data = build_pt_dataset(tmp_path / "data", n_pairs=40, dim=4)
    for format_ in ("safetensors", "hdf5"):
        js.convert(data, tmp_path / format_, format_)
    copies = [js.JASPERSteeringDataset(tmp_path / name, "train") for name in ("safetensors", "hdf5")]
    assert copies[0].contents() == copies[1].contents() != ""
    assert js.JASPERSteeringDataset(data, "train").contents() == ""
