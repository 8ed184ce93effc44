"""A dataset of any tensors as a user holds it: samples, batches, splits, workers, epochs, closing."""

from __future__ import annotations

import json
import logging
import multiprocessing
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch.utils.data import ConcatDataset, DataLoader, StackDataset, Subset, default_collate

import jasper_store as js
from jasper_store.errors import BatchError, ClosedError
from jasper_store.samples.batch import Batch
from jasper_store.samples.declaration import Field
from tests.jasper.expected import assert_same, draw

N, TRAIN, SEED = 40, 25, 9
LENGTHS = [number % 4 for number in range(N)]
ENDS = np.cumsum([0, *LENGTHS])


def tensors() -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(1)
    return {
        "embs": torch.randn(N, 6, generator=g),
        "passages": torch.randn(30, 6, generator=g).half(),
        "pairs": torch.randint(30, (N, 2), generator=g),
        "negatives": torch.randint(30, (N, 3), generator=g).to(torch.int32),
        "labels": torch.randint(5, (N,), generator=g).to(torch.int16),
        "one": torch.randn(N, 6, generator=g),
        "two": torch.randn(N, 6, generator=g),
        "words.values": torch.randint(30, (int(ENDS[-1]),), generator=g),
        "words.offsets": torch.from_numpy(ENDS),
        "train": torch.randperm(N, generator=g)[:TRAIN],
        "val": torch.arange(7),
        "unread": torch.randn(3, generator=g),
    }


T = tensors()
FIELDS: dict[str, str] = {
    "emb": "embs[row]",
    "_pair": "pairs[row]",
    "positive": "passages[pairs[row, 1]]",
    "both": "passages[_pair]",
    "negatives": "passages[negatives[row]]",
    "label": "labels[row]",
}
RAGGED = {"words": "words[row]", "passages": "passages[words[row]]"}
SPLITS = {"train": "train", "val": "val"}
PROBABILITIES = {0: (0.2, 0.5, 0.3), 1: (0.0, 0.0, 1.0)}


def probabilities(epoch: int) -> tuple[float, ...]:
    return PROBABILITIES[min(epoch, 1)]


CHOICE: dict[str, Any] = {"steer": js.Choice(("one", "two"), probabilities), "variant": js.Variant("steer")}


def expected(positions: Any, split: str | None = "train") -> dict[str, torch.Tensor]:
    positions = torch.as_tensor(positions, dtype=torch.int64)
    rows = positions if split is None else T[split][positions]
    return {
        "emb": T["embs"][rows],
        "positive": T["passages"][T["pairs"][rows, 1]],
        "both": T["passages"][T["pairs"][rows]],
        "negatives": T["passages"][T["negatives"][rows].long()],
        "label": T["labels"][rows],
    }


def steered(positions: Any, epoch: int) -> dict[str, torch.Tensor]:
    rows = T["train"][torch.as_tensor(positions, dtype=torch.int64)].tolist()
    variants = [draw(row, SEED, epoch, probabilities(epoch)) for row in rows]
    choose = [torch.zeros(N, 6), T["one"], T["two"]]
    return {
        "steer": torch.stack([choose[variant][row] for row, variant in zip(rows, variants, strict=True)]),
        "variant": torch.tensor(variants),
    }


def write(directory: Path, values: dict[str, torch.Tensor], **config: Any) -> Path:
    directory.mkdir()
    for name, value in values.items():
        save_file({name: value}, directory / f"{name}.safetensors")
    if config:
        (directory / "config.json").write_text(json.dumps(config))
    return directory


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write(tmp_path / "data", T)


@pytest.fixture(params=["mapped", "preloaded"])
def ds(request: pytest.FixtureRequest, data: Path) -> js.Dataset:
    return open_it(data, use_mmap=request.param == "mapped")


def open_it(
    data: Path, fields: dict[str, Any] | None = None, split: str | None = "train", **options: Any
) -> js.Dataset:
    return js.Dataset(data, FIELDS if fields is None else fields, splits=SPLITS, split=split, seed=SEED, **options)


# --- samples ----------------------------------------------------------------------------------------------------------


def test_samples_are_what_the_tensors_say(ds: js.Dataset) -> None:
    assert len(ds) == TRAIN
    for position in range(TRAIN):
        wanted = expected([position])
        assert_same(ds[position], {key: value[0] for key, value in wanted.items()})


@pytest.mark.parametrize("split", ["train", "val", None])
def test_splits(data: Path, split: str | None) -> None:
    with open_it(data, split=split) as ds:
        n = {"train": TRAIN, "val": 7, None: N}[split]
        assert len(ds) == n
        assert ds.split == split
        assert_same(ds.__getitems__(range(n)).tensors, expected(range(n), split))


