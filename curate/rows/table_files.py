"""Rows of tables in any of the forms that lists of URLs come in, as a stream from any row on.

    parquet                     from the row group that holds the first row
    feather, arrow              Arrow's file and stream formats
    csv, tsv, txt, jsonl, json  also as .gz; bytes are kept as they are, UTF-8 or not

One file is open at a time in a process, and stays open between calls: parts that follow each other
read it once in all. Memory stays at a few blocks, whatever the file's size. Empty lines are no
rows.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pyarrow as pa
import pyarrow.parquet as pq

from curate.rows import text_tables
from curate.rows.text_tables import Batch
from manifests import paths, store
from manifests.errors import PartDamaged, UserError

BATCH_ROWS = 1 << 16
READ_BYTES = 1 << 20
"""Of a parquet column at a time: row groups of gigabytes need no more memory than small ones."""
TEXT_FORMS = ("csv", "tsv", "txt", "jsonl", "json")
FORMS = ("parquet", "feather", "arrow", *TEXT_FORMS)
SUFFIXES = tuple(f".{form}" for form in FORMS) + tuple(f".{form}.gz" for form in TEXT_FORMS)
_FIX = "Write the file again, or take it away."


def form_of(path: str) -> str:
    """Return a file's form by its name. Raises: UserError for a name of none.

    Example: "a/b.tsv.gz" -> "tsv"
    """
    form = path.lower().removesuffix(".gz").rsplit(".", 1)[-1]
    if form not in FORMS or (path.lower().endswith(".gz") and form not in TEXT_FORMS):
        raise UserError(
            f"{path} is no table that can be read.",
            f"Known forms: {', '.join(SUFFIXES)}.",
            "Give a glob of such files, e.g. data/*.parquet.",
        )
    return form


def column_names(path: str) -> list[str]:
    """Return the names of a file's columns; of JSON, where each row has its own, none.

    Raises: UserError when the file cannot be read or two columns have one name.
    """
    form = form_of(path)
    if form == "json" or form == "jsonl":
        return []
    if form == "txt":
        return ["url"]
    with opened(path) as file:
        if form == "parquet":
            names = pq.ParquetFile(file).schema_arrow.names
        elif form in ("csv", "tsv"):
            names = text_tables.csv_header(file, form)
        else:
            names = _arrow_schema(file).names
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise UserError(f"{path} has two columns {twice[0]!r}.", "Columns go by name.", _FIX)
    return list(names)


def first_names(path: str) -> list[str]:
    """Return the names of a file's columns; of JSON, of its first rows. Raises: UserError."""
    if form_of(path) not in ("json", "jsonl"):
        return column_names(path)
    with opened(path) as file:
        return text_tables.json_names(file)


def count_rows(path: str) -> int:
    """Return how many rows a file has; text is scanned for it. Raises: UserError."""
    form = form_of(path)
    names = column_names(path)
    with opened(path) as file:
        if form == "parquet":
            return int(pq.ParquetFile(file).metadata.num_rows)
        if form in TEXT_FORMS:
            return text_tables.count_rows(file, form, names)
        return sum(batch.num_rows for batch in _arrow_batches(file))


def read_rows(path: str, first_row: int, num_rows: int) -> Iterator[Batch]:
    """Yield rows first_row .. first_row + num_rows of a file, in order.

    Raises: UserError when the file cannot be read; PartDamaged when it ends before.
    """
    stream = _taken(path, first_row)
    try:
        while num_rows:
            batch = stream.take(num_rows)
            if batch is None:
                raise PartDamaged(f"{path} has changed: {num_rows} rows fewer than were planned.")
            num_rows -= batch.num_rows
            yield batch
    except BaseException:
        stream.close()
        raise
    _keep(stream)


def close() -> None:
    """Close the file that is open, if one is."""
    with _LOCK:
        streams = [_OPEN.popitem()[1]] if _OPEN else []
    for stream in streams:
        stream.close()


