"""create_loader in one process: options, epochs, orders, states, and what the loader says about itself."""

from __future__ import annotations

import inspect
import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import ConcatDataset, DataLoader, DistributedSampler, Subset

import jasper_store as js
from jasper_store.errors import (
    DatasetNotFoundError,
    IncompatibleOptionsError,
    JasperStoreWarning,
    UnknownNameError,
)
from jasper_store.jasper import loader as loader_module
from jasper_store.jasper.dataset import JASPERSteeringDataset
from jasper_store.jasper.loader import create_loader
from jasper_store.loading.device import to_device
from jasper_store.loading.epochs import set_epoch
from jasper_store.loading.loader import Loader
from jasper_store.loading.order import order
from jasper_store.loading.samplers import EpochSampler
from tests.builders import build_pt_dataset
from tests.jasper.fakes import Numbers, as_is

N_PAIRS, N_TRAIN, N_VAL = 120, 84, 18


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_pt_dataset(tmp_path_factory.mktemp("loader") / "data", n_pairs=N_PAIRS)


def relevance(loader: Any) -> list[float]:
    return [float(value) for batch in loader for value in batch["relevance"]]


def test_the_signature_is_the_one_promised() -> None:
    parameters = inspect.signature(create_loader).parameters
    assert list(parameters)[:8] == [
        "dataset", "split", "batch_size", "num_workers", "distributed", "epoch", "drop_last", "pin_memory",
    ]  # fmt: skip
    for name in ("storage_format", "use_mmap", "device", "memory_limit", "seed", "order", "padding"):
        assert parameters[name].kind is inspect.Parameter.KEYWORD_ONLY
    assert parameters["seed"].default is None, "42, or that of the dataset"


def test_training_shuffles_and_drops_the_last_batch(data: Path) -> None:
    loader = create_loader(data, "train", 16)
    assert isinstance(loader, DataLoader)
    assert isinstance(loader.dataset_obj, JASPERSteeringDataset)
    assert isinstance(loader.sampler_obj, DistributedSampler)
    assert loader.dataset is loader.dataset_obj
    assert loader.sampler is loader.sampler_obj
    assert loader.batch_size == 16
    assert loader.drop_last
    batches = list(loader)
    assert len(batches) == len(loader) == N_TRAIN // 16
    assert type(batches[0]) is dict
    assert batches[0]["question_emb"].shape == (16, 16)
    wanted = loader.dataset_obj.__getitems__(order(N_TRAIN, 42, 0)[:16]).tensors  # type: ignore[attr-defined]
    assert all(torch.equal(batches[0][key], wanted[key]) for key in wanted)


def test_validation_does_neither(data: Path) -> None:
    loader = create_loader(data, "val", 16)
    dataset = JASPERSteeringDataset(data, "val")
    assert relevance(loader) == [float(sample["relevance"]) for sample in (dataset[i] for i in range(N_VAL))]
    assert loader.order == "sequential"
    assert relevance(create_loader(data, "train", 16, drop_last=False)) != relevance(
        create_loader(data, "train", 16, drop_last=False, epoch=1)
    )
    assert len(create_loader(data, "val", 16, drop_last=True)) == 1


def test_epochs_move_together(data: Path) -> None:
    loader = create_loader(data, "train", 16, epoch=3)
    assert (loader.dataset_obj.epoch, loader.sampler_obj.epoch) == (3, 3)
    before = relevance(loader)
    set_epoch(loader, 4)
    assert (loader.dataset_obj.epoch, loader.sampler_obj.epoch) == (4, 4)
    assert relevance(loader) != before
    set_epoch(loader, 3)
    assert relevance(loader) == before
    # Trainers tell only the sampler.
    loader.sampler_obj.set_epoch(7)
    assert loader.dataset_obj.epoch == 7


def test_set_epoch_sees_through_wrappers(data: Path) -> None:
    class Wrapped:
        def __init__(self, dataloader: Any) -> None:
            self._dataloader = dataloader

    loader = create_loader(data, "train", 16)
    for wrapped in (Wrapped(loader), to_device(loader, "cpu"), to_device(Wrapped(loader), "cpu")):
        epoch = loader.dataset_obj.epoch + 1
        set_epoch(wrapped, epoch)
        assert (loader.dataset_obj.epoch, loader.sampler_obj.epoch) == (epoch, epoch)


