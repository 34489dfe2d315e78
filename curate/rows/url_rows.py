"""Rows of a table of URLs -> SAMPLES, with a fate for every row.

Text is mended, and the verdict says so: what is not UTF-8 becomes U+FFFD, control characters go,
captions that are too long are cut. A row without a URL, or with one that is too long, is
quarantined. A row without a caption (LAION has some) is kept with an empty one;
filter.min_caption_chars drops it.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from curate.rows import laion
from curate.rows.columns import (
    DIGEST_BYTES,
    URL_ALIASES,
    choose,
    extra_of,
    plain_names,
    typed_columns,
)
from curate.rows.foreign import is_text, json_text, tame, valid_text
from curate.rows.text_tables import Batch
from curate.source_config import SourceConfig
from manifests import ledger
from manifests.schemas import SAMPLES, UID_ROW_BITS, conform

SHARD_DIGITS = 5
"""Of img2dataset's keys, for the number of the shard; more when it needs them."""
CUT_FROM = "caption_characters"
"""In `extra`: how many characters a caption had that was cut."""
SHOWN_CHARACTERS = 200
_CONTROLS = r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x{9f}]"  # all but tab and line ends

Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Place:
    """Where some rows stand.

    file: their SAMPLES.shard. row: the first one's number in the file. shard_index: of the shard
    that it is in. rows_per_shard: a shard begins at every multiple of it in the file.
    """

    file: str
    row: int
    shard_index: int
    rows_per_shard: int

    def uids(self, num_rows: int) -> npt.NDArray[np.uint64]:
        """Return the rows' uids."""
        shards, rows = self._split(num_rows)
        return shards << np.uint64(UID_ROW_BITS) | rows

    def keys(self, num_rows: int) -> list[str]:
        """Return the keys that img2dataset gives the rows."""
        digits = math.ceil(math.log10(self.rows_per_shard))
        shards, rows = self._split(num_rows)
        numbers = (shards * np.uint64(10**digits) + rows).tolist()
        return [f"{number:0{SHARD_DIGITS + digits}d}" for number in numbers]

    def _split(self, num_rows: int) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.uint64]]:
        within = self.row % self.rows_per_shard + np.arange(num_rows, dtype=np.uint64)
        step = np.uint64(self.rows_per_shard)
        return within // step + np.uint64(self.shard_index), within % step


@dataclass(frozen=True, slots=True)
class Made:
    """What became of some rows. counts: figures of the record's notes, to be added up."""

    samples: pa.Table
    verdicts: pa.Table
    quarantine: pa.Table
    counts: Counter[str] = field(default_factory=Counter)


def samples_of(
    batch: Batch, place: Place, source: SourceConfig, *, sizes_are_swapped: bool
) -> Made:
    """Return the SAMPLES of consecutive rows of one file, a verdict per row, and the bad ones.

    Args: sizes_are_swapped: the width is to be read from the height, and the reverse.
    """
    return _Rows(batch, place, source, sizes_are_swapped).made()


