"""``mine_negatives``: into a dataset of any format, whole or not at all, found again, and taken by a running loader."""

from __future__ import annotations

import copy
import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

import jasper_store as js
from jasper_store.errors import (
    ConversionError,
    DatasetNotFoundError,
    IncompatibleOptionsError,
    InsufficientMemoryError,
    IntegrityError,
)
from jasper_store.formats.generation import read_generation
from tests.builders import build_pt_dataset
from tests.building.raw import values

NEGATIVES = ("hard_negatives", "negative_tiers")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    build_pt_dataset(tmp_path / "pt")
    js.convert(tmp_path / "pt", tmp_path / "data")
    shutil.rmtree(tmp_path / "pt")
    return tmp_path / "data"


def files(path: Path) -> dict[str, bytes]:
    """Every file but the manifest, in which readers note what they have checked."""
    return {
        each.name: each.read_bytes()
        for each in path.iterdir()
        if each.name[0] != "." and each.name != "jasper_store.json"
    }


@pytest.mark.filterwarnings("ignore:use_mmap=True")
@pytest.mark.parametrize("format", ["safetensors", "npy", "hdf5", "pt"])
def test_in_every_format(data: Path, tmp_path: Path, format: str) -> None:  # noqa: A002
    path = tmp_path / format if format != "safetensors" else data
    if path != data:
        js.convert(data, path, format=format, compression="gzip" if format == "hdf5" else None)
    before = values(path)
    report = js.mine_negatives(path, similarities=True)
    after = values(path)
    assert report.n_pairs == len(before["pair_index"])
    assert after["hard_negatives"].shape == before["hard_negatives"].shape
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items() if name not in NEGATIVES)
    pairs = after["pair_index"]
    assert not (after["hard_negatives"] == pairs[:, 1:]).any()
    questions, sources = (
        torch.nn.functional.normalize(after[name].double(), dim=1) for name in ("question_embs", "source_embs")
    )
    cosines = (questions[pairs[:, 0]][:, None] * sources[after["hard_negatives"]]).sum(dim=2)
    assert after["negative_similarities"].double() == pytest.approx(cosines, abs=1e-6)
    cosines = (questions[pairs[:, 0]] * sources[pairs[:, 1]]).sum(dim=1)
    assert after["positive_similarities"].double() == pytest.approx(cosines, abs=1e-6)
    assert js.verify(path).ok
    if format == "hdf5":
        with js.open(path) as store:
            assert all(
                "gzip" in getattr(store[name].spec.location, "filters", ())
                for name in ("hard_negatives", "source_embs")
            )
    assert not [each.name for each in tmp_path.iterdir() if each.name.startswith(".")]
    assert json.loads(json.dumps(report.to_dict()))["kinds"] == report.kinds


def test_the_same_call_is_found_done(data: Path) -> None:
    first = js.mine_negatives(data, seed=3)
    before = files(data)
    again = js.mine_negatives(data, seed=3)
    assert again.existed
    assert "up to date" in str(again)
    assert files(data) == before
    assert (again.key, again.counts, again.kinds) == (first.key, first.counts, first.kinds)
    assert not js.mine_negatives(data, seed=3, force=True).existed
    assert not js.mine_negatives(data, seed=4).existed
    assert not js.mine_negatives(data, seed=4, similarities=True).existed
    # Tensors that are there stay those of the negatives.
    assert not js.mine_negatives(data, 3).existed
    assert values(data)["negative_similarities"].shape[1] == 3


def test_teachers_numbers_are_fields_of_a_sample(data: Path) -> None:
    js.mine_negatives(data, n_neg=3, similarities=True)
    fields = {
        "_pair": "train_idx[i]",
        "question": "question_embs[pair_index[_pair, 0]]",
        "negatives": "source_embs[hard_negatives[_pair]]",
        "teacher": "negative_similarities[_pair]",
        "positive": "positive_similarities[_pair]",
    }
    with js.Dataset(data, fields) as dataset:
        batch = next(iter(js.create_loader(dataset, batch_size=8, shuffle=False)))
        rows = dataset.store["train_idx"].tensor()[:8]
        assert torch.equal(batch["positive"], dataset.store["positive_similarities"].tensor()[rows])
    assert batch["teacher"].shape == (8, 3)
    cosines = torch.cosine_similarity(batch["question"][:, None].double(), batch["negatives"].double(), dim=2)
    assert batch["teacher"].double() == pytest.approx(cosines, abs=1e-6)


