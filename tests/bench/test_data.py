"""Generated data: the same rows in every layout, datasets that hold together, a disk budget that holds."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tools.bench import cli, generic_data, jasper_data, measure_loader, measure_rows, row_files
from tools.bench.assets import MARK, Assets, ReopenSpec
from tools.bench.cases.generic import _beside
from tools.bench.context import Context
from tools.bench.generic_data import GenericShape
from tools.bench.measure import CASES
from tools.bench.plain_dataset import PlainDataset
from tools.bench.readers.registry import READERS, peers
from tools.bench.results import target
from tools.bench.row_files import NAME, RowSource
from tools.bench.settings import Settings, quick

SOURCE = RowSource(rows=9_000, dim=4, seed=3)
SHAPE: dict[str, Any] = {"pairs": 400, "pairs_per_row": 4, "dim": 8, "n_neg": 5, "seed": 1}


@pytest.fixture(scope="module")
def expected() -> np.ndarray:
    return np.concatenate(list(SOURCE.blocks()))


@pytest.mark.parametrize("layout", ["rows.safetensors", "rows.npy", "rows.pt", "rows.h5", "rows.raw"])
def test_every_layout_holds_the_same_rows(layout: str, expected: np.ndarray, tmp_path: Path) -> None:
    path = tmp_path / layout
    row_files.write(layout, str(path), SOURCE.rows, SOURCE.dim, SOURCE.seed)
    if layout == "rows.safetensors":
        found = load_file(path)[NAME].numpy()
    elif layout == "rows.npy":
        found = np.load(path)
    elif layout == "rows.pt":
        found = torch.load(path, weights_only=True).numpy()
    elif layout == "rows.h5":
        with h5py.File(path) as file:
            assert file[NAME].id.get_offset() % 4096 == 0
            found = file[NAME][:]
    else:
        found = np.fromfile(path, dtype=np.float32).reshape(-1, SOURCE.dim)
    np.testing.assert_array_equal(found, expected)


def test_orders_are_equal_distinct_and_whole_batches() -> None:
    batches = row_files.orders(1_000, 500, seed=7, batch=64)
    assert [len(batch) for batch in batches] == [64] * 7
    picked = np.concatenate(batches)
    assert len(np.unique(picked)) == len(picked)
    np.testing.assert_array_equal(picked, np.concatenate(row_files.orders(1_000, 500, seed=7, batch=64)))


def test_sums_are_those_of_the_rows(expected: np.ndarray) -> None:
    found = measure_rows.sums(SOURCE.rows, SOURCE.dim, SOURCE.seed, batch=32, count=96)["sums"]
    batches = row_files.orders(SOURCE.rows, 96, SOURCE.seed, 32)
    assert found == [measure_rows.digest(torch.from_numpy(expected[batch])) for batch in batches]
    swapped = torch.from_numpy(expected[batches[0]]).clone()
    swapped[3, 1] += 1e-3
    assert measure_rows.digest(swapped) != found[0]


@pytest.mark.parametrize("key", [reader.key for reader in peers() if not reader.missing()])
def test_installed_peers_read_what_was_written(key: str, expected: np.ndarray, tmp_path: Path) -> None:
    if READERS[key].module not in {"torch", "safetensors", "numpy", "h5py"}:
        pytest.skip("peers that are no dependency are compared in the run itself")
    path = tmp_path / READERS[key].asset
    row_files.write(READERS[key].asset, str(path), SOURCE.rows, SOURCE.dim, SOURCE.seed)
    reader = READERS[key](SOURCE.rows, SOURCE.dim, lookahead=2)
    reader.prepare()
    reader.open(path)
    rows = np.array([5, 8_999, 5, 0, 4_097], dtype=np.int64)
    np.testing.assert_array_equal(reader.take(rows).numpy(), expected[rows])


@pytest.mark.parametrize("layout", ["pt", "safetensors"])
def test_datasets_hold_together(layout: str, tmp_path: Path) -> None:
    path = tmp_path / "dataset"
    jasper_data.write(layout, str(path), **SHAPE)
    config = json.loads((path / "config.json").read_text())
    data = PlainDataset(path).data
    assert data["source_embs"].shape == (100, 8)
    assert data["pair_index"].min() >= 0
    assert data["pair_index"].max() < 100
    negatives, positives = data["hard_negatives"], data["pair_index"][:, 1:]
    assert not (negatives == positives).any()
    assert all(len(set(row)) == config["n_neg"] for row in negatives.tolist())
    assert 0 <= negatives.min() <= negatives.max() < 100
    splits = torch.cat([data[f"{split}_idx"] for split in ("train", "val", "test")])
    assert torch.equal(splits.sort().values, torch.arange(400))


def test_both_layouts_hold_the_same_values(tmp_path: Path) -> None:
    for layout in ("pt", "safetensors"):
        jasper_data.write(layout, str(tmp_path / layout), **SHAPE)
    one, other = PlainDataset(tmp_path / "pt").data, PlainDataset(tmp_path / "safetensors").data
    assert all(torch.equal(values, other[name]) for name, values in one.items())


def test_a_sparse_dataset_takes_no_room(tmp_path: Path) -> None:
    path = tmp_path / "sparse"
    jasper_data.write("safetensors", str(path), sparse=True, **(SHAPE | {"pairs": 100_000, "dim": 384}))
    stats = [file.stat() for file in path.iterdir()]
    assert sum(stat.st_size for stat in stats) > 500_000_000
    assert sum(stat.st_blocks * 512 for stat in stats) < 5_000_000


@pytest.mark.parametrize("kind", generic_data.KINDS)
def test_declared_datasets_are_the_same_to_the_library_and_to_plain_code(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "dataset"
    shape = GenericShape(kind, rows=70_000 if kind == "labels" else 300, dim=32, seed=2)  # one has two blocks
    assert generic_data.write("safetensors", str(path), **vars(shape))["nbytes"] == shape.nbytes
    found = {name: values for file in path.glob("*.safetensors") for name, values in load_file(file).items()}
    assert {name: (tuple(values.shape), values.dtype) for name, values in found.items()} == shape.sizes
    assert measure_loader.equal(str(path), kind=kind)["equal"]
    assert generic_data.largest_file(path).stem.startswith(("emb", "query", "passage"))


def test_declared_datasets_are_assets_in_any_format(tmp_path: Path) -> None:
    settings = replace(Settings(), data_dir=tmp_path / "data", generic_rows=40, pairs=20, dim=4)
    assets = Assets(settings)
    assert np.load(assets.ensure("generic-labels.npy") / "embeddings.npy").shape == (40, 4)
    assert load_file(assets.ensure("generic-triplets.safetensors") / "pairs.safetensors")["pairs"].shape == (20, 2)


def test_the_row_beside_is_that_of_jasper(tmp_path: Path) -> None:
    context = Context(replace(Settings(), data_dir=tmp_path / "data"), lambda _: None)
    name = "embeddings and labels, 40 samples"
    mine = [
        target(f"{name}: `create_loader`, batch 32", "per sample, default collation", 3.0, 1.0, 25.0),
        target(f"block order, cold, 3.1 times the limit, {name}", "the same loader with all in RAM", 1.0, 1.0, 0.8),
        target(f"cold rows, global order, batch 256, {name}", "the disk's 4 KiB reads at depth 32", 0.9, 1.0, 0.9),
    ]
    assert [_beside(context, item)["jasper"] for item in mine] == [None, None, None]
    jasper = {
        "generated, 20 pairs: `create_loader`, batch 32": (mine[0].against, 24.0),
        "block order, cold, 3.1 times the limit, 4 pairs share a question and a source": (mine[1].against, 0.7),
        "block order, cold, 3.1 times the limit, every pair has its own rows": (mine[1].against, 0.1),
        "cold rows, global order, batch 2567, read-ahead 128 KiB": (mine[2].against, 0.2),
        "cold rows, global order, batch 256, read-ahead 128 KiB": (mine[2].against, 1.1),
    }
    found = [{"what": what, "against": against, "ratio": ratio} for what, (against, ratio) in jasper.items()]
    context.measured = {case: {"targets": found} for case in ("loader", "block", "cold")}
    assert [_beside(context, item)["jasper"] for item in mine] == [24.0, 0.1, 1.1]


@pytest.fixture
def assets(tmp_path: Path) -> Assets:
    return Assets(replace(Settings(), data_dir=tmp_path / "data", rows=200, dim=4, disk_budget=60_000))


def test_assets_are_made_once_and_made_anew_when_they_would_differ(assets: Assets) -> None:
    path = assets.ensure("rows.npy")
    first = path.stat().st_mtime_ns
    assert assets.ensure("rows.npy").stat().st_mtime_ns == first
    assets.settings = replace(assets.settings, seed=99)
    assets.ensure("rows.npy")
    assert json.loads(assets.path("rows.npy" + MARK).read_text())["arguments"]["seed"] == 99


def test_an_asset_without_its_mark_is_not_trusted(assets: Assets) -> None:
    path = assets.ensure("rows.npy")
    assets.path("rows.npy" + MARK).unlink()
    path.write_bytes(b"half a file")
    assert np.load(assets.ensure("rows.npy")).shape == (200, 4)


def test_the_oldest_asset_goes_to_make_room(assets: Assets) -> None:
    assets.ensure("rows.npy")
    assets.ensure("rows.raw")
    recipe = ReopenSpec("tools.bench.row_files:write", {"layout": "rows.raw", "rows": 10, "dim": 4, "seed": 1}, 50_000)
    assets.ensure("big", keep={"rows.raw"}, recipe=recipe)
    assert not assets.path("rows.npy").exists()
    assert assets.path("rows.raw").exists()
    with pytest.raises(RuntimeError, match="--disk-budget"):
        assets.ensure("bigger", keep={"rows.raw"}, recipe=replace(recipe, nbytes=90_000))
    assert assets.clean() > 0
    assert not assets.root.exists()


def test_every_case_and_reader_is_complete() -> None:
    folder = Path(cli.__file__).parent / "cases"
    assert {file.stem for file in folder.glob("*.py")} - {"__init__"} == set(CASES)
    for reader in READERS.values():
        assert reader.asset in row_files.WRITERS
        assert reader.label
        assert reader.how
    assert not any(reader.ours for reader in peers())


def test_quick_settings_are_small() -> None:
    settings = quick(Settings())
    assert settings.rows_nbytes < 100_000_000
    assert "data_dir" not in settings.to_dict(), "results name no path of the machine"


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "SIGNALS", ())
    data = ["--data-dir", str(tmp_path / "data")]
    assert cli.main([*data, "run", "--cases", "nonsense", "--out", str(tmp_path / "x.json")]) == 2
    assert "no such case: nonsense" in capsys.readouterr().err
    assert cli.main([*data, "clean"]) == 0
    assert "nothing to remove" in capsys.readouterr().out
    Assets(replace(Settings(), data_dir=tmp_path / "data"))
    assert cli.main([*data, "restore"]) == 0
    assert cli.main([*data, "clean"]) == 0
    assert not (tmp_path / "data").exists()
