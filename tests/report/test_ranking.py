"""How well questions find their positives: against a loop over pairs that shares nothing with the code under test."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import jasper_store as js
from jasper_store.report import positives as positives_module, ranking as ranking_module
from jasper_store.report.histogram import Histogram
from jasper_store.report.positives import KnownPositives
from jasper_store.report.ranking import Ranking, look_at_ranking
from jasper_store.report.suspects import find_suspects
from tests.builders import jasper_tensors, write_pt

STEERINGS = ("steering_centroid", "steering_keyword_weighted", "steering_residual")


def _look(path: Path, tensors: dict[str, Any], **options: Any) -> Ranking:
    with js.open(write_pt(path, tensors), **options) as store:
        return look_at_ranking(store, len(tensors["pair_index"]))


def _cosine(one: torch.Tensor, other: torch.Tensor) -> float:
    return float(torch.nn.functional.cosine_similarity(one.double(), other.double(), dim=0))


def _rows(tensors: dict[str, Any]) -> Iterator[tuple[int, int, list[int]]]:
    for (question, positive), negatives in zip(
        tensors["pair_index"].tolist(), tensors["hard_negatives"].tolist(), strict=True
    ):
        yield question, positive, negatives


def _counted(values: list[float], found: Histogram) -> None:
    """The histogram is that of these values."""
    assert found.rows == sum(found.counts) == len(values)
    assert found.smallest == pytest.approx(min(values), abs=1e-6)
    assert found.largest == pytest.approx(max(values), abs=1e-6)
    assert found.median == pytest.approx(sorted(values)[(len(values) - 1) // 2], abs=1e-6)


@pytest.fixture
def tensors() -> dict[str, Any]:
    return jasper_tensors(n_pairs=90, n_neg=4, n_sources=60, n_questions=30)


def test_cosines_and_margin(tensors: dict[str, Any], tmp_path: Path) -> None:
    found = _look(tmp_path, tensors)
    questions, sources = tensors["question_embs"], tensors["source_embs"]
    positive = [_cosine(questions[q], sources[s]) for q, s, _ in _rows(tensors)]
    negative = [[_cosine(questions[q], sources[n]) for n in chosen] for q, _, chosen in _rows(tensors)]
    _counted(positive, found.positive)
    margins = [one - max(others) for one, others in zip(positive, negative, strict=True)]
    _counted(margins, found.margin)
    assert found.not_above == pytest.approx(sum(margin <= 0 for margin in margins) / 90)
    for tier in found.tiers:
        mine = [
            value
            for values, tiers in zip(negative, tensors["negative_tiers"].tolist(), strict=True)
            for value, number in zip(values, tiers, strict=True)
            if number == tier.tier
        ]
        _counted(mine, tier.similarity)
        assert tier.share == pytest.approx(len(mine) / 360)
    assert (found.pairs, found.of, found.not_finite) == (90, 90, 0)


def test_zero_is_an_edge_of_the_margins_bins(tensors: dict[str, Any], tmp_path: Path) -> None:
    found = _look(tmp_path, tensors).margin
    width = (found.high - found.low) / len(found.counts)
    place = -found.low / width
    assert place == pytest.approx(round(place), abs=1e-6)
    assert found.low <= found.smallest < found.largest <= found.high + 1e-6
    assert sum(found.counts[: round(place)]) / found.rows == pytest.approx(_look(tmp_path, tensors).not_above, abs=0.02)


def test_recall(tensors: dict[str, Any], tmp_path: Path) -> None:
    tensors["source_embs"][7] = tensors["source_embs"][3]  # two rows, one source
    found = _look(tmp_path, tensors)
    sources = tensors["source_embs"]
    same = (
        torch.nn.functional.normalize(sources.double()) @ torch.nn.functional.normalize(sources.double()).T > 1 - 1e-4
    )
    answers: dict[int, set[int]] = {}
    for question, positive, _ in _rows(tensors):
        answers.setdefault(question, set()).add(positive)
    for number, recall in enumerate(found.recall):
        among_negatives = among_sources = 0
        for row, (question, positive, negatives) in enumerate(_rows(tensors)):
            query = torch.nn.functional.normalize(tensors["question_embs"][question].double(), dim=0)
            if number:
                query = query + tensors[STEERINGS[number - 1]][row].double()
            mine = _cosine(query, sources[positive])
            among_negatives += all(_cosine(query, sources[n]) < mine for n in negatives)
            rivals = [s for s in range(60) if s not in answers[question] and not same[s, positive]]
            among_sources += all(_cosine(query, sources[s]) < mine for s in rivals)
        assert recall.negatives == pytest.approx(among_negatives / 90)
        assert recall.sources == pytest.approx(among_sources / 90)
    assert [each.steering for each in found.recall] == ["none", "centroid", "keyword_weighted", "residual"]
    assert (found.sources, found.of_sources) == (60, 60)


def test_recall_of_the_question_is_that_of_the_demo(tensors: dict[str, Any], tmp_path: Path) -> None:
    from jasper_store.model.predictor import evaluate, question_alone

    tensors["val_idx"] = torch.arange(90)
    found = _look(tmp_path, tensors)
    with js.create_loader(tmp_path, "val", batch_size=16).dataset_obj as dataset:
        loader = js.create_loader(dataset, batch_size=16)
        assert found.recall[0].negatives == pytest.approx(evaluate(loader, question_alone)["none"])


def test_perfect_steering_finds_every_positive(tensors: dict[str, Any], tmp_path: Path) -> None:
    questions = torch.nn.functional.normalize(tensors["question_embs"][tensors["pair_index"][:, 0]])
    positives = tensors["source_embs"][tensors["pair_index"][:, 1]]
    tensors["steering_residual"] = positives - questions
    found = {each.steering: each for each in _look(tmp_path, tensors).recall}
    assert found["residual"].negatives == found["residual"].sources == 1
    assert found["none"].sources < 0.5


# ---- suspects


def _far_apart(tensors: dict[str, Any]) -> None:
    """Make every question its own positive's neighbour, so that no negative is suspected by accident."""
    tensors["source_embs"] = torch.eye(60, 64)
    tensors["question_embs"] = torch.zeros(90, 64)
    tensors["pair_index"] = torch.stack((torch.arange(90), torch.arange(90) % 60), dim=1)
    for row in range(90):
        tensors["question_embs"][row] = tensors["source_embs"][row % 60] + 0.01
    steps = torch.tensor([[3, 11, 17, 23]])
    tensors["hard_negatives"] = (tensors["pair_index"][:, 1:] + steps) % 60
    for name in STEERINGS:
        tensors[name] = torch.zeros(90, 64)
    for name, rows in (("keyword_embs", 20), ("centroid_embs", 4)):
        tensors[name] = torch.ones(rows, 64)


