"""Tables written as text: csv, tsv, one URL a line, JSON Lines, JSON arrays.

Values come as bytes, UTF-8 or not. A row that is no row of its table keeps its place and number,
and says what is wrong with it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import orjson
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pacsv

from curate.rows import json_rows
from curate.rows.columns import URL_ALIASES, choose
from curate.rows.foreign import json_text

BLOCK_BYTES = 1 << 24
"""A row of csv, with its line ends inside quotes, must fit."""
LINES_PER_BATCH = 1 << 14
MAX_LINE_BYTES = 1 << 26
"""A longer line is not kept in memory: its row is bad."""
MAX_ARRAY_BYTES = 1 << 30
"""Of a JSON array, which is read whole."""
NAMED_ROWS = 100
"""Of a JSON file, for the names that its rows have."""
SHOWN_CHARACTERS = 200
_DELIMITERS = {"csv": ",", "tsv": "\t"}
_NEXT_ROW = r"\n[^\n]*\t"  # within one value
_TOO_LONG = b"\xff(a line that is too long)\xff"  # stands for one that was not kept


@dataclass(frozen=True, slots=True)
class Batch:
    """Consecutive rows of a table.

    table: n rows of foreign columns. bad: position -> (error class, detail) of what is no row; its
    values are null. extra: JSON text of what else each row has, where the table has no columns for
    it (n values), or None.
    """

    table: pa.Table
    bad: Mapping[int, tuple[str, str]] = field(default_factory=dict)
    extra: list[str | None] | None = None

    @property
    def num_rows(self) -> int:
        """Rows, bad ones included."""
        return int(self.table.num_rows)

    def slice(self, start: int, stop: int) -> Batch:
        """Return rows start .. stop."""
        return Batch(
            self.table.slice(start, stop - start),
            {at - start: bad for at, bad in self.bad.items() if start <= at < stop},
            None if self.extra is None else self.extra[start:stop],
        )


def batches(file: pa.NativeFile, form: str, names: list[str]) -> Iterator[Batch]:
    """Yield the rows of a csv, tsv, txt, jsonl or json file.

    Args: names: the columns of a csv or tsv file, as `csv_header` returns them.
    Raises: pyarrow's errors and ValueError for what is no such file.
    """
    if form in _DELIMITERS:
        yield from _csv_batches(file, form, names)
    elif form == "txt":
        for lines in _lines(file):
            yield _urls(lines)
    else:
        for rows in _json_texts(file):
            yield _json_batch(rows)


def count_rows(file: pa.NativeFile, form: str, names: list[str]) -> int:
    """Return how many rows `batches` would yield. Args, Raises: as that."""
    if form in _DELIMITERS:
        return sum(batch.num_rows for batch in _csv_batches(file, form, names))
    if form == "txt":
        return sum(map(len, _lines(file)))
    return sum(map(len, _json_texts(file)))


def csv_header(file: pa.NativeFile, form: str) -> list[str]:
    """Return the names in a csv file's first row. Raises: pyarrow's errors."""
    return list(_csv_reader(file, form, [], []).schema.names)


def json_names(file: pa.NativeFile) -> list[str]:
    """Return the names that the first rows of a JSON file have, each once, in order.

    Raises: ValueError for what is no such file.
    """
    names: dict[str, None] = {}
    for text in next(_json_texts(file), [])[:NAMED_ROWS]:
        try:
            names |= dict.fromkeys(_json_object(text))
        except (ValueError, RecursionError):
            continue  # a bad row: it is told of when it is read
    return list(names)


def _csv_batches(file: pa.NativeFile, form: str, names: list[str]) -> Iterator[Batch]:
    bad: list[tuple[int, str]] = []
    at = 0
    for batch in _csv_reader(file, form, names, bad):
        made = _with_bad_rows(pa.Table.from_batches([batch]), bad, at)
        at += made.num_rows
        yield _without_merged_rows(made) if form == "tsv" else made
    if bad:
        none = pa.table({name: pa.array([], pa.binary()) for name in names})
        yield _with_bad_rows(none, bad, at, is_end=True)


def _csv_reader(
    file: pa.NativeFile, form: str, names: list[str], bad: list[tuple[int, str]]
) -> pacsv.CSVStreamingReader:
    """Return a reader of columns of bytes. Args: bad: gets (row, what it is) of rows left out."""

    def note(row: pacsv.InvalidRow) -> str:
        shown = (row.text or "")[:SHOWN_CHARACTERS]
        found = f"{row.actual_columns} values in {row.expected_columns} columns: {shown}"
        bad.append((row.number - 2, found))  # the header is row 1
        return "skip"

    return pacsv.open_csv(
        file,
        read_options=pacsv.ReadOptions(use_threads=False, block_size=BLOCK_BYTES),
        parse_options=pacsv.ParseOptions(
            delimiter=_DELIMITERS[form], newlines_in_values=True, invalid_row_handler=note
        ),
        convert_options=pacsv.ConvertOptions(
            check_utf8=False, column_types={name: pa.binary() for name in names}
        ),
    )


def _with_bad_rows(
    table: pa.Table, bad: list[tuple[int, str]], first: int, *, is_end: bool = False
) -> Batch:
    """Return the rows with the bad ones among them in their places, and take these off `bad`.

    Args: first: number of the first row that comes.
    """
    places: list[int | None] = []
    found = {}
    num_good = 0
    while num_good < table.num_rows or (is_end and bad):
        if bad and bad[0][0] == first + len(places):
            found[len(places)] = ("bad_row", bad.pop(0)[1])
            places.append(None)
        elif not bad:
            places += range(num_good, table.num_rows)
            num_good = table.num_rows
        else:
            places.append(num_good)
            num_good += 1
    return Batch(table.take(pa.array(places, pa.int64())) if found else table, found)


def _without_merged_rows(batch: Batch) -> Batch:
    """Return rows of a tsv file, those bad that hold others.

    Few tsv files quote anything (Conceptual Captions do not): a caption that begins with a
    quotation mark then goes on over the next lines, URLs and all, to the mark that ends it.
    """
    table, found = batch.table, {}
    for name in table.column_names:
        is_merged = pc.match_substring_regex(table.column(name), _NEXT_ROW)
        for at in pc.indices_nonzero(pc.fill_null(is_merged, False)).to_pylist():
            value = table.column(name)[at].as_py()
            shown = value[:SHOWN_CHARACTERS].decode(errors="replace")
            lines = value.count(b"\n") + 1
            found[at] = ("bad_row", f"a quotation mark makes {lines} lines one value: {shown}")
    if not found:
        return batch
    places = [None if at in found else at for at in range(table.num_rows)]
    return Batch(table.take(pa.array(places, pa.int64())), {**batch.bad, **found})


def _lines(file: pa.NativeFile) -> Iterator[list[bytes]]:
    """Yield lines that are not empty, without their ends; _TOO_LONG for one that is not kept."""
    rest, is_cut = b"", False
    while block := file.read(BLOCK_BYTES):
        *lines, rest = (rest + block).split(b"\n")
        if lines and is_cut:
            lines[0], is_cut = _TOO_LONG, False
        if len(rest) > MAX_LINE_BYTES:
            rest, is_cut = b"", True
        yield from _in_batches(lines)
    yield from _in_batches([_TOO_LONG if is_cut else rest])


def _in_batches(lines: list[bytes]) -> Iterator[list[bytes]]:
    kept = [line for one in lines if (line := one.strip(b" \t\r"))]
    for at in range(0, len(kept), LINES_PER_BATCH):
        yield kept[at : at + LINES_PER_BATCH]


def _urls(lines: list[bytes]) -> Batch:
    bad = {at: ("bad_row", _too_long()) for at, line in enumerate(lines) if line == _TOO_LONG}
    values = [None if at in bad else line for at, line in enumerate(lines)]
    return Batch(pa.table({"url": pa.array(values, pa.large_binary())}), bad)


def _too_long() -> str:
    return f"a line of more than {MAX_LINE_BYTES:,} bytes"


def _json_texts(file: pa.NativeFile) -> Iterator[list[bytes]]:
    """Yield the JSON texts of rows: of an array's values, or lines."""
    head = file.read(BLOCK_BYTES)
    if not head.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"["):
        yield from _lines(_Again(head, file))
        return
    data = head + file.read(MAX_ARRAY_BYTES)
    if len(data) > MAX_ARRAY_BYTES:
        raise ValueError("a JSON array of more than 1 GiB; write its rows as JSON Lines (.jsonl)")
    inner = data[data.index(b"[") + 1 :].rstrip()
    if not inner.endswith(b"]"):
        raise ValueError("the JSON array has no end")
    inner = inner[:-1]
    spans = json_rows.spans_within(inner, is_array=True).tolist()
    for at in range(0, len(spans), LINES_PER_BATCH):
        yield [inner[start:end] for start, end in spans[at : at + LINES_PER_BATCH]]


