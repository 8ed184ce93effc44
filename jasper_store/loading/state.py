"""Where in which epoch a run stands: six numbers and words, whatever the size of the dataset.

An epoch is an order of positions, and ranks take turns in it: after the same number of steps on every rank, the
samples served so far are a prefix of the order, whichever worker made the batches. So the state is one number, and a
run with any number of ranks and any batch size serves each remaining sample exactly once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Final

from jasper_store.errors import IncompatibleOptionsError

__all__ = ["STATE_VERSION", "LoaderState"]

STATE_VERSION: Final = 1
"""Version of the dictionary that ``state_dict`` returns; a release that changes it still reads the older ones."""


@dataclass(frozen=True, slots=True)
class LoaderState:
    """The state of a loader, the same on every rank. Made of ints and strings, so JSON and torch.save both keep it.

    Attributes:
        seed: seed of the order.
        epoch: the epoch that is being served.
        consumed: samples of the epoch that the trainers of all ranks together have been given.
        samples: samples in an epoch, over all ranks.
        order: the order in words: ``"sequential"``, ``"global"`` or ``"block 64 x 128"``.
        fingerprint: digest of the dataset; empty where a dataset has none.
        version: :data:`STATE_VERSION`.
    """

    seed: int
    epoch: int
    consumed: int
    samples: int
    order: str
    fingerprint: str
    version: int = STATE_VERSION

    def to_dict(self) -> dict[str, Any]:
        """The dictionary that ``state_dict`` returns."""
        return asdict(self)

    @classmethod
    def from_dict(cls, state: Mapping[str, Any]) -> LoaderState:
        """Read a dictionary that :meth:`to_dict` made, perhaps by way of JSON.

        Raises:
            IncompatibleOptionsError: it is not such a dictionary, or a newer release made it.
        """
        if not isinstance(state, Mapping):
            raise IncompatibleOptionsError(f"expected the dictionary that state_dict() returned, got {type(state)}")
        version = state.get("version")
        if version != STATE_VERSION:
            raise IncompatibleOptionsError(
                f"this release reads loader states of version {STATE_VERSION}, got version {version!r};"
                " pass what loader.state_dict() returned, or update jasper_store"
            )
        values: dict[str, Any] = {}
        for field in fields(cls):
            value = state.get(field.name)
            wanted = str if field.name in {"order", "fingerprint"} else int
            if not isinstance(value, wanted) or isinstance(value, bool):
                raise IncompatibleOptionsError(
                    f"the loader state has {field.name}={value!r}, expected {wanted.__name__};"
                    " pass what loader.state_dict() returned, unchanged"
                )
            values[field.name] = value
        found = cls(**values)
        if not 0 <= found.consumed <= found.samples:
            raise IncompatibleOptionsError(
                f"the loader state has consumed={found.consumed} of {found.samples} samples; it was damaged"
            )
        return found

    def check(self, expected: LoaderState, what: str = "this loader") -> None:
        """Refuse a state that another dataset, seed or order made; epoch and progress may differ.

        Args:
            expected: the state of the loader that is to continue.
            what: what that loader serves, in words.

        Raises:
            IncompatibleOptionsError: naming what differs, and what to change.
        """
        if self.samples != expected.samples:
            raise IncompatibleOptionsError(
                f"the state belongs to another dataset or split: its epoch has {self.samples:,} samples, that of {what} has"
                f" {expected.samples:,}. Open the dataset and split that the state was saved with"
            )
        if self.fingerprint != expected.fingerprint:
            raise IncompatibleOptionsError(
                f"the state belongs to another dataset or split: it has as many samples as {what}, {self.samples:,}, but the"
                " fields, the shapes of their tensors or the rows of the split are others. Open the dataset and split"
                " that the state was saved with; if this is it, its tensors or its declaration were changed since"
            )
        for name in ("seed", "order"):
            theirs, ours = getattr(self, name), getattr(expected, name)
            if theirs != ours:
                raise IncompatibleOptionsError(
                    f"the state was saved with {name}={theirs!r}, this loader has {name}={ours!r}, so the remaining"
                    f" samples would not be the same. Make the loader with {name}={theirs!r}"
                )
