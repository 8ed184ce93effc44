"""What mining did, for people and for machines."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

__all__ = ["MiningReport"]


@dataclass(frozen=True, slots=True)
class MiningReport:
    """What ``mine_negatives`` did. ``str(report)`` is for people.

    Attributes:
        path: the dataset.
        n_pairs: pairs that negatives were mined for.
        settings: how they were chosen, as ``MiningSettings`` has it.
        counts: what was left out, and what was done about gaps, as ``MiningCounts`` has it.
        kinds: negatives of each kind: in cluster, adjacent, other, random.
        similarity_of_kinds: mean cosine of question and negative of each kind; ``None`` for a kind that there is not.
        positive_similarity: mean cosine of question and positive.
        key: hash of the content and the settings that these negatives follow from.
        seconds: time taken.
        recall: of ``method="faiss"``: share of the most similar sources that the index found, measured on 256 pairs.
        existed: the dataset had these negatives already; nothing was written.
    """

    path: Path
    n_pairs: int
    settings: dict[str, Any]
    counts: dict[str, int]
    kinds: dict[str, int]
    similarity_of_kinds: dict[str, float | None]
    positive_similarity: float
    key: str
    seconds: float
    recall: float | None = None
    existed: bool = False

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {**asdict(self), "path": str(self.path)}

    def __str__(self) -> str:
        what = f"{self.n_pairs:,} pairs with {self.settings['n_neg']} negatives each"
        if self.existed:
            return f"{self.path}: up to date: {what}, mined from the same content with the same settings; nothing was written"
        lines = [
            f"{self.path}: {what}, in {self.seconds:.1f} s",
            f"positives: mean cosine {self.positive_similarity:.3f}",
        ]
        if self.recall is not None:
            lines.append(f"faiss: found {self.recall:.1%} of the most similar sources, measured on 256 pairs or all")
        for kind, count in self.kinds.items():
            mean = self.similarity_of_kinds[kind]
            lines.append(f"{kind}: {count:,} negatives" + ("" if mean is None else f", mean cosine {mean:.3f}"))
        lines.extend(f"{what.replace('_', ' ')}: {count:,}" for what, count in self.counts.items() if count)
        return "\n".join(lines)
