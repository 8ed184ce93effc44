"""Move the fragments of ``changelog.d/`` into ``CHANGELOG.md``: ``python tools/changelog.py VERSION``."""

from __future__ import annotations

import argparse
import datetime as dt
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
KINDS = ("added", "changed", "fixed", "removed")
HEADING = "## [Unreleased]\n"


def fragments(folder: Path) -> dict[str, list[Path]]:
    """The fragments by kind, in the order of the changelog.

    Raises:
        SystemExit: a file whose name says no kind.
    """
    found: dict[str, list[Path]] = {kind: [] for kind in KINDS}
    for path in sorted(folder.glob("*.md")):
        if path.name == "README.md":
            continue
        kind = path.stem.rpartition(".")[2]
        if kind not in found:
            raise SystemExit(f"{path.name}: expected <words>.<kind>.md with one of {', '.join(KINDS)}, found {kind!r}")
        found[kind].append(path)
    return found


def release(root: Path, version: str, date: str) -> None:
    """Write a section for a version: what stood under *Unreleased*, then the fragments, which are removed.

    Raises:
        SystemExit: ``CHANGELOG.md`` has no heading *Unreleased*.
    """
    changelog = root / "CHANGELOG.md"
    text = changelog.read_text(encoding="utf-8")
    before, heading, after = text.partition(HEADING)
    if not heading:
        raise SystemExit(f"{changelog}: expected the heading {HEADING.strip()!r}, found none")
    found = fragments(root / "changelog.d")
    said, _, older = after.partition("\n## [")
    for kind, paths in found.items():
        lines = [f"- {' '.join(path.read_text(encoding='utf-8').split())}\n" for path in paths]
        title = f"### {kind.capitalize()}\n\n"
        if lines and title in said:
            said = said.replace(title, title + "".join(lines))
        elif lines:
            said = f"{said.rstrip()}\n\n{title}{''.join(lines)}"
    section = f"{HEADING}\n## [{version}] - {date}\n\n{said.strip()}\n"
    changelog.write_text(before + section + (f"\n## [{older}" if older else ""), encoding="utf-8")
    for paths in found.values():
        for path in paths:
            path.unlink()


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("version")
    options = parser.parse_args()
    release(ROOT, options.version, dt.datetime.now(tz=dt.timezone.utc).date().isoformat())


if __name__ == "__main__":
    main()
