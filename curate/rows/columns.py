"""Source columns under their many names, brought to the SAMPLES schema.

LAION, img2dataset, clip-retrieval and DataComp name the same things differently and type them
differently; everything that SAMPLES has no column for is kept as given in `extra`, a JSON object.
A number that is missing, not finite or not a number becomes null: unknown, never 0.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc

from curate.rows.foreign import REPLACEMENT, json_text, tame, without_surrogates
from manifests.schemas import SAMPLES, conform

ALIASES: dict[str, tuple[str, ...]] = {
    "key": ("key", "image_path", "uid", "sample_id"),
    "caption": ("caption", "text", "top_caption"),
    "url": ("url",),
    "width": ("width",),
    "height": ("height",),
    "similarity": ("similarity",),
    "punsafe": ("punsafe",),
    "pwatermark": ("pwatermark",),
    "nsfw": ("nsfw",),
    "hash": ("hash",),
}
"""SAMPLES column -> source names, compared in lower case, best first."""

_SIDES = ("width", "height")
_NUMBERS = (*_SIDES, "similarity", "punsafe", "pwatermark", "hash")


def choose(names: Sequence[str]) -> dict[str, str]:
    """Return SAMPLES column -> source column for the names a source has.

    Example: ["URL", "TEXT", "NSFW"] -> {"caption": "TEXT", "url": "URL", "nsfw": "NSFW"}
    """
    by_lower = {name.lower(): name for name in reversed(names)}
    found = {
        column: next((by_lower[alias] for alias in aliases if alias in by_lower), None)
        for column, aliases in ALIASES.items()
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
    taken = set(chosen.values())
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
    table = pa.table([tame(column) for column in table.columns], names=table.column_names)
    chosen = choose([field.name for field in table.schema if not pa.types.is_nested(field.type)])
    columns: dict[str, Any] = {k: _column(k, table.column(name)) for k, name in chosen.items()}
    num = len(uids)
    columns.setdefault("key", pa.array([f"{shard}:{row}" for row in range(num)]))
    columns.setdefault("caption", pa.array([""] * num))
    columns |= {
        "uid": pa.array(uids),
        "source": pa.array([source] * num),
        "shard": pa.array([shard] * num),
        "offset": pa.array(np.zeros(num, np.uint64)),
        "size": pa.array(np.zeros(num, np.uint32)),
        "extra": _extra(table.drop_columns(list(chosen.values())), num),
    }
    if clip_score is not None:
        columns["clip_score"] = pa.array(clip_score, mask=~np.isfinite(clip_score))
    return conform(pa.table(columns), SAMPLES)


def _value(column: str, value: Any) -> Any:
    if value is None:
        return None
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


def _extra(table: pa.Table, num_rows: int) -> pa.Array | pa.ChunkedArray:
    if not table.num_columns:
        return pa.nulls(num_rows, pa.string())
    frame = pl.DataFrame(table).select(sorted(table.column_names))
    return frame.select(pl.struct(pl.all()).struct.json_encode()).to_series().to_arrow()
