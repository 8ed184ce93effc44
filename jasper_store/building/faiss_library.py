"""faiss, which is optional, in one thread: it does not promise the same bits with any other number."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from jasper_store.errors import IncompatibleOptionsError

__all__ = ["faiss_in_one_thread"]


@contextmanager
def faiss_in_one_thread(what: str, instead: str) -> Iterator[Any]:
    """The module, which uses one thread until the end of the block.

    Args:
        what: what it is wanted for, as the beginning of a sentence, for the message.
        instead: what the caller can pass to do without it.

    Raises:
        IncompatibleOptionsError: it is not installed.
    """
    try:
        import faiss
    except ImportError as exc:
        msg = f"{what} by faiss, which is not installed: pip install jasper_store[build], or pass {instead}"
        raise IncompatibleOptionsError(msg) from exc
    threads = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)
    try:
        yield faiss
    finally:
        faiss.omp_set_num_threads(threads)
