"""What tests of whole training programs share: the documentation's programs, torchrun, and what was handed out."""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import psutil

__all__ = ["ROOT", "Seen", "Torchrun", "free_port", "program", "seen"]

ROOT = Path(__file__).parents[2]


def program(name: str, directory: Path) -> Path:
    """A program of docs/distributed.md, as a file: what is printed there is what runs here."""
    text = (ROOT / "docs" / "distributed.md").read_text()
    found = re.search(rf'```python title="{re.escape(name)}"\n(.*?)```', text, re.DOTALL)
    assert found is not None, f"docs/distributed.md has no program {name}"
    path = directory / name
    path.write_text(found[1])
    return path


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port


class Torchrun:
    """One torchrun; nothing of it outlives the test."""

    def __init__(self, watch: Path, *arguments: object, watched: bool = True, **environ: str) -> None:
        watch.mkdir(exist_ok=True)
        command = [sys.executable, "-m", "torch.distributed.run", *map(str, arguments)]
        if watched:
            place = next(i for i, word in enumerate(command) if word.endswith(".py"))
            command.insert(place, str(Path(__file__).with_name("watched.py")))
        path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH", ""))))
        environ = {
            "PYTHONPATH": path,
            "WATCH_DIR": str(watch),
            "OMP_NUM_THREADS": "1",
            # Else restarted ranks may look for each other where they were before (pytorch#135712).
            "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
            **environ,
        }
        self.process = subprocess.Popen(
            command,
            env=os.environ | environ,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def wait(self, timeout: float = 240) -> str:
        """Everything that it printed; it must have ended well."""
        try:
            output, _ = self.process.communicate(timeout=timeout)
        finally:
            self.kill()
        assert self.process.returncode == 0, output
        return output

    def kill(self) -> None:
        """End it and its workers at once, as a node that goes dark does."""
        try:
            torchrun = psutil.Process(self.process.pid)
            # It stops first, so that it can neither notice nor start anybody anew.
            torchrun.suspend()
            family = [torchrun, *torchrun.children(recursive=True)]
        except psutil.NoSuchProcess:
            family = []
        for process in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self.process.wait()
        if self.process.stdout is not None:
            self.process.stdout.close()


class Seen(NamedTuple):
    """A batch that one rank was given."""

    life: int
    rank: int
    world: int
    epoch: int
    samples: tuple[float, ...]


def seen(watch: Path) -> list[Seen]:
    """What all ranks were given, in each rank's order."""
    batches = []
    for path in sorted(watch.glob("seen-*.jsonl")):
        _, life, rank, _ = path.stem.split("-")
        for line in path.read_text().splitlines():
            facts: dict[str, Any] = json.loads(line)
            batches.append(Seen(int(life), int(rank), facts["world"], facts["epoch"], tuple(facts["seen"])))
    return batches
