"""What a block order gives away in randomness: figures of the orders themselves, no clock involved."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tools.bench import spawn
from tools.bench.results import CaseResult, Column, Table

if TYPE_CHECKING:
    from tools.bench.context import Context

__all__ = ["NAME", "TITLE", "figures", "run"]

NAME = "mixing"
TITLE = "How well the two orders mix"
ROWS = 500_000
COLUMNS = (
    Column("label", "order"),
    Column("displacement", "mean distance from the row's place in the file, over n", "share"),
    Column("displacement_gap", "largest gap to a full shuffle's distribution", "share"),
    Column("neighbours", "mean distance of file neighbours, over n", "share"),
)


def run(context: Context) -> CaseResult:
    """A full shuffle has a third of n in the first and the last column."""
    rows = min(ROWS, context.settings.rows)
    found = spawn.call("tools.bench.cases.mixing:figures", rows=rows, seed=context.settings.seed).value["rows"]
    note = (
        f"Orders of {rows:,} rows. A block order deals rows that lie within a block into the same window: that is the "
        "small last figure. Where in the epoch a row comes is as random as in a full shuffle."
    )
    return CaseResult(NAME, TITLE, tables=[Table(TITLE, COLUMNS, found)], notes=[note])


def figures(rows: int, seed: int) -> dict[str, Any]:
    """Runs in a child."""
    from jasper_store.jasper import order
    from jasper_store.jasper.mixing import mixing

    orders = {
        "file order": order.SequentialOrder(rows),
        "global": order.order(rows, seed, 0),
        "block, 256 rows x 128": order.block_order(rows, seed, 0),
        "block, 256 rows x 32": order.block_order(rows, seed, 0, window=32),
        "block, 16 rows x 128": order.block_order(rows, seed, 0, block=16),
    }
    return {"rows": [{"key": name, "label": name, **vars(mixing(each))} for name, each in orders.items()]}
