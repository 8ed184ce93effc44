"""What maintainers run: the lower bounds as constraints, the changelog from its fragments."""

from __future__ import annotations

from pathlib import Path

import pytest

from tools.changelog import fragments, release
from tools.minimum import minimum, needed, read_project


def test_every_dependency_has_an_oldest_release() -> None:
    requirements = needed(read_project())
    assert len(minimum(requirements)) == len(requirements)
    assert {"torch", "pyarrow", "pytest"} <= {pin.partition("==")[0] for pin in minimum(requirements)}


def test_no_torch_is_allowed_that_executes_what_a_checkpoint_says() -> None:
    """CVE-2025-32434: before 2.6 torch.load did so even with weights_only=True."""
    (pin,) = (pin for pin in minimum(read_project()["dependencies"]) if pin.startswith("torch=="))
    assert tuple(map(int, pin.removeprefix("torch==").split("."))) >= (2, 6)


def test_bounds_become_pins() -> None:
    assert minimum(["a-b>=1.2", "c[d]>=3 ; python_version < '3.11'"]) == ["a-b==1.2", "c==3 ; python_version < '3.11'"]
    with pytest.raises(ValueError, match="expected name>=version"):
        minimum(["a"])


def test_fragments_are_moved_into_the_changelog(tmp_path: Path) -> None:
    (tmp_path / "changelog.d").mkdir()
    (tmp_path / "changelog.d" / "README.md").write_text("how")
    (tmp_path / "changelog.d" / "maps.fixed.md").write_text("Maps\nhold.\n")
    (tmp_path / "changelog.d" / "new.added.md").write_text("A new thing.\n")
    log = tmp_path / "CHANGELOG.md"
    log.write_text("# Changelog\n\n## [Unreleased]\n\n### Added\n\n- Before.\n\n## [0.1.0]\n\n- Old.\n")
    release(tmp_path, "0.2.0", "2030-01-02")
    assert log.read_text() == (
        "# Changelog\n\n## [Unreleased]\n\n## [0.2.0] - 2030-01-02\n\n### Added\n\n- A new thing.\n- Before.\n\n"
        "### Fixed\n\n- Maps hold.\n\n## [0.1.0]\n\n- Old.\n"
    )
    assert [path.name for path in (tmp_path / "changelog.d").iterdir()] == ["README.md"]


def test_a_fragment_of_no_kind_is_refused(tmp_path: Path) -> None:
    (tmp_path / "words.md").write_text("x")
    with pytest.raises(SystemExit, match=r"words\.md: expected"):
        fragments(tmp_path)


def test_the_fragments_here_have_a_kind() -> None:
    fragments(Path(__file__).parents[2] / "changelog.d")
