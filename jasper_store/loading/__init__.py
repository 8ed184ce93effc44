"""When rows are read: order, ranks, prefetching, workers, state, the loader."""
