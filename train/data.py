"""Samples of assembled shards, found through TRAIN_INDEX and read by offset: no tar is unpacked."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from manifests import paths, store


@dataclass(frozen=True, slots=True)
class TrainSample:
    """One row of instruction or caption data: LLaVA-format conversation and its images' bytes."""

    uid: int
    row: Mapping[str, Any]
    images: list[bytes]


def read_index(directory: str) -> list[dict[str, Any]]:
    """Return the TRAIN_INDEX rows of a directory of shards, in shard order."""
    return [row for path in _index_files(directory) for row in store.read_table(path).to_pylist()]


def read_samples(directory: str) -> Iterator[TrainSample]:
    """Yield every sample of a directory of shards, in shard order; one shard's index in memory."""
    for path in _index_files(directory):
        for entry in store.read_table(path).to_pylist():
            yield read_sample(directory, entry)


def read_sample(directory: str, entry: Mapping[str, Any]) -> TrainSample:
    """Return the sample of one TRAIN_INDEX row.

    Raises: ValueError when the bytes at the offset are no JSON: the index belongs to other shards.
    """
    shard = paths.join(directory, entry["shard"])
    text = _pread(shard, entry["json_offset"], entry["json_size"])
    images = [_pread(shard, one["offset"], one["size"]) for one in entry["images"]]
    return TrainSample(entry["uid"], json.loads(text), images)


def _index_files(directory: str) -> list[str]:
    names = [n for n in paths.list_names(directory, ".parquet") if n.startswith("part-")]
    return [paths.join(directory, name) for name in paths.shard_order(names)]


def _pread(path: str, offset: int, size: int) -> bytes:
    fs, local = paths.filesystem(path)
    return bytes(fs.cat_file(local, start=offset, end=offset + size))
