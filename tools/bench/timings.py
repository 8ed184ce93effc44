"""The shape that the file cases share: ways that take turns, seconds, bytes a second, targets between them."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from tools.bench.results import Column
from tools.bench.stats import median, spread

if TYPE_CHECKING:
    from tools.bench import spawn
    from tools.bench.context import Context

__all__ = ["COLUMNS", "Timings", "Way"]

COLUMNS = (
    Column("label", "way"),
    Column("seconds", "time", "s"),
    Column("spread", "±", "percent"),
    Column("bytes_per_s", "bytes/s", "bytes_per_s"),
    Column("anonymous", "peak anonymous added", "bytes"),
)


@dataclass(frozen=True)
class Way:
    """One way to do it: its name in the table, and the function in a child that does and times it."""

    label: str
    function: str
    arguments: dict[str, Any] = field(default_factory=dict)


class Timings:
    """All repeats of all ways."""

    def __init__(self, ways: dict[str, Way]) -> None:
        self.ways = ways
        self.found: dict[str, list[spawn.Result]] = defaultdict(list)
        self.failed: dict[str, str] = {}

    def measure(self, context: Context, repeats: int | None = None) -> Timings:
        """Let the ways take turns; one that failed once is not tried again."""
        for _ in range(repeats or context.settings.repeats):
            for key, way in self.ways.items():
                if key in self.failed:
                    continue
                one = context.try_call(way.label, way.function, 1800.0, **way.arguments)
                if isinstance(one, str):
                    self.failed[key] = one
                    continue
                self.found[key].append(one)
                context.say(f"  {way.label}: {one.value['seconds']:.2f} s")
        return self

    def seconds(self, key: str) -> float:
        """Median; NaN if it failed."""
        return median([float(one.value["seconds"]) for one in self.found.get(key, [])])

    def rate(self, key: str) -> float:
        """Bytes a second; NaN if it failed."""
        found = self.found.get(key)
        return float(found[0].value["nbytes"]) / self.seconds(key) if found else float("nan")

    def value(self, key: str, name: str) -> Any:
        """What the first repeat returned under a name."""
        found = self.found.get(key)
        return found[0].value.get(name) if found else None

    def rows(self) -> list[dict[str, Any]]:
        """For a table of :data:`COLUMNS`."""
        return [self._row(key, way) for key, way in self.ways.items()]

    def _row(self, key: str, way: Way) -> dict[str, Any]:
        found = self.found.get(key)
        if not found:
            return {"key": key, "label": way.label, "why": self.failed.get(key, "not measured")}
        every = [float(one.value["seconds"]) for one in found]
        return {
            "key": key,
            "label": way.label,
            "seconds": median(every),
            "all": every,
            "spread": spread(every),
            "bytes_per_s": self.rate(key),
            "anonymous": max(one.grown for one in found),
            "written": found[0].value.get("written"),
            "nbytes": found[0].value.get("nbytes"),
        }
