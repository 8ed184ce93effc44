"""Every error that jasper_store raises, and the warnings it gives.

::

    Exception
    └── JasperStoreError                base of all; catch this to catch everything
        ├── DatasetNotFoundError        also ValueError and FileNotFoundError
        ├── CorruptFileError            also ValueError; a file that cannot be trusted or understood
        ├── IntegrityError              also ValueError; files that are sound but contradict each other
        ├── IncompatibleOptionsError    also ValueError; options that are incompatible
        │   ├── UnknownNameError        also ValueError; a name that is not among the known ones
        │   └── DeclarationError        also ValueError; a declaration of samples that makes no sense
        ├── BatchError                  also AssertionError and ValueError; a batch that failed a check
        ├── ClosedError                 also ValueError; use after close()
        ├── ConversionError             also OSError; a conversion that could not be finished
        ├── HubError                    also OSError; the Hub refused, or could not be reached
        ├── WorkerDiedError             also RuntimeError; a worker process of a loader ended by itself
        ├── RankError                   also RuntimeError; ranks that would serve different epochs, or one that is missing
        └── InsufficientMemoryError     also MemoryError; it would not fit, with the numbers

    UserWarning
    └── JasperStoreWarning              base of all warnings
        ├── PerformanceWarning          it works, slowly, and the text says how to make it fast
        └── StaleDataWarning            what is read is older than what it was made from

Each error is also the builtin that a caller would expect, so both styles of ``except`` work. Each takes one
message, so that it survives the trip from a DataLoader worker (which rebuilds it from its text), and carries
the facts of the message as keyword-only fields, ``None`` where they are not known.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

__all__ = [
    "BatchError",
    "ClosedError",
    "ConversionError",
    "CorruptFileError",
    "DatasetNotFoundError",
    "DeclarationError",
    "HubError",
    "IncompatibleOptionsError",
    "InsufficientMemoryError",
    "IntegrityError",
    "JasperStoreError",
    "JasperStoreWarning",
    "PerformanceWarning",
    "RankError",
    "StaleDataWarning",
    "UnknownNameError",
    "WorkerDiedError",
]


class JasperStoreError(Exception):
    """Base of every error raised by jasper_store.

    Attributes:
        message: the whole text: what was expected, what was found, what to do next.
        path: the file or directory concerned, if one is.
        tensor: the name of the tensor concerned, if one is.
    """

    def __init__(self, message: str = "", *, path: str | Path | None = None, tensor: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.path = path
        self.tensor = tensor

    def __str__(self) -> str:
        # OSError's own __str__ would print an errno tuple for the subclasses that are also OSErrors.
        return self.message

    def __reduce__(self) -> tuple[object, ...]:
        # OSError's own __reduce__ forgets the keyword fields; the dictionary brings them back.
        return (type(self), (self.message,), self.__dict__)


class DatasetNotFoundError(JasperStoreError, ValueError, FileNotFoundError):
    """A directory, file, split, tensor or configuration that should be there is not."""


class CorruptFileError(JasperStoreError, ValueError):
    """A file is truncated, damaged, hostile, or written in a way this library does not read."""


class IntegrityError(JasperStoreError, ValueError):
    """The files are sound, yet what they say contradicts itself: shapes, dtypes, indices, values."""


class IncompatibleOptionsError(JasperStoreError, ValueError):
    """Options that are incompatible, refused before any data is touched."""


class UnknownNameError(IncompatibleOptionsError):
    """A format, split, tensor, steering variant or other name that is not among the known ones."""


class DeclarationError(IncompatibleOptionsError):
    """A declaration of samples that cannot be parsed, or that does not fit the tensors it names."""


class BatchError(JasperStoreError, AssertionError, ValueError):
    """A batch failed a check of ``validate_first_batch``; the message names the check."""


class ClosedError(JasperStoreError, ValueError):
    """A store, dataset or writer was used after ``close()``."""


class ConversionError(JasperStoreError, OSError):
    """A conversion or a write could not be finished: no space, read-only, source changed, target busy."""


class HubError(JasperStoreError, OSError):
    """The Hugging Face Hub refused, could not be reached, or a transfer was cut; run again, what is complete is kept."""


class WorkerDiedError(JasperStoreError, RuntimeError):
    """A worker process of a loader ended by itself; the message names it and says how. The others were stopped."""


class RankError(JasperStoreError, RuntimeError):
    """Processes of one run would not serve one epoch together: their data, seed or order differ, or one did not answer."""


class InsufficientMemoryError(JasperStoreError, MemoryError):
    """What was asked for does not fit; nothing was loaded.

    Attributes:
        needed: bytes that would be held.
        available: bytes that the budget allows.
    """

    def __init__(
        self,
        message: str = "",
        *,
        path: str | Path | None = None,
        tensor: str | None = None,
        needed: int | None = None,
        available: int | None = None,
    ) -> None:
        super().__init__(message, path=path, tensor=tensor)
        self.needed = needed
        self.available = available


class JasperStoreWarning(UserWarning):
    """Base of every warning given by jasper_store."""


class PerformanceWarning(JasperStoreWarning):
    """The request is honoured, but slowly; the text says what would make it fast."""


class StaleDataWarning(JasperStoreWarning):
    """A converted file is older than the file it was made from."""
