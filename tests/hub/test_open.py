"""Datasets of the Hub, opened where they were downloaded to."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import jasper_store as js
from jasper_store.errors import (
    CorruptFileError,
    DatasetNotFoundError,
    HubError,
    IncompatibleOptionsError,
    UnknownNameError,
)
from jasper_store.files import hub as hub_module
from jasper_store.files.hub import HubPath, is_hub_path, local_path
from tests.cli.conftest import Run
from tests.hub.conftest import constants
from tests.hub.server import TOKEN, StandIn


def _tree(root: Path) -> dict[str, bytes]:
    """Every file and link below a directory, with what it holds or points to."""
    return {
        str(path.relative_to(root)): str(path.readlink()).encode() if path.is_symlink() else path.read_bytes()
        for path in sorted(root.rglob("*"))
        if path.is_symlink() or path.is_file()
    }


@pytest.mark.parametrize(
    ("text", "repo", "revision"),
    [
        ("hf://owner/name", "owner/name", None),
        ("hf:/owner/name", "owner/name", None),
        ("hf://datasets/owner/na.me_2-x/", "owner/na.me_2-x", None),
        ("hf://owner/name@refs/pr/3", "owner/name", "refs/pr/3"),
        ("owner/name@v1.0", "owner/name", "v1.0"),
    ],
)
def test_paths_of_the_hub(text: str, repo: str, revision: str | None) -> None:
    assert HubPath.parse(text) == HubPath(repo, revision)


def test_other_paths_are_left_alone() -> None:
    for path in ("data", "/data/hf:/x", "hf", "./hf:", Path("x")):
        assert not is_hub_path(path)
        assert local_path(path) == Path(path)


def test_bytes_are_those_that_were_pushed(pushed: str, data: Path) -> None:
    with js.open(pushed, use_mmap=True) as there, js.open(data, use_mmap=True) as here:
        assert set(there) == set(here)
        for name in here:
            assert torch.equal(there[name].tensor(), here[name].tensor())
            assert there[name].placement == "mmap"


def test_mapped_in_the_cache_and_not_copied(pushed: str, cache: Path) -> None:
    with js.open(pushed, use_mmap=True) as store:
        path = store["source_embs"].path
        assert path.is_symlink()
        assert path.is_relative_to(cache)
        maps = Path("/proc/self/maps")
        if maps.exists():
            assert str(path.resolve()) in maps.read_text()


def test_every_entry_takes_it(pushed: str) -> None:
    with js.JASPERSteeringDataset(pushed, "train") as dataset:
        assert len(dataset) == 84
        with pickle.loads(pickle.dumps(dataset)) as again:
            assert torch.equal(again[3]["question_emb"], dataset[3]["question_emb"])
    splits = js.JASPERSteeringDataset.create_combined_splits(pushed)
    assert set(splits) == {"train", "val", "test"}
    for split in splits.values():
        split.close()
    with js.Dataset(pushed, {"q": "question_embs[i]"}) as generic:
        assert len(generic) == 40
    loader = js.create_loader(pushed, "train", batch_size=16)
    assert next(iter(loader))["negative_embs"].shape == (16, 3, 16)
    loader.dataset_obj.close()
    assert "source_embs" in str(js.plan(pushed))
    assert js.verify(pushed).ok
    assert [row.name for row in js.warm_up(pushed, ["source_embs"]).tensors] == ["source_embs"]


def test_a_second_opening_downloads_nothing(hub: StandIn, pushed: str) -> None:
    for _ in range(2):
        js.open(pushed).close()
        served = len(hub.downloads)
    js.open(pushed).close()
    assert len(hub.downloads) == served


def test_a_revision(hub: StandIn, data: Path, tmp_path: Path) -> None:
    first = js.push(data, "owner/name")
    js.convert(data, tmp_path / "npy", format="npy")
    js.push(tmp_path / "npy", "owner/name")
    with js.open(f"hf://owner/name@{first.commit}") as old, js.open("hf://owner/name") as new:
        assert old["question_embs"].path.suffix == ".safetensors"
        assert new["question_embs"].path.suffix == ".npy"


def test_private_data_with_a_token(hub: StandIn, data: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    js.push(data, "owner/secret", private=True)
    js.open("hf://owner/secret").close()
    monkeypatch.delenv("HF_TOKEN")
    shutil.rmtree(cache)
    with pytest.raises(DatasetNotFoundError, match=r"private.*HF_TOKEN"):
        js.open("hf://owner/secret")


# ---- the cache


def test_opening_changes_no_file_of_the_cache_but_the_manifest(pushed: str, cache: Path) -> None:
    snapshot = local_path(pushed)
    before = _tree(cache)
    with js.JASPERSteeringDataset(pushed, "train"):
        pass
    js.verify(pushed)
    changed = {name for name in {*before, *_tree(cache)} if before.get(name) != _tree(cache).get(name)}
    assert changed <= {str((snapshot / "jasper_store.json").relative_to(cache))}


def test_a_cache_that_cannot_be_written(pushed: str, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot = local_path(pushed)
    before = _tree(cache)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    for path in (snapshot, snapshot.parent):
        path.chmod(0o555)
    try:
        with js.JASPERSteeringDataset(pushed, "train", use_mmap=True) as dataset:
            assert dataset[0]["question_emb"].shape == (16,)
        if os.geteuid() != 0:
            assert _tree(cache) == before
    finally:
        for path in (snapshot.parent, snapshot):
            path.chmod(0o755)


def test_a_damaged_file_of_the_cache_is_refused(pushed: str) -> None:
    path = local_path(pushed) / "source_embs.safetensors"
    target = path.resolve()
    target.write_bytes(target.read_bytes()[:-8])
    with pytest.raises(CorruptFileError, match="truncated"):
        js.open(pushed)


# ---- without a network


def test_offline_with_what_the_cache_holds(pushed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    js.open(pushed).close()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with js.open(pushed) as store:
        assert "source_embs" in store
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with js.open(pushed) as store:
        assert "source_embs" in store


def test_offline_without(pushed: str, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(HubError, match="HF_HUB_OFFLINE"):
        js.open(pushed)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(HubError, match="cannot be reached"):
        js.open(pushed)


# ---- refused


def test_no_such_dataset(hub: StandIn) -> None:
    with pytest.raises(DatasetNotFoundError, match="no such dataset"):
        js.open("hf://owner/nothing")


def test_no_such_revision(pushed: str) -> None:
    with pytest.raises(UnknownNameError, match="'v9'"):
        js.open(f"{pushed}@v9")


@pytest.mark.parametrize(
    "path", ["hf://name", "hf://", "hf://owner/name/file.npy", "hf://owner/a b", "hf://o/..", "hf://o/n@"]
)
def test_a_wrong_path(hub: StandIn, path: str) -> None:
    with pytest.raises(IncompatibleOptionsError, match="expected a dataset of the Hub as"):
        js.open(path)


def test_a_download_that_is_too_short(hub: StandIn, pushed: str) -> None:
    hub.shortened = 100
    with pytest.raises(HubError, match="run again"):
        js.open(pushed)
    hub.shortened = 0
    assert js.verify(pushed).ok


def test_what_writes_refuses_it(hub: StandIn, pushed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for write in (
        lambda: js.DatasetWriter(pushed),
        lambda: js.commit(pushed),
        lambda: js.compact(pushed),
        lambda: js.convert(pushed),
        lambda: js.convert(tmp_path / "data", pushed),
    ):
        with pytest.raises(IncompatibleOptionsError, match="only read"):
            write()
    assert not (tmp_path / "hf:").exists()
    assert js.convert(pushed, tmp_path / "npy", format="npy").tensors


def test_options_are_checked_before_a_download(hub: StandIn, pushed: str) -> None:
    with pytest.raises(IncompatibleOptionsError, match="memory_limit"):
        js.open(pushed, memory_limit="much")
    assert not hub.downloads


def test_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> Any:
        raise ImportError(name)

    monkeypatch.setattr(hub_module, "import_module", missing)
    with pytest.raises(IncompatibleOptionsError, match=r"pip install 'jasper_store\[hub\]'"):
        js.open("hf://owner/name")


# ---- as commands


@pytest.mark.parametrize("command", [("inspect",), ("plan",), ("warm",), ("report", "--no-verify")])
def test_commands(pushed: str, run_json: Callable[..., Any], command: tuple[str, ...]) -> None:
    assert "source_embs" in json.dumps(run_json(command[0], pushed, *command[1:]))


def test_the_command_that_verifies(pushed: str, run_json: Callable[..., Any]) -> None:
    found = run_json("verify", pushed)
    assert found["ok"]
    assert any(fact["check"] == "checksum" for fact in found["facts"])


def test_a_command_on_what_is_not_there(hub: StandIn, refused: Callable[..., str]) -> None:
    assert "no such dataset" in refused(3, "inspect", "hf://owner/nothing")
    assert "expected a dataset of the Hub" in refused(2, "plan", "hf://name")


def test_convert_from_the_hub(pushed: str, run: Run, tmp_path: Path) -> None:
    assert run("convert", pushed, tmp_path / "out").exit_code == 0
    assert js.verify(tmp_path / "out").ok


def test_in_a_process_of_its_own(hub: StandIn, data: Path, tmp_path: Path) -> None:
    """As users set it: by the environment, with nothing patched."""
    script = (
        "import sys, jasper_store as js\n"
        "js.push(sys.argv[1], 'owner/name')\n"
        "loader = js.create_loader('hf://owner/name', 'train', batch_size=8, num_workers=1)\n"
        "print(sum(len(batch['relevance']) for batch in loader))\n"
    )
    env = os.environ | {
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(tmp_path / "home"),
        "HF_HUB_DISABLE_XET": "1",
        "HF_TOKEN": TOKEN,
    }
    done = subprocess.run(
        [sys.executable, "-c", script, str(data)], env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["80"]
