"""Where each row of a JSON file begins and ends, found without parsing: an array, or lines.

A file of many gigabytes is read once, in blocks, and whole columns of bytes are looked at: quotes
that no backslash escapes tell what is inside a string, brackets outside of strings tell the depth.
So a part of the file can later be read and parsed by itself.

Formats: RFC 8259 (a JSON array of rows); jsonlines.org (one JSON value a line).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO, cast

import numpy as np
import numpy.typing as npt

from manifests import paths
from manifests.errors import UserError
from manifests.schemas import MAX_ROWS_PER_SHARD

BLOCK_BYTES = 1 << 24

_BOM = b"\xef\xbb\xbf"
_SPACE = b" \t\r\n"
_PACKED = {b"PK\x03\x04": "zip", b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd", b"BZh": "bzip2"}
_QUOTE, _BACKSLASH, _COMMA, _NEWLINE = (ord(c) for c in '"\\,\n')
_STEP_OF_BYTE = np.zeros(256, np.int8)
_STEP_OF_BYTE[[ord(c) for c in "[{"]] = 1
_STEP_OF_BYTE[[ord(c) for c in "]}"]] = -1
_MARKS = bytes(chr(byte) in '"[]{},' for byte in range(256))
_IS_SPACE = np.zeros(256, np.bool_)
_IS_SPACE[list(_SPACE)] = True

Spans = npt.NDArray[np.int64]
"""int64 [n, 2]: first byte of a row, and the byte after its last."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """Consecutive rows of one file: bytes start..end hold them and what stands between them."""

    first_row: int
    num_rows: int
    start: int
    end: int


@dataclass(slots=True)
class _State:
    """What is carried from block to block of an array."""

    row_start: int  # the byte after the bracket or comma before the current row
    depth: int = 1
    in_string: bool = False
    is_escaped: bool = False  # whether an odd run of backslashes ended the block before
    end: int | None = None  # the byte after the array's last bracket


def chunks(path: str, num_bytes: int) -> list[Chunk]:
    """Return the rows of a file in chunks of about `num_bytes` bytes, in order.

    Raises: UserError as row_spans does.
    """
    found: list[Chunk] = []
    first, low, count, high = 0, -1, 0, -1
    for spans in row_spans(path):
        for start, end in spans.tolist():
            if count and end - low > num_bytes:
                found.append(Chunk(first, count, low, high))
                first, count = first + count, 0
            low = start if not count else low
            count, high = count + 1, end
    return [*found, Chunk(first, count, low, high)] if count else found


def row_spans(path: str, *, block_bytes: int = BLOCK_BYTES) -> Iterator[Spans]:
    """Yield where the rows of a JSON array or of JSON lines lie, block by block.

    A span may have white space at its ends; blank lines are no rows. What is inside a row is not
    checked. Raises: UserError when the file is missing, empty, packed, no such file at all, cut
    short or longer than an array, or has more than 2^24 rows.
    """
    num_rows = 0
    with _opened(path) as file:
        start, kind = _beginning(path, file)
        find = _array_spans if kind == b"[" else _line_spans
        for spans in find(path, file, start, block_bytes):
            num_rows += len(spans)
            if num_rows > MAX_ROWS_PER_SHARD:
                raise UserError(
                    f"{path} has more than {MAX_ROWS_PER_SHARD:,} rows.",
                    "A row's number has 24 bits of its uid.",
                    "Cut the file in two.",
                )
            yield spans


def spans_within(data: bytes, *, is_array: bool) -> Spans:
    """Return the spans of the rows of one chunk's bytes, without the white space around them.

    Args: is_array: rows are parted by commas, not by line ends.
    """
    block = np.frombuffer(data, np.uint8)
    if not is_array:
        return _lines_of(block)
    state = _State(row_start=0)
    spans = _rows_of_block(block, 0, state)
    return _trimmed(block, np.concatenate([spans, [[state.row_start, len(data)]]]))


def is_array(path: str) -> bool:
    """Tell whether the file is a JSON array, not JSON lines. Raises: UserError as row_spans."""
    with _opened(path) as file:
        return _beginning(path, file)[1] == b"["


def _opened(path: str) -> BinaryIO:
    fs, local = paths.filesystem(path)
    try:
        return cast(BinaryIO, fs.open(local, "rb"))
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist.", "", "Check source.files.") from error


def _beginning(path: str, file: BinaryIO) -> tuple[int, bytes]:
    """Return where the first byte that says something is, and that byte."""
    head = file.read(1 << 16)
    for magic, name in _PACKED.items():
        if head.startswith(magic):
            raise UserError(f"{path} is a {name} file.", "Rows are read in place.", "Unpack it.")
    skipped = len(_BOM) if head.startswith(_BOM) else 0
    found = skipped + len(head[skipped:]) - len(head[skipped:].lstrip(_SPACE))
    first = head[found : found + 1]
    if not first:
        raise UserError(f"{path} holds no rows.", "It is empty.", "Check the download.")
    if first not in (b"[", b"{"):
        raise UserError(
            f"{path} is neither a JSON array nor JSON lines.",
            f"It begins with {head[found : found + 20]!r}.",
            "Give a list of rows, [{...}, ...], or one {...} a line.",
        )
    return found, first


def _blocks(file: BinaryIO, start: int, block_bytes: int) -> Iterator[tuple[int, bytes]]:
    file.seek(start)
    while data := file.read(block_bytes):
        yield start, data
        start += len(data)


def _array_spans(path: str, file: BinaryIO, start: int, block_bytes: int) -> Iterator[Spans]:
    state, num_rows, position = _State(row_start=start + 1), 0, start + 1
    for at, data in _blocks(file, start + 1, block_bytes):
        position = at + len(data)
        if state.end is None:
            spans = _rows_of_block(np.frombuffer(data, np.uint8), at, state)
            if state.end is not None and _is_blank(file, *spans[-1].tolist()):
                spans = spans[:-1]  # an empty array, or a comma before its end
            file.seek(position)
            num_rows += len(spans)
            yield spans
        if state.end is not None:
            _check_rest(path, data[max(state.end - at, 0) :], max(state.end, at))
    if state.end is None:
        raise UserError(
            f"{path} is cut short.",
            f"It ends at byte {position}, after {num_rows} rows, with its array still open.",
            "Download it again.",
        )


def _is_blank(file: BinaryIO, start: int, end: int) -> bool:
    file.seek(start)
    return not file.read(end - start).strip(_SPACE)


def _check_rest(path: str, data: bytes, at: int) -> None:
    if rest := data.strip(_SPACE):
        raise UserError(
            f"{path} goes on after the end of its array.",
            f"Behind byte {at} comes {rest[:20]!r}.",
            "Make it one JSON array, or JSON lines.",
        )


def _rows_of_block(data: npt.NDArray[np.uint8], at: int, state: _State) -> Spans:
    """Return the spans of the rows that end in this block, and go on with the state.

    Args: data: the block's bytes; at: where it lies in the file.
    """
    marks = np.flatnonzero(np.frombuffer(data.tobytes().translate(_MARKS), np.bool_))
    kinds = data[marks]
    is_quote = kinds == _QUOTE
    quotes = marks[is_quote]
    is_real = is_quote.copy()
    is_real[is_quote] = ~_escaped(data, quotes, state.is_escaped)
    parity = np.bitwise_xor.accumulate(is_real) ^ state.in_string if len(marks) else is_real
    state.in_string = bool(parity[-1]) if len(marks) else state.in_string
    state.is_escaped = _ends_escaped(data, state.is_escaped)
    is_outside = ~parity & ~is_quote
    marks, kinds = marks[is_outside], kinds[is_outside]
    depths = state.depth + np.cumsum(_STEP_OF_BYTE[kinds], dtype=np.int64)
    state.depth = int(depths[-1]) if len(depths) else state.depth
    is_end = (depths == 0) | ((depths == 1) & (kinds == _COMMA))
    closings = np.flatnonzero(depths == 0)
    if len(closings):
        is_end[closings[0] + 1 :] = False
        state.end = at + int(marks[closings[0]]) + 1
    ends = marks[is_end] + at
    starts = np.concatenate([[state.row_start], ends + 1])
    state.row_start = int(starts[-1])
    return np.stack([starts[:-1], ends], axis=1)


def _escaped(
    data: npt.NDArray[np.uint8], quotes: npt.NDArray[np.int64], carried: bool
) -> npt.NDArray[np.bool_]:
    """Return which quotes stand behind an odd number of backslashes."""
    found = np.zeros(len(quotes), np.bool_)
    if carried and len(quotes) and quotes[0] == 0:
        found[0] = True
    running = np.flatnonzero(quotes > 0)
    back = 1
    while len(running):
        before = quotes[running] - back
        running = running[(before >= 0) & (data[before] == _BACKSLASH)]
        found[running] = back % 2 == 1
        is_at_begin = quotes[running] == back  # the run goes on in the block before
        if carried:
            found[running[is_at_begin]] = back % 2 == 0
        running = running[~is_at_begin]
        back += 1
    return found


def _ends_escaped(data: npt.NDArray[np.uint8], carried: bool) -> bool:
    """Tell whether an odd run of backslashes ends the block."""
    run = 0
    while run < len(data) and data[-1 - run] == _BACKSLASH:
        run += 1
    return (run % 2 == 1) ^ (carried and run == len(data))


def _line_spans(path: str, file: BinaryIO, start: int, block_bytes: int) -> Iterator[Spans]:
    rest, at = b"", start
    for _, data in _blocks(file, start, block_bytes):
        whole = rest + data
        end = whole.rfind(b"\n") + 1
        yield _lines_of(np.frombuffer(whole[:end], np.uint8)) + at
        rest, at = whole[end:], at + end
    yield _lines_of(np.frombuffer(rest, np.uint8)) + at


def _lines_of(data: npt.NDArray[np.uint8]) -> Spans:
    if not len(data):
        return np.zeros((0, 2), np.int64)
    ends = np.append(np.flatnonzero(data == _NEWLINE), len(data))
    starts = np.concatenate([[0], ends[:-1] + 1])
    spans = _trimmed(data, np.stack([starts, ends], axis=1))
    return spans[spans[:, 0] < spans[:, 1]]


def _trimmed(data: npt.NDArray[np.uint8], spans: Spans) -> Spans:
    """Return the spans without the white space at their ends."""
    spans = spans.astype(np.int64)
    for column, step in ((0, 1), (1, -1)):
        running = np.arange(len(spans))
        while len(running) and len(data):
            here = spans[running]
            looked = here[:, column] - (column == 1)
            is_more = (here[:, 0] < here[:, 1]) & _IS_SPACE[data[np.minimum(looked, len(data) - 1)]]
            running = running[is_more]
            spans[running, column] += step
    return spans
