"""The dataset card: what the report says of a dataset, as the README.md of its repository."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from jasper_store.files.hub import HubPath
from jasper_store.memory.sizes import format_bytes
from jasper_store.report.model import DatasetReport
from jasper_store.report.ranking import Ranking
from jasper_store.report.sample import SampleView
from jasper_store.samples.declaration import CONFIG_KEY

__all__ = ["card"]

_POWERS = ("", "K", "M", "B", "T")


def card(report: DatasetReport, config: Mapping[str, Any], repo: str) -> str:
    """The text of the card.

    Args:
        report: of the dataset, verified.
        config: its configuration; ``"license"`` and ``"language"`` are taken over.
        repo: ``"owner/name"``.
    """
    parts = [
        _front_matter(report, config),
        f"# {_text(report.name)}",
        _summary(report),
        "## How to load it\n\n" + _loading(report, repo),
    ]
    if report.samples is not None:
        parts.append("## Samples\n\n" + _samples(report.samples, config))
    if report.jasper is not None and report.jasper.figures is not None:
        parts.append("## Questions, positives and negatives\n\n" + _figures(report.jasper.figures.ranking))
    parts.append("## Tensors\n\n" + _tensors(report))
    return "\n\n".join(parts) + "\n"


def _front_matter(report: DatasetReport, config: Mapping[str, Any]) -> str:
    """YAML; each value is written as JSON, which YAML includes."""
    rows = _rows(report)
    facts: dict[str, Any] = {
        "pretty_name": report.name,
        **{key: config[key] for key in ("license", "language") if key in config},
        "tags": ["jasper-store", "embeddings", *(["hard-negatives"] if report.jasper is not None else [])],
        "size_categories": [_category(rows)],
        # The tensors are no table that the viewer could show.
        "viewer": False,
    }
    if report.jasper is not None:
        facts["task_categories"] = ["text-retrieval"]
    return "---\n" + "\n".join(f"{key}: {json.dumps(value)}" for key, value in facts.items()) + "\n---"


def _rows(report: DatasetReport) -> int:
    found = report.samples
    if found is None:
        return max((row.shape[0] for row in report.tensors if row.shape), default=0)
    return sum(found.splits.values()) or found.length


def _category(rows: int) -> str:
    """The Hub's class of sizes."""
    if rows < 1000:
        return "n<1K"
    power = len(str(rows)) - 1
    if power >= 12:
        return "n>1T"
    return f"{_power(power)}<n<{_power(power + 1)}"


def _power(power: int) -> str:
    return f"{10 ** (power % 3)}{_POWERS[power // 3]}"


def _summary(report: DatasetReport) -> str:
    files = f"{report.files:,} file{'s' * (report.files != 1)}"
    lines = [
        (
            f"Embeddings for training, {format_bytes(report.nbytes)} in {files} ({report.format}), written by "
            "jasper_store. Every tensor was read and verified before it was pushed; the checksums stand in "
            "`jasper_store.json`, and `jasper-store verify` compares them."
        )
    ]
    if report.jasper is not None and report.jasper.figures is not None:
        sizes = report.jasper.figures.sizes
        lines.append(_table(("", "rows"), [(name, f"{count:,}") for name, count in sizes.items()]))
    elif report.samples is not None and report.samples.splits:
        splits = report.samples.splits
        lines.append(_table(("split", "samples"), [(name, f"{count:,}") for name, count in splits.items()]))
    return "\n\n".join(lines)


def _loading(report: DatasetReport, repo: str) -> str:
    where = json.dumps(str(HubPath(repo)))
    if report.samples is None:
        use = f"with js.open({where}) as store:\n    print(store)"
    else:
        split = "" if report.samples.split is None else f", {json.dumps(report.samples.split)}"
        use = f"loader = js.create_loader({where}{split}, batch_size=256)\nbatch = next(iter(loader))"
    return (
        "```sh\npip install 'jasper_store[hub]'\n```\n\n"
        f"```python\nimport jasper_store as js\n\n{use}\n```\n\n"
        "The files are downloaded once, into the cache of huggingface_hub, and mapped there: they may be larger than memory. "
        "Add `@` and a commit to the path to stay with one revision."
    )


def _samples(found: SampleView, config: Mapping[str, Any]) -> str:
    rows = [(f"`{field.name}`", field.described, f"`{field.expression}`") for field in found.fields]
    text = _table(("field", "for one sample", "read by"), rows)
    if CONFIG_KEY not in config:
        return text
    declared = json.dumps(config[CONFIG_KEY], indent=1)
    return f"{text}\n\nThe declaration, in `config.json`:\n\n```json\n{declared}\n```"


def _figures(found: Ranking) -> str:
    seen = (
        f"All {found.pairs:,} pairs"
        if found.pairs >= found.of
        else f"A sample of {found.pairs:,} of {found.of:,} pairs"
    )
    cosines = [("positive", "", f"{found.positive.median:.3f}")]
    cosines += [(f"tier {tier.tier}", f"{tier.share:.0%}", f"{tier.similarity.median:.3f}") for tier in found.tiers]
    recall = [(each.steering, f"{each.negatives:.1%}", f"{each.sources:.1%}") for each in found.recall]
    suspects = found.suspects
    return "\n\n".join(
        (
            f"{seen} were looked at. Cosine of the question with:",
            _table(("", "of negatives", "median"), cosines),
            (
                f"The margin, the positive's cosine minus that of the most similar negative, has the median "
                f"{found.margin.median:.3f}; for {found.not_above:.1%} of the pairs it is not above 0. "
                f"{suspects.count:,} of {suspects.negatives:,} negatives may be positives: they are listed as one, have the "
                f"embedding of their positive, or a cosine above {suspects.threshold:g} times its cosine."
            ),
            (
                "Share of queries that are nearer to the positive than to anything else, without a model; the query is the "
                f"question with the steering added, and the sources are {found.sources:,} of {found.of_sources:,}:"
            ),
            _table(("steering", "among its hard negatives", "among the sources"), recall),
        )
    )


def _tensors(report: DatasetReport) -> str:
    rows = [
        (
            f"`{row.name}`",
            row.dtype,
            " x ".join(f"{size:,}" for size in row.shape) or "scalar",
            format_bytes(row.nbytes),
        )
        for row in report.tensors
    ]
    return _table(("tensor", "dtype", "shape", "size"), rows)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    def lines() -> Iterator[str]:
        yield f"| {' | '.join(head)} |"
        yield f"|{'---|' * len(head)}"
        for row in rows:
            yield f"| {' | '.join(_text(cell) for cell in row)} |"

    return "\n".join(lines())


def _text(words: str) -> str:
    """One line that Markdown shows as it is written, in a table too."""
    return " ".join(words.split()).replace("|", "\\|").replace("<", "&lt;")