@pytest.mark.parametrize("kind", ["list", "tensor", "numpy", "int32", "uint8", "scalars", "range", "strided", "empty"])
def test_positions_of_any_kind(ds: js.Dataset, kind: str) -> None:
    positions = torch.tensor([4, 1, 1, 9])
    given: Any = {
        "list": positions.tolist(),
        "tensor": positions,
        "numpy": positions.numpy(),
        "int32": positions.to(torch.int32),
        "uint8": positions.numpy().astype(np.uint8),
        "scalars": list(positions),
        "range": range(4),
        "strided": positions.repeat_interleave(2)[::2],
        "empty": [],
    }[kind]
    batch = ds.__getitems__(given)
    assert isinstance(batch, Batch)
    assert len(batch) == len(given)
    wanted: Any = torch.as_tensor([int(position) for position in given], dtype=torch.int64)
    assert_same(batch.tensors, expected(wanted))
    for place, position in enumerate(wanted.tolist()):
        assert_same(batch[place], ds[position])


def test_an_index_is_a_whole_number_and_not_negative(ds: js.Dataset) -> None:
    assert_same(ds[np.int64(3)], ds[3])
    assert_same(ds[torch.tensor(3)], ds[3])
    for index in (-1, -TRAIN, TRAIN, 10**30):
        with pytest.raises(IndexError, match=rf"Index {index} out of range \[0, 25\) of split 'train'"):
            ds[index]
    for bad in (1.0, "1", None):
        with pytest.raises(TypeError):
            ds[bad]  # type: ignore[index]


@pytest.mark.parametrize("use_mmap", [True, False])
def test_ragged_fields(data: Path, use_mmap: bool) -> None:
    with open_it(data, RAGGED, use_mmap=use_mmap) as ds:
        positions = [3, 0, 24, 3]
        rows = [int(T["train"][position]) for position in positions]
        values = [T["words.values"][ENDS[row] : ENDS[row + 1]] for row in rows]
        offsets = torch.tensor([0, *map(len, values)]).cumsum(0)
        batch = ds.__getitems__(positions)
        assert_same(
            batch.tensors,
            {
                "words.values": torch.cat(values),
                "words.offsets": offsets,
                "passages.values": T["passages"][torch.cat(values)],
                "passages.offsets": offsets,
            },
        )
        for place, wanted in enumerate(values):
            assert_same(batch[place], {"words": wanted, "passages": T["passages"][wanted]})
            assert_same(ds[positions[place]], batch[place])
        assert_same(batch[1:3].tensors, ds.__getitems__(positions[1:3]).tensors)
        assert_same(batch[0:0].tensors, ds.__getitems__([]).tensors)
        assert_same(default_collate(list(batch)), batch.tensors)
        assert_same(pickle.loads(pickle.dumps(batch[0])), batch[0])
        nested = torch.nested.nested_tensor_from_jagged(batch.tensors["words.values"], batch.tensors["words.offsets"])
        assert [row.tolist() for row in nested.unbind()] == [row.tolist() for row in values]


def test_integers_served_as_int64(data: Path) -> None:
    fields = {"label": Field.parse("labels[row]", "label", torch.int64), "same": "labels[row]"}
    with open_it(data, fields) as ds:
        batch = ds.__getitems__([5, 2]).tensors
        assert batch["label"].dtype == torch.int64
        assert batch["same"].dtype == torch.int16
        assert batch["label"].tolist() == batch["same"].tolist() == T["labels"][T["train"][[5, 2]]].tolist()


@pytest.mark.parametrize("use_mmap", [True, False])
def test_floats_served_as_another_dtype(data: Path, use_mmap: bool) -> None:
    if use_mmap:
        with pytest.raises(ValueError, match="dtype"):
            open_it(data, use_mmap=True, dtype=torch.bfloat16)
        return
    with open_it(data, use_mmap=False, dtype=torch.bfloat16) as ds:
        wanted = expected([1, 2])
        found = ds.__getitems__([1, 2]).tensors
        for key, value in wanted.items():
            assert torch.equal(found[key], value.bfloat16() if value.dtype.is_floating_point else value)


# --- facts ------------------------------------------------------------------------------------------------------------


