"""Ranks compare what they are about to serve: once, at the first batch of a loader over several processes.

Ranks share an epoch by arithmetic alone, so nothing fails where one of them has other data or another seed: some samples are
served twice and others never. Each rank therefore writes what it serves to the store through which the process group found
itself, rank 0 compares, and every rank reads what it found. No collective is used: those of NCCL need a device, and wait for a rank that has died
for as long as the group's timeout says.
"""

from __future__ import annotations

import itertools
import json
import os
from collections import defaultdict
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Final

import torch.distributed as dist

from jasper_store.errors import RankError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from jasper_store.loading.ranks import Ranks

__all__ = ["compare_ranks", "shared_store"]

WAIT_SECONDS = 300.0
"""How long a rank waits for the others to reach their first batch."""
_GRACE_SECONDS: Final = 10.0
"""How much longer the others wait for what rank 0 says, which waits for them."""
_SHOWN: Final = 8
# The checks of this process, counted: ranks make their loaders in one order, as they do with collectives.
_CHECKS = itertools.count()

# What is compared, in words; what a rank does not know is an empty text and is not compared.
_WORDS: Final = {
    "samples": "samples of an epoch",
    "fingerprint": "fields, shapes or rows of the split",
    "contents": "recorded checksums of the tensors",
    "seed": "seed",
    "order": "order",
    "epoch": "epoch",
    "consumed": "samples consumed before",
    "batch_size": "batch_size",
}


def shared_store(ranks: Ranks) -> Any:
    """The key-value store that all ranks reach; ``None`` where there is none, or the ranks were given as arguments.

    That is the store of the process group, else the one that torchrun's agent keeps.
    """
    if ranks.world_size == 1 or not ranks.found:
        return None
    if dist.is_available() and dist.is_initialized():
        if dist.get_world_size() != ranks.world_size:
            return None
        # PyTorch names no public way to the store; every release from 1.13 to 2.13 has this one.
        find = getattr(dist.distributed_c10d, "_get_default_store", None)
        return None if find is None else find()
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return None
    try:
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        return dist.TCPStore(  # type: ignore[attr-defined] # public, and not re-exported by name
            host, port, is_master=False, timeout=timedelta(seconds=WAIT_SECONDS)
        )
    except (KeyError, ValueError, RuntimeError) as exc:
        raise RankError(
            f"rank {ranks.rank} cannot reach the store of torchrun's agent, over which ranks compare what they serve:"
            f" {exc!s:.200}. Check MASTER_ADDR and MASTER_PORT, or pass rank= and world_size=, which compares nothing"
        ) from exc


def compare_ranks(store: Any, ranks: Ranks, facts: Mapping[str, object]) -> None:
    """Raise on every rank if two ranks would serve different epochs.

    Args:
        store: what :func:`shared_store` returned.
        ranks: this rank.
        facts: what this rank serves, by the names of ``_WORDS``; an empty text is not known.

    Raises:
        RankError: it names what differs, and on which ranks; or a rank that did not reach its first batch in time.
    """
    life = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    prefix = f"jasper_store/ranks/{life}/{ranks.world_size}/{next(_CHECKS)}"
    try:
        store.set(f"{prefix}/{ranks.rank}", json.dumps({name: str(facts[name]) for name in _WORDS}))
        if ranks.rank == 0:
            store.set(f"{prefix}/found", _gather(store, prefix, ranks.world_size))
        if not _arrives(store, [f"{prefix}/found"], WAIT_SECONDS + _GRACE_SECONDS):
            found = (
                f"rank 0 has not said within {WAIT_SECONDS + _GRACE_SECONDS:g} s whether all ranks serve the same epoch"
            )
        else:
            found = store.get(f"{prefix}/found").decode()
            # The last one to read it leaves nothing behind that a later run on this store could meet.
            if store.add(f"{prefix}/read", 1) == ranks.world_size:
                store.delete_key(f"{prefix}/found")
                store.delete_key(f"{prefix}/read")
    except RuntimeError as exc:  # of the network: the process that keeps the store has ended
        found = f"the store of the process group does not answer ({exc!s:.200})"
    if found:
        raise RankError(
            f"rank {ranks.rank} of {ranks.world_size}: {found}. Each rank needs the same dataset, split, seed, order, epoch"
            " and batch size; a rank that ended says why in its own output. With rank= and world_size= as arguments,"
            " ranks are not compared"
        )


def _gather(store: Any, prefix: str, world_size: int) -> str:
    """What all ranks wrote, compared; a text for an error, empty if they agree."""
    keys = [f"{prefix}/{rank}" for rank in range(world_size)]
    if not _arrives(store, keys, WAIT_SECONDS):
        late = [rank for rank, key in enumerate(keys) if not store.check([key])]
        if late:
            return f"{_named(late)} did not reach the first batch within {WAIT_SECONDS:g} s of rank 0"
    facts = [json.loads(store.get(key)) for key in keys]
    for key in keys:
        store.delete_key(key)
    return differences(facts)


def differences(facts: Sequence[Mapping[str, str]]) -> str:
    """What differs between ranks, in words; empty if nothing does."""
    found = []
    for name, words in _WORDS.items():
        holders: dict[str, list[int]] = defaultdict(list)
        for rank, values in enumerate(facts):
            if values[name]:
                holders[values[name]].append(rank)
        if len(holders) > 1:
            each = [f"{value:.40} on {_named(held)}" for value, held in list(holders.items())[:_SHOWN]]
            found.append(f"{words}: {', '.join(each)}{', ...' if len(holders) > _SHOWN else ''}")
    return f"ranks would not serve the same epoch; they differ in {'; '.join(found)}" if found else ""


def _named(ranks: Sequence[int]) -> str:
    shown = ", ".join(map(str, ranks[:_SHOWN])) + (", ..." if len(ranks) > _SHOWN else "")
    return f"rank{'s' if len(ranks) > 1 else ''} {shown}"


def _arrives(store: Any, keys: list[str], seconds: float) -> bool:
    """Whether keys are there in time."""
    try:
        store.wait(keys, timedelta(seconds=seconds))
    except RuntimeError as exc:
        # Of some stores DistStoreError, of others a plain RuntimeError; one that has ended raises at the next call.
        if isinstance(exc, dist.DistNetworkError):
            raise
        return False
    return True
