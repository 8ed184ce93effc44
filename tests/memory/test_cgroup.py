"""A real memory cgroup: the budget sees it, and prefetching under a cap smaller than a batch makes progress."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest

from tests.cgroups import limited

pytestmark = [pytest.mark.root, pytest.mark.skipif(sys.platform != "linux", reason="needs Linux")]

CAP = 384 << 20


@pytest.fixture
def cgroup():
    """An empty memory cgroup with a limit; what joins it must leave before the test ends."""
    with limited(CAP) as folder:
        yield folder


def run_inside(cgroup, code, *arguments):
    join = f"open({str(cgroup / 'cgroup.procs')!r}, 'w').write('0')\n"
    # Joined before the imports, so that what they allocate counts too; sys.argv[1:] is for the code.
    done = subprocess.run(
        [sys.executable, "-c", join + code, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_the_budget_sees_the_limit(cgroup):
    out = run_inside(
        cgroup,
        "import os\n"
        "from jasper_store.memory.budget import measure\n"
        "found = measure()\n"
        "print(found.winner.name, found.winner.nbytes)",
    )
    name, nbytes = out.rsplit(" ", 1)
    assert name.endswith(cgroup.name)
    assert 0 <= int(nbytes) < CAP


def test_a_cap_smaller_than_a_batch_still_makes_progress(cgroup, tmp_path):
    # 320 MiB of rows prefetched at once, under what is left of the cap once torch is loaded.
    rows = np.arange(320 << 8, dtype=np.int64).reshape(-1, 1).repeat(512, axis=1)
    rows.tofile(tmp_path / "data")
    os.sync()
    out = run_inside(
        cgroup,
        "import sys, numpy as np, torch\n"
        "from jasper_store.paging import madvise, mapping\n"
        "fmap = mapping.FileMap(sys.argv[1])\n"
        "values = mapping.view(fmap, 0, torch.int64, (320 << 8, 512))\n"
        "madvise.drop(fmap.address, fmap.nbytes, fmap.fileno())\n"
        "madvise.advise(fmap.address, fmap.nbytes, 'random')\n"
        "rows = np.random.default_rng(0).permutation(320 << 8)\n"
        "madvise.madvise_batcher().prefetch(madvise.row_ranges(fmap.address, 4096, 4096, rows))\n"
        "total = sum(int(values[torch.from_numpy(part)].sum()) for part in np.array_split(rows, 50))\n"
        "print(total)",
        tmp_path / "data",
    )
    assert int(out) == int(rows.sum())
