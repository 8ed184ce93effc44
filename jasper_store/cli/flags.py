"""Python's options in messages, as the flags of the command line.

The library says ``pass overwrite=True``, because it cannot tell what called it. Here a command was typed.
"""

from __future__ import annotations

import re
from collections.abc import Container

__all__ = ["in_flags"]

_FLAGS = {
    "absolute_margin": "--absolute-margin",
    "batch_size": "--batch-size",
    "budget": "--budget",
    "clusters": "--clusters",
    "compression": "--compression",
    "device": "--device",
    "dim": "--dim",
    "dtype": "--dtype",
    "epochs": "--epochs",
    "format": "--format",
    "keep_similarities": "--keep-similarities",
    "keyword_weights": "--keyword-weights",
    "keywords": "--keywords",
    "max_similarity": "--max-similarity",
    "memory_limit": "--memory-limit",
    "method": "--method",
    "n_neg": "--n-neg",
    "normalize_residual": "--normalize-residual",
    "num_workers": "--workers",
    "overwrite": "--overwrite",
    "pair_keywords": "--pair-keywords",
    "pairs": "--pairs",
    "question_ids": "--question-ids",
    "questions": "--questions",
    "ranks": "--ranks",
    "relative_margin": "--relative-margin",
    "relevance": "--relevance",
    "repeated_pairs": "--repeated-pairs",
    "seconds": "--seconds",
    "seed": "--seed",
    "shared_questions": "--shared-questions",
    "source_ids": "--source-ids",
    "sources": "--sources",
    "splits": "--splits",
    "storage_format": "--format",
    "tensors": "--tensor",
    "tier_numbers": "--tier-numbers",
    "tiers": "--tiers",
}
_SWITCHES = {
    "use_mmap=True": "--mmap",
    "use_mmap=False": "--preload",
    "use_mmap=None": "neither --mmap nor --preload",
}
_COMMANDS = {"js.convert": "convert", "js.verify": "verify", "js.warm_up": "warm", "js.plan": "plan"}

_OPTION = re.compile(rf"\b(?P<name>use_mmap|{'|'.join(_FLAGS)})=(?P<value>'[^']*'|torch\.\w+|[\w:+-]+(?:\.\d+)?)?")
_CALL = re.compile(rf"\b(?P<name>{'|'.join(map(re.escape, _COMMANDS))})\b(?:\([^)]*\))?")


def in_flags(message: str, known: Container[str] | None = None) -> str:
    """A message of the library in the words of the command line.

    Args:
        message: text with options such as ``overwrite=True`` or ``dtype='bfloat16'``.
        known: flags of the command at work; an option without a flag here is left, as one of Python. ``None``: all.
    """

    def flag(match: re.Match[str]) -> str:
        said = match[0]
        found = _SWITCHES.get(said) or _flag(match["name"], match["value"])
        wanted = re.findall(r"--[a-z-]+", found)
        if not wanted or (known is not None and not all(flag in known for flag in wanted)):
            return f"{said} in Python"
        return found

    if known is not None and "--from" in known:  # there --format is that of the target
        message = message.replace("or pass format=", "or pass --from")
    said = _CALL.sub(lambda match: f"jasper-store {_COMMANDS[match['name']]}", message)
    return _OPTION.sub(flag, said)


def _flag(name: str, value: str | None) -> str:
    flag = _FLAGS.get(name, "")
    if value is None or value == "True" or not flag:
        return flag
    if value in {"None", "False"}:
        return f"no {flag}"
    return f"{flag} {value.strip(chr(39)).removeprefix('torch.')}"
