"""The rows at given ranks of a stream that is too long to sort.

Rows are ordered by (code, tie), two uint64: a code is a key as an order-preserving integer, a tie
is what decides between equal codes. Together they are eight digits of 16 bits. One pass over the
stream counts the first digit and so finds the bin that holds a rank; the next counts the second
digit within that bin; a last one collects the rows of the bins found and sorts them. Keys that are
all equal only need more digits, down to the last one of the tie. The result is exact whatever the
order and size of the chunks.

Memory: per rank 65,536 counts (512 KB) and what one chunk needs, and at most `max_held` collected
rows of 16 bytes (a few times that while they are sorted). It does not grow with the stream.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from manifests.errors import PartDamaged, UserError

Float64s: TypeAlias = NDArray[np.float64]
Uint64s: TypeAlias = NDArray[np.uint64]
Masks: TypeAlias = NDArray[np.bool_]
Chunk: TypeAlias = tuple[Uint64s, Uint64s]
"""Codes and ties of some rows, uint64 [n] each."""
ReadChunks: TypeAlias = Callable[[], Iterable[Chunk]]
"""Starts the stream again; each time it must bring the same rows."""

MAX_HELD_ROWS = 1 << 20

_DIGIT_BITS = 16
_NUM_BINS = 1 << _DIGIT_BITS
_WORD_BITS = 64
_WORD_DIGITS = _WORD_BITS // _DIGIT_BITS
_NUM_DIGITS = 2 * _WORD_DIGITS
_WORD_MASK = (1 << _WORD_BITS) - 1
_ALL_BUT_SIGN = np.uint64((1 << 63) - 1)


@dataclass(frozen=True, slots=True)
class Place:
    """One row's place in the order: its code and its tie, each in [0, 2^64)."""

    code: int
    tie: int

    def rows_before(self, codes: Uint64s, ties: Uint64s) -> Masks:
        """Return which of the rows come before this place. bool [n]."""
        code, tie = np.uint64(self.code), np.uint64(self.tie)
        before: Masks = (codes < code) | ((codes == code) & (ties < tie))
        return before

    def rows_after(self, codes: Uint64s, ties: Uint64s) -> Masks:
        """Return which of the rows come after this place. bool [n]."""
        code, tie = np.uint64(self.code), np.uint64(self.tie)
        after: Masks = (codes > code) | ((codes == code) & (ties > tie))
        return after


