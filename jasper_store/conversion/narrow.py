"""Floating tensors in fewer bits, on request: what it costs in accuracy is measured, and overflow is refused."""

from __future__ import annotations

import torch

from jasper_store.errors import IncompatibleOptionsError, IntegrityError, UnknownNameError
from jasper_store.formats.files import dtype_name

__all__ = ["Narrowing", "narrowed", "parse_dtype", "saves_nothing"]

_FLOATS = {dtype_name(dtype): dtype for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64)}


def parse_dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    """A floating dtype from its name (``"float16"``, ``"torch.float16"``) or itself; None stays None.

    Raises:
        UnknownNameError: not the name of a dtype.
        IncompatibleOptionsError: not a floating dtype.
    """
    if dtype is None or (isinstance(dtype, torch.dtype) and dtype in _FLOATS.values()):
        return dtype
    name = str(dtype).removeprefix("torch.")
    if name in _FLOATS:
        return _FLOATS[name]
    known = ", ".join(repr(name) for name in _FLOATS)
    if isinstance(getattr(torch, name, None), torch.dtype):
        msg = f"dtype={name!r}: only floating tensors are narrowed, expected one of {known}"
        raise IncompatibleOptionsError(msg)
    msg = f"dtype={dtype!r}: expected one of {known}, or None to keep every value as it is"
    raise UnknownNameError(msg)


def narrowed(dtype: torch.dtype, wanted: torch.dtype | None) -> torch.dtype:
    """Dtype that a tensor is written in: ``wanted`` for floats of more bits, else its own.

    float16 written as bfloat16 would save nothing and lose accuracy; it stays what it is.
    """
    if wanted is None or not dtype.is_floating_point or dtype.itemsize <= wanted.itemsize:
        return dtype
    return wanted


def saves_nothing(written_as: str, wanted: torch.dtype) -> bool:
    """Whether a tensor stayed in another float of as many bits as ``wanted`` has."""
    kept = _FLOATS.get(written_as)
    return kept is not None and kept is not wanted and kept.itemsize == wanted.itemsize


class Narrowing:
    """Casts one tensor block by block.

    Attributes:
        max_error: largest absolute difference between a finite value and what is written; 0.0 before any block.
    """

    def __init__(self, name: str, dtype: torch.dtype) -> None:
        self.name = name
        self.dtype = dtype
        self.max_error = 0.0

    def cast(self, block: torch.Tensor, first_row: int) -> torch.Tensor:
        """The block in the new dtype.

        Raises:
            IntegrityError: a finite value would become infinite; names its row.
        """
        cast = block.to(self.dtype)
        if not block.numel():
            return cast
        # The difference of equal infinities, and of NaN, is NaN: no error was added to those.
        common = torch.promote_types(block.dtype, self.dtype)
        error = (cast.to(common) - block.to(common)).abs_().nan_to_num_(nan=0.0, posinf=float("inf"))
        largest = float(error.max())
        if largest == float("inf"):
            self._refuse(block, cast, first_row)
        self.max_error = max(self.max_error, largest)
        return cast

    def _refuse(self, block: torch.Tensor, cast: torch.Tensor, first_row: int) -> None:
        position = (torch.isinf(cast) & torch.isfinite(block)).nonzero()[0].tolist()
        value = float(block[tuple(position)])
        row = position[0] if position else 0
        where = f"row {first_row + row}" + (f", position {position[1:]}" if position[1:] else "")
        msg = (
            f"{self.name}: {where} holds {value:g}, and {dtype_name(self.dtype)} ends at {torch.finfo(self.dtype).max:g}; "
            "scale the tensor, or choose dtype='bfloat16', or keep it as it is (dtype=None, or leave it out of tensors=)"
        )
        raise IntegrityError(msg, tensor=self.name)
