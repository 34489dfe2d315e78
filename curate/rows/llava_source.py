"""Instruction rows of JSON files -> SAMPLES and CONVERSATIONS, with a fate for every row.

A file is cut at row borders into parts of about `bytes_per_part`; each part is read and parsed by
itself. uid: the file's position in the source's list, then the row's in the file.
"""

from __future__ import annotations

import gc
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
import orjson
import pyarrow as pa

from curate.media.tars import RangeReader
from curate.rows import conversation_parts, json_rows
from curate.rows.conversations import BadRow, Conversations, conversations_of, normalise
from curate.rows.foreign import json_text
from curate.source_config import SourceConfig
from manifests import ledger, paths
from manifests.errors import PartDamaged
from manifests.schemas import CONVERSATIONS, SAMPLES, TURN, UID_ROW_BITS, conform
from manifests.work import Item, Output, part_name

SHOWN_CHARACTERS = 200
"""Of the first question, as the caption in SAMPLES; of an error."""

MAX_DEPTH = 250
"""Levels of a row's other fields; orjson writes little more, and Python's own writer recurses."""

_PLAIN = orjson.OPT_SORT_KEYS


@dataclass(frozen=True, slots=True)
class JsonFile:
    """One file. shard: its name in SAMPLES, the source's and its own below the source's folder."""

    source: str
    shard: str
    path: str


def files_of(source: SourceConfig) -> tuple[JsonFile, ...]:
    """Return the files of a source, in shard order: by source, then by number and name.

    Lists them once in a process; forget_listing makes it look again.
    """
    return _listed(tuple((source.files or {}).items()))


def forget_listing() -> None:
    """Let the next call list the files anew."""
    _listed.cache_clear()


@lru_cache(maxsize=8)
def _listed(patterns: tuple[tuple[str, str], ...]) -> tuple[JsonFile, ...]:
    found = []
    for name, pattern in patterns:
        root, names = paths.expand(pattern, suffix="")
        found += [JsonFile(name, f"{name}/{one}", paths.join(root, one)) for one in names]
    return tuple(found)


def plan(source: SourceConfig) -> list[Item]:
    """One item per part. Reads every file once, to find its rows.

    Raises: UserError for a file that is missing, cut short, or neither an array nor lines of JSON.
    """
    items: list[Item] = []
    for at, file in enumerate(files_of(source)):
        is_array = json_rows.is_array(file.path)
        for chunk in json_rows.chunks(file.path, source.bytes_per_part):
            payload = {
                "part": len(items),
                "first_shard_index": at,
                "shards": [file.shard],
                "source": file.source,
                "is_array": is_array,
                "first_row": chunk.first_row,
                "rows": chunk.num_rows,
                "start": chunk.start,
                "end": chunk.end,
            }
            items.append(Item(part_name(len(items)), payload, float(chunk.end - chunk.start)))
    return items


def ingest_part(source: SourceConfig, payload: Mapping[str, Any]) -> Output:
    """Read one part. Raises: PartDamaged when the file is no longer what was planned."""
    file = _planned(source, payload)
    start, size = payload["start"], payload["end"] - payload["start"]
    with RangeReader(file.path) as reader:
        data = reader.read_up_to(start, size)
    spans = json_rows.spans_within(data, is_array=payload["is_array"])
    if len(data) != size or len(spans) != payload["rows"]:
        raise PartDamaged(f"{file.path} has changed: {len(spans)} of {payload['rows']} rows.")
    with _collector_off():
        rows = _Rows(file, payload["first_row"], _parsed(data, spans))
        return rows.output(payload, spans + start)


@contextmanager
def _collector_off() -> Iterator[None]:
    """Keep Python from looking for cycles among millions of parsed values, which have none."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def _planned(source: SourceConfig, payload: Mapping[str, Any]) -> JsonFile:
    """Return a part's file, by name: a file that came since would shift a position."""
    (shard,) = payload["shards"]
    for file in files_of(source):
        if file.shard == shard:
            return file
    raise PartDamaged(f"{shard} is gone from the source.")


def _parsed(data: bytes, spans: json_rows.Spans) -> list[Any]:
    """Return each row's value, or the BadRow that says why there is none.

    One by one: lines that are broken alone can make good JSON together.
    """
    view = memoryview(data)
    return [_value(view[start:end]) for start, end in spans.tolist()]


def _value(text: memoryview) -> Any:
    """Return a row's value; what orjson refuses (lone surrogates, NaN) Python may still read."""
    try:
        return orjson.loads(text)
    except orjson.JSONDecodeError:
        pass
    try:
        return json.loads(str(text, "utf-8"))
    except UnicodeDecodeError as error:
        return BadRow("bad_json", f"{error.reason} at byte {error.start} of the row")
    except (ValueError, RecursionError) as error:
        return BadRow("bad_json", str(error))


