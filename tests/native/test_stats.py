"""``stat_files`` against ``os.stat``."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from jasper_store.native import stats
from jasper_store.native.library import library
from jasper_store.native.stats import stat_files


@pytest.fixture(params=["compiled", "one by one"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "one by one":
        monkeypatch.setattr(stats, "library", lambda: None)
    elif library() is None:
        pytest.skip("the library was not built")
    return str(request.param)


@pytest.mark.usefixtures("way")
def test_the_facts_of_each_file_in_the_order_of_the_names(tmp_path: Path) -> None:
    (tmp_path / "below").mkdir()
    names = [f"{number:04d}.npy" for number in range(500)] + ["below/ä.npy", os.fsdecode(b"\xff.npy"), "link"]
    for number, name in enumerate(names[:-1]):
        (tmp_path / name).write_bytes(bytes(number))
        os.utime(tmp_path / name, ns=(0, number * 1_234_567_891 - 7))
    (tmp_path / "link").symlink_to("0003.npy")
    names = [names[n] for n in np.random.default_rng(0).permutation(len(names))]
    found = stat_files(tmp_path, names)
    facts = [(tmp_path / name).stat() for name in names]
    wanted = [[one.st_size, one.st_mtime_ns, one.st_ino, one.st_dev] for one in facts]
    assert found is not None
    assert found.T.tolist() == wanted


@pytest.mark.usefixtures("way")
def test_one_that_is_not_there(tmp_path: Path) -> None:
    (tmp_path / "a").touch()
    assert stat_files(tmp_path, []).shape == (4, 0)  # type: ignore[union-attr]
    assert stat_files(tmp_path, ["a", "b"]) is None
    (tmp_path / "loop").symlink_to("loop")
    assert stat_files(tmp_path, ["loop", "a"]) is None
