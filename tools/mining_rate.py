"""Exact mining against the rate of the machine's own matrix product, and against sentence_transformers.util.semantic_search.

    python -m tools.mining_rate [--questions 100000] [--sources 100000] [--clusters 224] [--peer] [--out docs/bench/mining.json]

Everything is measured in one process on the same arrays: mining, from reading the arrays to the finished negatives, and the
product alone in blocks of the fastest shape. The product takes turns with mining, as often as a sixty-fourth of the products is
mined, so that a machine whose speed changes changes both. ``--peer`` measures semantic_search instead of the product. It
returns the ``n_neg`` most similar sources of each question and applies no rule. A run is added to the JSON file.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from jasper_store.building.mining import MiningInputs, MiningSettings, mine
from jasper_store.building.quantized import quantizes
from tools.bench import machine

_BLOCKS = ((1024, 2048), (2048, 4096), (2048, 2048), (512, 4096), (4096, 8192))
_PEER_CHUNKS = ((1024, 500_000), (1024, 16_384), (256, 50_000), (100, 500_000))
"""Rows of a product of semantic_search: (query_chunk_size, corpus_chunk_size); the last are its defaults."""


class Rows:
    """A tensor as the miner reads one."""

    def __init__(self, values: torch.Tensor) -> None:
        self.values = values
        self.shape = tuple(values.shape)

    def take(self, rows: torch.Tensor) -> torch.Tensor:
        """Rows by number."""
        return self.values[rows]


def embeddings(
    n_questions: int, n_sources: int, dim: int, clusters: int
) -> tuple[torch.Tensor, torch.Tensor, np.ndarray, np.ndarray]:
    """Questions, sources, the source of each question, and the cluster of each source; seeded, of length 1."""
    generator = torch.Generator().manual_seed(0)

    def noise(rows: int) -> torch.Tensor:
        return torch.nn.functional.normalize(torch.randn(rows, dim, generator=generator), dim=1)

    own = torch.randint(0, clusters, (n_sources,), generator=generator)
    sources = torch.nn.functional.normalize(noise(clusters)[own] + 1.2 * noise(n_sources), dim=1)
    pairs = torch.randint(0, n_sources, (n_questions,), generator=generator)
    questions = torch.nn.functional.normalize(sources[pairs] + 0.8 * noise(n_questions), dim=1)
    return questions, sources, pairs.numpy(), own.numpy()


def product_seconds(questions: torch.Tensor, sources: torch.Tensor, block: tuple[int, int]) -> float:
    """Seconds that all products take, block by block into the same memory."""
    height, width = block
    out = torch.empty(height * width)
    began = time.perf_counter()
    with torch.inference_mode():
        for start in range(0, len(sources), width):
            some = sources[start : start + width]
            for low in range(0, len(questions), height):
                rows = questions[low : low + height]
                torch.mm(rows, some.T, out=out[: len(rows) * len(some)].view(len(rows), len(some)))
    return time.perf_counter() - began


class Reference:
    """Makes the same products as mining has made since the last turn, and measures that; a progress callback of mining."""

    def __init__(self, questions: torch.Tensor, sources: torch.Tensor, turns: int = 64) -> None:
        self.block = fastest_block(questions, sources)
        self.seconds = 0.0
        self._questions, self._sources, self._turns = questions, sources, turns
        self._done = 0

    def __call__(self, done: int, total: int) -> None:
        """Measure the products of questions that mining is ahead."""
        reached = len(self._questions) * (done * self._turns // total) // self._turns
        if reached > self._done:
            self.seconds += product_seconds(self._questions[self._done : reached], self._sources, self.block)
            self._done = reached


def fastest_block(questions: torch.Tensor, sources: torch.Tensor) -> tuple[int, int]:
    """The block of which a product is made in the least time."""
    some, among = questions[:4096], sources[:16384]
    return min(_BLOCKS, key=lambda block: min(product_seconds(some, among, block) for _ in range(2)))


def peer_runs(
    questions: torch.Tensor, sources: torch.Tensor, top_k: int, chunks: tuple[tuple[int, int], ...]
) -> list[dict[str, Any]]:
    """semantic_search with some chunk sizes."""
    from sentence_transformers import util

    runs = []
    for query, corpus in chunks:
        began = time.perf_counter()
        found = util.semantic_search(questions, sources, query, corpus, top_k, util.dot_score)
        runs.append({"query_chunk": query, "corpus_chunk": corpus, "seconds": time.perf_counter() - began})
        assert len(found) == len(questions)
        print(json.dumps(runs[-1]), flush=True)
    return runs


def arguments() -> argparse.Namespace:
    """What was asked for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--questions", type=int, default=100_000)
    parser.add_argument("--sources", type=int, default=100_000)
    parser.add_argument("--dim", type=int, default=384)
    parser.add_argument("--n-neg", type=int, default=10)
    parser.add_argument(
        "--clusters", type=int, default=0, help="mine in clusters, four kinds; default: the most similar"
    )
    parser.add_argument("--memory", type=int, default=2 << 30, help="budget of mining, bytes")
    parser.add_argument("--peer", action="store_true", help="compare with semantic_search")
    parser.add_argument("--peer-chunks", type=int, help="only the first so many of its chunk sizes, the best first")
    parser.add_argument("--out", type=Path)
    return parser.parse_args()


def main() -> None:
    """Measure once; print it, and add it to the file."""
    options = arguments()
    questions, sources, pairs, own = embeddings(
        options.questions, options.sources, options.dim, options.clusters or 224
    )
    run: dict[str, Any] = {
        "shape": [options.questions, options.sources, options.dim],
        "n_neg": options.n_neg,
        "clusters": options.clusters,
        "threads": torch.get_num_threads(),
        "products_of_bytes": quantizes(options.dim),
        "processor": machine.describe(Path.cwd())["processor"],
    }
    reference = None if options.peer else Reference(questions, sources)
    inputs = MiningInputs(
        Rows(questions),
        Rows(sources),
        np.stack([np.arange(len(pairs)), pairs], axis=1),
        own[pairs] if options.clusters else None,
        own if options.clusters else None,
    )
    settings = MiningSettings(options.n_neg, (3, 4, 3, 2) if options.clusters else (0, 0, 1, 0))
    began = time.perf_counter()
    mined = mine(inputs, settings, memory_limit=options.memory, progress=reference)
    run["mine_seconds"] = time.perf_counter() - began - (reference.seconds if reference else 0.0)
    assert mined.negatives.shape == (len(pairs), options.n_neg)
    if reference is None:
        run["semantic_search"] = peer_runs(questions, sources, options.n_neg, _PEER_CHUNKS[: options.peer_chunks])
        best = min(each["seconds"] for each in run["semantic_search"])
        run["semantic_search_over_mine"] = best / run["mine_seconds"]
    else:
        run["product_block"] = reference.block
        run["product_seconds"] = reference.seconds
        flop = 2 * options.questions * options.sources * options.dim
        run["product_gflops"] = flop / run["product_seconds"] / 1e9
        run["mine_over_product_rate"] = run["product_seconds"] / run["mine_seconds"]
    print(json.dumps(run))
    if options.out:
        there = json.loads(options.out.read_text()) if options.out.exists() else {"runs": []}
        there["runs"].append(run)
        options.out.write_text(json.dumps(there, indent=2) + "\n")


if __name__ == "__main__":
    main()
