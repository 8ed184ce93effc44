"""One rank of test_node.py: node_rank.py DATASET LIMIT; waits for a line on stdin before it ends."""

from __future__ import annotations

import json
import sys
from typing import Any

import torch

import jasper_store as js


def serve(data: str, limit: int) -> Any:
    loader = js.create_loader(data, "train", 256, memory_limit=limit, distributed=True)
    assert sum(len(batch["relevance"]) for batch in loader) > 0
    return loader


torch.set_num_threads(1)
data, limit = sys.argv[1], int(sys.argv[2])
# One epoch of everything mapped: whatever batches, threads and allocators take is there before it is measured. It stays open,
# since closing gives back the memory that is kept for batches.
first = serve(data, 0)
before = js.memory_report().anonymous
loader = serve(data, limit)
plan = loader.dataset_obj.store.plan
facts = {
    "grown": js.memory_report().anonymous - before,
    "budget": plan.budget.nbytes,
    "preloaded": plan.preloaded_nbytes,
    "mapped": plan.mapped_nbytes,
    "plan": str(plan),
}
sys.stdout.write(json.dumps(facts) + "\n")
sys.stdout.flush()
sys.stdin.readline()
