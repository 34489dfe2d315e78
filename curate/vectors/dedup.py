"""Near-duplicate components within one cluster, and which row of each component stays.

Two rows are joined when their exact similarity is above the threshold; components are those of that
graph. Tiles of a float32 matrix product find the joined pairs; only pairs within the proven error
of the threshold, whose ends nothing else has joined, are computed again in float64. Memory does not
grow with the rows but for some 16 bytes each, so rows may be a memory-mapped file.

Run through `components`, then `judge`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from curate.vectors.exact import (
    Float16Rows,
    Float64s,
    Uint64s,
    fp32_dot_error_bound,
    full_precision_gemm,
    load_block,
    pair_dots,
    squared_norms,
)

if TYPE_CHECKING:
    import torch

Ints: TypeAlias = NDArray[np.int64]
Masks: TypeAlias = NDArray[np.bool_]
Keep = Literal["middle", "far", "near", "clip_max", "inner_middle"]

EDGES_PER_RELABEL = 2_000_000
DENSE_SHARE = 1 / 16  # of a tile's pairs: above it, joining by first hits is cheaper than listing
_NO_PAIRS = np.empty((2, 0), np.int32)


@dataclass(frozen=True, slots=True)
class Judged:
    """Which rows stay: bool [n]; and for each row the row its component keeps: int64 [n]."""

    keep: Masks
    survivor: Ints


def components(rows: Float16Rows, similarity_above: float, *, block_rows: int = 2048) -> Ints:
    """Return each row's component as the smallest row index in it: int64 [n].

    Edges join rows whose exact dot is strictly above `similarity_above`, a float64. The result does
    not depend on `block_rows` or threads.

    Args:
        rows: float16 [n, d] of one cluster, finite, norm at most 5; an array or a memory map.
        block_rows: side of a tile; a tile and its operands take block_rows * (4 * block_rows + 8 d)
            bytes.
    """
    first = _first_copies(rows, similarity_above)
    different = np.flatnonzero(first == np.arange(len(first)))
    forest = _Forest(rows, different, similarity_above)
    with full_precision_gemm():
        _join_all(forest, block_rows)
    forest.relabel()
    label = different[forest.labels]
    return label[np.searchsorted(different, first)]


def judge(
    labels: Ints,
    d2: Float64s,
    uids: Uint64s,
    *,
    keep: Keep,
    clip_scores: Float64s | None = None,
    rows: Float16Rows | None = None,
) -> Judged:
    """Return which row of every component stays.

    A component of m rows is put in order and the row at one position stays; uid breaks ties:
    `middle` position m // 2 by d2 (so a pair keeps the farther row), `far` m - 1, `near` 0,
    `clip_max` the largest clip score, `inner_middle` position m // 2 by distance to the mean of the
    component's rows. That mean is rounded, so inner_middle alone is not exact.

    Args:
        labels: int64 [n], equal within a component (see components).
        d2: float64 [n], exact squared distance of each row to its own cluster's centroid.
        clip_scores: float64 [n], needed by clip_max.
        rows: float16 [n, d], needed by inner_middle.
    """
    order, starts, sizes = _grouped(labels, uids, _key(keep, labels, d2, clip_scores, rows))
    first = np.zeros_like(sizes)
    position = {"far": sizes - 1, "near": first, "clip_max": first}.get(keep, sizes // 2)
    winner = order[starts + position]
    is_kept = np.zeros(len(labels), np.bool_)
    is_kept[winner] = True
    survivor = np.empty(len(labels), np.int64)
    survivor[order] = np.repeat(winner, sizes)
    return Judged(is_kept, survivor)


def survivor_similarity(rows: Float16Rows, judged: Judged) -> Float64s:
    """Return the exact similarity of each dropped row to its survivor, NaN for a kept row.

    In a chain of near-duplicates it may be below the threshold.
    """
    dropped = np.flatnonzero(~judged.keep)
    similarity = np.full(len(judged.keep), np.nan)
    similarity[dropped] = pair_dots(rows, dropped, judged.survivor[dropped])
    return similarity


def distance_to_mean(rows: Float16Rows, labels: Ints, *, block_rows: int = 4096) -> Float64s:
    """Return each row's squared distance to the mean of its component, in bounded memory."""
    order, starts, sizes = _grouped(labels)
    group = np.repeat(np.arange(len(starts)), sizes)
    distance = np.zeros(len(labels))
    cuts = np.append(np.unique(starts // block_rows, return_index=True)[1], len(starts))
    for first, last in zip(cuts[:-1], cuts[1:], strict=True):  # components whose means are held
        stop = starts[last - 1] + sizes[last - 1]
        parts = [
            slice(s, min(s + block_rows, stop)) for s in range(starts[first], stop, block_rows)
        ]
        means = np.zeros((last - first, rows.shape[1]))
        for part in parts:
            np.add.at(means, group[part] - first, rows[order[part]].astype(np.float64))
        means /= sizes[first:last, None]
        for part in parts:
            off = rows[order[part]] - means[group[part] - first]
            distance[order[part]] = np.einsum("nd,nd->n", off, off)
    return distance


def _key(
    keep: Keep,
    labels: Ints,
    d2: Float64s,
    clip_scores: Float64s | None,
    rows: Float16Rows | None,
) -> Float64s:
    if keep == "clip_max":
        if clip_scores is None:
            raise ValueError("clip_max needs clip_scores")
        return -clip_scores
    if keep == "inner_middle":
        if rows is None:
            raise ValueError("inner_middle needs rows")
        return distance_to_mean(rows, labels)
    return d2


def _grouped(labels: Ints, *minor_to_major: NDArray[Any]) -> tuple[Ints, Ints, Ints]:
    """Return the rows by label, then by the keys, the last one first; group starts and sizes."""
    order = np.lexsort((*minor_to_major, labels))
    ordered = labels[order]
    starts = np.flatnonzero(np.diff(ordered, prepend=ordered[:1] - 1))
    return order, starts, np.diff(starts, append=len(labels))


def _first_copies(rows: Float16Rows, similarity_above: float) -> Ints:
    """Return for each row the first row with the same bytes, or itself.

    Copies are joined only when |x|^2 is above the threshold, which for a short row it may not be.
    """
    first = np.arange(len(rows))
    digests = _row_digests(rows)
    order, starts, sizes = _grouped(digests)
    suspects = np.flatnonzero(np.repeat(sizes, sizes) > 1)
    if not len(suspects):
        return first
    leader = np.repeat(order[starts], sizes)
    for part in np.array_split(suspects, 1 + len(suspects) // 4096):
        copy, original = order[part], leader[part]
        block = rows[copy]
        is_same = (block.view(np.uint16) == rows[original].view(np.uint16)).all(axis=1)
        is_same &= squared_norms(block) > similarity_above
        first[copy[is_same]] = original[is_same]
    return first


def _row_digests(rows: Float16Rows, *, block_rows: int = 4096) -> Ints:
    """Return a 64-bit digest of each row's bytes; it may collide, so equal ones are a hint."""
    odd = np.random.default_rng(0).integers(1 << 63, size=rows.shape[1], dtype=np.uint64) | 1
    digests = np.empty(len(rows), np.int64)
    for start in range(0, len(rows), block_rows):
        words = np.ascontiguousarray(rows[start : start + block_rows]).view(np.uint16)
        digests[start : start + block_rows] = (words * odd).sum(axis=1).view(np.int64)
    return digests


@dataclass(slots=True)
class _Forest:
    """Which of the different rows are joined so far; new joins wait until a relabel."""

    rows: Float16Rows
    different: Ints  # row indices, no two of them copies
    similarity_above: float
    labels: NDArray[np.int32] = field(init=False)  # position of the component's first row
    _joins: list[NDArray[np.int32]] = field(default_factory=list)  # [2, edges]
    _doubts: list[NDArray[np.int32]] = field(default_factory=list)
    _num_waiting: int = 0

    def __post_init__(self) -> None:
        self.labels = np.arange(len(self.different), dtype=np.int32)

    def add(self, pairs: NDArray[np.int32], is_sure: Masks) -> None:
        """Take pairs [2, p] of positions: those above the threshold, and those in doubt."""
        self._joins.append(pairs[:, is_sure])
        self._doubts.append(pairs[:, ~is_sure])
        self._num_waiting += pairs.shape[1]
        if self._num_waiting > EDGES_PER_RELABEL:
            self.relabel()

    def relabel(self) -> None:
        """Join what waits: sure pairs first, then those doubtful pairs that are still apart."""
        self.join(self._joins)
        pairs = np.concatenate([_NO_PAIRS, *self._doubts], axis=1)
        pairs = pairs[:, self.labels[pairs[0]] != self.labels[pairs[1]]]
        row_a, row_b = self.different[pairs]
        is_edge = pair_dots(self.rows, row_a, row_b) > self.similarity_above
        self.join([pairs[:, is_edge]])
        self._joins, self._doubts, self._num_waiting = [], [], 0

    def join(self, joins: list[NDArray[np.int32]]) -> None:
        """Join pairs at once and relabel."""
        from scipy.sparse import coo_matrix
        from scipy.sparse.csgraph import connected_components

        size = len(self.labels)
        ends = self.labels[np.concatenate([_NO_PAIRS, *joins], axis=1)]
        if not ends.shape[1]:
            return
        graph = coo_matrix((np.ones(ends.shape[1]), (ends[0], ends[1])), shape=(size, size))
        num_components, component = connected_components(graph, directed=False)
        smallest = np.full(num_components, size, np.int32)
        np.minimum.at(smallest, component, np.arange(size, dtype=np.int32))
        self.labels = smallest[component[self.labels]]


def _join_all(forest: _Forest, block_rows: int) -> None:
    """Meet every pair of blocks once, unless all their rows are one component already."""
    import torch

    num_rows, dim = len(forest.different), forest.rows.shape[1]
    side = min(block_rows, num_rows)
    buffer_a, buffer_b = torch.empty((side, dim)), torch.empty((side, dim))
    tile_buffer, mask_buffer = torch.empty(side * side), np.empty(side * side, np.bool_)
    for top in range(0, num_rows, block_rows):
        a_ND = load_block(forest.rows, _indices(forest, top, block_rows), buffer_a)
        for left in range(top, num_rows, block_rows):
            if _is_one_component(forest, top, left, block_rows):
                continue
            b_MD = a_ND
            if left > top:
                b_MD = load_block(forest.rows, _indices(forest, left, block_rows), buffer_b)
            area = len(a_ND) * len(b_MD)
            similarity = tile_buffer[:area].view(len(a_ND), len(b_MD))
            torch.mm(a_ND, b_MD.T, out=similarity)
            error = fp32_dot_error_bound(dim, _longest(a_ND), _longest(b_MD))
            mask = mask_buffer[:area].reshape(similarity.shape)
            _scan(forest, similarity.numpy(), mask, top=top, left=left, error=error)


def _scan(
    forest: _Forest,
    similarity: NDArray[np.float32],
    mask: Masks,
    *,
    top: int,
    left: int,
    error: float,
) -> None:
    """Hand the forest every pair of the tile that is, or may be, above the threshold and apart."""
    low = np.nextafter(np.float32(forest.similarity_above - error), np.float32(-np.inf))
    high = np.nextafter(np.float32(forest.similarity_above + error), np.float32(np.inf))
    np.greater(similarity, low, out=mask)
    if np.count_nonzero(mask) > DENSE_SHARE * mask.size:
        _join_first_hits(forest, similarity > high, top=top, left=left)
        labels_N = forest.labels[top : top + mask.shape[0], None]
        mask &= labels_N != forest.labels[left : left + mask.shape[1]]
    place = np.flatnonzero(mask)
    row, column = np.divmod(place.astype(np.int32), np.int32(mask.shape[1]))
    pairs = np.stack([row + np.int32(top), column + np.int32(left)])
    is_new = (pairs[0] < pairs[1]) & (forest.labels[pairs[0]] != forest.labels[pairs[1]])
    is_sure = similarity.reshape(-1)[place[is_new]] > high
    forest.add(pairs[:, is_new], is_sure)


def _join_first_hits(forest: _Forest, is_hit: Masks, *, top: int, left: int) -> None:
    """Join each row of the tile with its first hit and each column with its first hit."""
    rows = np.flatnonzero(is_hit.any(axis=1))
    columns = np.flatnonzero(is_hit.any(axis=0))
    by_row = np.stack([rows + top, is_hit[rows].argmax(axis=1) + left])
    by_column = np.stack([is_hit[:, columns].argmax(axis=0) + top, columns + left])
    forest.join([by_row.astype(np.int32), by_column.astype(np.int32)])


def _indices(forest: _Forest, start: int, block_rows: int) -> slice | Ints:
    """Return the row indices of a block, as a slice where no copy was left out: it reads faster."""
    index = forest.different[start : start + block_rows]
    is_run = index[-1] - index[0] == len(index) - 1
    return slice(int(index[0]), int(index[-1]) + 1) if is_run else index


def _is_one_component(forest: _Forest, top: int, left: int, block_rows: int) -> bool:
    if top == left and block_rows > 1:
        return False
    one = forest.labels[top]
    blocks = (forest.labels[start : start + block_rows] for start in (top, left))
    return all(bool((block == one).all()) for block in blocks)


def _longest(x_ND: torch.Tensor) -> float:
    """Return an upper bound on the norms of a float32 block, which float32 gets to one in 1000."""
    import torch

    return float(torch.linalg.vector_norm(x_ND, dim=1).max()) * 1.001
