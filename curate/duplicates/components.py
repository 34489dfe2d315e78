"""Near-duplicate components of a set of rows at one threshold.

Two rows are joined when their exact similarity is above the threshold; components are those of that
graph. A low-precision scan finds the pairs that may be joined; those it cannot tell, and that
nothing else has joined, are computed again in float64. Memory does not grow with the rows but for
some 16 bytes each, so rows may be a memory-mapped file.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from curate.duplicates.tiles import BLOCK_ROWS, Extent, Tile, scan, sorted_by_likeness
from curate.vectors.exact import Float16Rows, pair_dots
from curate.vectors.products import Precision, engine_threads, pairs_of

Ints: TypeAlias = NDArray[np.int64]
Int32s: TypeAlias = NDArray[np.int32]
Masks: TypeAlias = NDArray[np.bool_]

EDGES_PER_RELABEL = 1_000_000
DENSE_SHARE = 1 / 16  # of a tile's pairs: above it, joining by first hits is cheaper than listing
_NO_PAIRS = np.empty((2, 0), np.int32)


def components(
    rows: Float16Rows,
    similarity_above: float,
    *,
    precision: Precision = "auto",
    block_rows: int = BLOCK_ROWS,
) -> Ints:
    """Return each row's component as the smallest row index in it: int64 [n].

    Edges join rows whose exact dot is strictly above `similarity_above`, a float64. The result does
    not depend on `precision`, `block_rows` or threads.

    Args:
        rows: float16 [n, d], finite, norm at most 5; an array or a memory map.
        block_rows: side of a tile.
    """
    first = first_copies(rows)
    copies = np.flatnonzero(first != np.arange(len(first)))
    short = copies[pair_dots(rows, copies, copies) <= similarity_above]  # likeness joins them not
    first[short] = short
    different = np.flatnonzero(first == np.arange(len(first)))
    extent = Extent(len(different), len(different))
    with engine_threads():
        index = sorted_by_likeness(rows, different, extent, precision)
        joined = _Joined(rows, index, similarity_above)
        scan(
            rows,
            index,
            extent,
            sink=joined,
            precision=precision,
            block_rows=block_rows,
        )
    joined.relabel()
    smallest = np.full(len(index), len(rows))
    np.minimum.at(smallest, joined.labels, index)
    label = np.empty(len(rows), np.int64)
    label[index] = smallest[joined.labels]
    return label[first]


def first_copies(rows: Float16Rows) -> Ints:
    """Return for each row the first row with the same bytes, or itself: int64 [n]."""
    first = np.arange(len(rows))
    digests = _row_digests(rows)
    order = np.argsort(digests, kind="stable")
    ordered = digests[order]
    is_like_previous = np.append(False, ordered[1:] == ordered[:-1])
    suspects = np.flatnonzero(is_like_previous)
    if not len(suspects):
        return first
    leaders = order[np.maximum.accumulate(np.where(is_like_previous, 0, np.arange(len(order))))]
    for part in np.array_split(suspects, 1 + len(suspects) // 4096):
        copy, original = order[part], leaders[part]
        block = np.asarray(rows[copy]).view(np.uint16)
        is_same = (block == np.asarray(rows[original]).view(np.uint16)).all(axis=1)
        first[copy[is_same]] = original[is_same]
    return first


def _row_digests(rows: Float16Rows, *, block_rows: int = 4096) -> Ints:
    """Return a 64-bit digest of each row's bytes; it may collide, so equal ones are a hint."""
    words_per_row = -(-rows.shape[1] * 2 // 8)
    odd = np.random.default_rng(0).integers(1 << 63, size=words_per_row, dtype=np.uint64) | 1
    digests = np.empty(len(rows), np.int64)
    padded = np.zeros((block_rows, 4 * words_per_row), np.float16)
    for start in range(0, len(rows), block_rows):
        block = padded[: len(rows[start : start + block_rows])]
        block[:, : rows.shape[1]] = rows[start : start + block_rows]
        words = block.view(np.uint64)
        digests[start : start + block_rows] = (words * odd).sum(axis=1).view(np.int64)
    return digests


@dataclass(slots=True)
class _Joined:
    """Which rows of the scanned set are joined so far; new joins wait until a relabel."""

    rows: Float16Rows
    index: Ints
    similarity_above: float
    labels: Int32s = field(init=False)  # some position of the component
    _joins: list[Int32s] = field(default_factory=list)  # [2, edges]
    _doubts: list[Int32s] = field(default_factory=list)
    _num_waiting: int = 0

    def __post_init__(self) -> None:
        self.labels = np.arange(len(self.index), dtype=np.int32)

    def threshold(self, top: slice, left: slice) -> float:
        """Return the threshold, or inf when all rows of both blocks are one component already."""
        return np.inf if is_one(self.labels, top, left) else self.similarity_above

    def take(self, tile: Tile) -> None:
        """Take the pairs that are, or may be, above the threshold and apart."""
        if tile.hits.count() > DENSE_SHARE * tile.values.numel():
            self._join_first_hits(tile)
        pairs = pairs_of(tile.hits, tile.values, tile.a, tile.b)
        ends = np.stack([pairs.row + tile.top, pairs.column + tile.left]).astype(np.int32)
        is_new = self.labels[ends[0]] != self.labels[ends[1]]
        is_new &= pairs.estimate + pairs.slack >= self.similarity_above
        is_sure = pairs.estimate - pairs.slack > self.similarity_above
        self._joins.append(ends[:, is_new & is_sure])
        self._doubts.append(ends[:, is_new & ~is_sure])
        self._num_waiting += int(is_new.sum())
        if self._num_waiting > EDGES_PER_RELABEL:
            self.relabel()

    def relabel(self) -> None:
        """Join what waits: sure pairs first, then those doubtful pairs that are still apart."""
        self._join(self._joins)
        pairs = np.concatenate([_NO_PAIRS, *self._doubts], axis=1)
        pairs = pairs[:, self.labels[pairs[0]] != self.labels[pairs[1]]]
        similarity = pair_dots(self.rows, self.index[pairs[0]], self.index[pairs[1]])
        self._join([pairs[:, similarity > self.similarity_above]])
        self._joins, self._doubts, self._num_waiting = [], [], 0

    def _join(self, joins: list[Int32s]) -> None:
        ends = self.labels[np.concatenate([_NO_PAIRS, *joins], axis=1)]
        if ends.shape[1]:
            self.labels = connected(len(self.labels), ends[0], ends[1])[self.labels]

    def _join_first_hits(self, tile: Tile) -> None:
        """Join each row of the tile with its first sure hit, and each column with its first."""
        pairs = pairs_of(tile.hits, tile.values, tile.a, tile.b)
        pairs = pairs.take(pairs.estimate - pairs.slack > self.similarity_above)
        by_row = np.unique(pairs.row, return_index=True)[1]
        by_column = np.unique(pairs.column, return_index=True)[1]
        few = pairs.take(np.concatenate([by_row, by_column]))
        ends = np.stack([few.row + tile.top, few.column + tile.left]).astype(np.int32)
        self._join([ends])


def is_one(labels: Int32s, top: slice, left: slice) -> bool:
    """Return whether two blocks have one and the same label."""
    one = labels[top.start]
    return bool((labels[top] == one).all() and (labels[left] == one).all())


def connected(size: int, a: Int32s | Ints, b: Int32s | Ints) -> Int32s:
    """Return the component number of each of `size` nodes joined by edges a[i] - b[i]."""
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import connected_components

    graph = coo_matrix((np.ones(len(a), np.int8), (a, b)), shape=(size, size))
    found: Int32s = connected_components(graph, directed=False)[1]
    return found
