"""``jasper-store report``: a page that is whole, says what it should, and fetches nothing."""

from __future__ import annotations

import itertools
import json
import re
import shutil
import subprocess
import zlib
from collections.abc import Callable
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import jasper_store as js
from jasper_store.formats.base import Parts, Schema, TensorSpec
from jasper_store.formats.registry import locate
from jasper_store.jasper.steering import LinearCurriculum, default_curriculum
from jasper_store.report import figures as figures_module
from jasper_store.report.figures import project
from jasper_store.report.histogram import histogram
from jasper_store.report.jasper import curriculum_by_epoch
from jasper_store.report.page.document import COMMON_SECTIONS, SECTIONS
from jasper_store.report.page.svg import WIDTH, ticks
from jasper_store.report.page.tensor_parts import PARTS_SECTION
from jasper_store.report.parts import look_at_parts
from jasper_store.report.rows import spread
from jasper_store.report.sample import look_at_samples
from tests.cli.conftest import Run

VOID = {"meta", "br"}
CHROMIUM = next((found for name in ("chromium", "chromium-browser") if (found := shutil.which(name))), None)


class _Page(HTMLParser):
    """Fails on tags that do not nest; collects what is there."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.tags: set[str] = set()
        self.links: list[str] = []
        self.text = ""
        self.feed(page)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        found = dict(attrs)
        self.ids += [value for key, value in attrs if key == "id" and value]
        self.links += [str(found[key]) for key in ("src", "href", "xlink:href", "action") if key in found]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture
def made(run: Run, tmp_path: Path) -> Callable[[Path], str]:
    def make(data: Path, *more: str, code: int = 0) -> str:
        out = tmp_path / "report.html"
        result = run("report", data, "--out", out, *more)
        assert result.exit_code == code, result.output
        assert str(out) in result.stdout
        return out.read_text(encoding="utf-8")

    return make


def test_all_parts_are_there_and_nothing_is_fetched(made: Callable[..., str], data: Path) -> None:
    text = made(data)
    page = _Page(text)
    assert [name for name in page.ids if name in SECTIONS] == list(SECTIONS)
    assert "http://" not in text
    assert "https://" not in text
    assert "url(" not in text
    assert "@import" not in text
    assert page.links == []
    assert not page.tags & {"script", "link", "iframe", "img", "object"}
    assert "nan" not in re.findall(r'="([^"]*)"', text)
    assert text.count("<svg") == len(SECTIONS) - 2  # one each, but for the lists of suspects and of verify


def test_it_says_what_the_dataset_is(made: Callable[..., str], data: Path) -> None:
    page = _Page(made(data))
    for words in (
        "source_embs",
        "preloaded",
        "keyword_weighted 10% to 40%",
        "tier 0",
        "verified",
        "mapped, batches of 32",
    ):
        assert words in page.text


def test_names_are_escaped(made: Callable[..., str], data: Path) -> None:
    config = json.loads((data / "config.json").read_text())
    config["dataset_name"] = '<script>alert("x")</script>'
    (data / "config.json").write_text(json.dumps(config))
    text = made(data, "--no-verify")
    assert "<script" not in text
    assert "&lt;script&gt;" in text


def test_without_verification(made: Callable[..., str], data: Path) -> None:
    assert "not verified" in _Page(made(data, "--no-verify")).text


def test_data_that_contradicts_itself_still_has_a_page(made: Callable[..., str], data: Path) -> None:
    pairs = torch.load(data / "pair_index.pt", weights_only=True)
    pairs[3, 0] = 999
    torch.save(pairs, data / "pair_index.pt")
    page = _Page(made(data, code=4))
    assert [name for name in page.ids if name in SECTIONS] == list(SECTIONS)
    assert "999" in page.text
    assert "contradict" in page.text


def test_not_a_number_is_left_out_of_the_pictures(made: Callable[..., str], data: Path) -> None:
    for name in ("source_embs", "pair_relevance"):
        values = torch.load(data / f"{name}.pt", weights_only=True)
        values[:5] = float("nan")
        torch.save(values, data / f"{name}.pt")
    text = made(data, code=4)
    assert not re.search(r'(points|cx|cy|x|y|height|width)="[^"]*nan', text)


def test_in_json(run_json: Callable[..., Any], data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    found = run_json("report", data)
    assert found["figures"]["sizes"]["pairs"] == 50
    assert sum(found["figures"]["clusters"]) == 50
    assert sum(tier["share"] for tier in found["figures"]["tiers"]) == pytest.approx(1)
    assert sum(found["figures"]["relevance"]["counts"]) == 50
    assert len(found["figures"]["projection"]["points"]) == 50
    assert found["curriculum"][0] == [0.7, 0.2, 0.1, 0.0]
    assert found["verification"]["ok"] is True
    assert not (tmp_path / "report.html").exists()


def test_a_memory_limit_draws_a_mixed_plan(
    made: Callable[..., str], run_json: Callable[..., Any], data: Path, tmp_path: Path
) -> None:
    found = run_json("report", data, "--no-verify", "--memory-limit", "12KiB")
    places = {place["placement"]: place for place in found["places"]}
    assert set(places) == {"ram", "mmap"}
    assert found["memory_limit"] == 12 << 10
    for name, place in places.items():
        rows = [row for row in found["tensors"] if row["placement"] == name]
        assert place["tensors"] == len(rows)
        assert place["nbytes"] == sum(row["nbytes"] for row in rows)
    read = sum(row["nbytes"] for row in found["samples"]["reads"])
    assert sum(place["sample_nbytes"] for place in places.values()) == pytest.approx(read)
    text = made(data, "--no-verify", "--memory-limit", "12KiB")
    page = _Page(text)
    assert text.count("<svg") == len(SECTIONS) - 1  # one more than without a limit: what a sample reads, by place
    for words in (
        "preloading at most 12.00 KiB",
        "Bytes that a sample reads",
        " preloaded, ",
        " mapped), batches of 32",
    ):
        assert words in page.text, words
    assert "Bytes that a sample reads" not in _Page(made(data, "--no-verify")).text


def test_questions_are_compared_with_their_negatives(
    made: Callable[..., str], run_json: Callable[..., Any], data: Path
) -> None:
    page = _Page(made(data, "--no-verify"))
    for words in (
        "the positiveone a pair, median",
        "Of ",
        "with keyword_weighted",
        "chance 25.0%",
        "among all sources",
        "too similar",
    ):
        assert words in page.text, words
    ranking = run_json("report", data, "--no-verify")["figures"]["ranking"]
    assert ranking["pairs"] == 50
    assert len(ranking["recall"]) == 4
    assert len(ranking["suspects"]["first"]) == min(25, sum(ranking["suspects"]["counts"].values()))
    first = ranking["suspects"]["first"][0]
    assert {"pair", "source", "similarity", "positive_similarity", "reason"} <= first.keys()


def test_no_suspects_are_said(made: Callable[..., str], data: Path) -> None:
    questions = torch.load(data / "question_embs.pt", weights_only=True)
    pairs = torch.stack((torch.arange(40), torch.arange(40)), dim=1)
    torch.save(torch.cat((pairs, pairs[:10])), data / "pair_index.pt")
    sources = torch.cat((questions, -questions[:5]))
    torch.save(sources, data / "source_embs.pt")
    torch.save(torch.full((50, 3), 44), data / "hard_negatives.pt")
    page = _Page(made(data, "--no-verify"))
    assert "None is a positive of the same question" in page.text
    assert "Of 0.0% it is not above 0" in page.text


def test_without_centroids(made: Callable[..., str], data: Path) -> None:
    (data / "centroid_embs.pt").unlink()
    page = _Page(made(data, "--no-verify"))
    assert [name for name in page.ids if name in SECTIONS] == list(SECTIONS)
    assert "4 clusters hold" in page.text


# ---- datasets that are none of JASPER's


def test_a_declared_dataset_has_the_parts_that_all_have(made: Callable[..., str], declared: Path) -> None:
    text = made(declared)
    page = _Page(text)
    assert [name for name in page.ids if name in SECTIONS] == list(COMMON_SECTIONS)
    assert text.count("<svg") == len(COMMON_SECTIONS) - 1
    assert "triplets <b>" in page.text
    for words in (
        "passage_embs[hard_negatives[row]]",
        "float32 [3, 8]",
        "tokens.offsets",
        "int64 [...]",
        "by column 0, float32 [8]",
        "3 rows, float32 [8]",
        "position, 0 to 29 of train",
        "train / val30 / 10",
        "verified",
        "mapped, batches of 32",
        "serving the 30 samples of an epoch",
    ):
        assert words in page.text, words
    for words in ("negatives each", "urriculum", "teering", "luster", "not known"):
        assert words not in page.text, words
    assert not re.search(r'(points|x|y|x1|y1|height|width)="-?[^"]*nan', text)


def test_a_declared_dataset_in_json(run_json: Callable[..., Any], declared: Path) -> None:
    found = run_json("report", declared)
    assert "curriculum" not in found
    assert "figures" not in found
    samples = found["samples"]
    assert [field["name"] for field in samples["fields"]] == ["query", "positive", "negatives", "tokens"]
    assert samples["splits"] == {"train": 30, "val": 10}
    reads = {row["tensor"]: (row["rows"], row["nbytes"]) for row in samples["reads"]}
    assert reads["passage_embs"] == (4, 4 * 32)
    assert reads["tokens.values"][0] == pytest.approx(73 / 50)
    assert samples["nbytes_read"] == pytest.approx(sum(nbytes for _, nbytes in reads.values()))
    assert {rate["batch_size"] for rate in found["speed"]} == {32, 256}
    assert all(rate["samples_per_second"] > 0 for rate in found["speed"])


def test_jasper_has_the_picture_too(made: Callable[..., str], run_json: Callable[..., Any], data: Path) -> None:
    page = _Page(made(data, "--no-verify"))
    assert "one of steering_centroid, steering_keyword_weighted, steering_residual or zeros [row]" in page.text
    lookups = run_json("report", data, "--no-verify")["samples"]["lookups"]
    by_tensor = {lookup["tensors"][0]: lookup for lookup in lookups}
    assert lookups[by_tensor["question_embs"]["parent"]]["tensors"] == ["pair_index"]
    assert by_tensor["question_embs"]["by_column"] == 0
    assert by_tensor["steering_centroid"]["fields"] == ["steering", "steering_variant"]


def test_tensors_of_which_nothing_is_declared(made: Callable[..., str], tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    plain.mkdir()
    np.save(plain / "embeddings.npy", np.ones((40, 4), dtype=np.float32))
    np.save(plain / "labels.npy", np.arange(40))
    np.save(plain / "class_names.npy", np.arange(3))
    page = _Page(made(plain))
    for words in ("Nothing is declared", "embeddings[i]", "labels[i]", "samples40", "fields2", "preloaded"):
        assert words in page.text, words
    assert "class_names[i]" not in page.text
    assert _Page(made(plain / "embeddings.npy")).text.count("embeddings[i]")


def test_tensors_that_do_not_belong_together_have_a_page(made: Callable[..., str], tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    plain.mkdir()
    np.save(plain / "a.npy", np.ones((4, 2)))
    np.save(plain / "b.npy", np.ones((5, 2)))
    page = _Page(made(plain))
    assert "which tensors belong together" in page.text
    assert [name for name in page.ids if name in SECTIONS] == list(COMMON_SECTIONS)


@pytest.mark.parametrize("flag", ["--verify", "--no-verify"])
@pytest.mark.parametrize(
    ("samples", "says"),
    [
        ({"fields": {"x": "nope[i]", "y": "query_embs[nada[i]]"}}, ("'nope' (field 'x')", "'nada' (field 'y')")),
        ({"fields": {"x": "query_embs[passage_embs[i]]"}}, ("rows are named by integers",)),
        ({"fields": {"x": "query_embs[i"}}, ("cannot be understood",)),
        ({"fields": {"x": "query_embs[row]"}, "splits": {"train": "no_idx"}}, ("'no_idx' (split 'train')",)),
        (["query_embs[i]"], ("expected {",)),
    ],
)
def test_a_declaration_that_does_not_fit_is_said(
    made: Callable[..., str],
    declared: Path,
    redeclare: Callable[[Path, object], None],
    samples: object,
    says: tuple[str, ...],
    flag: str,
) -> None:
    redeclare(declared, samples)
    page = _Page(made(declared, flag, code=4))
    for words in (*says, "the declaration does not fit", "Not measured", "passage_embs"):
        assert words in page.text, words
    assert [name for name in page.ids if name in SECTIONS] == list(COMMON_SECTIONS)


def test_an_index_out_of_bounds_is_a_finding(made: Callable[..., str], declared: Path) -> None:
    values = np.load(declared / "hard_negatives.npy")
    values[3, 0] = 999
    for file in (declared / "hard_negatives.npy", declared / "jasper_store.json"):
        file.unlink()
    np.save(declared / "hard_negatives.npy", values)
    page = _Page(made(declared, code=4))
    assert "999" in page.text
    assert "1 error" in page.text


def _texts(page: str) -> list[list[tuple[float, float, float, str]]]:
    """By picture: left, right and baseline of its texts in its own units at 400 px, and what they say."""
    css = re.search(r"max-width: 480px.*?svg text \{ font-size: (\d+)px", page, re.DOTALL)
    assert css is not None
    size = int(css[1])
    # 400 px but for the margins of page and card; a picture is 440 units wide. 12 px is read without zooming.
    assert size * (400 - 2 * 10 - 2 * 13) / WIDTH >= 12
    pictures = []
    for picture in re.findall(r"<svg.*?</svg>", page, re.DOTALL):
        found = []
        for attributes, words in re.findall(r"<text([^>]*)>([^<]*)</text>", picture):
            given = dict(re.findall(r'([\w-]+)="([^"]*)"', attributes))
            width = len(unescape(words)) * size * (0.6 if given.get("class") == "strong" else 0.5)
            x, shift = float(given["x"]), {"middle": 0.5, "end": 1.0}.get(given.get("text-anchor", ""), 0.0)
            found.append((x - shift * width, x + (1 - shift) * width, float(given["y"]), words))
        pictures.append(found)
    return pictures


@pytest.mark.parametrize("kind", ["data", "declared", "numbered"])
def test_text_at_400_px_is_large_enough_and_in_its_place(
    made: Callable[..., str], request: pytest.FixtureRequest, kind: str
) -> None:
    for texts in _texts(made(request.getfixturevalue(kind))):
        for left, right, y, words in texts:
            assert left > -3, words
            assert right < WIDTH + 3, words
            for other in texts:
                beside = right <= other[0] + 3 or other[1] <= left + 3 or abs(other[2] - y) > 11
                assert beside or other == (left, right, y, words), (words, other)


@pytest.fixture
def numbered(tmp_path: Path) -> Path:
    """A tensor in twelve files, one in a whole one."""
    path = tmp_path / "numbered"
    path.mkdir()
    for number in range(12):
        np.save(path / f"embeddings-{number:05}.npy", np.ones((5 + number, 4), np.float32))
    np.save(path / "labels.npy", np.zeros(sum(5 + number for number in range(12)), np.int64))
    return path


def test_tensors_in_parts_have_a_picture(
    made: Callable[..., str], run_json: Callable[..., Any], numbered: Path, data: Path
) -> None:
    text = made(numbered)
    page = _Page(text)
    assert PARTS_SECTION in page.ids
    for words in ("12 parts in 12 files, 126 rows", "part 3 of 12: rows 11 to 17, embeddings-00002.npy"):
        assert words in page.text
    (found,) = run_json("report", numbered, "--no-verify")["parts"]
    assert (found["parts"], found["files"], found["fewest"], found["most"]) == (12, 12, 5, 16)
    assert [stretch["start"] for stretch in found["stretches"]][:3] == [0, 5, 11]
    assert PARTS_SECTION not in _Page(made(data, "--no-verify")).ids  # nothing to show


def test_many_parts_are_drawn_in_stretches(tmp_path: Path) -> None:
    files = tuple(tmp_path / f"{number}.npy" for number in range(1000))
    starts = np.arange(0, 3003, 3)
    parts = Parts(files, np.arange(1000), np.zeros(1000, np.int64), starts)
    (found,) = look_at_parts([TensorSpec("x", torch.float32, (3000, 2), parts)])
    assert (found.parts, found.files, found.rows, found.fewest) == (1000, 1000, 3000, 3)
    assert len(found.stretches) == 100
    assert sum(stretch.parts for stretch in found.stretches) == 1000
    assert all(a.stop == b.start for a, b in itertools.pairwise(found.stretches))
    assert found.stretches[0].files == ("0.npy", "9.npy")


def test_every_axis_has_a_name_and_a_unit(made: Callable[..., str], data: Path) -> None:
    pictures = dict(re.findall(r'<svg[^>]*aria-label="([^"]*)".*?>(.*?)</svg>', made(data), re.DOTALL))
    named = {
        "Probability of each steering": ["epoch", "probability"],
        "Similarity of negatives": ["cosine similarity with the pair&#x27;s positive, -1 to 1"],
        "Pairs per cluster": ["clusters, the largest first", "pairs per cluster"],
        "Distribution of relevance": ["relevance, 0 to 1", "pairs per bar"],
        "Distribution of cosine distance": ["cosine distance, 0 to 2", "pairs per bar"],
        "Samples per second": ["samples per second (/s), from 0"],
    }
    for label, names in named.items():
        (drawn,) = [drawn for title, drawn in pictures.items() if title.startswith(label)]
        assert re.findall(r'class="name">([^<]*)<', drawn) == names


def test_a_wide_dataset_and_long_names_stay_in_the_picture(made: Callable[..., str], tmp_path: Path) -> None:
    wide = tmp_path / "wide"
    with js.DatasetWriter(wide, format="npy") as writer:
        for number in range(40):
            writer.append(f"a_name_that_is_much_longer_than_any_box_of_the_picture_{number}", torch.ones(3, 2))
    text = made(wide, "--no-verify")
    picture = re.search(r'aria-label="Lookups of a sample.*?</svg>', text, re.DOTALL)
    assert picture is not None
    shown = re.findall(r"<text[^>]*>([^<]*)</text>", picture[0])
    assert len(shown) > 80
    assert max(map(len, shown)) <= 36
    assert "picture_39, float32 [2]" in picture[0]  # in the title


def test_a_view_of_samples_reads_headers_only(declared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    specs = locate(declared, "auto", Schema()).specs
    with monkeypatch.context() as patched:
        patched.setattr("jasper_store.samples.opened.open_store", None)
        view = look_at_samples(declared, specs)
    with js.Dataset(declared, split="train") as dataset:
        batch = dataset.__getitems__([0, 1]).tensors
        assert view.length == len(dataset)
        assert dict(dataset.fields) == {field.name: field.expression for field in view.fields}
        shapes = {key: list(batch[key].shape[1:]) for key in ("query", "positive", "negatives")}
    assert shapes == {field.name: list(field.shape) for field in view.fields if field.name != "tokens"}


def test_a_memory_limit(run_json: Callable[..., Any], data: Path) -> None:
    found = run_json("report", data, "--no-verify", "--memory-limit", "10KiB")
    assert {tensor["placement"] for tensor in found["tensors"]} == {"ram", "mmap"}
    assert "10.00 KiB" in found["budget"]


def test_bad_input(refused: Callable[..., str], data: Path, tmp_path: Path) -> None:
    assert "nowhere" in refused(3, "report", tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    assert "expected tensors" in refused(3, "report", tmp_path / "empty")
    assert "zarr" in refused(2, "report", data, "--format", "zarr")
    assert "is a directory" in refused(6, "report", data, "--out", tmp_path)
    assert "no directory" in refused(6, "report", data, "--out", tmp_path / "no" / "where.html")
    (data / "source_embs.pt").write_bytes(b"PK")
    assert "source_embs" in refused(4, "report", data, "--out", tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()


# ---- the computing part


def test_a_histogram_counts_what_is_finite() -> None:
    found = histogram(torch.tensor([0.0, 0.5, 1.0, float("nan"), float("inf")]), 5)
    assert (sum(found.counts), found.rows, found.low, found.high, found.median) == (3, 3, 0.0, 1.0, 0.5)
    assert sum(histogram(torch.full((7,), 0.25), 7).counts) == 7
    assert histogram(torch.tensor([]), 0).rows == 0


def test_a_histogram_of_equal_values_invents_no_range(made: Callable[..., str], data: Path) -> None:
    found = histogram(torch.full((7,), 1.0), 7)
    assert (found.smallest, found.largest) == (1.0, 1.0)
    torch.save(torch.ones_like(torch.load(data / "pair_relevance.pt", weights_only=True)), data / "pair_relevance.pt")
    page = made(data, "--no-verify")
    text = _Page(page).text
    assert "50 pairs.all are 1.0" in text
    assert page.count("<svg") == len(SECTIONS) - 3
    for invented in ("0.500 to 1.500", "from 0.500", "1.000 to 1.025", "0.975 to"):
        assert invented not in page


def test_no_finite_value_is_no_range(made: Callable[..., str], data: Path) -> None:
    nothing = torch.full_like(torch.load(data / "pair_relevance.pt", weights_only=True), float("nan"))
    torch.save(nothing, data / "pair_relevance.pt")
    assert "None of 50 pairs has a finite value." in _Page(made(data, "--no-verify")).text


def test_large_tensors_are_sampled_in_runs(data: Path) -> None:
    with js.open(data) as store:
        tensor = store["pair_relevance"]
        assert torch.equal(spread(tensor), tensor.tensor())
        assert len(spread(tensor, at_most=12, runs=3)) == 12


def test_bounded_samples_give_the_same_page(
    made: Callable[..., str], data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(figures_module, "_PAIRS", 5)
    monkeypatch.setattr(figures_module, "_POINTS", 5)
    monkeypatch.setattr(spread, "__defaults__", (16, 4))
    text = _Page(made(data, "--no-verify")).text
    assert "Counted among 16 of 50 pairs" in text


def test_the_projection_shows_the_axes_of_most_variance() -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(300, 6, generator=generator) * torch.tensor([0.1, 5.0, 0.1, 2.0, 0.1, 0.1])
    before = torch.random.get_rng_state()
    found = project(values, torch.zeros(300).long(), values[:1], torch.tensor([0]), 300)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert found is not None
    xs = np.array([point.x for point in found.points])
    assert abs(np.corrcoef(xs, values[:, 1].numpy())[0, 1]) > 0.99
    assert found.explained[0] > found.explained[1] > 0
    assert sum(found.explained) <= 1.0001


@pytest.mark.parametrize("shape", [(1, 5), (5, 1)])
def test_no_plane_no_projection(shape: tuple[int, int]) -> None:
    values = torch.randn(shape)
    assert project(values, torch.zeros(shape[0]).long(), values[:1], torch.tensor([0]), shape[0]) is None
    assert project(torch.ones(4, 4), torch.zeros(4).long(), torch.ones(1, 4), torch.tensor([0]), 4) is None


def test_the_curriculum_is_followed_to_its_last_change() -> None:
    stages = curriculum_by_epoch(default_curriculum())
    assert len(stages) == 50
    assert stages[-1] == (0.0, 0.2, 0.4, 0.4)
    linear = curriculum_by_epoch(LinearCurriculum(0.5, 0.1, 100, (0.2, 0.3, 0.5)))
    assert len(linear) == 110


@pytest.mark.parametrize(
    ("low", "high", "found"),
    [
        (0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1.0]),
        (0, 50, [0, 10, 20, 30, 40, 50]),
        (3, 3, [3]),
        (-1, 1, [-1, -0.5, 0, 0.5, 1]),
    ],
)
def test_ticks_are_round_numbers(low: float, high: float, found: list[float]) -> None:
    assert ticks(low, high) == pytest.approx(found)


# ---- in a browser


@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium (Debian's package of that name)")
@pytest.mark.parametrize("width", [1200, 390])
def test_chromium_renders_it(made: Callable[..., str], data: Path, tmp_path: Path, width: int) -> None:
    made(data)
    shot = tmp_path / "shot.png"
    subprocess.run(
        [
            str(CHROMIUM),
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-dev-shm-usage",
            "--disable-background-networking",
            "--no-first-run",
            f"--user-data-dir={tmp_path / 'profile'}",
            f"--window-size={width},2400",
            f"--screenshot={shot}",
            (tmp_path / "report.html").as_uri(),
        ],
        check=True,
        capture_output=True,
        timeout=120,
    )
    pixels = _pixels(shot.read_bytes())
    assert pixels.shape[1] == max(width, 390)
    # The cards, the text and the charts are many colours; a page that failed is one.
    assert len(np.unique(pixels[::4, ::4].reshape(-1, pixels.shape[2]), axis=0)) > 100


def _pixels(png: bytes) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """The bytes of an 8-bit PNG's pixels, [height, width, channels], as its filters left them.

    Whatever relates a pixel to its neighbours: a page that is one colour stays a few values.
    """
    width, height = int.from_bytes(png[16:20], "big"), int.from_bytes(png[20:24], "big")
    channels = {2: 3, 6: 4}[png[25]]
    data, at = b"", 8
    while at < len(png):
        length = int.from_bytes(png[at : at + 4], "big")
        if png[at + 4 : at + 8] == b"IDAT":
            data += png[at + 8 : at + 8 + length]
        at += length + 12
    lines = np.frombuffer(zlib.decompress(data), dtype=np.uint8).reshape(height, 1 + width * channels)
    return lines[:, 1:].reshape(height, width, channels)
