"""What to say when a worker process dies, and seeing to it that the others go too."""

from __future__ import annotations

import signal
from typing import Any

from jasper_store.errors import JasperStoreError

__all__ = ["WorkerDiedError", "explain_worker_death"]


class WorkerDiedError(JasperStoreError, RuntimeError):
    """A worker process of a loader ended by itself; the message names it and says how."""


def explain_worker_death(error: RuntimeError, batches: Any) -> None:
    """If ``error`` is PyTorch's word for a dead worker, stop the other workers and raise one that names it.

    Args:
        error: what PyTorch's iterator raised.
        batches: that iterator.

    Raises:
        WorkerDiedError: a worker died; any other error is left to the caller.
    """
    workers = getattr(batches, "_workers", ())
    dead = [
        (number, process)
        for number, process in enumerate(workers)
        if not process.is_alive() and process.exitcode not in {None, 0}
    ]
    if "DataLoader worker" not in str(error):
        return
    names = ", ".join(f"worker {number} (pid {process.pid}) {_how(process.exitcode)}" for number, process in dead)
    batches._shutdown_workers()  # noqa: SLF001 - what its own __del__ would do, some time later
    raise WorkerDiedError(
        f"{names or str(error)}; the other {max(len(workers) - len(dead), 0)} workers were stopped. If it was killed,"
        " look for the out-of-memory killer in the kernel's log, for a limit of the scheduler, and at the free space of"
        " /dev/shm; num_workers=0 needs none of them"
    ) from error


def _how(exitcode: int) -> str:
    if exitcode >= 0:
        return f"exited with status {exitcode}"
    try:
        return f"was ended by {signal.Signals(-exitcode).name}"
    except ValueError:
        return f"was ended by signal {-exitcode}"
