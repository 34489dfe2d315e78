"""The original bytes of samples, read from their shards by offset."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import groupby

from curate.media.tars import RangeReader
from manifests import paths
from manifests.errors import UserError

Place = tuple[str, int, int]
"""(shard below the root, offset in bytes, size in bytes)."""


def open_shard(root: str, shard: str) -> RangeReader:
    """Return an open reader of a shard. Raises: UserError when the shard is gone."""
    path = paths.join(root, shard)
    try:
        return RangeReader(path)
    except FileNotFoundError as error:
        raise UserError(
            f"{path} is gone.",
            "Its samples were listed by the ingest stage, and their bytes are needed now.",
            "Put the shard back, or run with a new --out to ingest what is there.",
        ) from error


def read_originals(root: str, places: Iterable[Place]) -> Iterator[bytes | None]:
    """Yield the bytes at each place, in order; None where the shard now ends before them.

    A shard stays open while consecutive places lie in it. Raises: UserError when one is gone.
    """
    for shard, group in groupby(places, key=lambda place: place[0]):
        with open_shard(root, shard) as reader:
            yield from (_read(reader, offset, size) for _, offset, size in group)


def _read(reader: RangeReader, offset: int, size: int) -> bytes | None:
    try:
        return reader.read(offset, size)
    except EOFError:
        return None
