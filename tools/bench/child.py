"""The inside of a measured process: ``python -m tools.bench.child package.module:function answer.json``."""

from __future__ import annotations

import json
import sys
from importlib import import_module
from pathlib import Path

__all__ = ["main"]


def main(function: str, answer: str) -> None:
    """Call the function with the JSON arguments of standard input; leave what it returns in the answer file."""
    arguments = json.load(sys.stdin)
    module, _, name = function.partition(":")
    result = getattr(import_module(module), name)(**arguments)
    Path(answer).write_text(json.dumps(result), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