class _Again:
    """A file whose beginning was read already."""

    def __init__(self, head: bytes, file: pa.NativeFile) -> None:
        self._head, self._file = head.removeprefix(b"\xef\xbb\xbf"), file

    def read(self, size: int) -> bytes:
        """Return the next bytes, b"" at the end."""
        head, self._head = self._head, b""
        return head or bytes(self._file.read(size))


def _json_batch(texts: list[bytes]) -> Batch:
    """Return JSON objects as columns of the names that SAMPLES has, and the rest as text."""
    columns: dict[str, list[Any]] = {}
    bad: dict[int, tuple[str, str]] = {}
    extra: list[str | None] = [None] * len(texts)
    for at, text in enumerate(texts):
        try:
            row, extra[at] = _json_row(text)
        except ValueError as error:
            bad[at] = ("bad_json", str(error)[:SHOWN_CHARACTERS])
            continue
        for column, value in row.items():
            columns.setdefault(column, [None] * len(texts))[at] = value
    columns.setdefault("url", [None] * len(texts))
    table = pa.table({name: _json_column(values) for name, values in columns.items()})
    return Batch(table, bad, extra)


@lru_cache(maxsize=64)
def _chosen(names: tuple[str, ...]) -> dict[str, str]:
    return choose(names, URL_ALIASES)


