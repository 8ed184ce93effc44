"""A dataset in words, for people."""

from __future__ import annotations

from typing import TYPE_CHECKING

from jasper_store.formats.files import dtype_name
from jasper_store.memory.budget import format_bytes

if TYPE_CHECKING:
    from jasper_store.samples.graph import Output, SampleGraph
    from jasper_store.store.placement import Plan

__all__ = ["field_lines", "placement_of"]


def placement_of(plan: Plan, samples: int) -> str:
    """Size and placement of a dataset in a few words."""
    places = {"preloaded": plan.preloaded_nbytes, "mapped": plan.mapped_nbytes, "chunked": plan.chunked_nbytes}
    where = ", ".join(f"{format_bytes(nbytes)} {place}" for place, nbytes in places.items() if nbytes)
    return f"{samples} samples, {where or '0 B'}{f' on {plan.device}' if plan.device else ''}"


def field_lines(graph: SampleGraph) -> list[str]:
    """A line for each field: its name, dtype and shape, and what it is read by."""
    rows = [
        (out.key, f"{dtype_name(out.dtype)} {_shape(graph, out)}", graph.declaration.text_of(out.key))
        for out in graph.outputs
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(2)]
    return [f"  {key:<{widths[0]}}  {what:<{widths[1]}}  {text}" for key, what, text in rows]


def _shape(graph: SampleGraph, out: Output) -> str:
    sizes = [*(["..."] if graph.nodes[out.node].ragged else []), *map(str, graph.shape_of(out))]
    return f"[{', '.join(sizes)}]"
