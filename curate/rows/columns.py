"""Source columns under their many names, brought to the SAMPLES schema.

LAION, img2dataset, clip-retrieval and DataComp name the same things differently and type them
differently; everything that SAMPLES has no column for is kept as given in `extra`, a JSON object.
A number that is missing, not finite or not a number becomes null: unknown, never 0. A digest that
is none becomes null too, and stays in `extra`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc

from curate.rows.foreign import REPLACEMENT, is_text, json_text, tame, without_surrogates
from manifests.schemas import SAMPLES, conform

ALIASES: dict[str, tuple[str, ...]] = {
    "key": ("key", "image_path", "uid", "sample_id", "id"),
    "caption": ("caption", "text", "top_caption", "alt_text"),
    "url": ("url", "image_url"),
    "width": ("width",),
    "height": ("height",),
    "similarity": (
        "similarity",
        "clip_l14_similarity_score",
        "clip_similarity_vitl14",
        "clip_b32_similarity_score",
        "clip_similarity_vitb32",
    ),
    "punsafe": ("punsafe",),
    "pwatermark": ("pwatermark",),
    "aesthetic": ("aesthetic", "aesthetic_score", "aesthetic_score_laion_v2"),
    "nsfw": ("nsfw",),
    "hash": ("hash",),
    "published_md5": ("md5", "published_md5"),
    "published_sha256": ("sha256", "published_sha256"),
}
"""SAMPLES column -> source names, compared in lower case, best first. Of similarities: the source's
own, then by ViT-L/14, then by ViT-B/32, which tells less."""

URL_ALIASES = ALIASES | {
    "width": ("original_width", "width"),
    "height": ("original_height", "height"),
    "key": ("key", "uid", "sample_id", "image_path", "id"),
}
"""The same for tables of URLs, where the image that counts is the one behind the URL."""

_SIDES = ("width", "height")
_HEX = re.compile(rb"[0-9A-Fa-f]*")
_NUMBERS = (*_SIDES, "similarity", "punsafe", "pwatermark", "aesthetic", "hash")
DIGEST_BYTES = {"published_md5": 16, "published_sha256": 32}


def choose(
    names: Sequence[str], aliases: Mapping[str, tuple[str, ...]] = ALIASES
) -> dict[str, str]:
    """Return SAMPLES column -> source column for the names a source has.

    Example: ["URL", "TEXT", "NSFW"] -> {"caption": "TEXT", "url": "URL", "nsfw": "NSFW"}
    """
    by_lower = {name.lower(): name for name in reversed(names)}
    found = {
        column: next((by_lower[alias] for alias in known if alias in by_lower), None)
        for column, known in aliases.items()
    }
    return {column: name for column, name in found.items() if name is not None}


def clean_text(data: bytes | str) -> tuple[str, bool]:
    """Return (valid text without outer white space, whether it had to be repaired).

    Bytes that are not UTF-8 and lone surrogates (JSON allows "\\ud800") become U+FFFD; a byte
    order mark in front is dropped.
    """
    if isinstance(data, bytes):
        text = data.decode("utf-8-sig", errors="replace")
        return text.strip(), REPLACEMENT in text and REPLACEMENT.encode() not in data
    text = without_surrogates(data)
    return text.strip(), text != data


def from_mapping(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the SAMPLES columns but `key`, and `extra`, of one sample's metadata (a JSON object).

    The sample's key is its members' name; one that the metadata bring too is kept in `extra`.
    """
    chosen = choose([name for name, value in values.items() if not isinstance(value, dict | list)])
    chosen.pop("key", None)
    row = {column: _value(column, values[name]) for column, name in chosen.items()}
    taken = {name for column, name in chosen.items() if not _is_no_digest(column, row[column])}
    rest = {k: v for k, v in values.items() if k not in taken and v is not None}
    row["extra"] = json_text(rest) if rest else None
    return row


def samples_from_columns(
    table: pa.Table,
    uids: npt.NDArray[np.uint64],
    *,
    source: str,
    shard: str,
    clip_score: npt.NDArray[np.float64] | None = None,
) -> pa.Table:
    """Return a SAMPLES table of embedding rows; row j of `table` belongs to uids[j].

    A source without keys gets "<shard>:<row>"; one without captions gets empty captions.
    """
    columns, rest = typed_columns(table, choose(plain_names(table.schema)))
    num = len(uids)
    columns.setdefault("key", pa.array([f"{shard}:{row}" for row in range(num)]))
    columns.setdefault("caption", pa.array([""] * num))
    columns |= {
        "uid": pa.array(uids),
        "source": pa.array([source] * num),
        "shard": pa.array([shard] * num),
        "offset": pa.array(np.zeros(num, np.uint64)),
        "size": pa.array(np.zeros(num, np.uint32)),
        "extra": extra_of(rest, num),
    }
    if clip_score is not None:
        columns["clip_score"] = pa.array(clip_score, mask=~np.isfinite(clip_score))
    return conform(pa.table(columns), SAMPLES)