class _Rows:
    """n rows on their way."""

    def __init__(
        self, batch: Batch, place: Place, source: SourceConfig, sizes_are_swapped: bool
    ) -> None:
        self.batch, self.place, self.source = batch, place, source
        self.num = batch.num_rows
        self.uids = place.uids(self.num)
        self.mended: dict[str, Mask] = {}
        self.patches: dict[int, dict[str, Any]] = {}
        self.counts: Counter[str] = Counter()
        self.chosen = choose(plain_names(batch.table.schema), URL_ALIASES)
        if sizes_are_swapped:
            sides = {"width": "height", "height": "width"}
            self.chosen = {sides.get(k, k): name for k, name in self.chosen.items()}

    def made(self) -> Made:
        urls, captions = self._raw("url"), self._raw("caption")
        columns, rest = typed_columns(self.batch.table, self._other_columns())
        url, caption = self._texts(urls, captions)
        columns |= {"url": url, "caption": caption, "key": self._keys()}
        if self.source.laion_hash:
            given = columns.get("hash")
            columns["hash"] = laion.known_hashes(given, urls, captions, self.counts)
        rest = rest.drop_columns([self.chosen[k] for k in _OWN if k in self.chosen])
        columns |= self._fixed() | {"extra": self._extra(rest)}
        errors = self._errors(url)
        good = pa.array(errors == "")
        samples = conform(pa.table(columns).filter(good), SAMPLES)
        reasons = self._reasons(errors)
        verdicts = ledger.verdicts("ingest", self.uids, reasons=reasons)
        return Made(samples, verdicts, self._quarantine(errors, columns), self.counts)

    def _raw(self, column: str) -> pa.Array:
        """Return a text column as bytes, as given; nulls when there is none."""
        if column not in self.chosen:
            return pa.nulls(self.num, pa.large_binary())
        return raw_text(self.batch.table.column(self.chosen[column]))

    def _other_columns(self) -> dict[str, str]:
        return {k: name for k, name in self.chosen.items() if k not in _OWN}

    def _texts(self, urls: pa.Array, captions: pa.Array) -> tuple[pa.Array, pa.Array]:
        url, url_mended = mended_text(urls)
        caption, caption_mended = mended_text(pc.fill_null(captions, b""))
        self.mended["text"] = url_mended | caption_mended
        most = self.source.max_caption_characters
        lengths = pc.utf8_length(caption).to_numpy(zero_copy_only=False)
        self.mended["caption_cut"] = is_long = lengths > most
        for row in np.flatnonzero(is_long).tolist():
            self.patches[row] = {CUT_FROM: int(lengths[row])}
        if is_long.any():
            caption = pc.utf8_slice_codeunits(caption, 0, most)
        return url, caption

    def _keys(self) -> pa.Array:
        """Return the source's own ids; where it has none, the keys that img2dataset would give."""
        if "key" not in self.chosen:
            return pa.array(self.place.keys(self.num), pa.string())
        given = _as_ids(self.batch.table.column(self.chosen["key"]))
        found = mended_text(raw_text(given))[0]
        missing = pc.fill_null(pc.equal(found, ""), True)
        if not pc.any(missing).as_py():
            return found
        return pc.if_else(missing, pa.array(self.place.keys(self.num), found.type), found)

    def _fixed(self) -> dict[str, Any]:
        rows = np.arange(self.place.row, self.place.row + self.num, dtype=np.uint64)
        return {
            "uid": self.uids,
            "source": pa.repeat(pa.scalar(self.source.label), self.num),
            "shard": pa.repeat(pa.scalar(self.place.file), self.num),
            "offset": rows,
            "size": np.zeros(self.num, np.uint32),
        }

    def _extra(self, rest: pa.Table) -> pa.Array:
        """Return what SAMPLES has no column for, as JSON objects."""
        if self.batch.extra is None:
            texts = pa.chunked_array(extra_of(rest, self.num)).combine_chunks()
        else:
            texts = pa.array(self.batch.extra, pa.string())
            for column in DIGEST_BYTES:  # those that are none
                values = rest.column(column).to_pylist() if column in rest.column_names else []
                for row, value in enumerate(values):
                    if value is not None:
                        self.patches.setdefault(row, {})[column] = value
        if not self.patches:
            return texts
        found = texts.to_pylist()
        for row, facts in self.patches.items():
            found[row] = json_text(json.loads(found[row] or "{}") | facts)
        return pa.array(found, pa.string())

    def _errors(self, url: pa.Array) -> npt.NDArray[np.object_]:
        """Return the error class of each row, "" of a good one."""
        errors = np.full(self.num, "", object)
        is_missing = pc.fill_null(pc.equal(url, ""), True)
        is_long = pc.greater(pc.utf8_length(url), self.source.max_url_characters)
        errors[pc.fill_null(is_long, False).to_numpy(zero_copy_only=False)] = "url_too_long"
        errors[is_missing.to_numpy(zero_copy_only=False)] = "missing_url"
        for row, (error, _) in self.batch.bad.items():
            errors[row] = error
        return errors

    def _reasons(self, errors: npt.NDArray[np.object_]) -> npt.NDArray[np.object_]:
        """Return the verdicts' reasons, and count the mends of good rows."""
        mends = np.full(self.num, "", object)
        for name, mask in self.mended.items():
            mask = mask & (errors == "")
            self.counts[f"mended_{name}"] += int(mask.sum())
            mends[mask] = np.where(mends[mask] == "", name, mends[mask] + f",{name}")
        reasons = errors.copy()
        reasons[mends != ""] = ledger.MENDED_PREFIX + mends[mends != ""]
        is_bad = errors != ""
        reasons[is_bad] = [ledger.quarantine_reason(error) for error in errors[is_bad]]
        return reasons

    def _quarantine(self, errors: npt.NDArray[np.object_], columns: Mapping[str, Any]) -> pa.Table:
        rows = np.flatnonzero(errors != "")
        keys = columns["key"].take(pa.array(rows)).to_pylist()
        urls = columns["url"].take(pa.array(rows)).to_pylist()
        found = [
            {
                "uid": int(self.uids[row]),
                "key": key,
                "shard": self.place.file,
                "error": errors[row],
                "detail": self._detail(int(row), url),
            }
            for row, key, url in zip(rows, keys, urls, strict=True)
        ]
        return ledger.quarantine(found)

    def _detail(self, row: int, url: str | None) -> str:
        if row in self.batch.bad:
            return self.batch.bad[row][1]
        where = f"row {self.place.row + row}"
        return f"{where}: {len(url)} characters: {url[:SHOWN_CHARACTERS]}" if url else where