@pytest.mark.parametrize("name", ["question_embs", "hard_negatives"])
def test_other_content_is_no_result_of_this_one(data: Path, tmp_path: Path, name: str) -> None:
    js.mine_negatives(data)
    mined = values(data)
    changed = mined[name].clone()
    changed[0] = changed[1]
    with js.DatasetWriter(tmp_path / "new") as writer:
        writer.append(name, changed)
    js.convert(tmp_path / "new", data, overwrite=True, tensors=[name])
    report = js.mine_negatives(data)
    assert not report.existed
    if name == "hard_negatives":
        assert torch.equal(values(data)[name], mined[name])


def test_another_number_of_negatives(data: Path) -> None:
    js.mine_negatives(data, n_neg=2)
    assert json.loads((data / "config.json").read_text())["n_neg"] == 2
    assert js.verify(data).ok
    with js.JASPERSteeringDataset(data, "train") as dataset:
        assert dataset.n_neg == 2
        assert js.validate_first_batch(js.create_loader(dataset, batch_size=4))
    assert js.mine_negatives(data).settings["n_neg"] == 2


def test_a_running_loader_takes_them(data: Path) -> None:
    js.mine_negatives(data, seed=1)
    with js.JASPERSteeringDataset(data, "train", use_mmap=True) as dataset:
        loader = js.create_loader(dataset, batch_size=8, shuffle=False)
        before = [batch["negative_embs"].clone() for batch in loader]
        js.mine_negatives(data, seed=2)
        between = [batch["negative_embs"].clone() for batch in loader]
        dataset.reload_negatives()
        after = [batch["negative_embs"].clone() for batch in loader]
    assert all(torch.equal(one, other) for one, other in zip(before, between, strict=True))
    assert not all(torch.equal(one, other) for one, other in zip(before, after, strict=True))


def test_a_build_does_not_take_it_for_its_own(tmp_path: Path) -> None:
    from tests.building.raw import raw

    js.build(tmp_path / "set", **raw())
    js.mine_negatives(tmp_path / "set", seed=9)
    with pytest.raises(ConversionError):
        js.build(tmp_path / "set", **raw())
    assert not js.build(tmp_path / "set", **raw(), overwrite=True).existed


# ---- what is refused


def test_what_cannot_be_mined(data: Path, tmp_path: Path) -> None:
    before = files(data)
    with pytest.raises(DatasetNotFoundError, match="expected a dataset's directory"):
        js.mine_negatives(tmp_path / "none")
    with js.DatasetWriter(tmp_path / "other") as writer:
        writer.append("question_embs", torch.ones(3, 2))
    with pytest.raises(DatasetNotFoundError, match="source_embs, pair_index"):
        js.mine_negatives(tmp_path / "other")
    with pytest.raises(InsufficientMemoryError, match="memory_limit"):
        js.mine_negatives(data, memory_limit="1MiB")
    with pytest.raises(IntegrityError, match="more sources than"):
        js.mine_negatives(data, n_neg=100_000)
    with pytest.raises(IncompatibleOptionsError, match="relative_margin"):
        js.mine_negatives(data, relative_margin=3)
    js.pack(data, tmp_path / "packed")
    with pytest.raises(IncompatibleOptionsError, match="packed"):
        js.mine_negatives(tmp_path / "packed")
    assert files(data) == before


# ---- a dataset in parts


def in_parts(data: Path) -> Path:
    """The dataset with its first 20 pairs once more, and their questions and sources as new rows."""
    with js.open(data) as store:
        first = {name: store[name].tensor()[:20].clone() for name in store}
        rows = torch.tensor([len(store["question_embs"]), len(store["source_embs"])])
        many = {name for name in store if len(store[name]) == len(store["pair_index"])}
        first["pair_index"] = torch.arange(20)[:, None] + rows
    config = json.loads((data / "config.json").read_text())
    (data / "config.json").write_text(json.dumps({key: value for key, value in config.items() if key != "split_sizes"}))
    with js.DatasetWriter(data, mode="append") as writer:
        for name in sorted(many | {"question_embs", "source_embs"}):
            if "pair_keyword_ids" not in name:
                writer.append(name, first[name])
        writer.append_ragged("pair_keyword_ids", [torch.tensor([0, 1])] * 20)
    return data


