"""Which rank this process is, of how many: from arguments, else the process group, else torchrun's environment."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch.distributed as dist

from jasper_store.errors import IncompatibleOptionsError

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["Ranks", "find_ranks"]


@dataclass(frozen=True, slots=True)
class Ranks:
    """One process among those that share an epoch.

    Attributes:
        rank: number of this process, from 0.
        world_size: how many processes there are.
        source: where the numbers came from, in words.
        found: whether the process group or the environment said them, and not the caller.
    """

    rank: int = 0
    world_size: int = 1
    source: str = "one process"
    found: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.world_size:
            raise IncompatibleOptionsError(
                f"rank {self.rank} of world_size {self.world_size} ({self.source}): expected 0 <= rank < world_size"
            )


def find_ranks(
    *,
    distributed: bool = True,
    rank: int | None = None,
    world_size: int | None = None,
    environ: Mapping[str, str] | None = None,
) -> Ranks:
    """Find out which rank this process is.

    The first of these that is there decides: the arguments; an initialised ``torch.distributed`` process group;
    the variables RANK and WORLD_SIZE, as torchrun sets them.

    Args:
        distributed: ``False`` looks at the arguments only, so that a process group that is used for something
            else does not silently take samples away.
        rank: number of this process; needs ``world_size``.
        world_size: number of processes; needs ``rank``.
        environ: environment variables; the process's own by default.

    Raises:
        IncompatibleOptionsError: one of ``rank`` and ``world_size`` without the other, a rank that is out of range, or
            ``distributed=True`` where nothing says the rank.
    """
    if (rank is None) != (world_size is None):
        raise IncompatibleOptionsError(
            f"rank={rank} with world_size={world_size}: give both, or neither to take them from the process group"
        )
    if rank is not None and world_size is not None:
        return Ranks(_whole("rank", rank), _whole("world_size", world_size), "from the arguments")
    if not distributed:
        return Ranks()
    if dist.is_available() and dist.is_initialized():
        return Ranks(dist.get_rank(), dist.get_world_size(), "from the process group", found=True)
    environ = os.environ if environ is None else environ
    if "RANK" in environ and "WORLD_SIZE" in environ:
        values = [_parsed(name, environ[name]) for name in ("RANK", "WORLD_SIZE")]
        return Ranks(values[0], values[1], "from RANK and WORLD_SIZE", found=True)
    raise IncompatibleOptionsError(
        "distributed=True, but this process does not know its rank: there is no initialised process group and no RANK"
        " and WORLD_SIZE in the environment. Start it with torchrun, call torch.distributed.init_process_group first,"
        " or pass rank= and world_size="
    )


def _whole(name: str, value: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise IncompatibleOptionsError(f"{name}={value!r}: expected a whole number")
    return value


def _parsed(name: str, text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise IncompatibleOptionsError(
            f"the environment says {name}={text!r}, which is not a whole number; correct it, or pass rank= and world_size="
        ) from None
