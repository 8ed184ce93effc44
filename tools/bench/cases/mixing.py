"""What a block order gives away in randomness: figures of the orders themselves, no clock involved."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from jasper_store.loading.order import BLOCK, WINDOW
from tools.bench import spawn
from tools.bench.results import CaseResult, Column, Table

if TYPE_CHECKING:
    from tools.bench.context import Context

__all__ = ["NAME", "TITLE", "figures", "run"]

NAME = "mixing"
TITLE = "How well the two orders mix"
ROWS = 500_000
SIZES = ((BLOCK, WINDOW), (BLOCK, WINDOW // 4), (4 * BLOCK, WINDOW), (BLOCK // 4, WINDOW))
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
    from jasper_store.loading import order
    from jasper_store.loading.shuffle_quality import shuffle_quality as mixing

    orders = {
        "file order": order.SequentialOrder(rows),
        "global": order.order(rows, seed, 0),
        **{
            f"block, {block} rows x {window}": order.block_order(rows, seed, 0, block, window)
            for block, window in SIZES
        },
    }
    return {"rows": [{"key": name, "label": name, **vars(mixing(each))} for name, each in orders.items()]}