class _Rows:
    """The rows of a part, column by column."""

    def __init__(self, file: JsonFile, first_row: int, values: list[Any]) -> None:
        self.file = file
        self.first_row = first_row
        self.bad: list[tuple[int, BadRow]] = []
        self.extras: list[str | None] = []
        self.rows = Conversations()
        if not self._add_all(values):
            for at, value in enumerate(values):
                self._add(at, value)
        bad = {at for at, _ in self.bad}
        self.kept = [at for at in range(len(values)) if at not in bad]

    def _add_all(self, values: list[Any]) -> bool:
        """Add all rows at once; add none and tell so when they must be looked at one by one."""
        rows = conversations_of(values)
        if rows is None:
            return False
        try:
            self.extras = [_as_text(extra) for extra in rows.extras]
        except BadRow:
            return False
        self.rows = rows
        return True

    def _add(self, at: int, value: Any) -> None:
        try:
            if isinstance(value, BadRow):
                raise value
            row = normalise(value)
            self.extras.append(_as_text(row.extra))
            self.rows.add(row)
        except BadRow as error:
            self.bad.append((at, error))

    def _numbered(self, at: int) -> str:
        return f"{self.file.source}_{self.first_row + at}"

    def output(self, payload: Mapping[str, Any], spans: json_rows.Spans) -> Output:
        """Return the part's tables. Args: spans: each row's bytes in the file."""
        first = (payload["first_shard_index"] << UID_ROW_BITS) + self.first_row
        uids = np.arange(first, first + len(spans), dtype=np.uint64)
        kept = np.array(self.kept, np.int64)
        reasons = np.full(len(spans), "", object)
        for at, bad in self.bad:
            reasons[at] = ledger.quarantine_reason(bad.error)
        name = f"{part_name(payload['part'])}.parquet"
        return Output(
            files={
                name: self._samples(uids[kept], spans[kept]),
                conversation_parts.name_of(payload["part"]): self._conversations(uids[kept]),
            },
            verdicts=ledger.verdicts("ingest", uids, reasons=reasons),
            quarantine=ledger.quarantine([self._bad_row(uids, at, bad) for at, bad in self.bad]),
        )

    def _samples(self, uids: npt.NDArray[np.uint64], spans: json_rows.Spans) -> pa.Table:
        rows, file = self.rows, self.file
        keys = (key or self._numbered(at) for key, at in zip(rows.keys, self.kept, strict=True))
        columns = {
            "uid": uids,
            "key": _texts(list(keys)),
            "source": pa.repeat(pa.scalar(file.source), len(uids)),
            "shard": pa.repeat(pa.scalar(file.shard), len(uids)),
            "offset": spans[:, 0],
            "size": spans[:, 1] - spans[:, 0],
            "caption": _texts([text[:SHOWN_CHARACTERS] for text in rows.first_questions()]),
            "url": _texts(rows.urls),
            "extra": _texts(self.extras),
        }
        return conform(pa.table(columns), SAMPLES)

    def _conversations(self, uids: npt.NDArray[np.uint64]) -> pa.Table:
        rows = self.rows
        turns = [_texts(rows.roles), _texts(rows.texts)]
        columns = {
            "uid": uids,
            "images": pa.ListArray.from_arrays(_ends(rows.num_images), _texts(rows.images)),
            "turns": pa.ListArray.from_arrays(
                _ends(rows.num_turns), pa.StructArray.from_arrays(turns, fields=list(TURN))
            ),
        }
        return conform(pa.table(columns), CONVERSATIONS)

    def _bad_row(self, uids: npt.NDArray[np.uint64], at: int, bad: BadRow) -> dict[str, Any]:
        return {
            "uid": int(uids[at]),
            "key": self._numbered(at),
            "shard": self.file.shard,
            "error": bad.error,
            "detail": bad.detail,
        }


def _as_text(extra: Mapping[str, Any]) -> str | None:
    """Return the JSON text of a row's other fields, None without any. Raises: BadRow."""
    if not extra:
        return None
    try:
        return orjson.dumps(extra, option=_PLAIN).decode()
    except TypeError as error:  # numbers beyond 64 bits, lone surrogates, or too deep
        if _is_deep(extra):
            detail = f"more than {MAX_DEPTH} levels in one of {list(extra)}"[:SHOWN_CHARACTERS]
            raise BadRow("bad_field", detail) from error
        return json_text(extra)


def _is_deep(value: Any) -> bool:
    """Tell whether a value has more than MAX_DEPTH levels; does not recurse itself."""
    level = [value]
    for _ in range(MAX_DEPTH):
        groups = (one.values() if isinstance(one, dict) else one for one in level)
        level = [one for group in groups for one in group if isinstance(one, dict | list)]
    return bool(level)


def _texts(values: Sequence[str | None]) -> pa.Array:
    """Return a string array; lone surrogates, which no UTF-8 has, become U+FFFD."""
    try:
        return pa.array(values, pa.string())
    except UnicodeEncodeError:
        mended = (
            one and one.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
            for one in values
        )
        return pa.array(list(mended), pa.string())


def _ends(lengths: Sequence[int]) -> pa.Array:
    return pa.array(np.concatenate([[0], np.cumsum(np.array(lengths, np.int64))]).astype(np.int32))
