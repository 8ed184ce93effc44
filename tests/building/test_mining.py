"""Mining against an oracle in plain numpy, to the last bit; at any memory, any number of threads, and after kills."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import time
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings as example_settings, strategies as st

from jasper_store.building import memory_plan, mining, problem, quantized, sweep
from jasper_store.building.checkpoints import Checkpoints
from jasper_store.building.mining import Mined, MiningSettings, mine
from jasper_store.errors import IncompatibleOptionsError, InsufficientMemoryError, IntegrityError
from jasper_store.native.topk import offers
from tests.building.oracle import inputs_of, oracle

PLENTY = 1 << 30


def whole_numbers(rng: np.random.Generator, rows: int, dim: int) -> np.ndarray:
    """Embeddings whose products and norms are exact: ties are many, and no order of adding matters."""
    found = rng.integers(-2, 3, (rows, dim)).astype(np.float32)
    found[~found.any(axis=1), 0] = 1
    return found


def task(seed: int, questions: int, sources: int, pairs: int, dim: int, clusters: int) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    given: dict[str, Any] = {
        "questions": whole_numbers(rng, questions, dim),
        "sources": whole_numbers(rng, sources, dim),
        "pairs": np.stack([rng.integers(0, questions, pairs), rng.integers(0, sources, pairs)], axis=1),
    }
    if clusters:
        given["pair_clusters"] = rng.integers(0, clusters, pairs)
        given["source_clusters"] = rng.integers(0, clusters, sources)
        given["centroids"] = whole_numbers(rng, clusters, dim)
    return given


def same(one: Mined, other: Mined) -> bool:
    arrays = ("negatives", "tiers", "similarities", "positive_similarities")
    return one.counts == other.counts and all(
        getattr(one, name).tobytes() == getattr(other, name).tobytes() for name in arrays
    )


def no_negative(inputs: dict[str, Any]) -> bool:
    """Whether every source has the bytes of a positive of some question: so few different ones there are."""
    sources, pairs = inputs["sources"], inputs["pairs"]
    positives = (sources[pairs[pairs[:, 0] == question, 1]] for question in np.unique(pairs[:, 0]))
    return any((sources[:, None] == own[None]).all(axis=2).any(axis=1).all() for own in positives)


def operations(compiled: bool) -> Any:
    """Have products looked through by compiled code where it was built, or by torch's operations."""
    return contextlib.nullcontext() if compiled else mock.patch.object(problem, "offers", return_value=False)


margins = st.one_of(st.none(), st.sampled_from([0.0, 0.05, 0.3, 1.0]))


@example_settings(max_examples=120, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    sizes=st.tuples(st.integers(1, 12), st.integers(14, 60), st.integers(1, 30), st.integers(1, 6)),
    clusters=st.integers(0, 7),
    n_neg=st.integers(1, 12),
    tiers=st.sampled_from([(3.0, 4.0, 3.0, 2.0), (0.0, 0.0, 1.0, 0.0), (0.0, 0.0, 0.0, 1.0), (1.0, 0.0, 0.0, 1.0)]),
    relative=margins,
    absolute=margins,
    highest=st.one_of(st.none(), st.sampled_from([-0.5, 0.0, 0.4, 0.9])),
    duplicate=st.one_of(st.none(), st.sampled_from([0.3, 0.9, 0.999])),
    ranks=st.one_of(st.none(), st.sampled_from([(0, 5), (3, 9), (2, 200), (40, 50)])),
    compiled=st.booleans(),
)
def test_equals_the_oracle(
    seed: int,
    sizes: tuple[int, int, int, int],
    clusters: int,
    n_neg: int,
    tiers: tuple[float, float, float, float],
    relative: float | None,
    absolute: float | None,
    highest: float | None,
    duplicate: float | None,
    ranks: tuple[int, int] | None,
    compiled: bool,
) -> None:
    inputs = task(seed, *sizes, clusters)
    settings = MiningSettings(
        n_neg=n_neg,
        tiers=tiers,
        relative_margin=relative,
        absolute_margin=absolute,
        max_similarity=highest,
        duplicate_similarity=duplicate,
        ranks=ranks,
        tier_numbers="builder",
        seed=seed,
    )
    if no_negative(inputs):
        with pytest.raises(IntegrityError, match="found none for"):
            mine(inputs_of(**inputs), settings, memory_limit=PLENTY)
        return
    with operations(compiled):
        found = mine(inputs_of(**inputs), settings, memory_limit=PLENTY)
    wanted = oracle(**inputs, settings=settings)
    assert np.array_equal(found.negatives, wanted.rows)
    assert np.array_equal(found.tiers, wanted.kinds + 1)
    assert found.similarities.tobytes() == wanted.similarities.tobytes()
    assert found.counts.to_dict() == wanted.counts
    assert list(found.kinds.values()) == np.bincount(wanted.kinds.ravel(), minlength=4).tolist()