def test_suspects_that_were_put_there_are_found_and_no_others(tensors: dict[str, Any], tmp_path: Path) -> None:
    _far_apart(tensors)
    assert _look(tmp_path, tensors).suspects.count == 0
    chosen, embeddings = tensors["hard_negatives"], tensors["source_embs"]
    # Pair 4: a source that another pair has as a positive of the same question. Pair 5: its positive, copied.
    # Pair 6: a source that is nearer to the question than the positive. Pair 7: one at 0.96 of it; pair 8: at 0.94.
    tensors["pair_index"][70, 0] = 4
    chosen[4, 2] = 70 % 60
    tensors["question_embs"][4, 10] += 0.9
    embeddings = torch.cat(
        (embeddings, embeddings[5:6], *(_at(tensors, pair, share) for pair, share in ((6, 1.05), (7, 0.96), (8, 0.94))))
    )
    tensors["source_embs"] = embeddings
    for place, pair in enumerate((5, 6, 7, 8)):
        chosen[pair, 1] = 60 + place
    found = _look(tmp_path, tensors).suspects
    assert [(each.pair, each.column, each.source, each.reason) for each in found.first] == [
        (4, 2, 10, "listed"),
        (5, 1, 60, "same"),
        (6, 1, 61, "similar"),
        (7, 1, 62, "similar"),
    ]
    assert found.counts == {"listed": 1, "same": 1, "similar": 2}
    assert (found.count, found.pairs, found.negatives) == (4, 4, 360)
    for each in found.first:
        question = tensors["question_embs"][tensors["pair_index"][each.pair, 0]]
        assert each.similarity == pytest.approx(_cosine(question, embeddings[each.source]), abs=1e-5)
        assert each.positive_similarity == pytest.approx(_cosine(question, embeddings[each.positive]), abs=1e-5)
        assert each.positive == tensors["pair_index"][each.pair, 1]
        assert each.tier == tensors["negative_tiers"][each.pair, each.column]