def plain_names(schema: pa.Schema) -> list[str]:
    """Return the names of the columns that hold one value a row."""
    return [field.name for field in schema if not pa.types.is_nested(field.type)]


def typed_columns(
    table: pa.Table, chosen: Mapping[str, str]
) -> tuple[dict[str, pa.ChunkedArray | pa.Array], pa.Table]:
    """Return (SAMPLES columns in their types, what they do not take as tame columns).

    Args: table: n rows of foreign columns; chosen: SAMPLES column -> source column.
    """
    columns: dict[str, pa.ChunkedArray | pa.Array] = {}
    taken = set()
    for column, name in chosen.items():
        given = table.column(name)
        if column in DIGEST_BYTES:
            columns[column] = _digests(column, given)
            if columns[column].null_count > given.null_count:
                continue
        else:
            columns[column] = _column(column, tame(given))
        taken.add(name)
    rest = [name for name in table.column_names if name not in taken]
    return columns, pa.table([tame(table.column(name)) for name in rest], names=rest)


def digest_of(value: bytes | str, num_bytes: int) -> bytes | None:
    """Return a digest given as bytes or in hexadecimal; None when it is neither.

    Text may come as bytes, and hexadecimal digits alone are text: an MD5 among SHA-256s, of 32
    characters, is no SHA-256.
    """
    if isinstance(value, bytes) and len(value) == num_bytes and not _HEX.fullmatch(value):
        return value
    text = value.decode("ascii", errors="replace") if isinstance(value, bytes) else value
    try:
        found = bytes.fromhex(text.strip())
    except ValueError:
        return None
    return found if len(found) == num_bytes else None


def _digests(column: str, values: pa.ChunkedArray) -> pa.Array:
    """Return digests as fixed-size bytes; null where there is none."""
    if not is_text(values.type):
        values = tame(values).cast(pa.string())
    num_bytes = DIGEST_BYTES[column]
    given = values.cast(pa.large_binary()).to_pylist()
    found = [None if one is None else digest_of(one, num_bytes) for one in given]
    return pa.array(found, pa.binary(num_bytes))


def _is_no_digest(column: str, value: Any) -> bool:
    return column in DIGEST_BYTES and value is None


def _value(column: str, value: Any) -> Any:
    if value is None:
        return None
    if column in DIGEST_BYTES:
        return digest_of(value if isinstance(value, bytes) else str(value), DIGEST_BYTES[column])
    if column not in _NUMBERS:
        return clean_text(value if isinstance(value, bytes) else str(value))[0]
    try:
        number = float(value) if column != "hash" else int(value)
    except (TypeError, ValueError, OverflowError):
        return None
    if column == "hash":
        return number if -(2**63) <= number < 2**63 else None
    if not math.isfinite(number):
        return None
    return number if column not in _SIDES else _side(number)


def _side(number: float) -> int | None:
    return int(number) if 1 <= number < 2**32 else None


def _column(column: str, values: pa.ChunkedArray) -> pa.ChunkedArray | pa.Array:
    """Return a tame column in the type that SAMPLES has for it."""
    wanted = SAMPLES.field(column).type
    if column not in _NUMBERS:
        text = pc.utf8_trim_whitespace(values.cast(pa.string()))
        return pc.fill_null(text, "") if column in ("key", "caption") else text
    if column == "hash" and pa.types.is_signed_integer(values.type):
        return values.cast(wanted)
    if column != "hash" and (pa.types.is_integer(values.type) or pa.types.is_floating(values.type)):
        return _numbers(column, values.cast(pa.float64(), safe=False)).cast(wanted, safe=False)
    return pa.array([_value(column, one) for one in values.to_pylist()], wanted)


def _numbers(column: str, values: pa.ChunkedArray) -> pa.ChunkedArray:
    known = pc.is_finite(values)
    if column in _SIDES:
        in_range = pc.and_(pc.greater_equal(values, 1), pc.less(values, 2**32))
        known = pc.and_(known, in_range)
    return pc.if_else(known, values, None)


def extra_of(table: pa.Table, num_rows: int) -> pa.Array | pa.ChunkedArray:
    """Return a table's columns as one JSON object a row; nulls when it has none."""
    if not table.num_columns:
        return pa.nulls(num_rows, pa.string())
    frame = pl.DataFrame(table).select(sorted(table.column_names))
    return frame.select(pl.struct(pl.all()).struct.json_encode()).to_series().to_arrow()