def test_repr_has_a_line_for_each_field(data: Path) -> None:
    with open_it(data, FIELDS | RAGGED | CHOICE, use_mmap=False) as ds:
        first, *lines = repr(ds).split("\n")
        assert first.startswith(f"Dataset({str(data)!r}, split 'train', 25 samples, ")
        assert first.endswith(" preloaded)")
        assert [line.split(maxsplit=1)[0] for line in lines] == list(ds.fields)
        assert [" ".join(line.split()[1:]) for line in lines] == [
            "float32 [6] embs[row]",
            "float16 [6] passages[pairs[row, 1]]",
            "float16 [2, 6] passages[_pair]",
            "float16 [3, 6] passages[negatives[row]]",
            "int16 [] labels[row]",
            "int64 [...] words[row]",
            "float16 [..., 6] passages[words[row]]",
            "float32 [6] one of one, two or zeros [row]",
            "int64 [] the variant drawn for steer",
        ]
        assert len({line.index(line.split(maxsplit=1)[1].split()[0]) for line in lines}) == 1
    assert repr(ds) == "Dataset(closed (split 'train'))"


def test_fields(data: Path) -> None:
    with open_it(data, FIELDS | CHOICE) as ds:
        wanted = {name: text for name, text in FIELDS.items() if name != "_pair"}
        assert ds.fields == wanted | {
            "steer": "one of one, two or zeros [row]",
            "variant": "the variant drawn for steer",
        }
        assert list(ds.graph.keys) == list(ds.fields)
    with js.Dataset(data) as every:
        assert every.fields == {name: f"{name}[i]" for name in sorted(T) if "." not in name and len(T[name]) == N} | {
            "words": "words[i]"
        }


def test_fingerprint(data: Path, tmp_path: Path) -> None:
    def print_of(path: Path = data, fields: dict[str, Any] | None = None, **options: Any) -> str:
        with open_it(path, fields, **options) as ds:
            found = ds.fingerprint()
            assert ds.fingerprint() == found == pickle.loads(pickle.dumps(ds)).fingerprint()
            return found

    base = print_of()
    # Of placement, format, and how a field is written it is none.
    assert {print_of(use_mmap=True), print_of(use_mmap=False), print_of(memory_limit=2000)} == {base}
    for name in ("npy", "hdf5", "pt"):
        js.convert(data, tmp_path / name, format=name)
        assert print_of(tmp_path / name) == base
    assert print_of(fields=FIELDS | {"both": "passages[pairs[row]]"}) == base
    # Of split, fields and sizes it is one.
    others = [
        print_of(split="val"),
        print_of(split=None),
        print_of(fields={key: text for key, text in FIELDS.items() if key != "label"}),
        print_of(fields=FIELDS | {"positive": "passages[pairs[row, 0]]"}),
        print_of(write(tmp_path / "more", T | {"passages": torch.cat([T["passages"], T["passages"]])})),
        print_of(write(tmp_path / "mixed", T | {"train": T["train"].flip(0)})),
    ]
    assert len({base, *others}) == 1 + len(others)


def test_memory(data: Path) -> None:
    with open_it(data, use_mmap=False) as ds:
        held = sum(value.nbytes for value in T.values())
        assert ds.memory_usage_mb == pytest.approx(held / 2**20, rel=0.01)
        assert not ds.use_mmap
    with open_it(data, use_mmap=True) as ds:
        assert ds.memory_usage_mb == 0
        assert ds.use_mmap
    with open_it(data, memory_limit=2000) as ds:
        assert 0 < ds.memory_usage_mb * 2**20 <= 2000
        assert ds.use_mmap


def test_reads_of_a_sample(data: Path) -> None:
    with open_it(data, FIELDS | RAGGED | CHOICE) as ds:
        reads = {entry.name: entry.reads_per_sample for entry in ds.store.plan.entries}
    mean = float(ENDS[-1]) / N
    assert reads == pytest.approx(
        {
            "embs": 1,
            "passages": 1 + 2 + 3 + mean,
            "pairs": 1,
            "negatives": 1,
            "labels": 1,
            "one": 0.5,
            "two": 0.3,
            "words.values": mean,
            "words.offsets": 1,
            "train": 1,
            "val": 1,
            "unread": 0,
        }
    )


def test_one_line_is_logged(data: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "jasper_store"), open_it(data, use_mmap=False):
        pass
    (record,) = [record for record in caplog.records if record.levelno == logging.INFO]
    assert "\n" not in record.getMessage()
    assert record.getMessage().startswith(f"{data}: 25 samples, ")
    assert record.getMessage().endswith(" preloaded")


