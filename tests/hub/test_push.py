"""A dataset sent to the Hub: whole, verified, in one commit, with its card."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

import jasper_store as js
from jasper_store.errors import (
    ConversionError,
    DatasetNotFoundError,
    HubError,
    IncompatibleOptionsError,
    IntegrityError,
)
from jasper_store.files.lock import LOCK_NAME, exclusive
from jasper_store.formats.generation import SHARDS
from jasper_store.hub.card import _category
from jasper_store.store.manifest import MANIFEST_NAME
from tests.builders import build_pt_dataset
from tests.cli.conftest import Run
from tests.hub.conftest import constants
from tests.hub.server import StandIn


def test_what_is_pushed_is_the_dataset(hub: StandIn, data: Path) -> None:
    report = js.push(data, "owner/name")
    repo = hub.repos["owner/name"]
    there = repo.files()
    for path in data.glob("*.safetensors"):
        assert there[path.name] == path.read_bytes()
    assert there["config.json"] == (data / "config.json").read_bytes()
    assert set(there) == {path.name for path in data.iterdir()} | {"README.md"}
    assert report.files == len(there)
    assert report.nbytes == sum(map(len, there.values()))
    assert report.commit == repo.branches["main"]
    assert report.commit in report.url
    assert len(repo.commits) == 2  # the first is empty: a reader sees nothing, or all
    assert not repo.private
    assert not (data / "README.md").exists()


def test_the_manifest_says_nothing_of_this_machine(hub: StandIn, data: Path) -> None:
    (data / MANIFEST_NAME).write_text((data / MANIFEST_NAME).read_text())
    assert "made_from" in (data / MANIFEST_NAME).read_text()
    js.push(data, "owner/name")
    pushed = json.loads(hub.repos["owner/name"].files()[MANIFEST_NAME])
    assert all(entry["made_from"] == [] for entry in pushed["files"].values())
    here = json.loads((data / MANIFEST_NAME).read_text())
    assert pushed["files"].keys() == here["files"].keys()
    for name, entry in pushed["files"].items():
        assert entry["tensors"] == here["files"][name]["tensors"]


def test_a_directory_without_a_manifest_gets_one(hub: StandIn, tmp_path: Path, cache: Path) -> None:
    plain = tmp_path / "plain"
    plain.mkdir()
    np.save(plain / "embeddings.npy", np.arange(4000, dtype=np.float32).reshape(1000, 4))
    js.push(plain, "owner/plain")
    entry = json.loads(hub.repos["owner/plain"].files()[MANIFEST_NAME])["files"]["embeddings.npy"]
    assert len(entry["tensors"]["embeddings"]["xxh3_128"]) == 32
    assert js.verify("hf://owner/plain").ok
    facts = [found.check for found in js.verify("hf://owner/plain").facts]
    assert "checksum" in facts


def test_the_card(hub: StandIn, data: Path) -> None:
    js.push(data, "owner/name")
    card = hub.repos["owner/name"].files()["README.md"].decode()
    head, body = card.removeprefix("---\n").split("\n---\n", 1)
    facts = {key: json.loads(value) for key, value in (line.split(": ", 1) for line in head.splitlines())}
    assert facts["license"] == "mit"
    assert facts["size_categories"] == ["n<1K"]
    assert "jasper-store" in facts["tags"]
    for words in (
        "| pairs | 120 |",
        "`source_embs[hard_negatives[row]]`",
        "| `question_embs` | float32 | 40 x 16 | 2.50 KiB |",
        'js.create_loader("hf://owner/name", "train", batch_size=256)',
        "| tier 0 |",
        "| residual |",
        "The margin",
    ):
        assert words in body, words
    assert str(data) not in card


def test_a_card_of_the_author_stays(hub: StandIn, data: Path) -> None:
    (data / "README.md").write_text("---\nlicense: mit\n---\nmine")
    js.push(data, "owner/name")
    assert hub.repos["owner/name"].files()["README.md"] == b"---\nlicense: mit\n---\nmine"


@pytest.mark.parametrize(
    ("rows", "category"),
    [(999, "n<1K"), (1000, "1K<n<10K"), (99_999, "10K<n<100K"), (2_000_000, "1M<n<10M"), (10**12, "n>1T")],
)
def test_categories_of_the_hub(rows: int, category: str) -> None:
    assert _category(rows) == category


def test_a_declared_dataset_has_its_declaration_on_the_card(hub: StandIn, tmp_path: Path) -> None:
    samples = {"fields": {"query": "embs[pairs[i, 0]]"}}
    with js.DatasetWriter(tmp_path / "triplets", samples=samples) as writer:
        writer.append("embs", torch.randn(30, 8))
        writer.append("pairs", torch.randint(30, (40, 2)))
    js.push(tmp_path / "triplets", "owner/triplets")
    card = hub.repos["owner/triplets"].files()["README.md"].decode()
    assert '"query": "embs[pairs[i, 0]]"' in card
    loader = js.create_loader("hf://owner/triplets", batch_size=8)
    assert next(iter(loader))["query"].shape == (8, 8)
    loader.dataset_obj.close()


def test_files_that_are_no_part_of_it_stay_here(hub: StandIn, data: Path) -> None:
    (data / "notes.txt").write_text("private")
    (data / ".env").write_text("SECRET=1")
    (data / "LICENSE").write_text("MIT")
    report = js.push(data, "owner/name")
    there = hub.repos["owner/name"].files()
    assert "LICENSE" in there
    assert not {"notes.txt", ".env"} & there.keys()
    assert report.left_out == ("notes.txt",)


def test_an_appended_dataset_is_pushed_with_its_parts(hub: StandIn, tmp_path: Path) -> None:
    path = tmp_path / "grown"
    with js.DatasetWriter(path) as writer:
        writer.append("embs", torch.ones(30, 8))
    with js.DatasetWriter(path, mode="append") as writer:
        writer.append("embs", torch.full((10, 8), 2.0))
    js.push(path, "owner/grown")
    with js.open("hf://owner/grown") as store:
        assert torch.equal(store["embs"][25:35], torch.cat((torch.ones(5, 8), torch.full((5, 8), 2.0))))


# ---- again


def test_pushed_again_nothing_is_sent(hub: StandIn, data: Path) -> None:
    first = js.push(data, "owner/name")
    sent = len(hub.uploads)
    second = js.push(data, "owner/name")
    assert len(hub.uploads) == sent
    assert second.commit == first.commit


def test_a_push_that_was_cut_goes_on(hub: StandIn, data: Path) -> None:
    hub.uploads_left = 3
    with pytest.raises(HubError, match="400"):
        js.push(data, "owner/name")
    assert hub.repos["owner/name"].files() == {}
    sent = list(hub.uploads)
    assert len(sent) == 3
    hub.uploads_left = None
    js.push(data, "owner/name")
    assert len(hub.uploads) == len(set(hub.uploads))
    assert js.verify("hf://owner/name").ok


def test_another_format_replaces_the_files(hub: StandIn, data: Path, tmp_path: Path) -> None:
    js.push(data, "owner/name")
    hub.repos["owner/name"].commit(
        "main", hub.repos["owner/name"].commits[hub.repos["owner/name"].branches["main"]], "x"
    )
    js.convert(data, tmp_path / "npy", format="npy")
    report = js.push(tmp_path / "npy", "owner/name")
    there = hub.repos["owner/name"].files()
    assert not [name for name in there if name.endswith(".safetensors")]
    assert "question_embs.npy" in there
    assert "question_embs.safetensors" in report.removed


def test_private_and_another_branch(hub: StandIn, data: Path) -> None:
    report = js.push(data, "owner/name@draft", private=True, message="second try")
    repo = hub.repos["owner/name"]
    assert repo.private
    assert repo.files("main") == {}
    assert "config.json" in repo.files("draft")
    assert repo.messages[-1] == "second try"
    assert report.revision == "draft"
    js.push(data, "owner/name", revision="v2")
    assert "config.json" in repo.files("v2")
    with pytest.raises(IncompatibleOptionsError, match="pass one"):
        js.push(data, "owner/name@draft", revision="v2")


# ---- refused


def _damaged(data: Path) -> None:
    path = data / "question_embs.safetensors"
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)


def _out_of_bounds(data: Path) -> None:
    for path in (data / "pair_index.safetensors", data / MANIFEST_NAME):
        path.unlink()
    torch.save(torch.full((120, 2), 999), data / "pair_index.pt")


@pytest.mark.parametrize("spoil", [_damaged, _out_of_bounds])
def test_what_does_not_verify_is_refused(hub: StandIn, data: Path, spoil: Callable[[Path], None]) -> None:
    spoil(data)
    with pytest.raises(IntegrityError, match="verifies"):
        js.push(data, "owner/name")
    assert not hub.repos


def test_what_is_being_written_is_refused(hub: StandIn, data: Path) -> None:
    with exclusive(data / LOCK_NAME, "converting"), pytest.raises(ConversionError, match="only writer"):
        js.push(data, "owner/name")
    (data / SHARDS).mkdir()
    with pytest.raises(ConversionError, match="shards that are not committed"):
        js.push(data, "owner/name")
    (data / SHARDS).rmdir()
    (data / ".question_embs.safetensors.1-00000000.tmp").touch()
    with pytest.raises(ConversionError, match="not finished"):
        js.push(data, "owner/name")
    assert not hub.repos


def test_what_changes_meanwhile_is_not_published(hub: StandIn, data: Path) -> None:
    def step(what: str, done: int, total: int | None) -> None:
        if what == "uploaded":
            _damaged(data)

    with pytest.raises(ConversionError, match="changed while"):
        js.push(data, "owner/name", step=step)
    assert hub.repos["owner/name"].files() == {}


@pytest.mark.parametrize(
    "name", ["name", "owner/name/more", "owner/na me", "/name", "owner/", "ow--ner/name", "owner/n@", ""]
)
def test_a_wrong_name(hub: StandIn, data: Path, name: str) -> None:
    with pytest.raises(IncompatibleOptionsError, match="hf://owner/name"):
        js.push(data, name)
    assert not hub.repos


def test_no_directory(hub: StandIn, data: Path) -> None:
    with pytest.raises(DatasetNotFoundError, match="nothing of that name"):
        js.push(data / "nothing", "owner/name")
    with pytest.raises(IncompatibleOptionsError, match="push its directory"):
        js.push(data / "config.json", "owner/name")
    with pytest.raises(IncompatibleOptionsError, match="dataset of the Hub"):
        js.push("hf://owner/name", "owner/name")


def test_without_a_token(hub: StandIn, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(HubError, match="hf auth login"):
        js.push(data, "owner/name")
    with pytest.raises(HubError, match="hf auth login"):
        js.push(data, "owner/name", token="wrong")


def test_no_hub(hub: StandIn, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(HubError, match="cannot be reached"):
        js.push(data, "owner/name")


def test_nothing_is_left_here(hub: StandIn, data: Path) -> None:
    before = {path.name for path in data.iterdir()}
    js.push(data, "owner/name")
    assert {path.name for path in data.iterdir()} == before


# ---- as a command


def test_the_command(hub: StandIn, data: Path, run: Run) -> None:
    result = run("push", data, "owner/name", "--private", "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["repo"] == "owner/name"
    assert hub.repos["owner/name"].private
    said = run("push", data, "owner/name").stdout
    assert "hf://owner/name: " in said
    assert hub.url in said


def test_the_command_without_a_token(
    hub: StandIn, data: Path, refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_TOKEN")
    assert "HF_TOKEN" in refused(7, "push", data, "owner/name")


def test_a_directory_of_pt_files(hub: StandIn, tmp_path: Path) -> None:
    js.push(build_pt_dataset(tmp_path / "pt"), "owner/pt")
    assert js.verify("hf://owner/pt").ok
