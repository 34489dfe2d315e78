"""img2dataset's layout of one shard: its keys, the members of its tar, its parquet, its stats.

    shards/00012.tar           key.jpg, key.json, key.txt of each image, by key
    shards/00012.parquet       every row, failures too, as the JSON members have it
    shards/00012_stats.json    counts and times, as img2dataset's own

Here members are in the order of their keys and have no time (img2dataset writes them as they come),
so the same answers make the same bytes. Layout source: github.com/rom1504/img2dataset, 1.47.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import polars as pl
import pyarrow as pa

from curate.download.journal import Span
from curate.download.statuses import Status, img2dataset_status
from curate.media.shard_list import SHARDS
from curate.media.tar_scan import BLOCK_BYTES
from curate.rows.foreign import without_surrogates
from manifests.schemas import SAMPLES, UID_ROW_BITS

SHARD_DIGITS = 5
NOT_LISTED = ("uid", "key", "shard", "offset", "size", "caption", "url", "extra", "clip_score")
"""SAMPLES columns that are others' in the layout, or not of the source."""
REPLACED = ("width", "height", "image_format", "image_sha256")
"""SAMPLES columns that tell of the stored image after the download."""

_TEXT, _NUMBER = pa.string(), pa.int32()
_OWN_COLUMNS = (
    ("caption", _TEXT),
    ("url", _TEXT),
    ("key", _TEXT),
    ("status", _TEXT),
    ("error_message", _TEXT),
    ("width", _NUMBER),
    ("height", _NUMBER),
    ("original_width", _NUMBER),
    ("original_height", _NUMBER),
    ("exif", _TEXT),
    ("sha256", _TEXT),  # of the downloaded bytes, as img2dataset has it
    ("uid", pa.uint64()),
    ("warren_status", _TEXT),
    ("http_code", _NUMBER),
    ("final_url", _TEXT),
    ("hash_check", _TEXT),
    ("num_attempts", _NUMBER),
)
"""The columns behind those of the source: img2dataset's, then ours."""

Row = Mapping[str, Any]


class Member(NamedTuple):
    """Where an image lies in the tar that will be written: offset and size in bytes."""

    offset: int
    size: int


def shard_name(shard: int, ending: str = ".tar") -> str:
    """Return a file of a shard. Example: 12 -> "shards/00012.tar"."""
    return f"{SHARDS}/{shard:0{SHARD_DIGITS}d}{ending}"


def key_of(uid: int, row_digits: int) -> str:
    """Return img2dataset's key of a row. Example: shard 12, row 34, 4 digits -> "000120034"."""
    shard, row = uid >> UID_ROW_BITS, uid & ((1 << UID_ROW_BITS) - 1)
    return f"{shard * 10**row_digits + row:0{SHARD_DIGITS + row_digits}d}"


def row_digits(rows_per_shard: int) -> int:
    """Return how many digits of a key are the row's: ceil(log10(rows)). Example: 10000 -> 4."""
    return len(str(rows_per_shard - 1)) if rows_per_shard > 1 else 0


def source_columns(samples: pa.Table) -> pa.Table:
    """Return the columns that stand before img2dataset's: the source's own, under their names.

    They are source_key, the SAMPLES columns that the source fills, and each column that SAMPLES has
    no place for; one that is called like a column of the layout gets "source_" before its name, as
    often as it takes to be called like no other.
    Binary columns become hexadecimal; values of several types, and lists, become JSON.
    """
    frame = pl.DataFrame(samples)
    given = [name for name in SAMPLES.names if name not in (*NOT_LISTED, *REPLACED)]
    columns = {"source_key": frame["key"]} | {name: _readable(frame[name]) for name in given}
    layout = {*columns, *(name for name, _ in _OWN_COLUMNS)}
    extra = _extra_columns(frame["extra"])
    for name, column in extra.items():
        free = name
        while free in layout or (free != name and (free in extra or free in columns)):
            free = f"source_{free}"
        columns[free] = column
    return pl.DataFrame(columns).to_arrow()