def test_set_epoch_moves_plain_loaders(data: Path) -> None:
    dataset, other = JASPERSteeringDataset(data, "train"), Numbers(5)
    for plain in (
        DataLoader(dataset, batch_size=4),
        DataLoader(Subset(dataset, [1, 2, 3])),
        DataLoader(ConcatDataset([other, Subset(dataset, [1])])),
    ):
        epoch = dataset.epoch + 1
        set_epoch(plain, epoch)
        assert dataset.epoch == epoch
    assert other.epoch == 3


def test_set_epoch_refuses_what_cannot_be(data: Path) -> None:
    loader = create_loader(data, "train", 16)
    for epoch in (-1, 1.5, True, "1"):
        with pytest.raises(IncompatibleOptionsError, match="epoch="):
            set_epoch(loader, epoch)  # type: ignore[arg-type]
    with pytest.raises(IncompatibleOptionsError, match="nothing in this DataLoader has an epoch"):
        set_epoch(DataLoader([1, 2]), 1)  # type: ignore[arg-type]


def test_a_second_pass_with_the_same_number_warns(data: Path) -> None:
    loader = create_loader(data, "train", 16)
    list(loader)
    with pytest.warns(JasperStoreWarning, match="set_epoch") as caught:
        list(loader)
    assert caught[0].filename == __file__


