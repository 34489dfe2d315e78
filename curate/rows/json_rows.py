"""Where the rows of a JSON array or of a JSON Lines file lie, found without parsing any.

A file is read once, in blocks, and only what JSON's grammar cares about is looked at: quotes that
no backslash escapes open and close strings, brackets outside strings change the depth, and commas
at depth 1 part the rows of the array (RFC 8259). Lines need no such care: a JSON string holds no
raw line feed. All of it is array arithmetic, so a gigabyte takes seconds; memory stays at a few
blocks, however large a row is. Whether a row is good JSON is for its reader to say.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from manifests import paths
from manifests.errors import UserError
from manifests.schemas import MAX_ROWS_PER_SHARD

BLOCK_BYTES = 1 << 20
"""Fits a core's cache: blocks of 16 MiB were scanned at half the speed."""
MAX_ROW_BYTES = 1 << 30
"""A chunk's text must fit Arrow's 32-bit offsets."""

Spans = npt.NDArray[np.int64]
"""int64 [n, 2]: first byte and end of each row in its file, without the white space around it."""
_Places = npt.NDArray[np.int64]
_Mask = npt.NDArray[np.bool_]
_Bytes = npt.NDArray[np.uint8]

_BOM = b"\xef\xbb\xbf"
_WHITE = b" \t\r\n"
_QUOTE, _BACKSLASH, _COMMA, _LINE_FEED = b'"\\,\n'
_IS_WHITE = np.isin(np.arange(256), list(_WHITE))
_STEPS = 16  # bytes of a run that are followed one by one before it is measured in another way
_NO_PLACES: _Places = np.zeros(0, np.int64)

_KNOWN_STARTS = (
    (b"\x1f\x8b", "is gzip-compressed", "Unpack it (gunzip) and give the file inside."),
    (b"PK\x03\x04", "is a zip archive", "Unpack it (unzip) and give the file inside."),
    (b"\x28\xb5\x2f\xfd", "is zstd-compressed", "Unpack it (unzstd) and give the file inside."),
    (b"PAR1", "is a parquet file", "Write its rows as JSON Lines."),
    (b"<", "is a web page or XML", "The download failed: fetch the file itself."),
    (b"version https://git-lfs", "is a Git LFS pointer", "Fetch the file itself: git lfs pull."),
    (b"\xff\xfe", "is UTF-16 text", "Write it again as UTF-8."),
    (b"\xfe\xff", "is UTF-16 text", "Write it again as UTF-8."),
)


class Chunk(NamedTuple):
    """Consecutive rows of one file: the number of the first, how many, and their bytes."""

    first_row: int
    num_rows: int
    start: int
    end: int


def chunks(path: str, num_bytes: int, *, block_bytes: int = BLOCK_BYTES) -> list[Chunk]:
    """Return the file's rows in chunks, in order: those that begin in the same `num_bytes` bytes.

    Raises: as `row_spans`.
    """
    found: dict[int, Chunk] = {}  # by number of the stretch, in order
    first_row = 0
    for spans in row_spans(path, block_bytes=block_bytes):
        stretches, firsts, counts = np.unique(
            spans[:, 0] // num_bytes, return_index=True, return_counts=True
        )
        for stretch, first, count in zip(stretches.tolist(), firsts, counts.tolist(), strict=True):
            begun = found.get(stretch)
            row, start = (first_row + int(first), int(spans[first, 0]))
            if begun is not None:
                row, start, count = begun.first_row, begun.start, begun.num_rows + count
            found[stretch] = Chunk(row, count, start, int(spans[row - first_row + count - 1, 1]))
        first_row += len(spans)
    return list(found.values())


def row_spans(path: str, *, block_bytes: int = BLOCK_BYTES) -> Iterator[Spans]:
    """Yield where the file's rows lie, in order: int64 [n, 2] (start, end), n >= 1.

    Raises: UserError when the file is missing, empty, compressed, neither an array nor JSON Lines,
    cut short, goes on after its array, or has more than 2^24 rows.
    """
    blocks = _blocks(path, block_bytes)
    offset, block = _beginning(path, blocks)
    scan = _LineScan() if block.startswith(b"{") else _ArrayScan(path)
    num_rows = 0
    while True:
        spans = scan.feed(block, offset) if block else scan.finish(offset)
        if len(spans):
            _check_rows(path, spans, num_rows, lines=isinstance(scan, _LineScan))
            num_rows += len(spans)
            yield spans
        if not block:
            return
        offset += len(block)
        block = next(blocks, b"")


