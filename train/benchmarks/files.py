"""A benchmark's files as rows: JSON, JSON lines, TSV and the hub's parquet; images read when asked.

Every reader keeps text as it is written: "NA" and "None" stay words, ids keep their type. Rows of a
parquet or TSV file know where their pictures are, so that no question carries image bytes.
"""

from __future__ import annotations

import base64
import binascii
import csv
import hashlib
import io
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from manifests import store
from manifests.errors import UserError

csv.field_size_limit(2**31 - 1)  # a picture in base64 is one field


@dataclass(frozen=True, slots=True)
class FileImage:
    """An image in a file of its own."""

    path: str

    def read(self) -> bytes:
        """Return the file's bytes. Raises: UserError when it cannot be read."""
        try:
            return Path(self.path).read_bytes()
        except OSError as error:
            raise UserError(
                f"The image {self.path} cannot be read.",
                str(error),
                "Put the benchmark's images where its questions name them.",
            ) from error


@dataclass(frozen=True, slots=True)
class ParquetImage:
    """An image in a parquet file, as the hub stores it: struct{bytes, path}, bytes, or a list.

    row: in the file, from 0. element: which one, where a cell has several.
    """

    path: str
    row: int
    column: str = "image"
    element: int = 0

    def read(self) -> bytes:
        """Return the encoded image. Raises: UserError when the cell has no bytes."""
        group, offset = _row_group(self.path, self.row)
        cell = _cells(self.path, group, self.column)[offset].as_py()
        if isinstance(cell, list):
            cell = cell[self.element] if self.element < len(cell) else None
        found = cell.get("bytes") if isinstance(cell, dict) else cell
        if not isinstance(found, bytes):
            raise UserError(
                f"{self.path}: row {self.row} has no bytes in column {self.column!r}.",
                "Only its image's name is stored.",
                "Take the parquet files that hold the images.",
            )
        return found


@dataclass(frozen=True, slots=True)
class TsvImage:
    """A base64 image in one field of a TSV file. start, size: bytes of its row in the file."""

    path: str
    start: int
    size: int
    field: int

    def read(self) -> bytes:
        """Return the decoded field. Raises: UserError when it is not base64."""
        with Path(self.path).open("rb") as file:
            file.seek(self.start)
            line = file.read(self.size).decode("utf-8")
        text = next(csv.reader(io.StringIO(line, newline=""), delimiter="\t"))[self.field]
        try:
            return base64.b64decode(text, validate=True)
        except binascii.Error as error:
            raise UserError(
                f"{self.path}: the image at byte {self.start} is not base64.",
                str(error),
                "Download the file again.",
            ) from error


@dataclass(frozen=True, slots=True)
class TsvRow:
    """A row of a TSV file: every field as text, "" where it is empty."""

    values: Mapping[str, str]
    path: str
    start: int
    size: int

    def image(self, column: str = "image") -> TsvImage:
        """Return where this row's picture is."""
        return TsvImage(self.path, self.start, self.size, list(self.values).index(column))


@dataclass(frozen=True, slots=True)
class ParquetRow:
    """A row of a parquet file without its pictures. num_images: column -> how many it has."""

    values: Mapping[str, Any]
    path: str
    row: int
    num_images: Mapping[str, int]

    def images(self, column: str = "image") -> tuple[ParquetImage, ...]:
        """Return where the pictures of one column are; none when the cell is null."""
        here = range(self.num_images.get(column, 0))
        return tuple(ParquetImage(self.path, self.row, column, one) for one in here)


def require(path: str | Path) -> Path:
    """Return the path as it is. Raises: UserError when nothing is there."""
    found = Path(path)
    if not found.exists():
        fix = "Check the path; it is relative to the folder where the command runs."
        raise UserError(f"{path} is not there.", "", fix)
    return found


def unreadable(path: str | Path, why: str, fix: str = "Download the file again.") -> UserError:
    """Return the error of a file that does not hold what it should."""
    return UserError(f"{path} cannot be read.", why, fix)