# --- options -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"split": "dev"}, UnknownNameError, "split 'dev'"),
        ({"order": "sorted"}, UnknownNameError, "order 'sorted'"),
        ({"padding": "zero"}, UnknownNameError, "padding 'zero'"),
        ({"storage_format": "csv"}, UnknownNameError, "csv"),
        ({"batch_size": 0}, IncompatibleOptionsError, "batch_size=0"),
        ({"batch_size": 2.5}, IncompatibleOptionsError, r"batch_size=2\.5"),
        ({"num_workers": -1}, IncompatibleOptionsError, "num_workers=-1"),
        ({"rank": 1}, IncompatibleOptionsError, "give both"),
        ({"rank": 2, "world_size": 2}, IncompatibleOptionsError, "rank 2 of world_size 2"),
        ({"sampler": [1]}, IncompatibleOptionsError, "takes no sampler="),
        ({"batch_sampler": [[1]]}, IncompatibleOptionsError, "takes no batch_sampler="),
        ({"prefetch_facto": 1}, UnknownNameError, "did you mean 'prefetch_factor'"),
        ({"colour": 1}, UnknownNameError, "DataLoader has"),
        ({"prefetch_factor": 2}, IncompatibleOptionsError, "needs workers"),
        ({"persistent_workers": True}, IncompatibleOptionsError, "needs workers"),
        ({"multiprocessing_context": "spawn"}, IncompatibleOptionsError, "needs workers"),
        ({"in_order": False}, IncompatibleOptionsError, "in_order=False"),
        ({"use_mmap": True, "pin_memory": True}, IncompatibleOptionsError, "pin_memory"),
        ({"use_mmap": True, "device": "cuda"}, IncompatibleOptionsError, "device"),
        ({"device": "cuda", "num_workers": 2}, IncompatibleOptionsError, "num_workers"),
        ({"device": "cuda", "pin_memory": True}, IncompatibleOptionsError, "pin_memory"),
        ({"device": "tpu"}, IncompatibleOptionsError, "tpu"),
    ],
)
def test_options_that_cannot_hold_are_refused_before_anything_is_opened(
    options: dict[str, Any], error: type[Exception], message: str, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if "storage_format" not in options:
        monkeypatch.setattr(loader_module, "JASPERSteeringDataset", None)
    with pytest.raises(error, match=message):
        create_loader(data, **{"split": "train", "batch_size": 4, **options})


def test_a_missing_directory_is_told_plainly(tmp_path: Path) -> None:
    with pytest.raises(DatasetNotFoundError):
        create_loader(tmp_path / "none", "train", 4)


def test_pinning_what_the_plan_maps_is_refused(data: Path) -> None:
    with pytest.raises(IncompatibleOptionsError, match="pin_memory"):
        create_loader(data, "train", 4, pin_memory=True, memory_limit=4000)


def test_a_dataset_is_closed_when_the_loader_cannot_be_made(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[JASPERSteeringDataset] = []

    class Watched(JASPERSteeringDataset):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            opened.append(self)

    monkeypatch.setattr(loader_module, "JASPERSteeringDataset", Watched)
    with pytest.raises(ValueError, match="timeout"):
        create_loader(data, "train", 4, num_workers=1, timeout=-1)
    with pytest.raises(ValueError, match="closed"):
        opened[0][0]


def test_options_reach_pytorch(data: Path) -> None:
    loader = create_loader(data, "train", 4, collate_fn=as_is, generator=torch.Generator())
    batch = next(iter(loader))
    assert len(batch) == 4
    assert batch[0]["question_emb"].shape == (16,)


# --- orders ------------------------------------------------------------------------------------------------------


def test_the_order_follows_the_plan(data: Path) -> None:
    loader = create_loader(data, "train", 4)
    assert loader.order == "global"
    assert "nothing that is read per sample is mapped" in loader.explain()
    loader = create_loader(data, "train", 4, use_mmap=True)
    assert loader.order == "global"
    assert "they fit" in loader.explain()
    loader = create_loader(data, "train", 4, use_mmap=True, memory_limit=4000)
    assert loader.order == "global"  # questions and sources are named at random, and there is no memory for windows
    assert "too little for windows" in loader.explain()
    with js.Dataset(data, {"some": "steering_centroid[i]"}, use_mmap=True, memory_limit=400) as dataset:
        loader = create_loader(dataset, batch_size=4)
        assert loader.order == "block"
        assert "read in runs" in loader.explain()
    loader = create_loader(data, "train", 4, use_mmap=True, memory_limit=4000, order="global")
    assert loader.order == "global"
    assert "it was asked for" in loader.explain()


@pytest.mark.parametrize("options", [{}, {"use_mmap": True}, {"use_mmap": True, "memory_limit": 4000}])
def test_placement_changes_nothing_in_a_block_order(data: Path, options: dict[str, Any]) -> None:
    alone = create_loader(data, "train", 7, order="block", drop_last=False, use_mmap=False)
    assert relevance(create_loader(data, "train", 7, order="block", drop_last=False, **options)) == relevance(alone)


@pytest.mark.parametrize("padding", ["wrap", "none"])
def test_ranks_share_an_epoch(data: Path, padding: Any) -> None:
    loaders = [
        create_loader(data, "val", 4, rank=rank, world_size=5, padding=padding, storage_format="pt")
        for rank in range(5)
    ]
    served = [relevance(loader) for loader in loaders]
    whole = relevance(create_loader(data, "val", 4))
    assert set().union(*served) == set(whole)
    lengths = sorted(map(len, served))
    assert lengths == ([4, 4, 4, 4, 4] if padding == "wrap" else [3, 3, 4, 4, 4])
    assert "1 of 5 (from the arguments)" in loaders[1].explain()


# --- states ------------------------------------------------------------------------------------------------------


def test_a_run_goes_on_elsewhere(data: Path) -> None:
    whole = relevance(create_loader(data, "train", 6, epoch=2, drop_last=False))
    first = create_loader(data, "train", 6, epoch=2, drop_last=False)
    served = [float(value) for _, batch in zip(range(5), first, strict=False) for value in batch["relevance"]]
    state = json.loads(json.dumps(first.state_dict()))
    assert state["consumed"] == 30
    rest = create_loader(data, "train", 11, drop_last=False, use_mmap=True)
    rest.load_state_dict(state)
    assert rest.dataset_obj.epoch == 2
    assert served + relevance(rest) == whole
    with pytest.raises(IncompatibleOptionsError, match="another dataset or split"):
        create_loader(data, "val", 6).load_state_dict(state)


def test_a_state_survives_torch_save(data: Path, tmp_path: Path) -> None:
    loader = create_loader(data, "train", 6)
    torch.save(loader.state_dict(), tmp_path / "state.pt")
    loader.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))


