"""The values of a report. Plain numbers only, so that they can be drawn, saved as JSON, and tested."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from jasper_store.bench.serving import LoaderRate
from jasper_store.conversion.verify import VerifyReport
from jasper_store.report.histogram import Histogram, Tier
from jasper_store.report.parts import TensorParts
from jasper_store.report.ranking import Ranking
from jasper_store.report.sample import SampleView

__all__ = ["DatasetReport", "Figures", "JasperPart", "PlaceRow", "Point", "Projection", "TensorRow"]


@dataclass(frozen=True, slots=True)
class TensorRow:
    """One tensor: what it is, where it would live, and how much of it is in memory now.

    Attributes:
        name: its name.
        dtype: without ``torch.``.
        shape: sizes.
        nbytes: bytes of its values.
        placement: where the planner would put it.
        reads_per_sample: rows that a training sample reads, on average.
        reason: why the planner put it there.
        resident_nbytes: bytes in the page cache; ``None`` where the system cannot say.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    placement: str
    reads_per_sample: float
    reason: str
    resident_nbytes: int | None


@dataclass(frozen=True, slots=True)
class PlaceRow:
    """What the plan puts into one place.

    Attributes:
        placement: the place.
        tensors: how many.
        nbytes: bytes of their values.
        sample_nbytes: bytes that a sample of the report's split reads there, on average.
    """

    placement: str
    tensors: int
    nbytes: int
    sample_nbytes: float


@dataclass(frozen=True, slots=True)
class Point:
    """An embedding in two dimensions, and its cluster."""

    x: float
    y: float
    cluster: int


@dataclass(frozen=True, slots=True)
class Projection:
    """Source embeddings in the plane that shows most of their variance.

    Attributes:
        points: one per sampled pair.
        centroids: of the clusters that the points belong to, in the same plane.
        explained: share of the variance along each of the two axes.
        of: pairs that there are.
    """

    points: tuple[Point, ...]
    centroids: tuple[Point, ...]
    explained: tuple[float, float]
    of: int


@dataclass(frozen=True, slots=True)
class Figures:
    """What the values look like.

    Attributes:
        sizes: pairs, questions, sources, keywords, clusters, and samples per split.
        clusters: pairs per cluster, by cluster number, among ``clusters_rows`` pairs.
        clusters_rows: pairs that were counted.
        tiers: negatives by tier.
        positive: cosine of a question with its positive, for comparison.
        ranking: how well questions find their positives.
        relevance: of pairs.
        distance: of questions to their centroid.
        projection: a picture of the embeddings; ``None`` where there is no plane (one dimension, one pair).
    """

    sizes: dict[str, int]
    clusters: tuple[int, ...]
    clusters_rows: int
    tiers: tuple[Tier, ...]
    positive: Histogram
    ranking: Ranking
    relevance: Histogram
    distance: Histogram
    projection: Projection | None


@dataclass(frozen=True, slots=True)
class JasperPart:
    """What only a JASPER dataset has to show.

    Attributes:
        dim: embedding dimension.
        n_neg: negatives per pair.
        curriculum: probabilities of the steering variants by epoch, until they change no more.
        figures: what the values look like; ``None`` where they contradict each other.
        why_no_figures: in that case, how.
    """

    dim: int
    n_neg: int
    curriculum: tuple[tuple[float, ...], ...]
    figures: Figures | None
    why_no_figures: str

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {
            "dim": self.dim,
            "n_neg": self.n_neg,
            "curriculum": [list(stage) for stage in self.curriculum],
            "figures": None if self.figures is None else asdict(self.figures),
            "why_no_figures": self.why_no_figures,
        }


@dataclass(frozen=True, slots=True)
class DatasetReport:
    """Everything that a report shows.

    Attributes:
        path: the dataset.
        name: what it calls itself, or the name of the directory or file.
        created: when it was built, as it says; ``""`` where it does not.
        format: storage format.
        files: number of files that hold the tensors.
        tensors: one row each, as they lie.
        budget: what bounds preloading, in words.
        memory_limit: the bound on preloading that was asked for, in bytes; ``None`` without one.
        samples: what a sample reads; ``None`` where that is not known.
        why_no_samples: in that case, why.
        declares: whether ``config.json`` declares what a sample reads.
        jasper: what only a JASPER dataset has; ``None`` for any other.
        speed: samples per second of the loader.
        why_no_speed: why there is none.
        verification: findings of ``js.verify``; ``None`` where it was not asked for.
        parts: the tensors that lie in several parts.
        made_at: when the report was made, in UTC.
        machine: what it was made on.
    """

    path: Path
    name: str
    created: str
    format: str
    files: int
    tensors: tuple[TensorRow, ...]
    budget: str
    samples: SampleView | None
    why_no_samples: str
    declares: bool
    jasper: JasperPart | None
    speed: tuple[LoaderRate, ...]
    why_no_speed: str
    verification: VerifyReport | None
    made_at: str
    machine: str
    parts: tuple[TensorParts, ...] = ()
    memory_limit: int | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(row.nbytes for row in self.tensors)

    @property
    def places(self) -> tuple[PlaceRow, ...]:
        """What lies where, in the order in which the places come up among the tensors."""
        by_place: dict[str, list[TensorRow]] = {}
        for row in self.tensors:
            by_place.setdefault(row.placement, []).append(row)
        return tuple(
            PlaceRow(
                place, len(rows), sum(row.nbytes for row in rows), sum(self.reads.get(row.name, 0.0) for row in rows)
            )
            for place, rows in by_place.items()
        )

    @property
    def reads(self) -> dict[str, float]:
        """Bytes that a sample reads of each tensor, on average; empty where that is not known."""
        return {} if self.samples is None else {row.tensor: row.nbytes for row in self.samples.reads}

    @property
    def misdeclared(self) -> bool:
        """Whether samples are declared, and the declaration does not fit the tensors."""
        return self.declares and self.samples is None

    @property
    def ok(self) -> bool:
        """Whether nothing was found that forbids training on it, as far as was looked."""
        return not self.misdeclared and (self.verification is None or self.verification.ok)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON; those of :class:`JasperPart` only for a JASPER dataset."""
        found = {key: getattr(self, key) for key in ("name", "created", "format", "files", "budget", "memory_limit")}
        return {
            "path": str(self.path),
            **found,
            "nbytes": self.nbytes,
            "tensors": [asdict(row) for row in self.tensors],
            "places": [asdict(row) for row in self.places],
            "parts": [asdict(row) for row in self.parts],
            "samples": None if self.samples is None else self.samples.to_dict(),
            "why_no_samples": self.why_no_samples,
            **({} if self.jasper is None else self.jasper.to_dict()),
            "speed": [asdict(rate) for rate in self.speed],
            "why_no_speed": self.why_no_speed,
            "verification": None if self.verification is None else self.verification.to_dict(),
            "made_at": self.made_at,
            "machine": self.machine,
        }
