"""``build``: every derived tensor against numpy, the same bits whatever the machine, all forms of input."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

import jasper_store as js
from jasper_store.building.clusters import default_count, k_means
from jasper_store.building.rows import Matrix
from tests.building.raw import DERIVED, expected, normalized, raw, values


def close(found: dict[str, torch.Tensor], wanted: dict[str, np.ndarray]) -> None:
    for name in DERIVED:
        assert found[name].numpy() == pytest.approx(wanted[name], abs=3e-6), name


@settings(max_examples=15)
@given(
    seed=st.integers(0, 1000),
    dim=st.integers(2, 24),
    clusters=st.integers(2, 6),
    softmax=st.booleans(),
    rows=st.integers(16, 80),
)
def test_every_derived_tensor_equals_numpy(
    tmp_path_factory: pytest.TempPathFactory, seed: int, dim: int, clusters: int, softmax: bool, rows: int
) -> None:
    out = tmp_path_factory.mktemp("build")
    inputs = raw(questions=rows, sources=rows + 7, pairs=2 * rows, dim=dim, clusters=clusters, seed=seed)
    own = np.random.default_rng(seed).integers(0, clusters, rows + 7)
    own[:clusters] = np.arange(clusters)
    js.build(
        out / "set",
        **inputs,
        clusters={"sources": own},
        keyword_weights="softmax" if softmax else "equal",
    )
    found = values(out / "set")
    close(found, expected(inputs, own, softmax=softmax))
    assert np.array_equal(found["pair_cluster_id"].numpy(), own[inputs["pairs"][:, 1]])
    for name in ("questions", "sources", "keywords"):
        assert np.array_equal(found[f"{name[:-1]}_embs"].numpy(), inputs[name])


def test_k_means_finds_directions_and_gives_means_of_members() -> None:
    rng = np.random.default_rng(3)
    centres = normalized(rng.standard_normal((6, 16)))
    sources = (centres[rng.integers(0, 6, 500)] + 0.05 * rng.standard_normal((500, 16))).astype(np.float32)
    pairs = torch.stack((torch.arange(100), torch.arange(100) * 3), dim=1)
    found = k_means(Matrix("sources", sources), pairs, 6, seed=1, block_rows=64, progress=lambda _: None)
    own = found.of_sources.numpy()
    source = normalized(sources)
    for cluster in range(len(found.centroids)):
        assert found.centroids[cluster].numpy() == pytest.approx(
            normalized(source[own == cluster].mean(axis=0)), abs=1e-6
        )
    assert torch.equal(found.of_pairs, found.of_sources[pairs[:, 1]])
    # Each source is nearer to its own cluster than to the others' by far, as the centres that they were made from are.
    cosines = source @ found.centroids.numpy().T
    assert (cosines[np.arange(500), own] > 0.9).mean() > 0.6


def test_the_result_is_a_sound_dataset(tmp_path: Path) -> None:
    report = js.build(tmp_path / "set", **raw())
    checked = js.verify(tmp_path / "set")
    assert checked.ok
    assert list(checked.warnings) == []
    with js.JASPERSteeringDataset(tmp_path / "set", "train") as dataset:
        assert len(dataset) == report.splits["train"]
        assert js.validate_first_batch(js.create_loader(dataset, batch_size=4))
    config = json.loads((tmp_path / "set" / "config.json").read_text())
    assert config["built"]["settings"]["n_neg"] == 3
    assert config["built"]["counts"] == report.counts
    assert json.loads(json.dumps(report.to_dict()))["splits"] == report.splits
    assert "splits: train" in str(report)
    assert [path.name for path in tmp_path.iterdir()] == ["set"]


def test_zeros_where_the_question_is_the_centroid(tmp_path: Path) -> None:
    inputs = raw(questions=20, sources=40, pairs=40)
    own = np.repeat(np.arange(8), 5)
    first = int(inputs["pairs"][0, 0])
    members = normalized(inputs["sources"][own == own[inputs["pairs"][0, 1]]])
    inputs["questions"][first] = 3 * normalized(members.mean(axis=0))
    js.build(tmp_path / "set", **inputs, clusters={"sources": own})
    found = values(tmp_path / "set")
    assert not found["steering_centroid"][0].any()
    assert not found["steering_residual"][0].any()
    assert abs(float(found["centroid_distances"][0])) < 1e-6


def test_the_residual_is_normalised_if_asked(tmp_path: Path) -> None:
    js.build(tmp_path / "plain", **raw())
    js.build(tmp_path / "unit", **raw(), normalize_residual=True)
    plain, unit = (values(tmp_path / name)["steering_residual"].double().numpy() for name in ("plain", "unit"))
    assert unit == pytest.approx(normalized(plain), abs=1e-6)
    assert np.linalg.norm(plain, axis=1).std() > 0.01


def test_steering_without_keywords_is_that_of_the_centroid(tmp_path: Path) -> None:
    inputs = raw()
    del inputs["keywords"], inputs["pair_keywords"]
    report = js.build(tmp_path / "set", **inputs)
    found = values(tmp_path / "set")
    assert torch.equal(found["steering_keyword_weighted"], found["steering_centroid"])
    assert "keyword_embs" not in found
    assert any("keyword" in note for note in report.notes)
    assert js.verify(tmp_path / "set").ok


# ---- the same bits


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("limit", ["2GiB", "32MiB"])
def test_the_same_bits_at_any_number_of_threads_and_any_limit(tmp_path: Path, threads: int, limit: str) -> None:
    inputs = raw(questions=500, sources=700, pairs=900, dim=64)
    js.build(tmp_path / "one", **inputs)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        js.build(tmp_path / "other", **inputs, memory_limit=limit)
    finally:
        torch.set_num_threads(before)
    same_bits(tmp_path / "one", tmp_path / "other")


def same_bits(one: Path, other: Path) -> None:
    first, second = values(one), values(other)
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


def test_another_seed_divides_otherwise(tmp_path: Path) -> None:
    js.build(tmp_path / "one", **raw())
    js.build(tmp_path / "other", **raw(), seed=7)
    assert not torch.equal(values(tmp_path / "one")["train_idx"], values(tmp_path / "other")["train_idx"])


@pytest.mark.parametrize("fmt", ["npy", "hdf5", "pt"])
def test_formats_hold_the_same(tmp_path: Path, fmt: str) -> None:
    js.build(tmp_path / "one", **raw())
    js.build(tmp_path / "other", **raw(), format=fmt)
    same_bits(tmp_path / "one", tmp_path / "other")


def test_narrow_embeddings_are_kept_and_steered_in_their_dtype(tmp_path: Path) -> None:
    inputs = raw()
    wide = {name: torch.from_numpy(inputs[name]).bfloat16() for name in ("questions", "sources", "keywords")}
    js.build(tmp_path / "set", **{**inputs, **wide}, clusters=4)
    found = values(tmp_path / "set")
    assert torch.equal(found["source_embs"], wide["sources"])
    assert found["steering_residual"].dtype == torch.bfloat16
    assert js.verify(tmp_path / "set").ok


# ---- forms of input


def forms(tmp_path: Path) -> dict[str, dict[str, Any]]:
    """The same inputs in many forms."""
    inputs = raw()
    lists = inputs["pair_keywords"]
    for name in ("questions", "sources", "keywords", "pairs"):
        np.save(tmp_path / f"{name}.npy", inputs[name])
    np.savez(tmp_path / "all.npz", q=inputs["questions"], s=inputs["sources"], k=inputs["keywords"])
    torch.save(lists, tmp_path / "lists.pt")
    values_, offsets = np.concatenate([np.array(row, np.int64) for row in lists]), np.cumsum([0, *map(len, lists)])
    read_only = inputs["questions"].copy()
    read_only.flags.writeable = False
    return {
        "tensors": {
            "questions": torch.from_numpy(inputs["questions"]),
            "sources": torch.from_numpy(inputs["sources"]),
            "pairs": torch.from_numpy(inputs["pairs"]).int(),
        },
        "read-only and backwards": {"questions": read_only, "sources": inputs["sources"][::-1][::-1]},
        "files": {name: tmp_path / f"{name}.npy" for name in ("questions", "sources", "keywords", "pairs")},
        "columns": {"questions": f"{tmp_path}/all.npz:q", "sources": (tmp_path / "all.npz", "s")},
        "lists in a file": {"pair_keywords": tmp_path / "lists.pt"},
        "values and offsets": {"pair_keywords": (values_, offsets)},
        "lists of rows": {"pairs": inputs["pairs"].tolist()},
    }


@pytest.mark.parametrize("form", ["tensors", "read-only and backwards", "files", "columns", "lists in a file", "values and offsets", "lists of rows"])  # fmt: skip
def test_forms_of_input(tmp_path: Path, form: str) -> None:
    js.build(tmp_path / "one", **raw())
    js.build(tmp_path / "other", **{**raw(), **forms(tmp_path)[form]})
    same_bits(tmp_path / "one", tmp_path / "other")


def test_tensors_of_a_store_and_directories_of_a_dataset(tmp_path: Path) -> None:
    inputs = raw()
    js.build(tmp_path / "one", **inputs)
    with js.open(tmp_path / "one") as store:
        stored = {"questions": store["question_embs"], "pair_keywords": store.ragged("pair_keyword_ids")}
        js.build(tmp_path / "two", **{**inputs, **stored})
    known: dict[str, Any] = dict.fromkeys(
        ("questions", "sources", "pairs", "keywords", "pair_keywords"), tmp_path / "one"
    )
    js.build(tmp_path / "three", **known, n_neg=3)
    same_bits(tmp_path / "one", tmp_path / "two")
    same_bits(tmp_path / "one", tmp_path / "three")


def test_columns_of_compressed_hdf5(tmp_path: Path) -> None:
    inputs = raw()
    h5py = pytest.importorskip("h5py")
    with h5py.File(tmp_path / "raw.h5", "w") as file:
        for name in ("questions", "sources", "pairs"):
            file.create_dataset(f"x/{name}", data=inputs[name], compression="gzip", chunks=(7, inputs[name].shape[1]))
    js.build(tmp_path / "one", **inputs)
    columns = {name: f"{tmp_path}/raw.h5:x/{name}" for name in ("questions", "sources", "pairs")}
    js.build(tmp_path / "two", **{**inputs, **columns})
    same_bits(tmp_path / "one", tmp_path / "two")


def test_tensors_that_want_gradients(tmp_path: Path) -> None:
    inputs = raw()
    js.build(tmp_path / "one", **inputs)
    js.build(tmp_path / "two", **{**inputs, "sources": torch.from_numpy(inputs["sources"]).requires_grad_()})
    same_bits(tmp_path / "one", tmp_path / "two")


def test_pairs_by_ids(tmp_path: Path) -> None:
    inputs = raw()
    q_ids, s_ids = [f"q{i}" for i in range(40)], [f"doc-{i:03}" for i in range(60)]
    columns = ([q_ids[i] for i in inputs["pairs"][:, 0]], [s_ids[i] for i in inputs["pairs"][:, 1]])
    (tmp_path / "q.txt").write_text("\n".join(q_ids) + "\n")
    np.save(tmp_path / "s.npy", np.array(s_ids))
    (tmp_path / "pairs.tsv").write_text("".join(f"{q}\t{s}\n" for q, s in zip(*columns, strict=True)))
    with js.DatasetWriter(tmp_path / "ids") as writer:
        writer.append("names", s_ids)
        writer.append("embs", inputs["sources"])
    js.build(tmp_path / "one", **inputs)
    ways: list[dict[str, Any]] = [
        {"pairs": columns, "question_ids": q_ids, "source_ids": s_ids},
        {"pairs": np.array(columns).T, "question_ids": np.array(q_ids), "source_ids": tmp_path / "s.npy"},
        {"pairs": tmp_path / "pairs.tsv", "question_ids": tmp_path / "q.txt", "source_ids": f"{tmp_path}/ids:names"},
        {"pairs": (inputs["pairs"][:, 0], columns[1]), "source_ids": s_ids},
    ]
    for number, way in enumerate(ways):
        js.build(tmp_path / f"way{number}", **{**inputs, **way})
        same_bits(tmp_path / "one", tmp_path / f"way{number}")
    with js.open(tmp_path / "ids") as store:
        stored = {"pairs": columns, "question_ids": q_ids, "source_ids": store.ids("names"), "sources": store["embs"]}
        js.build(tmp_path / "stored", **{**inputs, **stored})
    same_bits(tmp_path / "one", tmp_path / "stored")


def test_clusters_of_pairs(tmp_path: Path) -> None:
    inputs = raw()
    labels = np.arange(len(inputs["pairs"])) % 3
    js.build(tmp_path / "set", **inputs, clusters=labels)
    found = values(tmp_path / "set")
    source = normalized(inputs["sources"])
    for cluster in range(3):
        members = np.unique(inputs["pairs"][labels == cluster, 1])
        assert found["centroid_embs"][cluster].numpy() == pytest.approx(
            normalized(source[members].mean(axis=0)), abs=1e-6
        )
    assert np.array_equal(found["pair_cluster_id"].numpy(), labels)


def test_relevance_is_kept_and_is_one_by_default(tmp_path: Path) -> None:
    inputs = raw()
    js.build(tmp_path / "default", **inputs)
    assert bool((values(tmp_path / "default")["pair_relevance"] == 1).all())
    relevance = np.linspace(0, 1, len(inputs["pairs"]))
    js.build(tmp_path / "set", **inputs, relevance=relevance)
    assert values(tmp_path / "set")["pair_relevance"].numpy() == pytest.approx(relevance)


def test_similarities_are_kept_if_asked(tmp_path: Path) -> None:
    inputs = raw()
    js.build(tmp_path / "set", **inputs, keep_similarities=True)
    found = values(tmp_path / "set")
    question, source = normalized(inputs["questions"]), normalized(inputs["sources"])
    for p, (q, s) in enumerate(inputs["pairs"]):
        assert float(found["positive_similarities"][p]) == pytest.approx(question[q] @ source[s], abs=1e-5)
        wanted = source[found["hard_negatives"][p]] @ question[q]
        assert found["negative_similarities"][p].numpy() == pytest.approx(wanted, abs=1e-5)
    assert js.verify(tmp_path / "set").ok


def test_the_number_of_clusters_follows_a_rule() -> None:
    assert [default_count(n) for n in (2, 20, 1000, 50_000, 10**6, 10**9)] == [2, 3, 22, 158, 707, 4096]


def test_progress_names_every_stage_and_ends_at_its_total(tmp_path: Path) -> None:
    seen: dict[str, tuple[int, int]] = {}
    js.build(tmp_path / "set", **raw(), progress=lambda stage, done, total: seen.update({stage: (done, total)}))
    assert list(seen) == ["read", "clusters", "splits", "mine", "write"]
    assert all(done == total for done, total in seen.values())
