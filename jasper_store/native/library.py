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
_ABI: Final = 17
_LOG: Final = logging.getLogger("jasper_store")


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
    number, address, signed = ctypes.c_uint64, ctypes.c_void_p, ctypes.c_int64
    found.jasper_gather.argtypes = [address, number, ctypes.c_uint]
    found.jasper_gather.restype = signed
    found.jasper_gather_mapped.argtypes = [address, number, ctypes.c_uint]
    found.jasper_gather_mapped.restype = signed
    for one in (found.jasper_gather_one, found.jasper_gather_one_mapped):
        one.argtypes = [address]
        one.restype = signed
    found.jasper_fault_address.argtypes = []
    found.jasper_fault_address.restype = signed
    found.jasper_use_instructions.argtypes = [ctypes.c_int]
    found.jasper_use_instructions.restype = ctypes.c_int
    found.jasper_use_way.argtypes = [ctypes.c_int]
    found.jasper_use_way.restype = None
    found.jasper_locate_rows.argtypes = [address, signed, address, signed, number, address]
    found.jasper_locate_rows.restype = signed
    found.jasper_parts_of_rows.argtypes = [address, address, signed, number, address]
    found.jasper_parts_of_rows.restype = None
    found.jasper_shuffle.argtypes = [address, address, number, address]
    found.jasper_shuffle.restype = None
    found.jasper_stat_files.argtypes = [ctypes.c_int, ctypes.c_char_p, signed, address]
    found.jasper_stat_files.restype = signed
    found.jasper_open_reader.argtypes = []
    found.jasper_open_reader.restype = address
    found.jasper_close_reader.argtypes = [address]
    found.jasper_close_reader.restype = None
    found.jasper_begin_read.argtypes = [
        *(address, address, number, signed, signed),
        *(address, address, number, signed, address, address),
    ]
    found.jasper_begin_read.restype = ctypes.c_int
    found.jasper_begin_runs.argtypes = [address, address, number]
    found.jasper_begin_runs.restype = ctypes.c_int
    found.jasper_finish_read.argtypes = [address]
    found.jasper_finish_read.restype = signed
    found.jasper_offer.argtypes = [address]
    found.jasper_offer.restype = None
    found.jasper_multiplies_bytes.argtypes = []
    found.jasper_multiplies_bytes.restype = ctypes.c_int
    return found