# --- devices and advice ------------------------------------------------------------------------------------------


def test_on_the_cpu_batches_pass_through(data: Path) -> None:
    loader = create_loader(data, "train", 16)
    wrapped = to_device(loader, "cpu")
    assert len(wrapped) == len(loader)
    assert wrapped.dataset_obj is loader.dataset_obj
    iterator = iter(wrapped)
    next(iterator)
    assert wrapped.state_dict() == loader.state_dict()
    assert wrapped.state_dict()["consumed"] == 16
    wrapped.load_state_dict(wrapped.state_dict())
    assert len(list(wrapped)) == len(loader) - 1
    wrapped.set_epoch(2)
    assert loader.dataset_obj.epoch == 2


def test_other_devices_get_copies(data: Path) -> None:
    loader = create_loader(data, "train", 16)
    batch = next(iter(to_device(loader, "meta")))
    assert all(value.device.type == "meta" for value in batch.values())
    nested: DataLoader[Any] = DataLoader([(torch.zeros(2), [torch.ones(1)], "name")], batch_size=None)  # type: ignore[arg-type]
    moved = next(iter(to_device(nested, "meta")))
    assert moved[0].device.type == moved[1][0].device.type == "meta"
    assert moved[2] == "name"


@pytest.mark.cuda
@pytest.mark.parametrize("pin_memory", [True, False])
def test_copies_to_a_gpu_are_the_same_and_counted_right(data: Path, pin_memory: bool) -> None:
    plain = list(create_loader(data, "train", 16, pin_memory=False))
    loader = create_loader(data, "train", 16, pin_memory=pin_memory)
    assert all(value.is_pinned() is pin_memory for value in next(iter(loader)).values())
    wrapped = to_device(loader, "cuda")
    for number, batch in enumerate(wrapped):
        # The last batch of an epoch has consumed what it leaves out, too.
        assert wrapped.state_dict()["consumed"] == (16 * (number + 1) if number < len(plain) - 1 else N_TRAIN)
        for key, value in batch.items():
            assert value.is_cuda
            assert torch.equal(value.cpu(), plain[number][key])
    assert wrapped.state_dict()["consumed"] == N_TRAIN
    assert "device copy" in loader.advice()


@pytest.mark.parametrize("use_mmap", [True, False])
def test_advice_is_given_in_milliseconds(data: Path, use_mmap: bool) -> None:
    loader = create_loader(data, "train", 16, use_mmap=use_mmap)
    assert "no batch was served yet" in loader.advice()
    list(loader)
    first, second, *rest = loader.advice().splitlines()
    assert first.startswith("5 batches, one every ")
    assert "pages" in second
    assert "in the trainer's process" in second
    assert rest


def test_any_pass_may_be_abandoned(data: Path) -> None:
    loader = create_loader(data, "train", 4, use_mmap=True, order="block")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", JasperStoreWarning)
        for _ in range(3):
            iterator = iter(loader)
            next(iterator)
            next(iterator)
        assert len(list(loader)) == len(loader)


def test_a_loader_of_ones_own_dataset() -> None:
    dataset: Any = Numbers(10)
    loader = Loader(dataset, 4, sampler=EpochSampler(dataset, 1, 0), collate_fn=as_is)
    assert np.concatenate([batch.numpy() for batch in loader]).tolist() == order(10, 0, 0)[:].tolist()
    assert len(loader) == 3


def test_what_no_sample_reads_may_be_mapped_beside_pinned_batches(tmp_path):
    """Keyword embeddings that do not fit stay mapped; no batch touches them."""
    directory = build_pt_dataset(tmp_path / "data", n_keywords=5000)
    with pytest.raises(IncompatibleOptionsError, match="pin_memory"):
        create_loader(directory, "train", 8, use_mmap=True, pin_memory=True)
    loader = create_loader(directory, "train", 8, memory_limit=150_000)
    plan = loader.dataset_obj.store.plan
    assert {entry.name for entry in plan.entries if entry.placement == "mmap"} <= {"keyword_embs", "centroid_embs"}
    assert plan.placement("keyword_embs") == "mmap"
    assert plan.any_mapped
    assert not plan.reads_maps
    loader.dataset_obj.close()
