"""Plots from the JSON, as SVG that is the same for the same figures."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["Drawn", "draw"]

FOLDER = "bench"
OURS, OTHERS, LINE = "#2f6f4e", "#9aa5b1", "#b5382a"


@dataclass(frozen=True)
class Drawn:
    """A plot that was written.

    Attributes:
        path: relative to the folder it was drawn under.
        title: for those who do not see it.
    """

    path: str
    title: str


def draw(name: str, document: dict[str, Any], folder: Path, *, write: bool = True) -> Drawn | None:
    """Draw a case's bar plot under ``folder``; None without matplotlib or without its figures.

    Without ``write`` nothing is drawn, and what would be is returned.

    Raises:
        ValueError: there is no plot of that case.
    """
    if name != "cold":
        raise ValueError(f"there is no plot of {name!r}, only of 'cold'")
    bars = _bars(document["cases"].get(name, {}))
    if not bars or not find_spec("matplotlib"):
        return None
    title = "Cold random rows a second, against the disk's own limit"
    target = folder / FOLDER / f"{name}.svg"
    if write:
        target.parent.mkdir(parents=True, exist_ok=True)
        _bar_plot(target, title, bars, _limit(document["cases"][name]))
    return Drawn(f"{FOLDER}/{name}.svg", title)


def _bars(case: dict[str, Any]) -> list[tuple[str, float, bool]]:
    """Label, rate and whether it is ours, at the smallest batch and the smaller read-ahead, best last."""
    rows = [row for item in case.get("tables", ()) for row in item["rows"] if row.get("rows_per_s")]
    if not rows:
        return []
    batch, kib = min(row["batch"] for row in rows), min(row["read_ahead_kib"] for row in rows)
    here = [row for row in rows if row["batch"] == batch and row["read_ahead_kib"] == kib]
    here.sort(key=lambda row: row["rows_per_s"])
    clean = str.maketrans("", "", "*`")
    return [(row["label"].translate(clean), row["rows_per_s"], row["key"].startswith("ours")) for row in here]


def _limit(case: dict[str, Any]) -> float | None:
    found = [
        row.get("reads_per_s") for item in case["tables"] for row in item["rows"] if "depth 32" in str(row.get("what"))
    ]
    known = [rate for rate in found if rate]
    return max(known) if known else None


def _bar_plot(path: Path, title: str, bars: list[tuple[str, float, bool]], limit: float | None) -> None:
    # Optional, slow to import, and the backend is chosen before anything draws.
    mpl = import_module("matplotlib")
    mpl.use("svg")
    plt = import_module("matplotlib.pyplot")

    # Without a fixed salt and date, each drawing of the same figures would be another file.
    with mpl.rc_context({"svg.hashsalt": "bench", "font.size": 9, "svg.fonttype": "none"}):
        figure, axes = plt.subplots(figsize=(7.2, 0.34 * len(bars) + 1.1), layout="constrained")
        colours = [OURS if ours else OTHERS for _, _, ours in bars]
        drawn = axes.barh([label for label, _, _ in bars], [rate for _, rate, _ in bars], color=colours)
        axes.bar_label(drawn, [f"{rate:,.0f}" for _, rate, _ in bars], padding=3)
        axes.set_xscale("log")
        axes.set_xlim(right=max(rate for _, rate, _ in bars) * 4)
        if limit:
            axes.axvline(limit, color=LINE, linewidth=1, linestyle="--", label=f"the disk: {limit:,.0f}")
            axes.legend(loc="lower right", frameon=False)
        axes.set_title(title, fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
        figure.savefig(path, metadata={"Date": None})
        plt.close(figure)
