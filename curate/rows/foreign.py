"""Columns of files that others wrote, brought to types that every library here can read.

Parquet may bring dictionaries, runs, bytes, nested text that is not UTF-8, dates beyond any
calendar. Polars panics on some of them and Python refuses others; these functions never do.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

REPLACEMENT = "\ufffd"
_SURROGATES = re.compile("[\ud800-\udfff]")


def tame(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Return the column as numbers, booleans, decimals, valid text, or lists and structs of these.

    Dictionaries and runs are written out; bytes are read as text, where what is not UTF-8 becomes
    U+FFFD; dates and times become text, in UTC; any other type becomes its values' JSON text.
    """
    kind = column.type
    if isinstance(kind, pa.BaseExtensionType):
        return tame(pa.chunked_array([one.storage for one in column.chunks], kind.storage_type))
    if pa.types.is_dictionary(kind):
        return tame(column.cast(kind.value_type))
    if pa.types.is_run_end_encoded(kind):
        return tame(pc.run_end_decode(column))
    if is_text(kind):
        return valid_text(column)
    if _is_plain(kind) and _is_valid(column):
        return column
    values = _python_values(column)
    texts = (one if one is None or isinstance(one, str) else json_text(one) for one in values)
    return pa.chunked_array([pa.array(texts, pa.string())])


def is_text(kind: pa.DataType) -> bool:
    """Tell whether a type holds strings or bytes."""
    types = pa.types
    tests = (
        types.is_string,
        types.is_large_string,
        types.is_string_view,
        types.is_binary,
        types.is_large_binary,
        types.is_binary_view,
        types.is_fixed_size_binary,
    )
    return any(test(kind) for test in tests)


def valid_text(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Return a column of strings or bytes as strings; what is not UTF-8 becomes U+FFFD."""
    raw = column.cast(pa.large_binary())
    try:
        return raw.cast(pa.large_string()).cast(pa.string())
    except pa.ArrowInvalid:
        mended = (None if one is None else _decoded(one) for one in raw.to_pylist())
        return pa.chunked_array([pa.array(mended, pa.string())])


def json_text(value: Any) -> str:
    """Return one JSON text of a value: sorted keys, valid Unicode; NaN and infinity become null."""
    text = json.dumps(_jsonable(value), sort_keys=True, ensure_ascii=False, default=str)
    return without_surrogates(text)


def without_surrogates(text: str) -> str:
    """Return the text with U+FFFD for each lone surrogate, which JSON allows and UTF-8 does not."""
    return _SURROGATES.sub(REPLACEMENT, text)


def _jsonable(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, bytes):
        return _decoded(value)
    if isinstance(value, Mapping):
        return {str(k): _jsonable(v) for k, v in value.items()}
    return [_jsonable(v) for v in value] if isinstance(value, list | tuple) else value


def _decoded(raw: bytes) -> str:
    return raw.decode("utf-8", errors="replace")


def _is_plain(kind: pa.DataType) -> bool:
    types = pa.types
    tests = (
        types.is_integer,
        types.is_floating,
        types.is_boolean,
        types.is_null,
        types.is_decimal128,
    )
    if any(test(kind) for test in tests) or types.is_string(kind) or types.is_large_string(kind):
        return True
    if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        return _is_plain(kind.value_type)
    if types.is_struct(kind):
        return all(_is_plain(field.type) for field in kind)
    return False


def _is_valid(column: pa.ChunkedArray) -> bool:
    if not pa.types.is_nested(column.type):
        return True
    try:
        column.validate(full=True)  # finds nested text that is not UTF-8
    except pa.ArrowInvalid:
        return False
    return True


def _python_values(column: pa.ChunkedArray) -> list[Any]:
    """Return values of which Python can make JSON; of a type that Arrow cannot read, its name."""
    kind = column.type
    try:
        if pa.types.is_interval(kind):
            return [None if one is None else str(one) for one in column.to_pylist()]
        if pa.types.is_timestamp(kind):
            column = column.cast(pa.timestamp(kind.unit))  # UTC, whatever zone it is shown in
        return list(column.cast(_readable(kind)).to_pylist())
    except (pa.ArrowNotImplementedError, pa.ArrowInvalid, ValueError):
        return [f"<{kind}>" if known else None for known in column.is_valid().to_pylist()]


def _readable(kind: pa.DataType) -> pa.DataType:
    """Return the type to read a type as: text as bytes, moments as text, also when nested."""
    types = pa.types
    if is_text(kind):
        return pa.large_binary()
    if types.is_dictionary(kind):
        return _readable(kind.value_type)
    if types.is_temporal(kind) or types.is_decimal(kind):
        return pa.string()
    if types.is_map(kind):
        return pa.map_(_readable(kind.key_type), _readable(kind.item_type))
    if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        return pa.large_list(_readable(kind.value_type))
    if types.is_struct(kind):
        return pa.struct([field.with_type(_readable(field.type)) for field in kind])
    return kind