def unit_rows(rng: np.random.Generator, rows: int, dim: int) -> np.ndarray:
    return rng.standard_normal((rows, dim)).astype(np.float32)


def larger(seed: int = 0) -> dict[str, Any]:
    """Many pairs of few questions, sources with duplicates, clusters of pairs alone."""
    rng = np.random.default_rng(seed)
    sources = unit_rows(rng, 2000, 24)
    sources[1200:1600] = sources[:400]
    sources[1600:1800] = sources[7]
    return {
        "questions": unit_rows(rng, 300, 24),
        "sources": sources,
        "pairs": np.stack([rng.integers(0, 300, 800), rng.integers(0, 2000, 800)], axis=1),
        "pair_clusters": rng.integers(0, 9, 800),
    }


def smallest_limit(inputs: Any, settings: MiningSettings) -> int:
    with pytest.raises(InsufficientMemoryError, match="memory_limit") as caught:
        mine(inputs, settings, memory_limit=1)
    assert caught.value.needed is not None
    return caught.value.needed


@pytest.mark.parametrize("settings", [MiningSettings(n_neg=6), MiningSettings(n_neg=4, ranks=(5, 40))])
def test_memory_and_threads_change_no_bit(settings: MiningSettings) -> None:
    inputs = inputs_of(**larger())
    wanted = mine(inputs, settings, memory_limit=PLENTY)
    least = smallest_limit(inputs, settings)
    threads = torch.get_num_threads()
    try:
        for limit, count in ((least, 1), (least + (4 << 20), 2), (PLENTY, 2), (PLENTY, 1)):
            torch.set_num_threads(count)
            assert same(mine(inputs, settings, memory_limit=limit), wanted)
    finally:
        torch.set_num_threads(threads)