def spans_within(data: bytes, *, is_array: bool) -> Spans:
    """Return where the rows of a chunk's bytes lie: int64 [n, 2], from the chunk's first byte on.

    Args: data: the chunk's bytes; is_array: rows are parted by commas, not by line ends.
    """
    scan = _ArrayScan("A chunk", inside=True) if is_array else _LineScan()
    blocks = range(0, len(data), BLOCK_BYTES)
    found = [scan.feed(data[at : at + BLOCK_BYTES], at) for at in blocks]
    if isinstance(scan, _ArrayScan):
        found.append(scan.feed(b"]", len(data)))
    return np.concatenate([*found, scan.finish(len(data))])


def is_array(path: str) -> bool:
    """Tell whether a file is a JSON array and not JSON Lines. Raises: UserError as `row_spans`."""
    return _beginning(path, _blocks(path, 4096))[1].startswith(b"[")


def _blocks(path: str, block_bytes: int) -> Iterator[bytes]:
    """Yield the file's bytes. Raises: UserError when there is none."""
    fs, local = paths.filesystem(path)
    try:
        file = fs.open(local, "rb")
    except FileNotFoundError as error:
        raise UserError(
            f"{path} is gone.", "The recipe's source names it.", "Check the path."
        ) from error
    with file:
        while block := file.read(block_bytes):
            yield block


def _beginning(path: str, blocks: Iterator[bytes]) -> tuple[int, bytes]:
    """Return (offset, bytes) from the first byte that means something to the end of its block.

    Raises: UserError when that byte begins neither an array nor an object.
    """
    block = next(blocks, b"")
    while len(block) < len(_BOM) and (more := next(blocks, b"")):
        block += more
    offset = len(_BOM) if block.startswith(_BOM) else 0
    block = block[offset:]
    while not (kept := block.lstrip(_WHITE)):
        offset += len(block)
        block = next(blocks, b"")
        if not block:
            raise UserError(
                f"{path} is empty.", f"It holds {offset} bytes and no row.", "Download it again."
            )
    if kept[:1] not in (b"[", b"{"):
        raise _no_json(path, kept, offset + len(block) - len(kept))
    return offset + len(block) - len(kept), kept


def _no_json(path: str, start: bytes, offset: int) -> UserError:
    for known, what, fix in _KNOWN_STARTS:
        if start.startswith(known):
            return UserError(f"{path} {what}.", "A llava_json source reads plain JSON files.", fix)
    return UserError(
        f"{path} is neither a JSON array nor JSON Lines: byte {offset} begins {start[:20]!r}.",
        "An array begins with [ and each line of JSON Lines with {.",
        "Write its rows in one of these forms.",
    )


def _check_rows(path: str, spans: Spans, num_before: int, *, lines: bool) -> None:
    if num_before + len(spans) > MAX_ROWS_PER_SHARD:
        at = int(spans[MAX_ROWS_PER_SHARD - num_before, 0])
        raise UserError(
            f"{path} has more than 2^24 rows: row {MAX_ROWS_PER_SHARD} begins at byte {at}.",
            "A uid gives 24 bits to the row in the file.",
            "Split the file.",
        )
    sizes = spans[:, 1] - spans[:, 0]
    largest = int(np.argmax(sizes))
    if sizes[largest] > MAX_ROW_BYTES:
        raise UserError(
            f"{path}: row {num_before + largest} at byte {spans[largest, 0]} is larger than 1 GiB.",
            "A chunk's text must fit Arrow's 32-bit offsets.",
            "Take that row out.",
        )
    if lines and not num_before and sizes[0] == 1:  # the first line is a bracket
        raise UserError(
            f"{path} is one JSON object over many lines.",
            "Rows stand in a JSON array, or one on each line.",
            "Write the array that the object holds as a file of its own.",
        )


