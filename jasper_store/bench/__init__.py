"""How fast a dataset is served on this machine: rows, batches, and what the disk itself can do."""
