"""The program for CUDA machines: what it does where there is none, and what it needs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tools.bench import gpu, results

ROOT = Path(gpu.__file__).resolve().parents[2]


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without CUDA")
def test_without_cuda_it_says_so_and_succeeds(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert gpu.main(["--out", str(tmp_path / "gpu.json")]) == 0
    said = json.loads(capsys.readouterr().out)
    assert not results.check(said)
    assert said["cases"]["gpu"]["status"] == "skipped"
    assert "no CUDA" in said["cases"]["gpu"]["why"]
    assert results.load(tmp_path / "gpu.json") == said


def test_it_needs_only_torch_numpy_h5py_safetensors_and_psutil(tmp_path: Path) -> None:
    code = f"""
import sys
for name in ("xxhash", "isal", "typer", "rich", "hdf5plugin", "torchdata", "matplotlib", "pytest"):
    sys.modules[name] = None
from tools.bench import gpu
missing = gpu.stand_ins()
from tools.bench.jasper_data import write
write("safetensors", {str(tmp_path / "data")!r}, pairs=64, pairs_per_row=1, dim=8, n_neg=3, seed=1)
import jasper_store as js
loader = js.create_loader({str(tmp_path / "data")!r}, "train", 16)
print(missing, len([batch for batch in loader]))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "['xxhash', 'isal'] 3"


@pytest.mark.cuda
def test_a_small_run_on_the_device(tmp_path: Path) -> None:
    result = gpu.measure(tmp_path, pairs=20_000, dim=64, batches=[64, 256], repeats=1)
    assert any(note.endswith("own check: none.") for note in result.notes)
    assert all(row["events"] > 0 for table in result.tables[:1] for row in table.rows)
    assert {item.met is None for item in result.targets} == {False}
    document = {"schema": results.SCHEMA, "machine": {}, "settings": {}, "cases": {"gpu": result.to_dict()}}
    assert not results.check(document)
