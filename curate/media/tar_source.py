"""Tar shards of image + caption, as SAMPLES: nothing is unpacked, every member group has one fate.

Image bytes stay where they are: a sample is a shard, an offset and a size. Captions come from
key.txt, else from the JSON's or the shard parquet's caption; img2dataset's 00000.parquet beside
00000.tar gives the metadata columns, else key.json does.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from curate.media.images import ImageError, sniff
from curate.media.tars import BadSample, RangeReader, Span, TarSample, group_samples, scan_members
from curate.rows.columns import clean_text, from_mapping
from curate.rows.foreign import tame
from curate.source_config import SourceConfig
from manifests import ledger, paths, store
from manifests.errors import UserError
from manifests.schemas import MAX_ROWS_PER_SHARD, SAMPLES, UID_ROW_BITS, conform
from manifests.work import Output, part_name

HEADER_BYTES = 64 * 1024
"""Enough of an image to read its size; a JPEG with a larger EXIF block is sniffed whole."""
MAX_IMAGE_BYTES = 2**32 - 1
"""What the SAMPLES column `size` can say."""


MAX_IMAGE_BYTES = 2**32 - 1  # SAMPLES.size is a uint32


@dataclass(frozen=True, slots=True)
class _Bad:
    """A row that cannot become a sample."""

    row: int
    key: str
    error: str
    detail: str


class _BadRow(Exception):
    """Carries an error class and a detail out of the reading of one sample."""

    def __init__(self, error: str, detail: str) -> None:
        super().__init__(error, detail)
        self.error, self.detail = error, detail


def ingest_part(
    source: SourceConfig, root: str, part: int, shards: Sequence[tuple[int, str]]
) -> Output:
    """Return the SAMPLES of some shards, with a verdict per member group.

    Args: shards: (shard_index, name below root) of each.
    Raises: UserError when a shard is missing or holds more rows than a uid can number.
    """
    scanned = [_Shard(source, root, index, name) for index, name in shards]
    verdicts = [row for shard in scanned for row in shard.verdict_rows()]
    rows = [row for shard in scanned for row in shard.samples]
    return Output(
        files={f"{part_name(part)}.parquet": conform(pa.Table.from_pylist(rows, SAMPLES), SAMPLES)},
        verdicts=ledger.verdicts(
            "ingest",
            np.array([uid for uid, _ in verdicts], np.uint64),
            reasons=[reason for _, reason in verdicts],
        ),
        quarantine=ledger.quarantine([row for shard in scanned for row in shard.quarantine_rows()]),
        notes={"skipped_members": sum(shard.num_skipped for shard in scanned)},
    )


class _Shard:
    """One scanned shard: its samples and its bad rows."""

    def __init__(self, source: SourceConfig, root: str, index: int, name: str) -> None:
        self._source, self._index, self._name = source, index, name
        self.samples: list[dict[str, Any]] = []
        self.bad: list[_Bad] = []
        path = paths.join(root, name)
        self._listed = read_listing(path.removesuffix(".tar") + ".parquet")
        try:
            self._scan(path)
        except FileNotFoundError as error:
            raise UserError(f"{path} is gone.", "It was listed as a shard a moment ago.") from error

    def verdict_rows(self) -> list[tuple[int, str]]:
        """Return (uid, reason) of every row, by uid."""
        bad = [(self._uid(one.row), ledger.quarantine_reason(one.error)) for one in self.bad]
        return sorted([*((row["uid"], "") for row in self.samples), *bad])

    def quarantine_rows(self) -> list[dict[str, Any]]:
        """Return the QUARANTINE rows."""
        return [
            dict(uid=self._uid(b.row), key=b.key, shard=self._name, error=b.error, detail=b.detail)
            for b in self.bad
        ]

    def _uid(self, row: int) -> int:
        return self._index << UID_ROW_BITS | row

    def _scan(self, path: str) -> None:
        scan = scan_members(path)
        groups = group_samples(scan)
        self.num_skipped = len(groups.skipped)
        if len(groups.rows) + (scan.damage is not None) > MAX_ROWS_PER_SHARD:
            raise UserError(
                f"{path} has more than 2^24 samples.",
                "A uid gives 24 bits to the row in the shard.",
                "Split the shard.",
            )
        with RangeReader(path) as reader:
            for row in groups.rows:
                self._add(reader, row)
        blamed = any(one.error == "truncated_member" for one in self.bad)
        if scan.damage is not None and not blamed:
            detail = f"{scan.damage} at byte {scan.damage_offset} of {scan.num_bytes}"
            self.bad.append(_Bad(len(groups.rows), "", "damaged_shard", detail))

    def _add(self, reader: RangeReader, row: TarSample | BadSample) -> None:
        if isinstance(row, BadSample):
            self.bad.append(_Bad(row.row, clean_text(row.key)[0], row.error_class, row.detail))
            return
        try:
            self.samples.append(self._sample(reader, row))
        except _BadRow as bad:
            self.bad.append(_Bad(row.row, clean_text(row.key)[0], bad.error, bad.detail))

    def _sample(self, reader: RangeReader, row: TarSample) -> dict[str, Any]:
        if row.image.size > MAX_IMAGE_BYTES:
            raise _BadRow("image_too_large", f"{row.image.size} bytes")
        if row.image.size > MAX_IMAGE_BYTES:
            raise _BadRow("image_too_large", f"{row.image.size} bytes")
        values = self._values(reader, row)
        caption = _caption(reader, row, values)
        width, height = values.get("width"), values.get("height")
        if not width or not height:
            width, height = _size_by_header(reader, row.image)
        return values | {
            "uid": self._uid(row.row),
            "key": clean_text(row.key)[0],
            "source": self._source.label,
            "shard": self._name,
            "offset": row.image.offset,
            "size": row.image.size,
            "caption": caption,
            "width": width,
            "height": height,
            "image_format": row.image_suffix,
            "image_sha256": _digest(reader, row.image) if self._source.hash_images else None,
        }

    def _values(self, reader: RangeReader, row: TarSample) -> dict[str, Any]:
        listed = self._listed.get(row.key)
        if listed is not None:
            return from_mapping({k: v for k, v in listed.items() if k != "key"})
        return _json_values(reader, row) if row.json else from_mapping({})


def read_listing(path: str) -> dict[str, dict[str, Any]]:
    """Return img2dataset's per-shard parquet as key -> row; {} when there is none.

    Rows of failed downloads have no tar member and are never looked up. Text that is not UTF-8 is
    repaired. Raises: UserError when the file is there but is no parquet.
    """
    fs, local = paths.filesystem(path)
    if not fs.exists(local):
        return {}
    try:
        with fs.open(local, "rb") as file:
            table = pq.ParquetFile(file).read()
    except store.BAD_PARQUET as error:
        raise UserError(
            f"{path} is not a readable parquet file.",
            f"It lies beside a shard, where img2dataset writes the shard's metadata: {error}",
            "Remove it, or write it again.",
        ) from error
    if "key" not in table.column_names:
        return {}
    columns = {
        name: tame(column).to_pylist()
        for name, column in zip(table.column_names, table.columns, strict=True)
    }
    rows = (dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True))
    return {str(row["key"]): row for row in rows}


def _json_values(reader: RangeReader, row: TarSample) -> dict[str, Any]:
    """Return the SAMPLES columns that key.json fills; a sample with a key.txt can do without."""
    assert row.json is not None, "called for rows with a JSON member"
    text, _ = clean_text(reader.read(row.json.offset, row.json.size))
    try:
        values = json.loads(text)
        return from_mapping(values if isinstance(values, dict) else {"json_value": values})
    except (ValueError, RecursionError) as error:  # nested too deeply, to read or to write again
        if row.txt is not None:
            return from_mapping({"json_error": str(error)})
        raise _BadRow("bad_json", str(error)) from error


def _caption(reader: RangeReader, row: TarSample, values: Mapping[str, Any]) -> str:
    if row.txt is not None:
        caption, _ = clean_text(reader.read(row.txt.offset, row.txt.size))
    else:
        found = values.get("caption")
        if found is None and row.json is not None:
            found = _json_values(reader, row).get("caption")
        caption = found or ""
    if not caption:
        raise _BadRow("missing_caption", "the sample's caption is empty or not there")
    return caption


def _size_by_header(reader: RangeReader, image: Span) -> tuple[int | None, int | None]:
    """Return (width, height), or Nones when the header is unreadable: decoding will say why."""
    for num_bytes in sorted({min(HEADER_BYTES, image.size), image.size}):
        try:
            header = sniff(reader.read(image.offset, num_bytes))
        except ImageError:
            continue
        return header.width, header.height
    return None, None


def _digest(reader: RangeReader, image: Span) -> bytes:
    return hashlib.sha256(reader.read(image.offset, image.size)).digest()
