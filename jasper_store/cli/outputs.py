"""Where commands write: said to be impossible before minutes of work, not after."""

from __future__ import annotations

from pathlib import Path

from jasper_store.errors import ConversionError

__all__ = ["make_directory", "require_file"]


def make_directory(out: Path) -> Path:
    """The directory of ``--out``, made with its parents if it is not there.

    Raises:
        ConversionError: it is a file, or cannot be made.
    """
    if out.exists() and not out.is_dir():
        raise ConversionError(f"--out {out}: expected a directory, found a file; name another", path=out)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as exc:
        raise ConversionError(
            f"--out {out}: the directory cannot be made ({exc.strerror}); name one that can be written to", path=out
        ) from exc
    return out


def require_file(out: Path) -> None:
    """Check that a file of this name can be written.

    Raises:
        ConversionError: it is a directory, or lies in one that is not there.
    """
    if out.is_dir():
        raise ConversionError(f"{out} is a directory; pass the name of a file with --out", path=out)
    if not out.absolute().parent.is_dir():
        raise ConversionError(f"{out}: there is no directory {out.absolute().parent}; make it first", path=out)
