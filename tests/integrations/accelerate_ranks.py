"""One rank of test_accelerate.py: accelerate_ranks.py DATASET OUTPUT BATCH_SIZE."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from accelerate import Accelerator, DataLoaderConfiguration

import jasper_store as js


def relevance(batches: Any) -> list[float]:
    return [sample for batch in batches for sample in batch["relevance"].tolist()]


def main(data: str, output: Path, batch_size: int) -> None:
    accelerator = Accelerator()
    served: dict[str, list[float]] = {}

    shared = js.create_loader(data, "train", batch_size, distributed=True)
    prepared = accelerator.prepare(shared)
    assert prepared is shared
    served["shared"] = relevance(prepared)
    accelerator.register_for_checkpointing(prepared)
    js.set_epoch(prepared, 1)
    batches = iter(prepared)
    served["interrupted"] = relevance([next(batches), next(batches)])
    accelerator.save_state(str(output / "state"))
    accelerator.wait_for_everyone()  # rank 0 writes for all
    relevance(batches)
    accelerator.load_state(str(output / "state"))
    served["resumed"] = relevance(prepared)

    whole = accelerator.prepare(js.create_loader(data, "train", batch_size))
    served["whole"] = relevance(whole)
    js.set_epoch(whole, 3)
    served["epoch 3"] = relevance(whole)
    served["even"] = relevance(accelerator.prepare(js.create_loader(data, "val", batch_size)))

    accelerator = Accelerator(dataloader_config=DataLoaderConfiguration(even_batches=False))
    served["exact"] = relevance(accelerator.prepare(js.create_loader(data, "val", batch_size)))

    (output / f"rank-{accelerator.process_index}.json").write_text(json.dumps(served))
    accelerator.end_training()


main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]))
