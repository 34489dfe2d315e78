"""One shard from a sealed journal: its files as img2dataset has them, and where its images lie."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa

from curate.download import layout
from curate.download.journal import Journal
from curate.download.layout import Member, Row
from curate.download.statuses import Status
from curate.media.tars import write_tar
from manifests.schemas import SAMPLES, UID_ROW_BITS, conform
from manifests.store import Content

_ROWS_AT_ONCE = 1024


@dataclass(frozen=True, slots=True)
class Shard:
    """The rows of one input shard, settled. samples: their SAMPLES by uid; source: the columns of
    `layout.source_columns` for them; digits: of a key, the row's."""

    number: int
    samples: pa.Table
    source: pa.Table
    journal: Journal
    digits: int

    def build(self) -> tuple[dict[str, Content], pa.Table, list[dict[str, Any]]]:
        """Return the shard's files by path, the SAMPLES of its images, and what became of each row.

        The tar is written as a stream, which holds one image at a time.
        """
        assert self.journal.span is not None, "only what is settled for good is built"
        uids = self.samples.column("uid").to_pylist()
        rows = [self.journal.row(uid) for uid in uids]
        is_ok = [row["status"] == Status.OK for row in rows]
        listing = layout.listing(self.source, self.samples, rows, self.digits)
        images = [(uid, row) for uid, row, ok in zip(uids, rows, is_ok, strict=True) if ok]
        listed = listing.filter(pa.array(is_ok, pa.bool_()))
        sizes = [self.journal.entries[uid].image_bytes for uid, _ in images]
        found = layout.places(zip(_members(listed, images), sizes, strict=True))
        files: dict[str, Content] = {
            layout.shard_name(self.number): lambda file: self._write_tar(file, listed, images),
            layout.shard_name(self.number, ".parquet"): listing,
            layout.shard_name(self.number, "_stats.json"): layout.stats(rows, self.journal.span),
        }
        kept = self.samples.filter(pa.array(is_ok, pa.bool_()))
        return files, self._described(kept, found, [row for _, row in images]), rows

    def _write_tar(
        self, file: BinaryIO, listed: pa.Table, images: Sequence[tuple[int, Row]]
    ) -> None:
        write_tar(file, self._entries(listed, images))
        self.journal.close()

    def _entries(
        self, listed: pa.Table, images: Sequence[tuple[int, Row]]
    ) -> Iterator[tuple[str, bytes]]:
        for (uid, _), members in zip(images, _members(listed, images), strict=True):
            for name, content in members:
                yield name, self.journal.image(uid) if content is None else content

    def _described(
        self, samples: pa.Table, places: Sequence[Member], rows: Sequence[Row]
    ) -> pa.Table:
        """Return SAMPLES rows as they were, with the images where they are now."""
        num = len(rows)
        digests = [bytes.fromhex(row["stored_sha256"]) for row in rows]
        changed: dict[str, Any] = {
            "shard": pa.array([layout.shard_name(self.number)] * num, pa.string()),
            "offset": pa.array([one.offset for one in places], pa.uint64()),
            "size": pa.array([one.size for one in places], pa.uint32()),
            "width": pa.array([row["width"] for row in rows], pa.uint32()),
            "height": pa.array([row["height"] for row in rows], pa.uint32()),
            "image_format": pa.array([row["suffix"] for row in rows], pa.string()),
            "image_sha256": pa.array(digests, pa.binary(32)),
        }
        columns = {name: changed.get(name, samples.column(name)) for name in samples.column_names}
        return conform(pa.table(columns), SAMPLES)


def by_shard(samples: pa.Table) -> list[tuple[int, int, int]]:
    """Return (shard number, first row, number of rows) of each shard in SAMPLES sorted by uid."""
    numbers = samples.column("uid").to_numpy() >> np.uint64(UID_ROW_BITS)
    found, first, counts = np.unique(numbers, return_index=True, return_counts=True)
    return [(int(a), int(b), int(c)) for a, b, c in zip(found, first, counts, strict=True)]


def _members(
    listed: pa.Table, images: Sequence[tuple[int, Row]]
) -> Iterator[list[tuple[str, bytes | None]]]:
    """Yield the members of each ok row, a few rows in memory at a time."""
    for first in range(0, listed.num_rows, _ROWS_AT_ONCE):
        rows = listed.slice(first, _ROWS_AT_ONCE).to_pylist()
        for row, (_, noted) in zip(rows, images[first : first + _ROWS_AT_ONCE], strict=True):
            yield layout.members(row, noted["suffix"])
