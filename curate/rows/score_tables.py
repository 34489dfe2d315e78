"""Published scores and digests of rows that other tables have: joined by LAION's hash, or by URL.

The source of the rows may be a table of URLs or published embeddings. Of several values for one row
the one counts that is least in the row's favour: the largest punsafe and pwatermark, the smallest
of the other scores, the tag NSFW before UNSURE before UNLIKELY. Memory: a part's rows and a batch
of the tables.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any

import mmh3
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from curate.rows import table_files
from curate.rows.columns import DIGEST_BYTES, choose, typed_columns
from curate.rows.foreign import tame
from curate.source_config import SourceConfig
from manifests import paths
from manifests.errors import UserError
from manifests.schemas import SAMPLES, conform
from manifests.strict import Strict

_WORST = {
    "punsafe": np.fmax,
    "pwatermark": np.fmax,
    "aesthetic": np.fmin,
    "similarity": np.fmin,
}
_SLOT_BITS, _MAX_SLOT_BITS = 6, 27
"""Of the table that tells at one look that a key is surely not there: 64 slots a key or more, one
byte each, at most 128 MiB."""
_TAGS = ("nsfw", "unsure", "unlikely")
"""Of LAION's NSFW, in lower case, worst first; an unknown one ranks before the last."""
JOINED = (*_WORST, "nsfw", *DIGEST_BYTES)
"""The SAMPLES columns that a table may bring."""
_VERSION = 2
"""Raised whenever the same tables would bring other values: it makes the rows another input."""
_NO_CEILING = (
    "no ceiling is set on the published probability of unsafe content (punsafe); LAION advises "
    "0.5, and its research-safe release ends at 0.45. Set filter.drop_above_punsafe: 0.45"
)
_NOTHING_TO_JUDGE = (
    "filter.drop_above_punsafe judges nothing: no table has a column punsafe, and what is not "
    "known passes. Use tables that have it (Re-LAION's do), or join the published scores: "
    "source.join, with source.laion_hash: true where they go by LAION's hash"
)


@lru_cache(maxsize=8)
def tables_of(patterns: tuple[str, ...]) -> tuple[str, ...]:
    """Return the paths of the tables that the patterns mean. Raises: UserError."""
    found = []
    for pattern in patterns:
        root, names = paths.expand(pattern, suffix=".parquet")
        found += [paths.join(root, name) for name in names]
    return tuple(found)


@lru_cache(maxsize=8)
def keys_of(patterns: tuple[str, ...]) -> frozenset[str]:
    """Return the keys by which the tables are joined, of hash and url. Raises: as columns_of."""
    return frozenset(next(iter(columns_of(path))) for path in tables_of(patterns))


def identity(patterns: tuple[str, ...]) -> list[list[Any]]:
    """Return [name, size, modification time] of each table; nothing where none is joined.

    Lists the tables anew; later calls in this process use that list. Raises: UserError.
    """
    tables_of.cache_clear()
    keys_of.cache_clear()
    tables = tables_of(patterns)
    found = [[paths.name_of(path), *paths.identity_of(path)] for path in tables]
    return [["join", _VERSION], *found] if found else []


def must_have_hash(shown: str, names: Sequence[str], source: SourceConfig) -> None:
    """Check that rows with these columns have a hash where tables go by it. Raises: UserError."""
    by_hash = "hash" in keys_of(source.join)
    if by_hash and "hash" not in choose(names) and not source.laion_hash:
        raise UserError(
            f"{shown} has no column hash, by which tables are to be joined.",
            "LAION's hash is computed only on request.",
            "Set source.laion_hash: true.",
        )