def listing(source: pa.Table, samples: pa.Table, rows: Sequence[Row], digits: int) -> pa.Table:
    """Return a shard's parquet: a row per input row.

    Args: source: of `source_columns`; samples: SAMPLES; rows: what the journal noted of each.
    """
    uids = samples.column("uid").to_pylist()
    statuses = [Status(row["status"]) for row in rows]
    values: dict[str, Any] = {
        "caption": samples.column("caption"),
        "url": samples.column("url"),
        "key": [key_of(uid, digits) for uid in uids],
        "status": [img2dataset_status(one) for one in statuses],
        "error_message": [_message(row) for row in rows],
        "uid": samples.column("uid"),
        "warren_status": [one.value for one in statuses],
    }
    for name, kind in _OWN_COLUMNS:
        found = values.get(name)
        if not isinstance(found, pa.ChunkedArray):
            found = pa.array([row.get(name) for row in rows] if found is None else found, kind)
        source = source.append_column(pa.field(name, kind), found.cast(kind))
    return source


def members(row: Row, suffix: str) -> list[tuple[str, bytes | None]]:
    """Return (name, content) of an ok row's members, in the tar's order; None is the image.

    Args: row: of a listing.
    """
    texts = {suffix: None, "json": json_member(row), "txt": (row["caption"] or "").encode()}
    return [(f"{row['key']}.{one}", texts[one]) for one in sorted(texts)]


def places(
    of_rows: Iterable[tuple[list[tuple[str, bytes | None]], int]],
) -> list[Member]:
    """Return where each row's image will lie in the tar of these rows.

    Args: of_rows: the members of each row, and the bytes of its image.
    """
    found, at = [], 0
    for given, image_bytes in of_rows:
        for _, content in given:
            size = image_bytes if content is None else len(content)
            if content is None:
                found.append(Member(at + BLOCK_BYTES, size))
            at += BLOCK_BYTES + size + -size % BLOCK_BYTES
    return found


def json_member(row: Row) -> bytes:
    """Return key.json of a row of a listing: json.dumps(row, indent=4), several times faster.

    The values are no lists or objects, so that the C encoder, which does not indent, can write it.
    """
    text = json.dumps(row, separators=(",\n    ", ": "))
    return f"{{\n    {text[1:-1]}\n}}".encode()


def stats(rows: Sequence[Row], span: Span) -> bytes:
    """Return the shard's _stats.json."""
    words = Counter(img2dataset_status(Status(row["status"])) for row in rows)
    by_status = Counter(row["status"] for row in rows)
    by_status["success"] = by_status.pop(Status.OK.value, 0)
    found = {
        "count": len(rows),
        "successes": words["success"],
        "failed_to_download": words["failed_to_download"],
        "failed_to_resize": words["failed_to_resize"],
        "duration": span.ended - span.started,
        "start_time": span.started,
        "end_time": span.ended,
        "status_dict": {name: num for name, num in sorted(by_status.items()) if num},
    }
    return json.dumps(found, indent=4).encode()


def _message(row: Row) -> str | None:
    if row["status"] == Status.OK.value:
        return None
    return str(row["detail"] or row["status"])


def _readable(column: pl.Series) -> pl.Series:
    return column.bin.encode("hex") if column.dtype == pl.Binary else column


def _extra_columns(extra: pl.Series) -> dict[str, pl.Series]:
    """Return name -> column of the JSON objects in `extra`, in the order in which names appear."""
    parsed = [json.loads(text) if text else {} for text in extra]
    names = dict.fromkeys(name for one in parsed for name in one)
    return {name: _typed(name, [one.get(name) for one in parsed]) for name in names}


def _typed(name: str, values: list[Any]) -> pl.Series:
    """Return a column of the one type that its values have, else of their JSON."""
    values = [without_surrogates(one) if isinstance(one, str) else one for one in values]
    kinds = {type(value) for value in values if value is not None}
    if kinds == {int, float}:
        return pl.Series(name, values, pl.Float64, strict=False)
    for kind, wanted in ((bool, pl.Boolean), (float, pl.Float64), (str, pl.String)):
        if kinds == {kind}:
            return pl.Series(name, values, wanted)
    if kinds == {int} and all(v is None or -(2**63) <= v < 2**63 for v in values):
        return pl.Series(name, values, pl.Int64)
    texts = [None if value is None else json.dumps(value, ensure_ascii=False) for value in values]
    return pl.Series(name, texts, pl.String)