def wide(rows: int, *, spread: float = 1.0) -> dict[str, Any]:
    """Embeddings that are looked at as bytes; the smaller the spread, the less their bounds tell."""
    rng = np.random.default_rng(7)
    sources = unit_rows(rng, rows, 96) * spread + 0.3 * (1 - spread)
    sources[rows // 2 : rows // 2 + 40] = sources[:40]
    pairs = np.stack([np.arange(rows // 4).repeat(2), rng.integers(0, rows, rows // 4 * 2)], axis=1)
    questions = sources[pairs[::2, 1]] + 0.1 * spread * unit_rows(rng, rows // 4, 96)
    own = rng.integers(0, 8, rows)
    return {"questions": questions, "sources": sources, "pairs": pairs} | {
        "pair_clusters": own[pairs[:, 1]],
        "source_clusters": own,
    }


def multiplied(left: Any, right: Any, out: torch.Tensor) -> None:
    """Products of bytes on any processor."""
    out.copy_(left.numbers.double() @ right.numbers.double().T)


@pytest.mark.skipif(not offers(torch.device("cpu")), reason="the library was not built")
@pytest.mark.parametrize("spread", [1.0, 0.02])
@pytest.mark.parametrize(
    "settings",
    [
        MiningSettings(n_neg=6),
        MiningSettings(n_neg=4, ranks=(5, 40)),
        MiningSettings(n_neg=8, max_similarity=0.3, relative_margin=None),
    ],
)
def test_products_of_bytes_change_no_bit(settings: MiningSettings, spread: float) -> None:
    inputs = inputs_of(**wide(2100, spread=spread))
    used = mock.Mock(side_effect=multiplied)
    with mock.patch.object(problem, "quantizes", return_value=False), mock.patch.object(quantized, "product", used):
        wanted = mine(inputs, settings, memory_limit=PLENTY)
    assert not used.called
    with mock.patch.object(problem, "quantizes", return_value=True), mock.patch.object(quantized, "product", used):
        assert same(mine(inputs, settings, memory_limit=PLENTY), wanted)
    # Bounds that spare nothing are given up after the first of two blocks. Where there is a ceiling, they lie above it.
    assert (used.call_count == 1) == (spread < 1 and settings.ranks is not None)
    assert same(mine(inputs, settings, memory_limit=PLENTY), wanted)  # as this processor does it


@pytest.mark.parametrize("settings", [MiningSettings(n_neg=2), MiningSettings(n_neg=2, ranks=(2, 8))])
def test_lists_that_begin_longer_change_no_bit(settings: MiningSettings) -> None:
    inputs = inputs_of(**wide(2100))
    wanted = mine(inputs, settings, memory_limit=PLENTY)
    lengths = mock.Mock(side_effect=sweep.sweep)
    with (
        mock.patch.object(memory_plan, "_MOST_TASKS", 256),
        mock.patch.object(mining, "_MANY", -1.0),  # longer after each block
        mock.patch.object(mining, "sweep", lengths),
    ):
        assert same(mine(inputs, settings, memory_limit=PLENTY), wanted)
    first = lengths.call_args_list[0].args[2]
    assert {first, 4 * first, 16 * first} <= {call.args[2] for call in lengths.call_args_list}


@pytest.mark.parametrize("settings", [MiningSettings(n_neg=6), MiningSettings(n_neg=4, ranks=(5, 40))])
def test_compiled_code_changes_no_bit(settings: MiningSettings) -> None:
    inputs = inputs_of(**larger())
    with operations(compiled=False):
        wanted = mine(inputs, settings, memory_limit=PLENTY)
    assert same(mine(inputs, settings, memory_limit=PLENTY), wanted)


def test_injected_duplicates_and_false_negatives_stay_out() -> None:
    """5 % of the sources are copies of positives, and 5 % answer in nearly the same words: known in, counted out."""
    rng = np.random.default_rng(4)
    n, each = 400, 20
    sources = unit_rows(rng, n, 32)
    questions = sources[: n // 2] + 0.4 * unit_rows(rng, n // 2, 32)
    pairs = np.stack([np.arange(n // 2)] * 2, axis=1)
    answered = rng.permutation(n // 2)
    copies = sources[answered[:each]]
    others = sources[answered[each : 2 * each]] + 1e-3 * unit_rows(rng, each, 32)
    whole = np.concatenate([sources, copies, others])
    plain = MiningSettings(n_neg=6, relative_margin=None, duplicate_similarity=None)
    injected = {int(question): n + at for at, question in enumerate(answered[: 2 * each])}

    without = mine(inputs_of(questions, whole, pairs), plain, memory_limit=PLENTY)
    assert without.counts.duplicates == each
    chosen = {question for question, row in injected.items() if row in without.negatives[question]}
    # Copies are never chosen; what nearly is an answer would be, without a rule.
    assert chosen == set(answered[each : 2 * each].tolist())

    by_cosine = mine(
        inputs_of(questions, whole, pairs), MiningSettings(n_neg=6, relative_margin=None), memory_limit=PLENTY
    )
    assert by_cosine.counts.duplicates == each
    assert by_cosine.counts.near_duplicates == each
    by_margin = mine(
        inputs_of(questions, whole, pairs), MiningSettings(n_neg=6, duplicate_similarity=None), memory_limit=PLENTY
    )
    assert by_margin.counts.relative_margin >= each
    for found in (by_cosine, by_margin):
        assert all(row not in found.negatives[question] for question, row in injected.items())
        assert not found.counts.relaxed


def test_a_margin_stays_below_a_positive_of_negative_cosine() -> None:
    questions, sources = (
        np.array([[1.0, 0.0]], np.float32),
        np.array([[-1.0, 1.0], [-1.0, 0.95], [-1.0, 1.1], [-1.0, 0.1], [-1.0, 0.2]], np.float32),
    )
    found = mine(
        inputs_of(questions, sources, np.array([[0, 0]])),
        MiningSettings(n_neg=2, tiers=(0, 0, 1, 0), duplicate_similarity=None),
        memory_limit=PLENTY,
    )
    assert found.negatives.tolist() == [[4, 3]]
    assert found.counts.relative_margin == 2  # rows 1 and 2: one above the positive, one less than 5 % below it


def test_tiers_are_written_as_asked() -> None:
    inputs = inputs_of(**larger())
    jasper = mine(inputs, MiningSettings(n_neg=12), memory_limit=PLENTY)
    builder = mine(inputs, MiningSettings(n_neg=12, tier_numbers="builder"), memory_limit=PLENTY)
    assert np.array_equal(jasper.tiers, np.array([9, 1, 1, 2, 0])[builder.tiers])
    if not jasper.counts.other_kinds:
        assert np.bincount(builder.tiers.ravel()).tolist() == [0, 2400, 3200, 2400, 1600]


# ---- bad input


def test_bad_settings() -> None:
    for wrong, words in (
        ({"n_neg": 0}, "n_neg=0"),
        ({"relative_margin": 2.0}, "relative_margin=2.0"),
        ({"max_similarity": float("nan")}, "max_similarity=nan"),
        ({"ranks": (5, 5)}, "ranks="),
        ({"tiers": (1, 2, 3)}, "four numbers"),
        ({"tiers": (0, 0, 0, 0)}, "not all of them 0"),
        ({"method": "magic"}, "expected one of exact, faiss"),
        ({"tier_numbers": "magic"}, "'jasper'"),
    ):
        with pytest.raises(IncompatibleOptionsError, match=words):
            MiningSettings(**wrong)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"sources": np.ones((60, 7), np.float32)}, "one dimension"),
        ({"sources": np.ones(60, np.float32)}, "shape"),
        ({"questions": np.ones((10, 6), np.int64)}, "floating numbers"),
        ({"pairs": np.array([[0, 60]])}, "found row 60 in pair 0"),
        ({"pairs": np.array([[-1, 0]])}, "found row -1 in pair 0"),
        ({"pairs": np.array([[0.0, 1.0]])}, "integers of shape"),
        ({"pairs": np.empty((0, 2), np.int64)}, "at least one pair"),
        ({"pair_clusters": np.full(20, -1)}, "pair_cluster"),
        ({"centroids": np.ones((5, 3), np.float32)}, "centroids: expected shape"),
    ],
)
def test_bad_input(change: dict[str, Any], words: str) -> None:
    with pytest.raises(IntegrityError, match=words):
        mine(inputs_of(**{**task(0, 10, 60, 20, 6, 5), **change}), MiningSettings(), memory_limit=PLENTY)


@pytest.mark.parametrize(("value", "words"), [(0.0, "row 7 is all zeros"), (np.nan, "row 7 holds NaN")])
@pytest.mark.parametrize("name", ["questions", "sources"])
def test_bad_rows(name: str, value: float, words: str) -> None:
    inputs = task(0, 10, 60, 20, 6, 5)
    inputs[name][7] = value
    with pytest.raises(IntegrityError, match=f"{name}.*{words}"):
        mine(inputs_of(**inputs), MiningSettings(), memory_limit=PLENTY)


def test_too_few_sources() -> None:
    inputs = task(0, 3, 5, 4, 3, 0)
    with pytest.raises(IntegrityError, match="more sources than the n_neg=5"):
        mine(inputs_of(**inputs), MiningSettings(n_neg=5), memory_limit=PLENTY)
    every = {**inputs, "pairs": np.stack([np.zeros(5, int), np.arange(5)], axis=1)}
    with pytest.raises(IntegrityError, match="found none for question 0"):
        mine(inputs_of(**every), MiningSettings(n_neg=2), memory_limit=PLENTY)


def test_negatives_are_repeated_where_there_are_no_others() -> None:
    inputs = task(0, 3, 8, 4, 6, 0)
    inputs["sources"] = np.eye(8, 6, dtype=np.float32) + 0.1
    inputs["pairs"] = np.stack([np.zeros(6, int), np.arange(6)], axis=1)  # rows 6 and 7 are left, which are equal
    found = mine(inputs_of(**inputs), MiningSettings(n_neg=3), memory_limit=PLENTY)
    assert found.counts.repeated == 6
    assert set(found.negatives.ravel().tolist()) == {6, 7}


def test_one_cluster_has_no_far_one() -> None:
    inputs = task(1, 10, 60, 20, 6, 1)
    settings = MiningSettings(n_neg=6, relative_margin=None)
    found = mine(inputs_of(**inputs), settings, memory_limit=PLENTY)
    assert found.kinds["adjacent"] == found.kinds["other"] == 0
    assert found.kinds["in cluster"] + found.kinds["random"] == 120
    assert found.counts.other_kinds > 0


# ---- kills


class _Killed(Checkpoints):
    """Kills the process once a few blocks are kept."""

    saves = 3

    def save(self, start: int, stop: int, **arrays: np.ndarray) -> None:
        super().save(start, stop, **arrays)
        self.saves -= 1
        if self.saves == 0:
            os.kill(os.getpid(), signal.SIGKILL)


def in_child(
    workdir: Path, given: dict[str, Any], limit: int, *, early: bool = False, seconds: float | None = None
) -> int:
    """Mine in a forked process that is killed; its exit status."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            torch.set_num_threads(1)
            if early:
                mining.Checkpoints = _Killed  # type: ignore[attr-defined]
            mine(inputs_of(**given), MiningSettings(n_neg=6), memory_limit=limit, workdir=workdir)
            code = 0
        finally:
            os._exit(code)
    if seconds is not None:
        time.sleep(seconds)
        os.kill(pid, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@pytest.fixture
def one_thread() -> Any:
    """A parallel region of OpenMP would leave a forked child waiting for threads that it does not have."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")


@needs_fork
@pytest.mark.usefixtures("one_thread")
def test_killed_in_the_middle(tmp_path: Path) -> None:
    given = larger()
    settings = MiningSettings(n_neg=6)
    limit = smallest_limit(inputs_of(**given), settings)
    wanted = mine(inputs_of(**given), settings, memory_limit=PLENTY)
    assert in_child(tmp_path, given, limit, early=True) == -signal.SIGKILL
    blocks = sorted(path.name for path in tmp_path.glob("mining-*/block-*"))
    assert len(blocks) == 3
    seen: list[int] = []
    # With other memory the blocks are others, and those that are finished are taken all the same.
    found = mine(
        inputs_of(**given),
        settings,
        memory_limit=PLENTY,
        workdir=tmp_path,
        progress=lambda done, _: seen.append(done),
    )
    assert same(found, wanted)
    assert found.products < wanted.products
    assert seen == sorted(seen)
    other = mine(inputs_of(**given), MiningSettings(n_neg=6, seed=1), memory_limit=PLENTY, workdir=tmp_path)
    assert not same(other, wanted)


@needs_fork
@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.usefixtures("one_thread")
def test_killed_at_many_moments(tmp_path: Path) -> None:
    given = larger()
    settings = MiningSettings(n_neg=6)
    limit = smallest_limit(inputs_of(**given), settings)
    wanted = mine(inputs_of(**given), settings, memory_limit=PLENTY)
    rng = random.Random(3)
    began = time.monotonic()
    assert in_child(tmp_path / "first", given, limit) == 0
    lasts = time.monotonic() - began
    kills = 0
    while kills < 50:
        workdir = tmp_path / f"{kills}"
        if in_child(workdir, given, limit, seconds=rng.uniform(0, lasts)) != -signal.SIGKILL:
            continue
        kills += 1
        assert same(mine(inputs_of(**given), settings, memory_limit=PLENTY, workdir=workdir), wanted)
