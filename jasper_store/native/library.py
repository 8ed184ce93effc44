"""Loads the compiled library of the C files beside it. It is optional: every caller has a way without it."""

from __future__ import annotations

import ctypes
import functools
import logging
import sys
from pathlib import Path
from typing import Any, Final

__all__ = ["LIBRARY", "library"]

LIBRARY: Final = Path(__file__).with_name("_rows.so")
_ABI: Final = 18
_LOG: Final = logging.getLogger("jasper_store")

_NUMBER, _ADDRESS, _SIGNED, _INT = ctypes.c_uint64, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
# Arguments and result of each function.
_SIGNATURES: Final[dict[str, tuple[list[Any], Any]]] = {
    "jasper_gather": ([_ADDRESS, _NUMBER, ctypes.c_uint], _SIGNED),
    "jasper_gather_begin": ([_ADDRESS, _ADDRESS, _NUMBER, ctypes.c_uint], _SIGNED),
    "jasper_gather_finish": ([_ADDRESS], None),
    "jasper_gather_cancel": ([_ADDRESS], None),
    "jasper_gather_mapped": ([_ADDRESS, _NUMBER, ctypes.c_uint], _SIGNED),
    "jasper_gather_one": ([_ADDRESS], _SIGNED),
    "jasper_gather_one_mapped": ([_ADDRESS], _SIGNED),
    "jasper_fault_address": ([], _SIGNED),
    "jasper_use_instructions": ([_INT], _INT),
    "jasper_use_way": ([_INT], None),
    "jasper_locate_rows": ([_ADDRESS, _SIGNED, _ADDRESS, _SIGNED, _NUMBER, _ADDRESS], _SIGNED),
    "jasper_parts_of_rows": ([_ADDRESS, _ADDRESS, _SIGNED, _NUMBER, _ADDRESS], None),
    "jasper_shuffle": ([_ADDRESS, _ADDRESS, _NUMBER, _ADDRESS], None),
    "jasper_stat_files": ([_INT, ctypes.c_char_p, _SIGNED, _ADDRESS], _SIGNED),
    "jasper_open_reader": ([], _ADDRESS),
    "jasper_close_reader": ([_ADDRESS], None),
    "jasper_begin_read": (
        [
            *(_ADDRESS, _ADDRESS, _NUMBER, _SIGNED, _SIGNED),
            *(_ADDRESS, _ADDRESS, _NUMBER, _SIGNED, _ADDRESS, _ADDRESS),
        ],
        _INT,
    ),
    "jasper_begin_runs": ([_ADDRESS, _ADDRESS, _NUMBER], _INT),
    "jasper_finish_read": ([_ADDRESS], _SIGNED),
    "jasper_offer": ([_ADDRESS], None),
    "jasper_multiplies_bytes": ([], _INT),
}


def _log_unusable(why: str) -> None:
    """Say once why there is no library: :func:`library` asks only once."""
    _LOG.debug("the compiled library %s %s; rows are gathered by torch, which is slower", LIBRARY, why)


@functools.cache
def library() -> Any:
    """The library; ``None`` if it was not built for this system."""
    if sys.byteorder != "little" or not LIBRARY.exists():
        _log_unusable("was not built for this system")
        return None
    try:
        found = ctypes.CDLL(str(LIBRARY))
        if found.jasper_rows_abi() != _ABI:
            _log_unusable("was built from other sources, for example by an older checkout")
            return None
    except (OSError, AttributeError) as exc:
        _log_unusable(f"cannot be used here ({exc})")
        return None
    for name, (arguments, result) in _SIGNATURES.items():
        function = getattr(found, name)
        function.argtypes, function.restype = arguments, result
    return found