# --- pickling, closing ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("memory_limit", [None, 2000, 0])
def test_pickles_to_little_and_serves_the_same(data: Path, memory_limit: int | None) -> None:
    with open_it(data, FIELDS | RAGGED | CHOICE, memory_limit=memory_limit) as ds:
        ds.set_epoch(1)
        raw = pickle.dumps(ds)
        assert len(raw) < 64 << 10
        with pickle.loads(raw) as again:
            assert (len(again), again.split, again.seed, again.epoch) == (TRAIN, "train", SEED, 1)
            assert again.fields == ds.fields
            assert_same(again.__getitems__(range(TRAIN)).tensors, ds.__getitems__(range(TRAIN)).tensors)
            assert_same(again[4], ds[4])
            again.set_epoch(0)  # by value, so nobody else's
            assert ds.epoch == 1


def test_a_large_dataset_pickles_to_little(tmp_path: Path) -> None:
    data = write(tmp_path / "large", {"embs": torch.zeros(100_000, 16)})
    with js.Dataset(data, {"x": "embs[i]"}, use_mmap=False) as ds:
        ds.__getitems__([1, 2])
        assert len(pickle.dumps(ds)) < 64 << 10


def test_closing(data: Path) -> None:
    with open_it(data) as ds:
        batch = ds.__getitems__([3])
    ds.close()
    assert_same(batch.tensors, expected([3]))
    assert len(ds) == TRAIN
    for use in (
        lambda: ds[0],
        lambda: ds.__getitems__([0]),
        lambda: ds.store,
        lambda: ds.fields,
        lambda: ds.graph,
        ds.fingerprint,
        lambda: ds.memory_usage_mb,
        lambda: js.create_loader(ds, batch_size=2),
        ds.__enter__,
    ):
        with pytest.raises(ClosedError, match=r"the dataset \(split 'train'\) is closed; open it again to use it"):
            use()


# --- epochs and workers -----------------------------------------------------------------------------------------------


def test_a_choice_follows_the_epoch(data: Path) -> None:
    with open_it(data, CHOICE) as ds:
        for epoch in (0, 1, 2, 0):
            ds.set_epoch(epoch)
            assert ds.epoch == epoch
            assert_same(ds.__getitems__(range(TRAIN)).tensors, steered(range(TRAIN), epoch))


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_the_epoch_reaches_persistent_workers(data: Path, start: str) -> None:
    if start not in multiprocessing.get_all_start_methods():
        pytest.skip(f"this system cannot {start}")
    with open_it(data, CHOICE) as ds:
        loader = DataLoader(ds, batch_size=7, num_workers=2, persistent_workers=True, multiprocessing_context=start)
        for epoch in (0, 1, 0):
            ds.set_epoch(epoch)
            whole = default_collate_batches(list(loader))
            assert_same(whole, steered(range(TRAIN), epoch))
        del loader


def test_collations_that_look_at_a_sample_get_a_whole_one(ds: js.Dataset) -> None:
    """PyTorch's default collation is answered with the tensors as they are; any other one may look for the keys."""
    from torch.utils.data._utils.collate import collate, default_collate_fn_map

    with ds:
        batch: Any = ds.__getitems__([3, 1, 2])  # default_collate names no type but a list
        assert default_collate(batch) is batch.tensors
        assert set(batch[0]) == set(batch.tensors)
        tensors_alone: dict[Any, Any] = {torch.Tensor: default_collate_fn_map[torch.Tensor]}
        assert_same(collate(batch, collate_fn_map=tensors_alone), batch.tensors)
        assert_same(collate(batch, collate_fn_map=default_collate_fn_map), batch.tensors)


