"""The harness of the compiled library: threads, children and failing calls; short here, under the sanitizers if slow.

``make test-asan``, ``make test-ubsan`` and ``make test-tsan`` run it longer, and the tests in Python as well.
"""

from __future__ import annotations

import re
import subprocess
from collections import Counter
from pathlib import Path

import pytest

from tools.compilers import COMPILERS, Compiler, check
from tools.native_harness import build_harness, compiler, run_harness
from tools.sanitizers import SANITIZERS, Sanitizer

gcc = compiler()
pytestmark = pytest.mark.skipif(gcc is None, reason="there is no C compiler here: install gcc")


def counts(said: str) -> dict[str, int]:
    """What the harness did, by its word for it."""
    return {word: int(number) for number, word in re.findall(r"(\d+) ([a-z]+)", said)}


def test_threads_children_and_calls_that_fail(tmp_path: Path) -> None:
    assert gcc is not None
    build_harness(tmp_path / "harness", [gcc], "-O1")
    did: Counter[str] = Counter()
    for _ in range(20):  # what happens is drawn; on a busy machine little of it fits into a second
        done = run_harness([str(tmp_path / "harness")], 1)
        assert (done.returncode, done.stderr) == (0, "")
        did.update(counts(done.stdout))
        if all(did.values()):
            break
    assert {"gathers", "refused", "in", "readings", "abandoned", "of", "children", "faults"} <= did.keys()
    assert all(did.values())


def builds(sanitizer: Sanitizer, folder: Path, *flags: str) -> Path:
    """The harness with a sanitizer; skips where the compiler has no such runtime."""
    assert gcc is not None
    (folder / "empty.c").write_text("int main(void) { return 0; }\n")
    probe = [gcc, *sanitizer.flags, "-o", str(folder / "empty"), str(folder / "empty.c")]
    if subprocess.run(probe, capture_output=True, check=False).returncode:
        pytest.skip(f"{gcc} cannot link {sanitizer.runtime}")
    build_harness(folder / "harness", [gcc], *sanitizer.flags, *flags)
    return folder / "harness"


@pytest.mark.slow
@pytest.mark.parametrize("sanitizer", SANITIZERS.values(), ids=list(SANITIZERS))
def test_a_sanitizer_finds_a_planted_defect_and_no_other(sanitizer: Sanitizer, tmp_path: Path) -> None:
    environment = {sanitizer.variable: sanitizer.options}
    planted = builds(sanitizer, tmp_path, f"-D{sanitizer.plant}=1")
    done = run_harness([*sanitizer.launcher, str(planted)], 2, environment=environment)
    assert done.returncode
    assert sanitizer.report in done.stderr
    sound = builds(sanitizer, tmp_path)
    done = run_harness([*sanitizer.launcher, str(sound)], 5, environment=environment)
    assert (done.returncode, done.stderr) == (0, "")
    assert counts(done.stdout)["children"]


@pytest.mark.slow
@pytest.mark.parametrize("each", COMPILERS, ids=[each.command for each in COMPILERS])
def test_compilers_have_no_warning(each: Compiler, tmp_path: Path) -> None:
    if each.missing:
        pytest.skip(f"{each.missing} is not installed: apt-get install {each.package}")
    assert counts(check(each, tmp_path, 1))["gathers"]