def _json_row(text: bytes) -> tuple[dict[str, Any], str | None]:
    """Return (values by SAMPLES column, JSON text of the rest or None) of a row.

    Raises: ValueError for what is no JSON object, or is nested too deeply.
    """
    try:
        row = _json_object(text)
        chosen = _chosen(tuple(k for k, v in row.items() if not isinstance(v, dict | list)))
        taken = set(chosen.values())
        rest = {k: v for k, v in row.items() if k not in taken}
        return {k: row[name] for k, name in chosen.items()}, json_text(rest) if rest else None
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def _json_object(text: bytes) -> dict[str, Any]:
    if text == _TOO_LONG:
        raise ValueError(_too_long())
    try:
        value = orjson.loads(text)
    except orjson.JSONDecodeError:  # Python reads lone surrogates, NaN, and bytes that are no UTF-8
        value = json.loads(text.decode("utf-8", errors="surrogateescape"))
    if isinstance(value, dict):
        return value
    raise ValueError(f"a row is a JSON object, not {str(text[:80], 'utf-8', 'replace')}")


def _json_column(values: list[Any]) -> pa.Array:
    """Return values as numbers where all are, else as bytes of text, lone surrogates and all."""
    known = [one for one in values if one is not None]
    if known and all(isinstance(one, int | float) and not isinstance(one, bool) for one in known):
        try:
            kind = pa.float64() if any(isinstance(one, float) for one in known) else pa.int64()
            return pa.array(values, kind)
        except (OverflowError, pa.ArrowInvalid):
            pass
    return pa.array([None if one is None else _text(one) for one in values], pa.large_binary())


def _text(value: Any) -> bytes:
    if not isinstance(value, str):
        return json_text(value).encode()
    try:
        return value.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        return value.encode("utf-8", "surrogatepass")