class _LineScan:
    """Finds lines that are not blank; holds the ends of one that is not over yet."""

    def __init__(self) -> None:
        self._pending = _NO_PLACES  # first byte and end of what an open line holds so far

    def feed(self, block: bytes, offset: int) -> Spans:
        """Return the lines that end in this block."""
        data = np.frombuffer(block, np.uint8)
        feeds = np.flatnonzero(data == _LINE_FEED)
        starts, ends = np.append(0, feeds + 1), np.append(feeds, len(data))
        starts, ends = _trimmed(data, starts, ends)
        starts, ends = starts + offset, ends + offset
        if self._pending.size:
            ends[0] = ends[0] if starts[0] < ends[0] else self._pending[1]
            starts[0] = self._pending[0]
        is_open = starts[-1] < ends[-1]
        self._pending = np.array([starts[-1], ends[-1]]) if is_open else _NO_PLACES
        return _spans(starts[:-1], ends[:-1])

    def finish(self, offset: int) -> Spans:
        """Return the last line, which need not have a line feed."""
        last, self._pending = self._pending, _NO_PLACES
        return _spans(last[:1], last[1:])


class _ArrayScan:
    """Finds the values of one array; holds what an open string, bracket or row has so far.

    Args: inside: begin in the array, at its first value, and not before its bracket.
    """

    def __init__(self, path: str, *, inside: bool = False) -> None:
        self._path = path
        self._in_string = False
        self._depth = int(inside)
        self._backslashes = 0  # that the last block ends with
        self._closed = False
        self._num_rows = 0
        self._cuts: _Places = np.full(int(inside), -1, np.int64)  # where the open row's turn began
        self._content = _NO_PLACES  # its first and last byte so far

    def feed(self, block: bytes, offset: int) -> Spans:
        """Return the rows that end in this block. Raises: UserError for what is no array."""
        data = np.frombuffer(block, np.uint8)
        if self._closed:
            self._must_be_white(data, offset)
            return _spans(_NO_PLACES, _NO_PLACES)
        places, steps, depths, inside = self._structure(block, data)
        closing = np.flatnonzero(depths == 0)
        limit = len(data)
        if closing.size:
            num = int(closing[0]) + 1
            places, steps, depths, inside = places[:num], steps[:num], depths[:num], inside[:num]
            limit, self._closed = int(places[-1]), True
            self._must_be_white(data[limit + 1 :], offset + limit + 1)
        gaps = self._gaps(data[:limit], places, depths, inside)
        if places.size:
            self._depth, self._in_string = int(depths[-1]), bool(inside[-1])
        touching = (depths == 2) & (steps == 1) | (depths == 1) & (steps <= 0)
        is_cut = (depths == 1) & (steps == 1) | (depths == 0)
        white = _IS_WHITE[data[gaps]]
        comma = data[gaps] == _COMMA
        content = np.concatenate([gaps[~white & ~comma], places[touching]])
        cuts = np.concatenate([gaps[comma], places[is_cut]])
        return self._rows(np.sort(content) + offset, np.sort(cuts) + offset)

    def finish(self, offset: int) -> Spans:
        """Return no rows: a closed array has none left. Raises: UserError when it is not closed."""
        if self._closed:
            return _spans(_NO_PLACES, _NO_PLACES)
        where = f"after {self._num_rows} rows"
        if self._content.size:
            where = f"within row {self._num_rows}, which begins at byte {self._content[0]}"
        raise UserError(
            f"{self._path} ends at byte {offset} before its array is closed, {where}.",
            "The download is not complete, or a quote or bracket of that row is missing.",
            "Download it again, or correct that row.",
        )

    def _structure(
        self, block: bytes, data: _Bytes
    ) -> tuple[_Places, npt.NDArray[np.int8], _Places, _Mask]:
        """Return the places of string ends and of brackets outside strings.

        And of each: its step in depth (0 for a quote), the depth after it, and whether a string is
        open after it.
        """
        places = np.flatnonzero(_is_bracket(data) | (data == _QUOTE))
        quotes = data[places] == _QUOTE
        escaped = self._escaped(block, data, places[quotes])
        if escaped.any():
            kept = np.ones(len(places), np.bool_)
            kept[np.flatnonzero(quotes)[escaped]] = False
            places, quotes = places[kept], quotes[kept]
        inside = (np.cumsum(quotes) + self._in_string) & 1 == 1
        kept = quotes | ~inside
        places, quotes, inside = places[kept], quotes[kept], inside[kept]
        # [ and { have bit 2 clear, ] and } have it set
        steps = np.where(quotes, 0, 1 - (data[places] & 4).view(np.int8) // 2).astype(np.int8)
        return places, steps, np.cumsum(steps, dtype=np.int64) + self._depth, inside

    def _escaped(self, block: bytes, data: _Bytes, quotes: _Places) -> _Mask:
        """Tell of each quote whether an odd number of backslashes stands before it."""
        lengths = np.zeros(len(quotes), np.int64)
        left = np.arange(len(quotes))
        for step in range(1, _STEPS + 1):
            before = quotes[left] - step
            left = left[(before >= 0) & (data[before] == _BACKSLASH)]
            if not left.size:
                break
            lengths[left] = step
        else:
            others = np.append(-1, np.flatnonzero(data != _BACKSLASH))
            ends = quotes[left] - 1
            lengths[left] = ends - others[np.searchsorted(others, ends, side="right") - 1]
        lengths[lengths == quotes] += self._backslashes
        if block.endswith(b"\\"):
            num = len(block) - len(block.rstrip(b"\\"))
            self._backslashes = num + (self._backslashes if num == len(block) else 0)
        else:
            self._backslashes = 0
        is_escaped: _Mask = lengths & 1 == 1
        return is_escaped

    def _gaps(self, data: _Bytes, places: _Places, depths: _Places, inside: _Mask) -> _Places:
        """Return the places of all bytes between the array's values, and of bare values."""
        starts, ends = np.append(0, places + 1), np.append(places, len(data))
        is_gap = np.append(self._depth == 1 and not self._in_string, (depths == 1) & ~inside)
        starts, ends = starts[is_gap], ends[is_gap]
        lengths = ends - starts
        before = np.cumsum(lengths) - lengths
        total = int(lengths.sum())
        return np.repeat(starts - before, lengths) + np.arange(total)

    def _rows(self, content: _Places, cuts: _Places) -> Spans:
        """Return the values between the cuts: the array's brackets and commas."""
        content = np.concatenate([self._content, content])
        cuts = np.concatenate([self._cuts, cuts])
        if not cuts.size:
            return _spans(_NO_PLACES, _NO_PLACES)
        at = np.searchsorted(content, cuts)
        empty = at[:-1] == at[1:]
        rest = content[at[-1] :]
        self._cuts, self._content = cuts[-1:], rest[[0, -1]] if rest.size else rest
        if empty.any():
            first = int(np.argmax(empty))
            if self._closed and self._num_rows + len(empty) == 1:
                return _spans(_NO_PLACES, _NO_PLACES)  # the empty array
            raise UserError(
                f"{self._path} has no value before the comma or bracket at byte "
                f"{cuts[first + 1]}, where row {self._num_rows + first} should be.",
                "In a JSON array one comma stands between two values.",
                "Remove the comma that is too many.",
            )
        self._num_rows += len(empty)
        return _spans(content[at[:-1]], content[at[1:] - 1] + 1)

    def _must_be_white(self, data: _Bytes, offset: int) -> None:
        solid = np.flatnonzero(~_IS_WHITE[data])
        if solid.size:
            raise UserError(
                f"{self._path} goes on after its array, at byte {offset + solid[0]}.",
                "A bracket of the rows before is one too many, or two files were joined.",
                "Give one array for each file, or JSON Lines.",
            )


def _is_bracket(data: _Bytes) -> _Mask:
    """Tell where one of [ ] { } stands: with bit 5 set they are 0x7b and 0x7d, 2 apart."""
    lowered = data | np.uint8(0x20)
    lowered -= np.uint8(0x7B)
    lowered &= np.uint8(0xFD)
    found: _Mask = lowered == 0
    return found


def _trimmed(data: _Bytes, starts: _Places, ends: _Places) -> tuple[_Places, _Places]:
    """Return the pieces without the white space around them; a blank one has start == end."""
    left = np.arange(len(starts))
    for _ in range(_STEPS):
        left = left[starts[left] < ends[left]]
        before, after = _IS_WHITE[data[starts[left]]], _IS_WHITE[data[ends[left] - 1]]
        after &= ~before | (ends[left] - starts[left] > 1)
        starts[left] += before
        ends[left] -= after
        left = left[before | after]
        if not left.size:
            return starts, ends
    solid = np.append(np.flatnonzero(~_IS_WHITE[data]), len(data))
    starts = np.minimum(solid[np.searchsorted(solid, starts)], ends)
    last = np.append(-1, solid)[np.searchsorted(solid, ends)]
    return starts, np.maximum(last + 1, starts)


def _spans(starts: _Places, ends: _Places) -> Spans:
    """Return the pieces that are not blank, as int64 [n, 2]."""
    full = ends > starts
    return np.stack([starts[full], ends[full]], axis=1)
