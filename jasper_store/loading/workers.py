"""Reports a worker process that died, and stops the others."""

from __future__ import annotations

import pickle
import signal
import time
from typing import Any, Final

from jasper_store.errors import JasperStoreError, WorkerDiedError

__all__ = ["DEATH_SIGNS", "WorkerDiedError", "raise_if_worker_died"]

#: What PyTorch's iterator raises when a worker dies: its own RuntimeError, or, if the worker was sending a batch,
#: the error of the broken connection.
DEATH_SIGNS: Final = (RuntimeError, OSError, EOFError)
#: A connection may break some moments before the process is gone.
_PATIENCE: Final = 0.5
_TOLD: Final = "DataLoader worker (pid"
#: How Python ends a process that could not make what it was sent.
_FAILED: Final = 1


def raise_if_worker_died(error: BaseException, batches: Any, dataset: Any = None) -> None:
    """If an error of PyTorch's iterator comes from a dead worker, stop the other workers and say which one died.

    Args:
        error: what the iterator raised, one of :data:`DEATH_SIGNS`.
        batches: the iterator.
        dataset: what the workers read, if it is known.

    Raises:
        WorkerDiedError: a worker died; any other error is left to the caller.
    """
    workers = list(getattr(batches, "_workers", ()))
    dead = _dead(workers)
    told = str(error).startswith(_TOLD)
    if workers and not dead and not isinstance(error, RuntimeError):
        deadline = time.monotonic() + _PATIENCE
        while not dead and time.monotonic() < deadline:
            try:
                time.sleep(_PATIENCE / 20)
            except RuntimeError as exc:  # PyTorch's handler of SIGCHLD, which notices the death meanwhile
                told = str(exc).startswith(_TOLD)
                if not told:
                    raise
                error = exc
            dead = _dead(workers)
    if not (told or (dead and not isinstance(error, RuntimeError))):
        return
    batches._shutdown_workers()  # noqa: SLF001 - what its own __del__ would do, some time later
    names = ", ".join(f"worker {number} (pid {process.pid}) {_how(process.exitcode)}" for number, process in dead)
    if any(process.exitcode == _FAILED for _, process in dead) and (why := _why_not_opened(dataset)):
        raise WorkerDiedError(
            f"{names}, because a new process cannot open the dataset: {why}; the other workers were stopped"
        ) from error
    raise WorkerDiedError(
        f"{names or str(error)}; the other {len(workers) - len(dead)} workers were stopped. If it was killed, look for"
        " the out-of-memory killer in the kernel's log, for a limit of the scheduler, and at the free space of /dev/shm;"
        " num_workers=0 needs none of them"
    ) from error


def _dead(workers: list[Any]) -> list[tuple[int, Any]]:
    """Workers that ended by themselves, with their numbers."""
    return [(number, process) for number, process in enumerate(workers) if process.exitcode not in {None, 0}]


def _why_not_opened(dataset: Any) -> str:
    """Why a process that gets the dataset as a pickle cannot open it; "" if it can."""
    try:
        pickle.loads(pickle.dumps(dataset))  # noqa: S301 - made here
    except JasperStoreError as exc:
        return str(exc)
    except Exception:  # noqa: BLE001 - another dataset's; the error that is explained must not be lost
        return ""
    return ""


def _how(exitcode: int) -> str:
    if exitcode >= 0:
        return f"exited with status {exitcode}"
    try:
        return f"was ended by {signal.Signals(-exitcode).name}"
    except ValueError:
        return f"was ended by signal {-exitcode}"