class _Stream:
    """A file being read: `at` is the number of the row that comes next."""

    def __init__(self, path: str, first_row: int) -> None:
        self.path = path
        self.identity = paths.identity_of(path)
        self.at, self._batches = _batches_from(path, first_row)
        self._rest: Batch | None = None
        self.skip_to(first_row)

    def skip_to(self, row: int) -> None:
        """Leave out the rows before `row`."""
        while self.at < row and self.take(row - self.at) is not None:
            pass

    def take(self, most: int) -> Batch | None:
        """Return the next rows, at most so many; None at the end."""
        batch = self._rest or next(self._batches, None)
        if batch is None:
            return None
        part = batch.slice(0, most)
        self._rest = batch.slice(most, batch.num_rows) if batch.num_rows > most else None
        self.at += part.num_rows
        return part

    def close(self) -> None:
        """Close the file."""
        self._batches.close()  # type: ignore[attr-defined]


_OPEN: dict[str, _Stream] = {}
_LOCK = threading.Lock()


def _taken(path: str, first_row: int) -> _Stream:
    """Return the open stream when it can go on to `first_row`, else a new one."""
    with _LOCK:
        stream = _OPEN.pop(path, None)
    if stream is not None:
        if stream.at <= first_row and stream.identity == paths.identity_of(path):
            stream.skip_to(first_row)
            return stream
        stream.close()
    close()
    return _Stream(path, first_row)


def _keep(stream: _Stream) -> None:
    close()
    with _LOCK:
        _OPEN[stream.path] = stream


def _batches_from(path: str, first_row: int) -> tuple[int, Iterator[Batch]]:
    """Return (number of the first row that comes, batches): at or before `first_row`."""
    form = form_of(path)
    if form == "parquet":
        group, start = _group_of(path, first_row)
        return start, _stream(path, lambda file: _parquet_batches(file, group))
    if form in TEXT_FORMS:
        names = column_names(path)
        return 0, _stream(path, lambda file: text_tables.batches(file, form, names))
    return 0, _stream(path, _arrow_batches)


def _stream(path: str, read: Callable[[pa.NativeFile], Iterator[Batch]]) -> Iterator[Batch]:
    with opened(path) as file:
        yield from (batch for batch in read(file) if batch.num_rows)


def _group_of(path: str, row: int) -> tuple[int, int]:
    """Return (the row group that holds a row, its first row)."""
    with opened(path) as file:
        metadata = pq.ParquetFile(file).metadata
        start = 0
        for group in range(metadata.num_row_groups):
            end = start + metadata.row_group(group).num_rows
            if row < end:
                return group, start
            start = end
    return metadata.num_row_groups, start


def _parquet_batches(file: pa.NativeFile, group: int) -> Iterator[Batch]:
    parquet = pq.ParquetFile(file, buffer_size=READ_BYTES)
    groups = list(range(group, parquet.metadata.num_row_groups))
    for batch in parquet.iter_batches(BATCH_ROWS, row_groups=groups):
        yield Batch(pa.Table.from_batches([batch]))


def _arrow_schema(file: pa.NativeFile) -> pa.Schema:
    return _arrow_reader(file).schema


def _arrow_batches(file: pa.NativeFile) -> Iterator[Batch]:
    reader = _arrow_reader(file)
    if isinstance(reader, pa.RecordBatchFileReader):
        found = (reader.get_batch(at) for at in range(reader.num_record_batches))
    else:
        found = iter(reader)
    for batch in found:
        for at in range(0, batch.num_rows, BATCH_ROWS):
            yield Batch(pa.Table.from_batches([batch.slice(at, BATCH_ROWS)]))


def _arrow_reader(file: pa.NativeFile) -> pa.RecordBatchFileReader | pa.RecordBatchStreamReader:
    is_file = file.read(6) == b"ARROW1"
    file.seek(0)
    return pa.ipc.open_file(file) if is_file else pa.ipc.open_stream(file)


@contextmanager
def opened(path: str) -> Iterator[pa.NativeFile]:
    """Open a file for Arrow, unpacked. Raises: UserError, also for what reading it meets."""
    fs, local = paths.filesystem(path)
    try:
        is_local = paths.is_local(path)
        with pa.OSFile(local) if is_local else pa.PythonFile(fs.open(local, "rb"), "r") as raw:
            yield pa.CompressedInputStream(raw, "gzip") if path.lower().endswith(".gz") else raw
    except FileNotFoundError as error:
        raise UserError(f"{path} is gone.", "It was listed a moment ago.", _FIX) from error
    except store.BAD_PARQUET as error:
        form = form_of(path)
        raise UserError(f"{path} is not a readable {form} file.", f"{error}.", _FIX) from error
