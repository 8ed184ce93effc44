"""``push``: a verified dataset to a repository of the Hub, published by one commit.

Files are uploaded first, some at a time; the commit that names them comes last, so a reader of the repository sees the
old dataset or the new one. A push that was cut is run again: what the Hub has already is not sent a second time.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from os import PathLike
from pathlib import Path
from typing import Any

from jasper_store.errors import IncompatibleOptionsError, IntegrityError
from jasper_store.files.hub import REPO_TYPE, HubPath, hub_errors, hub_library, is_hub_path, quiet_bars
from jasper_store.files.lock import LOCK_NAME, exclusive
from jasper_store.hub.card import card
from jasper_store.hub.contents import CARD_NAME, Contents, is_data, look_at
from jasper_store.memory.sizes import format_bytes
from jasper_store.report.gather import make_report
from jasper_store.report.model import DatasetReport
from jasper_store.samples.opened import CONFIG_NAME, load_config
from jasper_store.store.manifest import MANIFEST_NAME

__all__ = ["PushReport", "push"]

_TOGETHER = 8
_TOGETHER_NBYTES = 4 << 30

Step = Callable[[str, int, "int | None"], None]
"""Called as ``step(what, done, total)``; ``total`` is ``None`` where it is not known."""


@dataclass(frozen=True, slots=True)
class PushReport:
    """What was pushed.

    Attributes:
        repo: ``"owner/name"``.
        revision: the branch.
        commit: hash of the commit; that of the last one where nothing had changed.
        url: of the commit.
        files: files of the dataset, card and manifest included.
        nbytes: bytes of them.
        removed: files with tensors that the repository had and the directory has not.
        left_out: files of the directory that are no part of the dataset.
        seconds: wall time, verification included.
    """

    repo: str
    revision: str
    commit: str
    url: str
    files: int
    nbytes: int
    removed: tuple[str, ...]
    left_out: tuple[str, ...]
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        lines = [
            (
                f"{HubPath(self.repo, None if self.revision == 'main' else self.revision)}: {self.files} files, "
                f"{format_bytes(self.nbytes)}, in {self.seconds:.1f} s"
            ),
            self.url,
        ]
        if self.removed:
            lines.append(f"removed there: {', '.join(self.removed)}")
        if self.left_out:
            lines.append(f"no part of the dataset, not pushed: {', '.join(self.left_out)}")
        return "\n".join(lines)


def push(
    path: str | PathLike[str],
    repo: str,
    *,
    private: bool = False,
    revision: str | None = None,
    message: str | None = None,
    token: str | None = None,
    step: Step | None = None,
) -> PushReport:
    """Verify a dataset and publish it on the Hugging Face Hub, in one commit.

    The repository is made if it is not there. Afterwards it holds the files of the dataset, its manifest with the
    checksum of each tensor, and a card; files with tensors that it had before and the directory has not are removed by the
    same commit. A ``README.md`` in the directory is pushed as it is; without one the card is made from the report.

    Args:
        path: dataset directory, of JASPER, with a declaration, or of any tensors.
        repo: ``"owner/name"``.
        private: make a new repository private; one that is there keeps its visibility.
        revision: branch to push to, made if it is not there; ``"main"`` by default.
        message: of the commit.
        token: of the Hub; by default the one that ``hf auth login`` stored, or the variable ``HF_TOKEN``.
        step: told what is being done.

    Raises:
        IncompatibleOptionsError: a name that is no ``owner/name``; huggingface_hub is not installed; no directory.
        DatasetNotFoundError: no such directory, or no tensors there; the repository may not be read.
        IntegrityError: the dataset does not verify; nothing was sent.
        ConversionError: it is being written, or changed meanwhile; nothing was published.
        HubError: the Hub refused, cannot be reached, or the transfer was cut; nothing was published, run it again.
    """
    began = time.perf_counter()
    where, step = _where(repo, revision), step or (lambda *_: None)
    library = hub_library()
    if is_hub_path(path):
        raise IncompatibleOptionsError(f"{os.fspath(path)}: expected a directory to push, found a dataset of the Hub")
    directory = Path(path)
    with _undisturbed(directory):
        found = look_at(directory)
        report = make_report(directory, verify=True, speed_seconds=0, step=step)
        _require_verified(report)
        config = load_config(directory / CONFIG_NAME) if CONFIG_NAME in found.files else {}
        made = {MANIFEST_NAME: found.manifest()}
        if not found.has_card:
            made[CARD_NAME] = card(report, config, where.repo).encode()
        with hub_errors(where), quiet_bars():
            commit, removed = _Upload(library, where, token, step).run(found, made, message, private=private)
    return PushReport(
        repo=where.repo,
        revision=where.revision or "main",
        commit=commit.oid,
        url=str(commit.commit_url),
        files=len(found.files) + len(made),
        nbytes=found.nbytes + sum(map(len, made.values())),
        removed=removed,
        left_out=found.left_out,
        seconds=time.perf_counter() - began,
    )


def _where(repo: str, revision: str | None) -> HubPath:
    where = HubPath.parse(repo)
    if revision is None:
        return where
    if where.revision is not None and where.revision != revision:
        raise IncompatibleOptionsError(
            f"{repo}: names the revision {where.revision!r}, and revision={revision!r}; pass one"
        )
    return HubPath(where.repo, revision)


def _require_verified(report: DatasetReport) -> None:
    found = report.verification
    if report.misdeclared:
        raise IntegrityError(
            f"{report.path}: expected a dataset that verifies, found a declaration that does not fit its tensors: "
            f"{report.why_no_samples}",
            path=report.path,
        )
    if found is not None and not found.ok:
        first = found.errors[0]
        raise IntegrityError(
            f"{report.path}: expected a dataset that verifies, found {len(found.errors)} errors, the first: {first.check}: "
            f"{first.message}. jasper-store verify lists them; nothing was sent",
            path=report.path,
            tensor=first.tensor,
        )


@contextlib.contextmanager
def _undisturbed(directory: Path) -> Iterator[None]:
    """Keep writers out of the directory, where it can be written at all."""
    if not (directory.is_dir() and os.access(directory, os.W_OK)):
        yield
        return
    with exclusive(directory / LOCK_NAME, f"pushing {directory}"):
        yield


class _Upload:
    """One push, by the client of the Hub."""

    def __init__(self, library: Any, where: HubPath, token: str | None, step: Step) -> None:
        self._library = library
        self._api = library.HfApi(token=token, library_name="jasper_store")
        self._where = where
        self._step = step
        self._target = {"repo_id": where.repo, "repo_type": REPO_TYPE, "revision": where.revision}

    def run(
        self, found: Contents, made: dict[str, bytes], message: str | None, *, private: bool
    ) -> tuple[Any, tuple[str, ...]]:
        """Make the repository, upload, commit; the commit, and the names of the files that it removed."""
        api, repo = self._api, self._where.repo
        self._step("the repository", 0, None)
        api.create_repo(repo, repo_type=REPO_TYPE, private=private or None, exist_ok=True)
        if self._where.revision not in {None, "main"}:
            api.create_branch(repo, branch=self._where.revision, repo_type=REPO_TYPE, exist_ok=True)
        add = self._library.CommitOperationAdd
        files = [add(path_in_repo=name, path_or_fileobj=str(path)) for name, path in sorted(found.files.items())]
        self._send(files, [found.identities[name].size for name in sorted(found.files)])
        stale = self._stale({*found.files, *made})
        operations = [
            *(self._library.CommitOperationDelete(path_in_repo=name) for name in stale),
            *(add(path_in_repo=name, path_or_fileobj=content) for name, content in made.items()),
            *files,
        ]
        found.require_unchanged()
        self._step("the commit", 0, None)
        words = message or f"{found.directory.resolve().name}, pushed by jasper-store"
        return api.create_commit(operations=operations, commit_message=words, **self._target), tuple(stale)

    def _send(self, files: list[Any], sizes: list[int]) -> None:
        """Upload the contents of files, some at a time; nothing refers to them before the commit."""
        done, total, start = 0, sum(sizes), 0
        while start < len(files):
            stop, together = start + 1, sizes[start]
            while stop < min(start + _TOGETHER, len(files)) and together + sizes[stop] <= _TOGETHER_NBYTES:
                together += sizes[stop]
                stop += 1
            self._step(f"uploading {files[start].path_in_repo}", done, total)
            # Contents are kept: the commit compares them with what the Hub has.
            self._api.preupload_lfs_files(additions=files[start:stop], free_memory=False, **self._target)
            done, start = done + together, stop
        self._step("uploaded", done, total)

    def _stale(self, names: set[str]) -> list[str]:
        """Files with tensors that the repository has, and the dataset has not."""
        there = self._api.list_repo_files(**self._target)
        return sorted(name for name in there if name not in names and is_data(name))
