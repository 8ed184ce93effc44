"""Exit codes: the one table of them in the code. ``docs/cli.md`` has the same one for people; a test compares them."""

from __future__ import annotations

from enum import IntEnum
from typing import TYPE_CHECKING

from jasper_store.errors import (
    ConversionError,
    CorruptFileError,
    DatasetNotFoundError,
    HubError,
    IncompatibleOptionsError,
    InsufficientMemoryError,
    IntegrityError,
)

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["ERRORS", "ExitCode", "code_of"]


class ExitCode(IntEnum):
    """How a command ended.

    Attributes:
        meaning: the code in a few words.
    """

    meaning: str

    def __new__(cls, value: int, meaning: str) -> Self:
        """A code with its meaning."""
        made = int.__new__(cls, value)
        made._value_ = value
        made.meaning = meaning
        return made

    DONE = 0, "done"
    UNEXPECTED = 1, "unexpected failure"
    USAGE = 2, "wrong usage, or options that are incompatible"
    NOT_FOUND = 3, "not found"
    DATA = 4, "damaged or contradictory data"
    MEMORY = 5, "does not fit in memory"
    WRITE = 6, "could not be written"
    HUB = 7, "the Hub refused, or could not be reached"
    INTERRUPTED = 130, "interrupted"


ERRORS: tuple[tuple[type[BaseException], ExitCode], ...] = (
    (IncompatibleOptionsError, ExitCode.USAGE),
    (DatasetNotFoundError, ExitCode.NOT_FOUND),
    (CorruptFileError, ExitCode.DATA),
    (IntegrityError, ExitCode.DATA),
    (InsufficientMemoryError, ExitCode.MEMORY),
    (ConversionError, ExitCode.WRITE),
    (HubError, ExitCode.HUB),
    (MemoryError, ExitCode.MEMORY),
    (KeyboardInterrupt, ExitCode.INTERRUPTED),
)
"""Which error ends with which code; the first that fits decides."""


def code_of(error: BaseException) -> ExitCode:
    """The code that a command ends with after this error."""
    return next((code for kind, code in ERRORS if isinstance(error, kind)), ExitCode.UNEXPECTED)
