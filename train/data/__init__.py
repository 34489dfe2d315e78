"""Samples of shards by offset, in a planned order, as micro-batches of pixels and ids."""
