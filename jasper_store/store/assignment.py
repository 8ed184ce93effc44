"""Which tensors are loaded: a pure function of sizes, reads per sample and a budget.

The rule: tensors are preloaded in the order of *bytes read per sample over bytes held*, until the budget is
spent. A row read per sample counts the same wherever it lies, so this is the order in which a byte of memory
saves most reading: small index tensors first, the tables that every sample reads next, and what no sample
reads last, only if it fits as well.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from jasper_store.errors import InsufficientMemoryError
from jasper_store.memory.budget import format_bytes
from jasper_store.store.placement import CHUNKED, MMAP, RAM, Entry, Plan, table

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from jasper_store.memory.budget import Budget
    from jasper_store.store.placement import Item

__all__ = ["make_auto_plan", "make_plan"]


def make_plan(
    items: Iterable[Item],
    budget: Budget,
    *,
    device: str | None = None,
    use_mmap: bool | None = None,
    notes: Sequence[str] = (),
    network: bool = False,
) -> Plan:
    """Decide where every tensor lives.

    Args:
        items: the tensors.
        budget: what may be held: of the host, or of the device where one is given.
        device: ``None`` for the host; a device name puts everything that is read there.
        use_mmap: ``None`` fills the budget; ``True`` maps everything that can be; ``False`` loads everything.
        notes: carried into the plan.
        network: the files lie on a network file system; what stays mapped there is warned of.

    Returns:
        The plan. Equal arguments give equal plans; preloaded bytes never exceed ``budget.nbytes`` (values that
        came with a header apart, which are in memory already and are counted first); and a larger budget never
        makes a sample read more bytes from files.

    Raises:
        InsufficientMemoryError: ``use_mmap=False``, or a device, and it does not fit. A tensor that can neither
            be mapped nor read in chunks must fit as well.
    """
    items = tuple(items)
    ram = device or RAM
    must = _must_load(items, device, use_mmap)
    _require_fit([item for item in items if item.inline or item.name in must], items, budget, device, use_mmap)
    chosen = must if use_mmap is not None else _choose(items, must, budget.nbytes)
    ranks = {item.name: place for place, item in enumerate(_by_priority(items), start=1)}
    left = budget.nbytes - sum(item.nbytes for item in items if item.name in chosen or item.inline)
    entries = []
    for item in items:
        if item.inline:
            placement, reason = RAM, "came with the file's header"
        elif item.name in chosen:
            placement = ram
            reason = _why_loaded(item, use_mmap, f"place {ranks[item.name]} of {len(items)} by reads per byte")
        else:
            placement = CHUNKED if item.chunked else MMAP
            reason = _why_not_loaded(item, use_mmap, left)
        if item.remark:
            reason += f"; {item.remark}"
        entries.append(Entry(item.name, item.nbytes, item.reads_per_sample, placement, reason))
    warnings = _warnings(entries, use_mmap, network=network)
    return Plan(tuple(entries), budget, device, use_mmap, tuple(notes), tuple(warnings))


def make_auto_plan(
    items: Iterable[Item],
    host: Budget,
    device_budgets: Mapping[str, Budget],
    *,
    use_mmap: bool | None = None,
    notes: Sequence[str] = (),
    network: bool = False,
) -> Plan:
    """The plan for ``device="auto"``: the first device that holds everything, else host memory, and a note why.

    Args:
        items: the tensors.
        host: budget of the host.
        device_budgets: device name to its budget, best first; empty where there is none.
        use_mmap: as :func:`make_plan`; ``True`` keeps the data on the host.
        notes: carried into the plan.
        network: as :func:`make_plan`.

    Raises:
        InsufficientMemoryError: ``use_mmap=False`` and it fits neither on a device nor on the host.
    """
    items = tuple(items)
    needed = sum(item.nbytes for item in items if not item.inline)
    why = "device='auto' chose the host: no CUDA device was found"
    if use_mmap:
        why = "device='auto' chose the host: use_mmap=True was asked for"
        device_budgets = {}
    for device, budget in device_budgets.items():
        if needed <= budget.nbytes:
            note = (
                f"device='auto' chose {device}: all {format_bytes(needed)} fit in the {format_bytes(budget.nbytes)} "
                "that may be used there"
            )
            return make_plan(items, budget, device=device, use_mmap=False, notes=(*notes, note), network=network)
        why = (
            f"device='auto' chose the host: {format_bytes(needed)} do not fit in the {format_bytes(budget.nbytes)} "
            f"that may be used on {device}"
        )
    return make_plan(items, host, use_mmap=use_mmap, notes=(*notes, why), network=network)


def _by_priority(items: Sequence[Item]) -> list[Item]:
    """Most bytes read per sample per byte held first; of equals the smallest, then by name."""
    return sorted(items, key=lambda item: (-item.priority, item.nbytes, item.name))


def _must_load(items: Sequence[Item], device: str | None, use_mmap: bool | None) -> set[str]:
    """Names that have no choice: asked for, read on a device, or readable in no other way."""
    names = set()
    for item in items:
        wanted = use_mmap is False or (device is not None and item.reads_per_sample > 0)
        if not item.inline and (wanted or not (item.mappable or item.chunked)):
            names.add(item.name)
    return names


def _choose(items: Sequence[Item], must: set[str], nbytes: int) -> set[str]:
    """What to load within ``nbytes``: all of ``must``, then by priority each tensor that still fits.

    Skipping one that does not fit and going on keeps the bytes served from memory growing with the budget: a
    larger budget differs first where it takes a tensor that the smaller could not, and that one tensor saves more
    reading than all tensors of lower priority that could have filled the same room. Tensors that are read together in
    runs come after the others, all of them or none: without one of them the runs would be no shorter.
    """
    chosen = set(must)
    left = nbytes - sum(item.nbytes for item in items if item.name in must or item.inline)
    free = [item for item in _by_priority(items) if not item.inline and item.name not in must]
    for item in free:
        if item.reads_per_sample > 0 and not item.together and item.nbytes <= left:
            chosen.add(item.name)
            left -= item.nbytes
    runs = [item for item in free if item.together and item.reads_per_sample > 0]
    if sum(item.nbytes for item in runs) <= left:
        chosen.update(item.name for item in runs)
        left -= sum(item.nbytes for item in runs)
    unread = [item for item in free if item.reads_per_sample <= 0]
    # Memory saves nothing for a tensor that no sample reads; but when all of them fit, a store that holds
    # everything can be pinned, and needs its files no more.
    if all(item.name in chosen for item in free if item.reads_per_sample > 0) and (
        sum(item.nbytes for item in unread) <= left
    ):
        chosen.update(item.name for item in unread)
    return chosen


def _require_fit(
    loaded: Sequence[Item], items: Sequence[Item], budget: Budget, device: str | None, use_mmap: bool | None
) -> None:
    needed = sum(item.nbytes for item in loaded)
    # Values that came with a header are in memory already; alone they are no reason to refuse.
    if needed <= budget.nbytes or all(item.inline for item in loaded):
        return
    place = device or "host memory"
    if use_mmap is False:
        asked, remedy = "use_mmap=False asks to preload everything", "use_mmap=None (load what fits, map the rest)"
    elif device is not None:
        asked, remedy = f"device={device!r} holds everything that is read", "device=None (data stays on the host)"
    else:
        asked, remedy = "some tensors can only be read whole", "jasper-store convert, which writes mappable files"
    names = {item.name for item in loaded}
    entries = [
        Entry(item.name, item.nbytes, item.reads_per_sample, "load" if item.name in names else "-", item.remark)
        for item in items
    ]
    message = (
        f"{asked}, which needs {format_bytes(needed)} of {place}, and {format_bytes(budget.nbytes)} may be used; "
        f"nothing was loaded. Deciding bound: {budget.winner.name}, {format_bytes(budget.winner.nbytes)}.\n"
        + "\n".join(table(entries))
        + f"\n{budget.explain()}\nTo open it: {remedy}; dtype=torch.float16 or bfloat16 halves float32 tensors; "
        "raise the bound that decided; or use fewer ranks per node"
    )
    raise InsufficientMemoryError(message, needed=needed, available=budget.nbytes)


def _why_loaded(item: Item, use_mmap: bool | None, rank: str) -> str:
    if use_mmap is False:
        return "use_mmap=False"
    if not (item.mappable or item.chunked):
        return "can only be read whole"
    if item.reads_per_sample <= 0:
        return "fits; not read in training"
    if use_mmap:
        return "cannot be mapped"
    return f"fits; {rank}"


def _why_not_loaded(item: Item, use_mmap: bool | None, left: int) -> str:
    if use_mmap:
        return "use_mmap=True, but chunks cannot be mapped" if item.chunked else "use_mmap=True"
    if item.reads_per_sample <= 0:
        return "not read in training"
    if item.together:
        return "read in whole blocks: preloaded only if all that lies in them fits"
    return f"does not fit: {format_bytes(item.nbytes)}, and {format_bytes(max(left, 0))} of the budget are left"


def _warnings(entries: Sequence[Entry], use_mmap: bool | None, *, network: bool) -> list[str]:
    texts = []
    chunked = [entry.name for entry in entries if entry.placement == CHUNKED]
    if use_mmap and chunked:
        texts.append(
            f"use_mmap=True, and {', '.join(chunked)} cannot be mapped: chunked or compressed HDF5 data has no single "
            "place in its file, so rows are read and decompressed chunk by chunk; convert to safetensors, npy or "
            "uncompressed HDF5 (jasper-store convert DIR --format safetensors) to map it"
        )
    mapped = [entry for entry in entries if entry.placement == MMAP and entry.reads_per_sample > 0]
    if network and mapped:
        texts.append(
            f"{', '.join(entry.name for entry in mapped)} ({format_bytes(sum(entry.nbytes for entry in mapped))}) stay "
            "mapped on a network file system, where a random row costs a round trip; copy the dataset to a local disk, "
            "or give it the memory to be preloaded"
        )
    return texts