def default_collate_batches(batches: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    return {key: torch.cat([batch[key] for batch in batches]) for key in batches[0]}


def test_the_epoch_of_a_loader_is_that_of_its_dataset(data: Path) -> None:
    with open_it(data, FIELDS | CHOICE) as ds:
        loader = js.create_loader(ds, batch_size=4, drop_last=False)
        orders = []
        for epoch in (0, 1):
            js.set_epoch(loader, epoch)
            assert ds.epoch == epoch
            positions = loader.sampler_obj.order[:].tolist()
            orders.append(positions)
            assert_same(default_collate_batches(list(loader)), expected(positions) | steered(positions, epoch))
        assert orders[0] != orders[1]


# --- PyTorch's own wrappers -------------------------------------------------------------------------------------------


def test_subset_concat_and_stack(ds: js.Dataset) -> None:
    (found,) = DataLoader(Subset(ds, [5, 2, 8]), batch_size=3)
    assert_same(found, expected([5, 2, 8]))
    (found,) = DataLoader(ConcatDataset([Subset(ds, [5]), Subset(ds, [2, 8])]), batch_size=3)
    assert_same(found, expected([5, 2, 8]))
    stacked = StackDataset(ds, torch.utils.data.TensorDataset(torch.arange(TRAIN)))
    first, second = list(DataLoader(stacked, batch_size=10))[1]
    assert_same(first, expected(range(10, 20)))
    assert second[0].tolist() == list(range(10, 20))
    named = StackDataset(left=ds, right=ds)
    batch = next(iter(DataLoader(named, batch_size=4)))
    assert_same(batch["left"], expected(range(4)))
    assert_same(batch["right"], expected(range(4)))


def test_ragged_fields_through_pytorchs_wrappers(data: Path) -> None:
    with open_it(data, RAGGED) as ds:
        wanted = ds.__getitems__([5, 2, 8]).tensors
        parts: Any = (Subset(ds, [5, 2, 8]), ConcatDataset([Subset(ds, [5]), Subset(ds, [2, 8])]))
        for part in parts:
            (found,) = DataLoader(part, batch_size=3)
            assert_same(found, wanted)


# --- the first batch --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fields", [FIELDS, RAGGED, CHOICE, FIELDS | RAGGED | CHOICE], ids=["plain", "ragged", "choice", "all"]
)
@pytest.mark.parametrize("workers", [0, 2])
def test_the_first_batch_is_validated(data: Path, fields: dict[str, Any], workers: int) -> None:
    with open_it(data, fields) as ds:
        assert js.validate_first_batch(js.create_loader(ds, batch_size=4, num_workers=workers))
        assert js.validate_first_batch(DataLoader(ds, batch_size=4))
        assert js.validate_first_batch(DataLoader(Subset(ds, [3, 1, 2]), batch_size=2))
        assert js.validate_first_batch(DataLoader(ConcatDataset([ds, ds]), batch_size=2))


def test_a_first_batch_that_is_wrong(tmp_path: Path) -> None:
    values = T | {"passages": torch.full((30, 6), float("nan"))}
    with open_it(write(tmp_path / "nan", values), RAGGED | {"emb": "embs[row]"}) as ds:
        with pytest.raises(BatchError, match=r"NaN.*passages\.values of sample"):
            js.validate_first_batch(js.create_loader(ds, batch_size=8))

        def cut(batch: Batch) -> dict[str, torch.Tensor]:
            return batch.tensors | {"words.offsets": batch.tensors["words.offsets"][:-1]}

        with pytest.raises(BatchError, match=r"words\.offsets has batch=7, but|has batch=8, but"):
            js.validate_first_batch(js.create_loader(ds, batch_size=8, collate_fn=cut))


# --- declared beside the data -----------------------------------------------------------------------------------------


@pytest.fixture
def declared(tmp_path: Path) -> Path:
    return write(tmp_path / "declared", T, samples={"fields": FIELDS, "splits": SPLITS}, title="anything")


@pytest.mark.parametrize("split", ["train", "val", None])
def test_a_declaration_in_config_json(declared: Path, split: str | None) -> None:
    loader = js.create_loader(declared, split, batch_size=6, drop_last=False)
    with loader.dataset_obj as ds:
        assert type(ds) is js.Dataset
        assert ds.split == split
        order = loader.sampler_obj.order[:].tolist()
        assert (order == sorted(order)) == (split == "val")
        assert_same(default_collate_batches(list(loader)), expected(order, split))
    with js.Dataset(declared, split=split) as ds:
        assert_same(ds.__getitems__(range(7)).tensors, expected(range(7), split))


def test_plans_and_stores_of_a_declared_directory_know_its_reads(declared: Path) -> None:
    wanted = {"embs": 1, "passages": 6, "pairs": 1, "negatives": 1, "labels": 1, "train": 1, "val": 1} | dict.fromkeys(
        ("one", "two", "words.values", "words.offsets", "unread"), 0
    )
    assert {entry.name: entry.reads_per_sample for entry in js.plan(declared).entries} == wanted
    with js.open(declared) as store:
        assert {entry.name: entry.reads_per_sample for entry in store.plan.entries} == wanted
    with js.Dataset(declared, split="train") as ds:
        assert {entry.name: entry.reads_per_sample for entry in ds.store.plan.entries} == wanted


def test_conversion_takes_the_declaration_along(declared: Path, tmp_path: Path) -> None:
    js.convert(declared, tmp_path / "npy", format="npy")
    with js.Dataset(tmp_path / "npy", split="train") as ds:
        assert ds.storage_format == "npy"
        assert_same(ds.__getitems__(range(TRAIN)).tensors, expected(range(TRAIN)))