def punsafe_warnings(
    tables: Sequence[Sequence[str]], source: SourceConfig, sections: Mapping[str, Strict]
) -> list[str]:
    """Return what to say of the ceiling on punsafe. Args: tables: the columns of the source's."""
    tables = [*tables, *map(table_files.column_names, tables_of(source.join))]
    has_punsafe = any("punsafe" in choose(columns) for columns in tables)
    ceiling = getattr(sections.get("filter"), "drop_above_punsafe", None)
    if ceiling is None:
        return [_NO_CEILING] if has_punsafe else []
    are_known = all(tables)  # of JSON, each row has its own columns
    return [_NOTHING_TO_JUDGE] if are_known and not has_punsafe else []


def filled(
    samples: pa.Table, source: SourceConfig, counts: Mapping[str, int]
) -> tuple[pa.Table, dict[str, Any]]:
    """Return (SAMPLES with what the source's joins bring, notes: counts and the join's figures)."""
    notes: dict[str, Any] = {name: num for name, num in sorted(counts.items()) if num}
    tables = tables_of(source.join)
    if tables:
        samples, notes["joined"] = joined(samples, tables)
    return samples, notes


def columns_of(path: str) -> dict[str, str]:
    """Return SAMPLES column -> the table's column, of the join's key and what the table brings.

    Raises: UserError when the table has no key or nothing to bring.
    """
    found = choose(table_files.column_names(path))
    key = "hash" if "hash" in found else "url"
    brought = {column: found[column] for column in JOINED if column in found}
    if key not in found or not brought:
        raise UserError(
            f"{path} cannot be joined.",
            f"It needs a column hash or url, and one of {', '.join(JOINED)}.",
            "Take it out of source.join.",
        )
    return {key: found[key], **brought}


def joined(samples: pa.Table, tables: Sequence[str]) -> tuple[pa.Table, dict[str, Any]]:
    """Return (SAMPLES with nulls filled from the tables, figures of it).

    The figures: rows, matched and unmatched, and filled: column -> values that came from a table.
    """
    columns = [columns_of(path) for path in tables]
    known: dict[str, Callable[[pa.ChunkedArray], _Known]] = {"hash": _hashes, "url": _url_hashes}
    needed = {next(iter(chosen)) for chosen in columns}
    keys = {key: _Keys(*known[key](samples.column(key))) for key in needed}
    urls = samples.column("url").to_pylist() if "url" in needed else []
    brought = {column: _Values(column, samples.num_rows) for column in JOINED}
    matched = np.zeros(samples.num_rows, np.bool_)
    for path, chosen in zip(tables, columns, strict=True):
        key = next(iter(chosen))
        for batch in _batches(path, list(chosen.values())):
            rows, hits = keys[key].matches(*_keys_of(batch, key, chosen[key]))
            if key == "url":  # two URLs may have one hash
                given = tame(batch.column(chosen["url"])).take(pa.array(hits)).to_pylist()
                same = np.array([urls[r] == g for r, g in zip(rows, given, strict=True)], np.bool_)
                rows, hits = rows[same], hits[same]
            matched[rows] = True
            _bring(batch.take(pa.array(hits)), chosen, rows, brought)
    return _filled(samples, brought, matched)


