"""The parts of the page that say how well questions find their positives."""

from __future__ import annotations

from html import escape

from jasper_store.report.page import charts, ridges
from jasper_store.report.page.parts import legend, section
from jasper_store.report.page.svg import WIDTH, Axis, joined, picture, tag, text
from jasper_store.report.ranking import Ranking
from jasper_store.report.suspects import Suspect, Suspects

__all__ = ["TITLES", "ranking_sections"]

TITLES = {
    "questions": "Questions, positives and negatives",
    "margin": "Margin",
    "recall": "Recall@1 without a model",
    "suspects": "Suspected false negatives",
}
"""Identifiers of these parts, in their order, and their titles."""

_REASONS = {
    "listed": "listed as a positive",
    "same": "same embedding",
    "similar": "too similar",
}
_BAR = 15.0
_MOST_ROWS = 12


def ranking_sections(found: Ranking) -> str:
    """Cosines of the question, margin, recall and suspects, as cards."""
    return _questions(found) + _margin(found) + _recall(found) + _suspects(found)


def _pairs(found: Ranking) -> str:
    seen = f"{found.pairs:,} pairs" if found.pairs >= found.of else f"A sample of {found.pairs:,} of {found.of:,} pairs"
    left_out = f" ({found.not_finite:,} more are not finite)" if found.not_finite else ""
    return f"{seen}{left_out}"


def _questions(found: Ranking) -> str:
    note = (
        f"{_pairs(found)}: the cosine of the question with its positive, and with each of its negatives. Training "
        "learns most where they overlap. Each outline is scaled to its own peak; dashed is the median."
    )
    return section("questions", TITLES["questions"], note, ridges.of_the_question(found))


def _margin(found: Ranking) -> str:
    note = (
        f"{_pairs(found)}: the cosine of the question with its positive minus that with the most similar of its "
        f"negatives. Of {found.not_above:.1%} it is not above 0 (red): a negative is as similar, or more. Dashed is the "
        f"median, {found.margin.median:.3f}."
    )
    picture = charts.distribution(found.margin, "margin, -2 to 2", "v3", below="t2")
    return section("margin", TITLES["margin"], note, picture)


def _recall(found: Ranking) -> str:
    negatives = found.suspects.negatives // max(found.pairs, 1)
    which = "all" if found.sources >= found.of_sources else f"a sample of {found.sources:,} of {found.of_sources:,}"
    note = (
        f"{_pairs(found)}: share of queries that are nearer to the positive than to anything else. A query is the "
        "question, with a steering added to it as it is stored, made length 1; no model is involved."
    )
    words = legend(
        [
            (
                "v1",
                f"among the positive and its {_count(negatives, 'hard negative')}; chance {1 / (1 + negatives):.1%}",
            ),
            ("v3", f"among {which} sources, other positives left out; chance {1 / max(found.sources, 1):.2%}"),
        ]
    )
    return section("recall", TITLES["recall"], note, _bars(found), words)


def _bars(found: Ranking) -> str:
    row = 58.0
    axis = Axis(0, 1, 0, WIDTH - 60)
    parts = []
    for index, each in enumerate(found.recall):
        top = index * row
        name = "the question alone" if each.steering == "none" else f"with {each.steering}"
        parts.append(text(0, top + 14, name, class_="strong"))
        for line, (value, colour) in enumerate(((each.negatives, "v1"), (each.sources, "v3"))):
            y = top + 20 + line * (_BAR + 2)
            end = max(axis(value), 1.5)
            parts.append(tag("rect", tag("title", f"{value:.2%}"), x=0, y=y, width=end, height=_BAR, class_=colour))
            parts.append(text(end + 7, y + 12, f"{value:.1%}"))
    height = row * len(found.recall) + 16
    parts.append(text(0, height - 4, "share of queries that find their positive first, 0 to 100%", class_="name"))
    return picture(height, "Recall@1 of the question alone and with each steering", *parts)


# ---- suspects


def _suspects(found: Ranking) -> str:
    note = f"{_pairs(found)}, {found.suspects.negatives:,} negatives. {_counts(found.suspects)}"
    if not found.suspects.first:
        return section("suspects", TITLES["suspects"], note, wide=True)
    head = (
        '<tr><th class="right">pair</th><th class="right">negative</th><th class="right wide-only">tier</th>'
        '<th class="right">cosine</th><th class="right wide-only">positive</th>'
        '<th class="right">positive\'s<span class="wide-only"> cosine</span></th>'
        '<th class="apart">why</th></tr>'
    )
    listed = found.suspects.first[:_MOST_ROWS]
    rows = joined(_row(each) for each in listed)
    shown = ""
    if found.suspects.count > len(listed):
        words = (
            f"The first {len(listed)} of {found.suspects.count:,}; jasper-store report --json has "
            f"{len(found.suspects.first)}. Negative and positive are rows of source_embs."
        )
        shown = f'<p class="note under">{words}</p>'
    table = f'<div class="scroll"><table><thead>{head}</thead><tbody>{rows}</tbody></table></div>{shown}'
    return section("suspects", TITLES["suspects"], note, table, wide=True)


def _counts(found: Suspects) -> str:
    if not found.count:
        return (
            "None is a positive of the same question, has the embedding of its positive, or is more similar to the "
            f"question than {found.threshold:g} times its positive."
        )
    why = {
        "listed": "are positives of the same question",
        "same": "have the embedding of their positive",
        "similar": f"are more similar to the question than {found.threshold:g} times its positive",
    }
    said = "; ".join(f"{count:,} {why[reason]}" for reason, count in found.counts.items() if count)
    share = found.count / max(found.negatives, 1)
    return (
        f"{found.count:,} of them ({share:.1%}), in {_count(found.pairs, 'pair')}, may be positives: {said}. Training "
        "would push away what it should find. Look at them, and mine again if they are."
    )


def _row(found: Suspect) -> str:
    return (
        f'<tr><td class="right">{found.pair:,}</td><td class="right">{found.source:,}</td>'
        f'<td class="right wide-only">{found.tier}</td><td class="right">{found.similarity:.4f}</td>'
        f'<td class="right wide-only">{found.positive:,}</td><td class="right">{found.positive_similarity:.4f}</td>'
        f'<td class="soft apart">{escape(_REASONS[found.reason])}</td></tr>'
    )


def _count(count: int, word: str) -> str:
    return f"{count:,} {word}{'s' * (count != 1)}"
