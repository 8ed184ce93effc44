"""The library with everything imported that it would import at first use, so that no clock sees it."""

from __future__ import annotations

from typing import Any

__all__ = ["library"]


def library() -> Any:
    """``jasper_store``, its public names loaded, torch with them: peers are imported before the clock starts too."""
    import jasper_store

    for name in jasper_store.__all__:
        getattr(jasper_store, name)
    return jasper_store