_OWN = ("url", "caption", "key")


def raw_text(column: pa.ChunkedArray) -> pa.Array:
    """Return a column as bytes, large_binary [n]: text as it is, other values as text."""
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    if not is_text(column.type):
        column = tame(column).cast(pa.string())
    found = column.cast(pa.large_binary())
    return pa.concat_arrays(found.chunks) if found.num_chunks else pa.array([], found.type)


def mended_text(raw: pa.Array) -> tuple[pa.Array, Mask]:
    """Return (valid text without control characters and outer white space, where it was mended).

    Args: raw: large_binary [n]. Returns: string [n] with raw's nulls, bool [n].
    """
    mended = np.zeros(len(raw), np.bool_)
    try:
        text = raw.cast(pa.large_string())
    except pa.ArrowInvalid:
        text = pa.concat_arrays(valid_text(pa.chunked_array([raw])).chunks)
        mended = _differ(text.cast(pa.large_binary()), raw)
        text = text.cast(pa.large_string())
    has_controls = pc.fill_null(pc.match_substring_regex(text, _CONTROLS), False)
    if pc.any(has_controls).as_py():
        mended = mended | has_controls.to_numpy(zero_copy_only=False)
        text = pc.replace_substring_regex(text, _CONTROLS, "")
    return pc.utf8_trim_whitespace(text).cast(pa.string()), mended


def _differ(left: pa.Array, right: pa.Array) -> Mask:
    found = pc.fill_null(pc.not_equal(left, right), False)
    return np.asarray(found.to_numpy(zero_copy_only=False), np.bool_)


def _as_ids(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Return ids as given; whole numbers that came as floats (2990575000000.0) as whole numbers."""
    if not pa.types.is_floating(column.type):
        return column
    numbers = column.cast(pa.float64())
    is_whole = pc.and_(pc.is_finite(numbers), pc.equal(pc.round(numbers), numbers))
    is_whole = pc.and_(is_whole, pc.less(pc.abs(numbers), 2.0**63))
    whole = pc.if_else(is_whole, numbers, None).cast(pa.int64(), safe=False).cast(pa.string())
    others = pc.if_else(pc.is_finite(numbers), numbers, None).cast(pa.string())
    return pc.coalesce(whole, others)
