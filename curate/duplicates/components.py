"""Near-duplicate components of a set of rows at one threshold.

Two rows are joined when their exact similarity is above the threshold; components are those of that
graph. A low-precision scan finds the pairs that may be joined; those it cannot tell, and that
nothing else has joined, are computed again in float64. Rows may be a memory-mapped file: beside
some 50 bytes a row, memory is that of two panels, one tile and the pairs that are listed at once.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from curate.duplicates.tiles import Extent, Tile, scan, sorted_by_likeness
from curate.vectors.exact import Float16Rows, pair_dots
from curate.vectors.hits import Hits, in_parts, pairs_of, sure_hits
from curate.vectors.products import Precision, engine_threads

Ints: TypeAlias = NDArray[np.int64]
Int32s: TypeAlias = NDArray[np.int32]
Masks: TypeAlias = NDArray[np.bool_]

EDGES_PER_RELABEL = 1 << 18
DOUBTS_PER_STEP = 1 << 15
DENSE_SHARE = 1 / 32  # of a tile's pairs: above it, joining by first hits is cheaper than listing
_NO_PAIRS = np.empty((2, 0), np.int32)


def components(
    rows: Float16Rows,
    similarity_above: float,
    *,
    precision: Precision = "auto",
    block_rows: int | None = None,
    device: str | None = None,
) -> Ints:
    """Return each row's component as the smallest row index in it: int64 [n].

    Edges join rows whose exact dot is strictly above `similarity_above`, a float64. The result does
    not depend on `precision`, `block_rows`, `device` or threads.

    Args:
        rows: float16 [n, d], finite, norm at most 5; an array or a memory map.
        block_rows: side of a tile; by default what suits the device.
        device: where the products are made; "cpu" by default.
    """
    first = _first_joined_copies(rows, similarity_above)
    different = np.flatnonzero(first == np.arange(len(first)))
    extent = Extent(len(different), len(different))
    with engine_threads(device):
        index = sorted_by_likeness(rows, different, extent, precision=precision, device=device)
        joined = _Joined(rows, index, similarity_above)
        scan(
            rows,
            index,
            extent,
            sink=joined,
            precision=precision,
            block_rows=block_rows,
            device=device,
        )
    joined.relabel()
    smallest = np.full(len(index), len(rows))
    np.minimum.at(smallest, joined.labels, index)
    label = np.empty(len(rows), np.int64)
    label[index] = smallest[joined.labels]
    return label[first]


def _first_joined_copies(rows: Float16Rows, similarity_above: float) -> Ints:
    """Return the first copy of each row, or itself where two copies are not similar enough."""
    first = first_copies(rows)
    copies = np.flatnonzero(first != np.arange(len(first)))
    short = copies[pair_dots(rows, copies, copies) <= similarity_above]
    first[short] = short
    return first


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
    padded = np.zeros((min(block_rows, len(rows)), 4 * words_per_row), np.float16)
    for start in range(0, len(rows), block_rows):
        block = padded[: len(rows[start : start + block_rows])]
        block[:, : rows.shape[1]] = rows[start : start + block_rows]
        words = np.einsum("nw,w->n", block.view(np.uint64), odd)
        digests[start : start + block_rows] = words.view(np.int64)
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
        hits = tile.hits
        if hits.count() > DENSE_SHARE * tile.values.numel():
            self._join_first_hits(tile)
            hits = self._apart(tile)
        for few in in_parts(hits):
            self._list(tile, few)

    def relabel(self) -> None:
        """Join what waits: sure pairs first, then those doubtful pairs that are still apart."""
        self._join(self._joins)
        doubts = np.concatenate([_NO_PAIRS, *self._doubts], axis=1)
        self._joins, self._doubts, self._num_waiting = [], [], 0
        for start in range(0, doubts.shape[1], DOUBTS_PER_STEP):
            pairs = doubts[:, start : start + DOUBTS_PER_STEP]
            pairs = pairs[:, self.labels[pairs[0]] != self.labels[pairs[1]]]
            similarity = pair_dots(self.rows, self.index[pairs[0]], self.index[pairs[1]])
            self._join([pairs[:, similarity > self.similarity_above]])

    def _list(self, tile: Tile, hits: Hits) -> None:
        pairs = pairs_of(hits, tile.values, tile.a, tile.b)
        ends = np.stack([pairs.row + tile.top, pairs.column + tile.left]).astype(np.int32)
        is_new = self.labels[ends[0]] != self.labels[ends[1]]
        is_new &= pairs.estimate + pairs.slack >= self.similarity_above
        is_sure = pairs.estimate - pairs.slack > self.similarity_above
        self._joins.append(ends[:, is_new & is_sure])
        self._doubts.append(ends[:, is_new & ~is_sure])
        self._num_waiting += int(is_new.sum())
        if self._num_waiting > EDGES_PER_RELABEL:
            self.relabel()

    def _join(self, joins: list[Int32s]) -> None:
        join(self.labels, *self.labels[np.concatenate([_NO_PAIRS, *joins], axis=1)])

    def _join_first_hits(self, tile: Tile) -> None:
        """Join each row of the tile with its first sure hit, and each column with its first."""
        row = tile.hits.row.cpu().numpy()
        is_sure = sure_hits(tile.values, tile.hits, tile.a, tile.b, self.similarity_above)
        ends = []
        for axis in (1, 0):
            first = is_sure.argmax(axis=axis)
            place = np.arange(len(first))
            at = (place, first) if axis == 1 else (first, place)
            at = tuple(end[is_sure[at]] for end in at)
            ends.append(np.stack([row[at[0]] + tile.top, at[1] + tile.left]).astype(np.int32))
        self._join(ends)

    def _apart(self, tile: Tile) -> Hits:
        """Return the hits of the tile whose ends are not joined yet."""
        import torch

        device = tile.values.device
        tops = torch.from_numpy(self.labels[tile.hits.row.cpu().numpy() + tile.top]).to(device)
        lefts = torch.from_numpy(self.labels[tile.left : tile.left + len(tile.b)]).to(device)
        is_apart = tops[:, None] != lefts[None, :]
        return Hits(tile.hits.row, is_apart.logical_and_(tile.hits.mask))


def is_one(labels: Int32s, top: slice, left: slice) -> bool:
    """Return whether two blocks have one and the same label."""
    one = labels[top.start]
    return bool((labels[top] == one).all() and (labels[left] == one).all())


def join(labels: Int32s, a: Int32s, b: Int32s) -> None:
    """Give labels a[i] and b[i] one label, all that are linked so, wherever they stand."""
    is_apart = a != b
    a, b = a[is_apart], b[is_apart]
    if not len(a):
        return
    if 8 * len(a) > len(labels):
        new = connected(len(labels), a, b)
    else:  # few: work only on these
        nodes, place = np.unique(np.concatenate([a, b]), return_inverse=True)
        new = np.arange(len(labels), dtype=np.int32)
        new[nodes] = nodes[connected(len(nodes), place[: len(a)], place[len(a) :])]
    np.take(new, labels, out=labels, mode="clip")


def connected(size: int, a: Int32s | Ints, b: Int32s | Ints) -> Int32s:
    """Return the smallest node linked with each of `size` nodes joined by edges a[i] - b[i].

    Each round hangs every tree that has a smaller neighbour below one, and flattens: all but the
    local minima go, so that at least half of the unfinished trees do.
    """
    root = np.arange(size, dtype=np.int32)
    while len(a):
        np.minimum.at(root, np.maximum(a, b), np.minimum(a, b))
        while not np.array_equal(root, flat := root[root]):
            root = flat
        a, b = root[a], root[b]
        is_apart = a != b
        a, b = a[is_apart], b[is_apart]
    return root