def test_a_dataset_in_parts_gets_the_next_generation(data: Path, tmp_path: Path) -> None:
    in_parts(data)
    js.convert(data, tmp_path / "whole")
    js.mine_negatives(tmp_path / "whole", similarities=True)
    wanted = values(tmp_path / "whole")
    with js.JASPERSteeringDataset(data, "train", use_mmap=True) as dataset:
        loader = js.create_loader(dataset, batch_size=8, shuffle=False)
        before = [batch["negative_embs"].clone() for batch in loader]
        js.mine_negatives(data, similarities=True)
        between = [batch["negative_embs"].clone() for batch in loader]
        dataset.reload_negatives()
        after = [batch["negative_embs"].clone() for batch in loader]
    assert all(torch.equal(one, other) for one, other in zip(before, between, strict=True))
    assert not all(torch.equal(one, other) for one, other in zip(before, after, strict=True))
    generation = read_generation(data)
    assert generation is not None
    assert generation.number == 2
    found = values(data)
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())
    assert js.verify(data).ok
    assert js.mine_negatives(data, similarities=True).existed
    js.mine_negatives(data, seed=9)
    js.compact(data, remove_old=True)
    assert js.mine_negatives(data, seed=9).existed
    assert js.verify(data).ok
    assert [path.name for path in data.iterdir() if path.name[0] == "."] == []


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_workers_of_a_dataset_in_parts_begin_with_what_was_reloaded(data: Path, context: str) -> None:
    in_parts(data)
    with js.JASPERSteeringDataset(data, "train", use_mmap=True) as opened:
        js.mine_negatives(data, seed=7)
        opened.reload_negatives()
        dataset = copy.deepcopy(opened)
        batches = {
            workers: [
                batch["negative_embs"].clone()
                for batch in js.create_loader(
                    dataset,
                    batch_size=8,
                    shuffle=False,
                    num_workers=workers,
                    multiprocessing_context=context if workers else None,
                )
            ]
            for workers in (0, 1)
        }
    assert all(torch.equal(one, other) for one, other in zip(batches[0], batches[1], strict=True))
    with js.JASPERSteeringDataset(data, "train", use_mmap=True) as dataset:
        fresh = [b["negative_embs"] for b in js.create_loader(dataset, batch_size=8, shuffle=False)]
    assert all(torch.equal(one, other) for one, other in zip(batches[0], fresh, strict=True))


def test_parts_keep_the_shape_of_their_rows(data: Path) -> None:
    in_parts(data)
    with pytest.raises(IncompatibleOptionsError, match=r"n_neg=7: .* in parts, which keep the shape"):
        js.mine_negatives(data, 7)
    generation = read_generation(data)
    assert generation is not None
    assert generation.number == 1


def test_a_dataset_in_parts_is_cut_before_it_is_published(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from jasper_store.conversion import rewrite

    class Cut(BaseException):
        pass

    def cut(*_: Any, **__: Any) -> None:
        raise Cut

    in_parts(data)
    before = values(data)
    with monkeypatch.context() as patch:
        patch.setattr(rewrite, "publish", cut)
        with pytest.raises(Cut):
            js.mine_negatives(data, seed=3)
    assert js.verify(data).ok
    assert all(torch.equal(tensor, before[key]) for key, tensor in values(data).items())
    assert not js.mine_negatives(data, seed=3).existed
    assert js.mine_negatives(data, seed=3).existed


# ---- failures


def test_a_failure_while_writing_leaves_all_as_it_was(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from jasper_store.building import negatives

    before = files(data)

    def fails(*_: Any, **__: Any) -> None:
        raise ConversionError("no room")

    with monkeypatch.context() as patch:
        patch.setattr(negatives, "convert", fails)
        with pytest.raises(ConversionError, match="no room"):
            js.mine_negatives(data)
    assert files(data) == before
    js.mine_negatives(data)
    assert js.verify(data).ok


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_killed_while_writing(data: Path, tmp_path: Path) -> None:
    from jasper_store.conversion import run

    shutil.copytree(data, tmp_path / "same" / "data")
    js.mine_negatives(tmp_path / "same" / "data")
    wanted = values(tmp_path / "same" / "data")
    before = files(data)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    pid = os.fork()
    if pid == 0:
        setattr(run, "exchanged", lambda *_: os.kill(os.getpid(), signal.SIGKILL))  # noqa: B010 - as its caller finds it
        try:
            js.mine_negatives(data)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
    torch.set_num_threads(threads)
    assert files(data) == before
    assert not js.mine_negatives(data).existed
    found = values(data)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert js.verify(data).ok
    assert sorted(each.name for each in tmp_path.iterdir()) == ["data", "same"]