class _Keys:
    """The keys of a part's rows, to look others up in."""

    def __init__(self, keys: npt.NDArray[np.int64], places: npt.NDArray[np.int64]) -> None:
        order = np.argsort(keys, kind="stable")
        self._sorted, self._rows = keys[order], places[order]
        num_slots = 1 << min(len(keys).bit_length() + _SLOT_BITS, _MAX_SLOT_BITS)
        self._mask = np.int64(num_slots - 1)
        self._may_be = np.zeros(num_slots, np.bool_)
        self._may_be[keys & self._mask] = True

    def matches(
        self, keys: npt.NDArray[np.int64], places: npt.NDArray[np.int64]
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Return (row of the part, place of the key) of each pair with one key."""
        maybe = self._may_be[keys & self._mask]
        keys, places = keys[maybe], places[maybe]
        first = np.searchsorted(self._sorted, keys, "left")
        count = np.searchsorted(self._sorted, keys, "right") - first
        hits = np.repeat(np.arange(len(keys)), count)
        within = np.arange(len(hits)) - np.repeat(np.cumsum(count) - count, count)
        return self._rows[np.repeat(first, count) + within], places[hits]


class _Values:
    """What the tables bring for one column, row by row."""

    def __init__(self, column: str, num_rows: int) -> None:
        self._worst = _WORST.get(column)
        self._type = SAMPLES.field(column).type
        self._numbers = np.full(num_rows, np.nan)
        self._others: dict[int, Any] = {}
        self._rank = _tag_rank if column == "nsfw" else _itself

    def add(self, rows: npt.NDArray[Any], values: pa.Array) -> None:
        """Take values for rows; a row may come twice."""
        if self._worst is not None:
            numbers = pc.fill_null(values, float("nan")).to_numpy(zero_copy_only=False)
            self._worst.at(self._numbers, rows, numbers)
            return
        for row, value in zip(rows.tolist(), values.to_pylist(), strict=True):
            if value:
                self._others[row] = min(value, self._others.get(row, value), key=self._rank)

    def array(self) -> pa.Array:
        """Return the values, null where there is none."""
        if self._worst is not None:
            return pa.array(self._numbers, mask=np.isnan(self._numbers))
        found = [self._others.get(row) for row in range(len(self._numbers))]
        return pa.array(found, self._type)


def _itself(value: Any) -> Any:
    return value


def _tag_rank(tag: str) -> tuple[float, str]:
    lower = tag.lower()
    return (_TAGS.index(lower) if lower in _TAGS else len(_TAGS) - 1.5, tag)


_Known = tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]


def _hashes(values: pa.ChunkedArray) -> _Known:
    """Return (the hashes, int64 [m], their places) of rows that have one."""
    known = pc.indices_nonzero(values.is_valid())
    return values.take(known).to_numpy(), known.to_numpy().astype(np.int64)


def _url_hashes(urls: pa.ChunkedArray) -> _Known:
    """Return (a hash of each URL, int64 [m], their places) of rows that have one."""
    known = pc.indices_nonzero(urls.is_valid())
    texts = urls.take(known).cast(pa.binary()).to_pylist()
    values = (mmh3.hash64(text, 0, signed=True)[0] for text in texts)
    return np.fromiter(values, np.int64, len(texts)), known.to_numpy().astype(np.int64)


def _keys_of(batch: pa.Table, key: str, name: str) -> _Known:
    if key == "url":
        return _url_hashes(tame(batch.column(name)).cast(pa.string()))
    typed, _ = typed_columns(batch.select([name]), {"hash": name})
    return _hashes(pa.chunked_array(typed["hash"]))


def _bring(
    batch: pa.Table,
    chosen: Mapping[str, str],
    rows: npt.NDArray[Any],
    brought: Mapping[str, _Values],
) -> None:
    columns = {column: name for column, name in chosen.items() if column in brought}
    typed, _ = typed_columns(batch.select(list(columns.values())), columns)
    for column, values in typed.items():
        brought[column].add(rows, values)


def _filled(
    samples: pa.Table, brought: Mapping[str, _Values], matched: npt.NDArray[np.bool_]
) -> tuple[pa.Table, dict[str, Any]]:
    filled = {}
    for column, values in brought.items():
        at = samples.schema.get_field_index(column)
        before = samples.column(column)
        after = pc.coalesce(before, values.array())
        filled[column] = before.null_count - after.null_count
        samples = samples.set_column(at, SAMPLES.field(column), after)
    num = int(matched.sum())
    figures = {"rows": len(matched), "matched": num, "unmatched": len(matched) - num}
    return conform(samples, SAMPLES), figures | {"filled": {k: n for k, n in filled.items() if n}}


def _batches(path: str, columns: list[str]) -> Any:
    with table_files.opened(path) as file:
        for batch in pq.ParquetFile(file).iter_batches(table_files.BATCH_ROWS, columns=columns):
            yield pa.Table.from_batches([batch])
