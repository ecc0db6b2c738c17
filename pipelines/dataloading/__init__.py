"""Samples in, batches out: order and randomness by key, worker processes, packing, shards."""
