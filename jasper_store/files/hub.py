"""Datasets on the Hugging Face Hub: what ``hf://owner/name`` means, and where its files are once they are downloaded.

A dataset is downloaded whole, by huggingface_hub, into its cache (``HF_HOME``), and opened there in place: names in the
cache are symbolic links to files that are named by their content, and a map follows a link as any open does. A second
opening downloads nothing; without a network it takes what the cache holds.

:func:`local_path` is the one place that resolves such a path; every function and command that takes a path calls it.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from jasper_store.errors import (
    ConversionError,
    DatasetNotFoundError,
    HubError,
    IncompatibleOptionsError,
    JasperStoreError,
    UnknownNameError,
)

__all__ = [
    "REPO_TYPE",
    "HubPath",
    "hub_errors",
    "hub_library",
    "is_hub_path",
    "local_path",
    "quiet_bars",
    "require_local",
]

REPO_TYPE = "dataset"

# A pathlib path of hf://owner/name has one slash: that is how the command line's arguments arrive.
_SCHEME = re.compile(r"hf:/{1,2}")
_PART = r"[A-Za-z0-9](?:[\w.-]{0,94}[\w])?"
_NAME = re.compile(rf"(?:datasets/)?(?P<owner>{_PART})/(?P<name>{_PART})(?:@(?P<revision>[^\s@]+))?/?", re.ASCII)


@dataclass(frozen=True, slots=True)
class HubPath:
    """A dataset repository at a revision.

    Attributes:
        repo: ``"owner/name"``.
        revision: branch, tag or commit; ``None`` for the default branch.
    """

    repo: str
    revision: str | None = None

    @classmethod
    def parse(cls, text: str) -> HubPath:
        """Read ``hf://owner/name``, ``owner/name``, either with ``@revision``.

        Raises:
            IncompatibleOptionsError: it is neither.
        """
        match = _NAME.fullmatch(_SCHEME.sub("", text, count=1))
        if match is None or any(bad in f"{match['owner']}/{match['name']}" for bad in ("--", "..")):
            raise IncompatibleOptionsError(
                f"{text!r}: expected a dataset of the Hub as hf://owner/name or hf://owner/name@revision, where owner and "
                "name are of letters, digits, '-', '_' and '.', and have neither '--' nor '..'"
            )
        return cls(f"{match['owner']}/{match['name']}", match["revision"])

    def __str__(self) -> str:
        return f"hf://{self.repo}" + ("" if self.revision is None else f"@{self.revision}")


def is_hub_path(path: object) -> bool:
    """Whether a path names a dataset of the Hub."""
    return isinstance(path, (str, os.PathLike)) and _SCHEME.match(os.fspath(path)) is not None


def local_path(path: str | os.PathLike[str]) -> Path:
    """A path on this machine: of a dataset of the Hub the directory that it was downloaded to, else the path itself.

    Raises:
        IncompatibleOptionsError: a path of the Hub that is no ``hf://owner/name[@revision]``; huggingface_hub is not
            installed.
        DatasetNotFoundError: there is no such dataset or revision, or it is private.
        HubError: the Hub cannot be reached and the cache does not hold the dataset, the Hub refused, or the download
            was cut.
        ConversionError: the cache cannot be written.
    """
    text = os.fspath(path)
    if not is_hub_path(text):
        return Path(text)
    where = HubPath.parse(text)
    library = hub_library()
    with hub_errors(where), quiet_bars():
        return Path(library.snapshot_download(where.repo, repo_type=REPO_TYPE, revision=where.revision))


def require_local(path: str | os.PathLike[str]) -> None:
    """Refuse a path of the Hub where something is written.

    Raises:
        IncompatibleOptionsError: it is one.
    """
    if is_hub_path(path):
        raise IncompatibleOptionsError(
            f"{os.fspath(path)}: expected a directory to write to, found a dataset of the Hub, which is only read; write "
            "into a directory, then jasper-store push it"
        )


def hub_library() -> Any:
    """The module ``huggingface_hub``.

    Raises:
        IncompatibleOptionsError: it is not installed.
    """
    try:
        return import_module("huggingface_hub")
    except ImportError as exc:
        raise IncompatibleOptionsError(
            "hf:// paths and push need huggingface_hub, which is not installed; pip install 'jasper_store[hub]'"
        ) from exc


@contextmanager
def quiet_bars() -> Iterator[None]:
    """Without the progress bars of huggingface_hub where there is no terminal to draw them on."""
    tools: Any = import_module("huggingface_hub.utils")
    if sys.stderr.isatty() or tools.are_progress_bars_disabled():
        yield
        return
    tools.disable_progress_bars()
    try:
        yield
    finally:
        tools.enable_progress_bars()


@contextmanager
def hub_errors(where: HubPath) -> Iterator[None]:
    """Turn what huggingface_hub raises, and what its HTTP library raises through it, into errors of this package."""
    try:
        yield
    except JasperStoreError:
        raise
    except Exception as exc:  # each release of huggingface_hub has its own HTTP library, with its own errors
        if type(exc).__module__ == "builtins" and not isinstance(exc, (OSError, ValueError, RuntimeError)):
            raise  # a mistake in the code: it must not read as a failure of the Hub
        # A RuntimeError of an upload says which file it was; what went wrong is its cause.
        cause = exc.__cause__ if type(exc) is RuntimeError else None
        raise _explained(cause or exc, where) from exc


def _explained(exc: BaseException, where: HubPath) -> JasperStoreError:
    kinds = {kind.__name__ for kind in type(exc).__mro__}
    status = getattr(getattr(exc, "response", None), "status_code", None)
    if "HFValidationError" in kinds:
        return IncompatibleOptionsError(f"{where}: {exc}")
    if "RevisionNotFoundError" in kinds:
        return UnknownNameError(
            f"{where}: the dataset has no branch, tag or commit {where.revision!r}; look at its revisions on the Hub"
        )
    if "GatedRepoError" in kinds:
        return HubError(f"{where}: its owner has to grant access, and has not; ask for it on its page, then {_LOGIN}")
    if "RepositoryNotFoundError" in kinds:
        return DatasetNotFoundError(
            f"{where}: there is no such dataset on the Hub, or it is private and this token may not read it; check "
            f"the name, or {_LOGIN}"
        )
    if "LocalTokenNotFoundError" in kinds or status in {401, 403}:
        return HubError(f"{where}: the Hub refused ({_first_line(exc)}); {_LOGIN} with a token that may do this")
    if "OfflineModeIsEnabled" in kinds or "OfflineModeIsEnabled" in _causes(exc):
        return HubError(
            f"{where}: the cache does not hold it whole, and HF_HUB_OFFLINE forbids to download it; unset HF_HUB_OFFLINE once"
        )
    if "LocalEntryNotFoundError" in kinds or kinds & _CONNECTION:
        return HubError(
            f"{where}: the Hub cannot be reached, and the cache does not hold the dataset whole "
            f"({_first_line(exc)}); check the network and HF_ENDPOINT, and run again"
        )
    if status is not None:
        return HubError(f"{where}: the Hub answered {status} ({_first_line(exc)}); try again later")
    if isinstance(exc, OSError) and exc.errno is not None:
        return ConversionError(
            f"{where}: {exc.filename or 'the cache'} cannot be written: {exc.strerror}; make room or change the "
            "permissions, or set HF_HOME to another directory"
        )
    return HubError(f"{where}: the transfer failed ({_first_line(exc)}); run again, what is complete is kept")


_LOGIN = "log in (hf auth login, or the variable HF_TOKEN)"
_CONNECTION = {"ConnectError", "ConnectionError", "ConnectTimeout", "TimeoutException", "Timeout"}


def _causes(exc: BaseException) -> set[str]:
    """Names of the errors that an error was raised from."""
    names, cause = set(), exc.__cause__ or exc.__context__
    while cause is not None:
        names.add(type(cause).__name__)
        cause = cause.__cause__ or cause.__context__
    return names


def _first_line(exc: BaseException) -> str:
    lines = [line.strip() for line in str(exc).splitlines() if line.strip()]
    return lines[0].rstrip(".") if lines else type(exc).__name__