def read_json(path: str | Path) -> Any:
    """Return a JSON file's value. Raises: UserError naming line and column of what is broken."""
    try:
        return json.loads(require(path).read_text(encoding="utf-8-sig"))
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}, column {error.colno}"
        raise unreadable(path, f"It is not JSON: {error.msg} at {place}.") from error
    except (OSError, UnicodeDecodeError) as error:
        raise unreadable(path, str(error)) from error


def read_jsonl(path: str | Path) -> list[dict[str, Any]]:
    """Return the objects of a JSON-lines file; blank lines are skipped.

    Lines end at a newline only: other separators of Unicode may stand in a text.
    Raises: UserError naming the line that is no JSON object.
    """
    try:
        text = require(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise unreadable(path, str(error)) from error
    lines = enumerate(text.split("\n"), start=1)
    return [_object(line, path, number) for number, line in lines if line.strip()]


def _object(line: str, path: str | Path, number: int) -> dict[str, Any]:
    try:
        found = json.loads(line)
    except json.JSONDecodeError as error:
        raise unreadable(path, f"Line {number} is not JSON: {error.msg}.") from error
    if not isinstance(found, dict):
        raise unreadable(path, f"Line {number} is not a JSON object.")
    return found


def read_json_rows(path: str | Path) -> list[dict[str, Any]]:
    """Return the objects of a file that is a JSON array, or JSON lines under any name."""
    with require(path).open(encoding="utf-8-sig") as file:
        first = file.read(64).lstrip()[:1]
    if first != "[":
        return read_jsonl(path)
    rows = read_json(path)
    if not all(isinstance(row, dict) for row in rows):
        raise unreadable(path, "It is not a list of JSON objects.")
    return list(rows)


def question_lines(folder: str | Path, pattern: str) -> list[Path]:
    """Return a folder's JSON-lines files of questions, those that match a pattern first.

    Answers may lie beside them: their rows have a `text` too, but no `image` or `question`.
    """
    found = sorted(Path(folder).glob("*.jsonl"), key=lambda one: not one.match(pattern))
    return [one for one in found if _asks(one)]


def _asks(path: Path) -> bool:
    with path.open(encoding="utf-8-sig") as file:
        first = next((line for line in file if line.strip()), "")
    try:
        row = json.loads(first)
    except json.JSONDecodeError:
        return False
    return isinstance(row, dict) and bool({"image", "question", "image_source"} & set(row))


def tsv_rows(path: str | Path) -> Iterator[TsvRow]:
    """Yield the rows of a TSV file with a header, quoted as pandas and Excel quote.

    Raises: UserError when a row has another number of fields than the header.
    """
    with require(path).open("rb") as file:
        counted = _Counted(file)
        reader = csv.reader(counted, delimiter="\t")
        header = next(reader, [])
        start = counted.num_bytes
        for fields in _whole(reader, path):
            size = counted.num_bytes - start
            if fields and len(fields) != len(header):
                why = f"Line {reader.line_num} has {len(fields)} fields, the header {len(header)}."
                raise unreadable(path, why)
            if fields:
                yield TsvRow(dict(zip(header, fields, strict=True)), str(path), start, size)
            start = counted.num_bytes


def _whole(reader: Any, path: str | Path) -> Iterator[list[str]]:
    """Yield a TSV reader's rows. Raises: UserError where there is no row, e.g. at a lone "\\r"."""
    try:
        yield from reader
    except csv.Error as error:
        raise unreadable(path, f"Line {reader.line_num}: {error}.") from error


class _Counted:
    """Lines of a binary file as text, with the number of bytes handed out."""

    def __init__(self, file: Iterable[bytes]) -> None:
        self._lines = iter(file)
        self.num_bytes = 0

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        line = next(self._lines)
        at_start = self.num_bytes == 0
        self.num_bytes += len(line)
        return line.decode("utf-8-sig" if at_start else "utf-8")


def parquet_files(path: str | Path) -> list[Path]:
    """Return the parquet file, or all of a folder and its folders, by name. May be empty."""
    found = require(path)
    if found.is_file():
        return [found] if found.suffix == ".parquet" else []
    return sorted(one for one in found.rglob("*.parquet") if not one.name.startswith("."))


def split_of(path: str | Path) -> str:
    """Return a parquet file's split by the hub's naming: "test-00000-of-00002.parquet" -> test."""
    return Path(path).stem.partition("-0")[0]


def parquet_columns(path: str | Path) -> list[str]:
    """Return the names of a parquet file's columns. Raises: UserError when it is none."""
    return list(_parquet(str(path)).schema_arrow.names)


def parquet_rows(paths: Sequence[str | Path]) -> list[ParquetRow]:
    """Return the rows of parquet files in order, without reading pictures.

    Columns of pictures (struct with `bytes`, binary, or a list of either) are counted only.
    Raises: UserError when a file is no parquet file.
    """
    return [row for path in paths for row in _rows_of(str(path))]


def _rows_of(path: str) -> Iterator[ParquetRow]:
    file = _parquet(path)
    schema = file.schema_arrow
    pictures = [field.name for field in schema if _holds_pictures(field.type)]
    plain = [name for name in schema.names if name not in pictures]
    counts = {name: _counts(file, schema.field(name)) for name in pictures}
    for row, values in enumerate(file.read(columns=plain).to_pylist()):
        here = {name: counts[name][row] for name in pictures}
        yield ParquetRow(values, path, row, here)


def _counts(file: Any, field: Any) -> list[int]:
    """Return how many pictures each row has, reading names instead of bytes where there are."""
    import pyarrow as pa

    is_list = pa.types.is_list(field.type) or pa.types.is_large_list(field.type)
    inner = field.type.value_type if is_list else field.type
    has_names = pa.types.is_struct(inner) and inner.get_field_index("path") >= 0
    leaf = f"{field.name}.list.element.path" if is_list else f"{field.name}.path"
    known = [leaf] if has_names else [field.name]
    names = {file.schema.column(i).path for i in range(len(file.schema))}
    columns = known if not has_names or leaf in names else [field.name]
    cells = file.read(columns=columns).column(0)
    if not is_list:
        return [int(one) for one in cells.is_valid().to_pylist()]
    return [len(one) if one is not None else 0 for one in cells.to_pylist()]


def _holds_pictures(kind: Any) -> bool:
    import pyarrow as pa

    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return _holds_pictures(kind.value_type)
    if pa.types.is_struct(kind):
        return bool(kind.get_field_index("bytes") >= 0)
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def _parquet(path: str) -> Any:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return pq.ParquetFile(require(path))
    except (pa.ArrowInvalid, OSError) as error:
        raise unreadable(path, str(error)) from error


def _row_group(path: str, row: int) -> tuple[int, int]:
    """Return the row group that a row lies in, and its place there."""
    meta = _parquet(path).metadata
    for group in range(meta.num_row_groups):
        size = meta.row_group(group).num_rows
        if row < size:
            return group, row
        row -= size
    raise unreadable(path, f"It has {meta.num_rows} rows, fewer than when it was read.")


@lru_cache(maxsize=2)  # neighbours are asked one after the other
def _cells(path: str, group: int, column: str) -> Any:
    return _parquet(path).read_row_group(group, columns=[column]).column(0)


def digests(paths: Iterable[str | Path]) -> dict[str, str]:
    """Return each file's name -> sha256 hex. Files of one name are told apart by their folder."""
    listed = [Path(path) for path in paths]
    names = [path.name for path in listed]
    return {
        path.name if names.count(path.name) == 1 else f"{path.parent.name}/{path.name}": (
            store.sha256_of(str(path))
        )
        for path in listed
    }


def digests_of_many(paths: Sequence[str | Path]) -> dict[str, str]:
    """Return `digests`; small text files that many questions are spread over count as one.

    Its sha256 is that of the sorted lines "name sha256".
    """
    texts = [path for path in paths if Path(path).suffix == ".txt"]
    found = digests(path for path in paths if Path(path).suffix != ".txt")
    if texts:
        each = digests(texts)
        lines = "\n".join(f"{name} {each[name]}" for name in sorted(each))
        found[f"{len(each)} text files"] = hashlib.sha256(lines.encode()).hexdigest()
    return found