@dataclass(frozen=True, slots=True)
class _Span:
    """The rows that share their first `depth` digits with `first`.

    first: the least (code << 64 | tie) of them; num_before: rows of the stream that come before
    it; num_rows: rows of the stream inside.
    """

    depth: int
    first: int
    num_before: int
    num_rows: int

    @property
    def last(self) -> int:
        """The greatest (code << 64 | tie) inside."""
        return self.first + (1 << (_DIGIT_BITS * (_NUM_DIGITS - self.depth))) - 1

    @property
    def num_to_collect(self) -> int:
        """Rows to look at for what is in it; none once every digit is known."""
        return 0 if self.depth == _NUM_DIGITS else self.num_rows

    def rows_of(self, chunk: Chunk) -> Chunk:
        """Return the chunk's rows that are inside."""
        if self.depth == 0:
            return chunk
        codes, ties = chunk
        inside = _is_within(codes, self.first >> _WORD_BITS, self.last >> _WORD_BITS)
        if self.depth > _WORD_DIGITS:
            inside &= _is_within(ties, self.first & _WORD_MASK, self.last & _WORD_MASK)
        return codes[inside], ties[inside]

    def next_digits(self, chunk: Chunk) -> NDArray[np.int64]:
        """Return the digit after the shared ones of the chunk's rows that are inside."""
        words = self.rows_of(chunk)[self.depth // _WORD_DIGITS]
        shift = _WORD_BITS - _DIGIT_BITS * (self.depth % _WORD_DIGITS + 1)
        return ((words >> np.uint64(shift)) & np.uint64(_NUM_BINS - 1)).astype(np.int64)

    def narrowed(self, counts: NDArray[np.int64], rank: int) -> _Span:
        """Return the span of the one next digit that holds the row of this rank."""
        ends = self.num_before + np.cumsum(counts)
        digit = int(np.searchsorted(ends, rank, side="right"))
        step = 1 << (_DIGIT_BITS * (_NUM_DIGITS - self.depth - 1))
        num_rows = int(counts[digit])
        return _Span(
            self.depth + 1, self.first + digit * step, int(ends[digit]) - num_rows, num_rows
        )


def descending_codes(keys: Float64s) -> Uint64s:
    """Return uint64 codes that ascend where the keys (float64) descend; equal keys, equal codes.

    0.0 and -0.0 are equal. The bits of positive numbers ascend with them: they are turned over; the
    bits of negative numbers, whose sign is set, descend with them and come last.

    Raises: UserError for a key that is not a number: it has no rank.
    """
    if np.isnan(keys).any():
        raise UserError(
            f"{int(np.isnan(keys).sum())} of {len(keys)} keys are not numbers.",
            "A band or a largest score ranks the rows; a row without a key has no rank.",
            "Give every row a score, or leave the band out.",
        )
    return _turned_over((keys + 0.0).view(np.uint64))


def key_of(code: int) -> float:
    """Return the key whose descending code this is; 0.0 for either zero."""
    bits = _turned_over(np.array([code], np.uint64))
    return float(bits.view(np.float64)[0])


def rows_at(
    read: ReadChunks, ranks: Sequence[int], *, num_rows: int, max_held: int = MAX_HELD_ROWS
) -> list[Place]:
    """Return the places of the rows of these 0-based ranks, in the order of `ranks`.

    Args: read: starts the stream anew for each pass: one when there are at most `max_held` rows,
    mostly three, never more than eight; ranks: in [0, num_rows); num_rows: rows of the stream;
    max_held: rows that may be collected and sorted, of all ranks together.
    Raises: PartDamaged when the stream does not bring `num_rows` rows, the same each time.
    """
    assert all(0 <= rank < num_rows for rank in ranks), "a rank is that of a row"
    spans = {rank: _Span(0, 0, 0, num_rows) for rank in ranks}
    while sum(span.num_to_collect for span in set(spans.values())) > max_held:
        open_spans = {span for span in spans.values() if span.num_to_collect}
        counts = _counted(read, open_spans)
        spans = {
            rank: span.narrowed(counts[span], rank) if span in counts else span
            for rank, span in spans.items()
        }
    found = _collected(read, set(spans.values()))
    return [_place(spans[rank], found, rank) for rank in ranks]


def _counted(read: ReadChunks, spans: set[_Span]) -> dict[_Span, NDArray[np.int64]]:
    """Return how many rows each span has of each next digit."""
    counts = {span: np.zeros(_NUM_BINS, np.int64) for span in spans}
    for chunk in read():
        for span, count in counts.items():
            count += np.bincount(span.next_digits(chunk), minlength=_NUM_BINS)
    _must_be_all({span: int(count.sum()) for span, count in counts.items()})
    return counts


def _collected(read: ReadChunks, spans: set[_Span]) -> dict[_Span, Chunk]:
    """Return the rows of each span in order; those of a span that is one place are not needed."""
    found: dict[_Span, list[Chunk]] = {span: [] for span in spans if span.num_to_collect}
    for chunk in read() if found else ():
        for span, chunks in found.items():
            chunks.append(span.rows_of(chunk))
    _must_be_all({span: sum(len(one[0]) for one in chunks) for span, chunks in found.items()})
    return {span: _sorted(chunks) for span, chunks in found.items()}


def _sorted(chunks: Sequence[Chunk]) -> Chunk:
    codes = np.concatenate([chunk[0] for chunk in chunks])
    ties = np.concatenate([chunk[1] for chunk in chunks])
    order = np.lexsort((ties, codes))
    return codes[order], ties[order]


def _place(span: _Span, found: Mapping[_Span, Chunk], rank: int) -> Place:
    if span not in found:
        return Place(span.first >> _WORD_BITS, span.first & _WORD_MASK)
    codes, ties = found[span]
    at = rank - span.num_before
    return Place(int(codes[at]), int(ties[at]))


def _must_be_all(seen: Mapping[_Span, int]) -> None:
    for span, num_seen in seen.items():
        if num_seen != span.num_rows:
            raise PartDamaged(
                f"{num_seen} rows were read where {span.num_rows} should be: a part is missing, or "
                "changed while it was read."
            )


def _is_within(words: Uint64s, first: int, last: int) -> Masks:
    return (words >= np.uint64(first)) & (words <= np.uint64(last))


def _turned_over(bits: Uint64s) -> Uint64s:
    """Turn over all bits but the sign where the sign is not set; twice gives the same again."""
    is_negative = bits >> np.uint64(63)
    flip: Uint64s = (is_negative - np.uint64(1)) & _ALL_BUT_SIGN
    return bits ^ flip