def _at(tensors: dict[str, Any], pair: int, share: float) -> torch.Tensor:
    """A source whose cosine with the question is this share of the positive's, or as near to 1 as there is."""
    question = torch.nn.functional.normalize(tensors["question_embs"][pair], dim=0)
    aside = torch.zeros(64)
    aside[63] = 1
    aside = torch.nn.functional.normalize(aside - (aside @ question) * question, dim=0)
    cosine = min(share * _cosine(question, tensors["source_embs"][pair % 60]), 1.0)
    found: torch.Tensor = cosine * question + (1 - cosine**2) ** 0.5 * aside
    return found[None]


def test_of_many_suspects_the_worst_are_listed() -> None:
    cosines = torch.cat((torch.full((50, 1), 0.5), torch.linspace(0.48, 0.9, 50)[:, None]), dim=1)
    none = torch.zeros(50, 1, dtype=torch.bool)
    rows = torch.arange(50)
    found = find_suspects(
        pairs=rows * 10,
        index=torch.zeros(50, 2, dtype=torch.int64),
        chosen=rows[:, None],
        tier=none.long(),
        cosines=cosines,
        same=none,
        listed=none,
    )
    assert found.count == 50
    assert [each.pair for each in found.first] == [row * 10 for row in range(49, 24, -1)]


# ---- bounded, whatever lies where


@pytest.mark.parametrize("options", [{"use_mmap": True}, {"use_mmap": False}])
def test_placement_changes_nothing(tensors: dict[str, Any], tmp_path: Path, options: dict[str, Any]) -> None:
    assert _look(tmp_path, tensors, **options) == _look(tmp_path, tensors)


def test_blocks_change_nothing(tensors: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = _look(tmp_path, tensors)
    monkeypatch.setattr(ranking_module, "_BLOCK_PAIRS", 7)
    monkeypatch.setattr(positives_module, "_BLOCK_ROWS", 11)
    parts = _look(tmp_path, tensors)
    assert parts.recall == whole.recall
    assert parts.suspects == whole.suspects
    assert parts.margin.median == pytest.approx(whole.margin.median, abs=1e-6)


def test_a_sample_is_the_same_each_time(
    tensors: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ranking_module, "_PAIRS", 25)
    monkeypatch.setattr(ranking_module, "_SOURCES", 15)
    found = _look(tmp_path, tensors)
    assert (found.pairs, found.of, found.sources, found.of_sources) == (25, 90, 15, 60)
    assert found == _look(tmp_path, tensors)
    assert found.suspects.negatives == 100


def test_what_is_held_does_not_grow(tensors: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No take is of more bytes than a block, or the sample of sources, may have."""
    monkeypatch.setattr(ranking_module, "_BLOCK_NBYTES", 4096)
    monkeypatch.setattr(ranking_module, "_SOURCES_NBYTES", 2048)
    taken = []
    with js.open(write_pt(tmp_path, tensors), use_mmap=True) as store:
        kind = type(store["source_embs"])
        plain = kind.take

        def take(self: Any, rows: Any, out: Any = None) -> torch.Tensor:
            found = plain(self, rows, out)
            if found.is_floating_point():
                taken.append(found.nbytes)
            return found

        monkeypatch.setattr(kind, "take", take)
        look_at_ranking(store, 90)
    assert max(taken) <= 4096


def test_embeddings_that_are_not_finite_are_left_out(tensors: dict[str, Any], tmp_path: Path) -> None:
    tensors["source_embs"][tensors["pair_index"][0, 1]] = float("nan")
    tensors["steering_residual"][5] = float("inf")
    found = _look(tmp_path, tensors)
    assert found.not_finite >= 2
    assert found.pairs + found.not_finite == 90
    assert found.positive.rows == found.pairs
    tensors["question_embs"][:] = float("nan")
    nothing = _look(tmp_path, tensors)
    assert (nothing.pairs, nothing.not_finite, nothing.suspects.count) == (0, 90, 0)
    assert [each.negatives for each in nothing.recall] == [0, 0, 0, 0]


def test_known_positives(tensors: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    index = tensors["pair_index"]
    with js.open(write_pt(tmp_path, tensors)) as store:
        known = KnownPositives.of(store["pair_index"], index[:10], 60)
        place, source = known.of_questions(index[:10, 0])
        for row in range(10):
            wanted = sorted({s for q, s, _ in _rows(tensors) if q == index[row, 0]})
            assert source[place == row].tolist() == wanted
        assert known.holds(index[:10, 0], index[:10, 1]).all()
        monkeypatch.setattr(positives_module, "SCALARS", 0)
        few = KnownPositives.of(store["pair_index"], index[:10], 60)
        assert len(few.keys) == len({tuple(pair) for pair in index[:10].tolist()})
