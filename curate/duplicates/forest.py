"""The maximum spanning forest of the near-duplicate graph: one build, every threshold.

Nodes are rows, edges all pairs whose exact similarity is above a floor. The forest keeps, of every
cycle, all edges but the weakest; so for any threshold t >= floor the components of the graph "above
t" are those of the forest's edges above t: a cut takes milliseconds and reads no embedding. Ties
are broken by row, which makes the forest unique: (similarity descending, row_a, row_b).

The scan lists candidate edges with a bound on each (tiles). Most are dropped unmeasured: an edge
that may be worth u at most cannot be in the forest when its ends are joined already by edges worth
more than u. For that the builder keeps the components at a ladder of up to LEVELS similarities.
What is left is measured exactly, and Kruskal's algorithm (scipy, on ranks) decides. Beside the
levels, memory is that of components and some 100 bytes a row for the edges while they are merged.

Legend: n rows, E edges.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from curate.duplicates.components import Int32s, Ints, connected, is_one, join
from curate.duplicates.dense_tree import spanning_tree
from curate.duplicates.regions import Copies, Regions
from curate.duplicates.tiles import Tile, scan, sorted_by_likeness
from curate.vectors.exact import Float16Rows, Float64s, pair_dots
from curate.vectors.hits import Hits, above_diagonal, in_parts, pairs_of
from curate.vectors.products import Precision, as_tensor, engine_threads

Masks: TypeAlias = NDArray[np.bool_]

LEVELS, FEWEST_LEVELS = 24, 4
LEVEL_BYTES = 24 << 20
"""What the levels may take together: a very large cluster gets fewer of them."""
CANDIDATES_PER_MERGE = 1 << 17
MEASURED_IN_STEPS = 8
ROWS_PER_PRODUCT = 256  # in float64: what stays small beside the result
FEWEST_DENSE, DENSE_SHARE = 1 << 18, 1 / 4
"""Hits in a tile, and their share of its pairs, from which none is listed: its forest is grown."""
FEW_CANDIDATES, MANY_CANDIDATES = 1 << 12, 1 << 13
"""Up to how many are measured without joining any first; from how many of a tile its strongest are
joined first, to drop the rest."""
CELLS_PER_PAIR = 24
"""How many times cheaper a similarity is in a float64 product than by itself."""


@dataclass(frozen=True, slots=True)
class Forest:
    """Edges row_a < row_b: int64 [E], with exact similarity float64 [E], by row_a, then row_b."""

    num_rows: int
    floor: float
    row_a: Ints
    row_b: Ints
    similarity: Float64s

    def cut(self, similarity_above: float) -> Ints:
        """Return each row's component above a threshold, as its smallest row: int64 [n].

        Equal to components(rows, similarity_above). Raises: ValueError below the floor.
        """
        if similarity_above < self.floor:
            raise ValueError(f"the forest has no edges below its floor, {self.floor}")
        strong = self.similarity > similarity_above
        return connected(self.num_rows, self.row_a[strong], self.row_b[strong]).astype(np.int64)

    def weakest_links(self, similarity_above: float, is_end: Masks) -> Float64s:
        """Return for each row the weakest similarity on its path to the end of its component.

        That path is the strongest of all chains between the two: up to that threshold they stay
        joined. Infinite for an end itself. Args: is_end: bool [n], one row of every component.
        """
        from scipy.sparse import coo_matrix
        from scipy.sparse.csgraph import breadth_first_order

        strong = self.similarity > similarity_above
        a, b, similarity = self.row_a[strong], self.row_b[strong], self.similarity[strong]
        ends, root = np.flatnonzero(is_end), self.num_rows  # a root above all ends, as one tree
        tree = coo_matrix(
            (
                np.ones(len(a) + len(ends), np.int8),
                (np.append(a, ends), np.append(b, np.full(len(ends), root))),
            ),
            shape=(root + 1, root + 1),
        )
        parent = breadth_first_order(tree, root, directed=False)[1][:root].astype(np.int64)
        parent[ends] = ends
        weakest = np.full(root, np.inf)
        below = np.where(parent[b] == a, b, a)
        weakest[below] = similarity
        while True:  # each round doubles how far a row looks
            further = parent[parent]
            weakest = np.minimum(weakest, weakest[parent])
            if np.array_equal(further, parent):
                return np.asarray(weakest, np.float64)
            parent = further


def spanning_forest(
    rows: Float16Rows,
    floor: float,
    *,
    regions: Regions | None = None,
    precision: Precision = "auto",
    block_rows: int | None = None,
    device: str | None = None,
) -> Forest:
    """Return the maximum spanning forest of all pairs of rows with similarity above the floor.

    The result does not depend on `precision`, `block_rows`, `device` or threads.

    Args:
        rows: float16 [n, d], finite, norm at most 5; an array or a memory map.
        regions: which pairs are compared; all by default.
        block_rows: side of a tile; by default what suits the device.
        device: where the products are made; "cpu" by default.
    """
    where = regions or Regions.one(len(rows))
    different, copies = where.without_copies(rows)
    with engine_threads(device):
        index = sorted_by_likeness(
            rows, different.order, different.extent, precision=precision, device=device
        )
        builder = _Builder(rows, index, floor)
        scan(
            rows,
            index,
            different.extent,
            sink=builder,
            precision=precision,
            block_rows=block_rows,
            device=device,
        )
        builder.merge()
    found = Forest(len(rows), floor, builder.a, builder.b, builder.similarity)
    return _with_leaves(found, rows, copies)


def kruskal(num_rows: int, a: Ints, b: Ints, similarity: Float64s) -> Ints:
    """Return which edges (a < b) make the maximum spanning forest, ties to the smaller (a, b)."""
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import minimum_spanning_tree

    order = np.lexsort((b, a, -similarity))
    repeated = np.append(False, (np.diff(a[order]) == 0) & (np.diff(b[order]) == 0))
    order = order[~repeated[: len(order)]]
    rank = np.arange(1.0, len(order) + 1)  # no two alike, and none is zero
    graph = coo_matrix((rank, (a[order], b[order])), shape=(num_rows, num_rows))
    kept = minimum_spanning_tree(graph.tocsr()).data.astype(np.int64) - 1
    return np.asarray(order[np.sort(kept)], np.int64)


def _with_leaves(forest: Forest, rows: Float16Rows, copies: Copies) -> Forest:
    """Return the forest with each byte-identical copy as a leaf at its strongest edge.

    A copy has its original's similarities, so it closes no path that the original does not; its
    strongest edge is the original's, or the one to the original itself. Ties go to the smaller
    row, which is what (row_a, row_b) order comes to.
    """
    end, other, strength = (
        np.append(forest.row_a, forest.row_b),
        np.append(forest.row_b, forest.row_a),
        np.tile(forest.similarity, 2),
    )
    order = np.lexsort((other, -strength, end))
    ends, at = np.unique(end[order], return_index=True)
    best_other = np.full(forest.num_rows, -1, np.int64)
    best = np.full(forest.num_rows, -np.inf)
    best_other[ends], best[ends] = other[order][at], strength[order][at]
    neighbor, similarity = best_other[copies.original], best[copies.original]
    own = np.where(copies.are_compared, pair_dots(rows, copies.row, copies.row), -np.inf)
    is_own = (own > similarity) | ((own == similarity) & (copies.original < neighbor))
    neighbor = np.where(is_own, copies.original, neighbor)
    similarity = np.maximum(similarity, own)
    joined = similarity > forest.floor
    return _ordered(
        forest.num_rows,
        forest.floor,
        np.append(forest.row_a, copies.row[joined]),
        np.append(forest.row_b, neighbor[joined]),
        np.append(forest.similarity, similarity[joined]),
    )


def _ordered(num_rows: int, floor: float, a: Ints, b: Ints, similarity: Float64s) -> Forest:
    low, high = np.minimum(a, b), np.maximum(a, b)
    order = np.lexsort((high, low))
    return Forest(num_rows, floor, low[order], high[order], similarity[order])


@dataclass(frozen=True, slots=True)
class Candidates:
    """Pairs of scanned positions, int64 [p], with bounds on their similarity, float64 [p].

    Where the bounds are equal the similarity is exact.
    """

    top: Ints
    left: Ints
    upper: Float64s
    lower: Float64s

    def __len__(self) -> int:
        return len(self.top)

    def take(self, which: Masks | Ints | slice) -> Candidates:
        """Return some of the pairs."""
        return Candidates(self.top[which], self.left[which], self.upper[which], self.lower[which])

    def is_best_of_an_end(self) -> Masks:
        """Return which pairs have the largest lower bound of all that share an end with them."""
        is_best = np.zeros(len(self), np.bool_)
        for end in (self.top - self.top.min(), self.left - self.left.min()):
            best = np.full(end.max() + 1, -np.inf)
            np.maximum.at(best, end, self.lower)
            is_best |= self.lower == best[end]
        return is_best

    @staticmethod
    def joined(parts: list[Candidates]) -> Candidates:
        """Return all pairs of several."""
        names = ("top", "left", "upper", "lower")
        return Candidates(*(np.concatenate([getattr(p, name) for p in parts]) for name in names))


@dataclass(slots=True)
class _Builder:
    """The forest of what was scanned so far, and the candidates since.

    a < b: int64 row numbers. ladder: similarities, ascending; levels[l]: int32 [n] components of
    the scanned positions by edges known to be above ladder[l].
    """

    rows: Float16Rows
    index: Ints
    floor: float
    a: Ints = field(default_factory=lambda: np.empty(0, np.int64))
    b: Ints = field(default_factory=lambda: np.empty(0, np.int64))
    similarity: Float64s = field(default_factory=lambda: np.empty(0))
    ladder: Float64s = field(init=False)
    levels: Int32s = field(init=False)
    _waiting: list[Candidates] = field(default_factory=list)
    _num_waiting: int = 0
    _position: Ints = field(init=False)

    def __post_init__(self) -> None:
        size = max(FEWEST_LEVELS, min(LEVELS, LEVEL_BYTES // (4 * max(1, len(self.index)))))
        self.ladder = self.floor + (1.0 - self.floor) * np.linspace(0.0, 1.0, size) ** 0.75
        self.levels = np.tile(np.arange(len(self.index), dtype=np.int32), (size, 1))
        self._position = np.full(len(self.rows), -1, np.int64)
        self._position[self.index] = np.arange(len(self.index))

    def threshold(self, top: slice, left: slice) -> float:
        """Return the highest level at which both blocks are joined: weaker pairs are no edges."""
        found = self.floor
        for level, labels in zip(self.ladder, self.levels, strict=True):
            if not is_one(labels, top, left):
                break
            found = float(level)
        return found

    def take(self, tile: Tile) -> None:
        """Take the candidates that may still be in the forest."""
        hits = tile.hits if tile.top != tile.left else above_diagonal(tile.hits)
        if hits.count() > max(FEWEST_DENSE, DENSE_SHARE * tile.values.numel()):
            self._grow_dense(tile, *self._sides(tile))
            return
        for few in in_parts(hits):
            found = self._listed(tile, few)
            if len(found) > MANY_CANDIDATES:
                self._climb(found.take(found.is_best_of_an_end()))
                found = self._measured_as_block(found.take(self._may_matter(found)))
            self._wait(found)

    def _listed(self, tile: Tile, hits: Hits) -> Candidates:
        pairs = pairs_of(hits, tile.values, tile.a, tile.b)
        upper = pairs.estimate + pairs.slack
        found = Candidates(
            pairs.row + tile.top, pairs.column + tile.left, upper, upper - 2 * pairs.slack
        )
        found = found.take(upper > self.floor)
        return found.take(self._may_matter(found))

    def _measured_as_block(self, found: Candidates) -> Candidates:
        """Return candidates of a tile with their exact similarity where a product is cheapest."""
        top, row = np.unique(found.top, return_inverse=True)
        left, column = np.unique(found.left, return_inverse=True)
        if len(top) * len(left) > CELLS_PER_PAIR * len(found):
            return found
        similarity = self._block(top, left)[row, column]
        found = Candidates(found.top, found.left, similarity, similarity)
        return found.take(self._may_matter(found))

    def merge(self) -> None:
        """Measure what waits, the strongest first, unless it turns out not to matter, and merge."""
        if not self._num_waiting:
            return
        waiting = Candidates.joined(self._waiting)
        self._waiting, self._num_waiting = [], 0
        if len(waiting) > FEW_CANDIDATES:
            self._climb(waiting)
            waiting = waiting.take(self._may_matter(waiting))
        waiting = waiting.take(np.argsort(-waiting.upper, kind="stable"))
        step = max(FEW_CANDIDATES, len(self.index), len(waiting) // MEASURED_IN_STEPS)
        while len(waiting):
            self._add(waiting.take(slice(step)))
            waiting = waiting.take(slice(step, None))
            if len(waiting):
                self._climb_forest()
                waiting = waiting.take(self._may_matter(waiting))

    def _add(self, found: Candidates) -> None:
        """Put the exact similarity in place of the bounds and merge."""
        a, b = self.index[found.top], self.index[found.left]
        similarity = found.lower.copy()
        inexact = np.flatnonzero(found.upper != found.lower)
        similarity[inexact] = pair_dots(self.rows, a[inexact], b[inexact])
        above = similarity > self.floor
        a, b = np.minimum(a, b)[above], np.maximum(a, b)[above]
        a, b = np.append(self.a, a), np.append(self.b, b)
        similarity = np.append(self.similarity, similarity[above])
        kept = kruskal(len(self.rows), a, b, similarity)
        self.a, self.b, self.similarity = a[kept], b[kept], similarity[kept]

    def _climb_forest(self) -> None:
        ends = self._position[self.a], self._position[self.b]
        self._climb(Candidates(*ends, self.similarity, self.similarity))

    def _climb(self, pairs: Candidates) -> None:
        """Join at every level the pairs that are known to be above it."""
        for level, labels in zip(self.ladder, self.levels, strict=True):
            pairs = pairs.take(pairs.lower > level)
            join(labels, labels[pairs.top], labels[pairs.left])

    def _may_matter(self, pairs: Candidates) -> Masks:
        """Return which pairs are not joined by edges that are certainly stronger."""
        level = np.searchsorted(self.ladder, pairs.upper, side="left")
        inside = np.minimum(level, len(self.ladder) - 1)
        joined = self.levels[inside, pairs.top] == self.levels[inside, pairs.left]
        return np.asarray(~joined | (level == len(self.ladder)), np.bool_)

    def _wait(self, found: Candidates) -> None:
        self._waiting.append(found)
        self._num_waiting += len(found)
        if self._num_waiting > CANDIDATES_PER_MERGE:
            self.merge()
            self._climb_forest()

    def _sides(self, tile: Tile) -> tuple[Ints, Ints]:
        """Return the positions of the tile's rows and columns that have a hit."""
        has_hit = tile.hits.mask.any(dim=0).cpu().numpy()
        return tile.hits.row.cpu().numpy() + tile.top, np.flatnonzero(has_hit) + tile.left

    def _grow_dense(self, tile: Tile, top: Ints, left: Ints) -> None:
        """Compute the pairs of some rows and columns exactly, and take their spanning forest."""
        one_set = tile.top == tile.left
        if one_set:
            top = left = np.union1d(top, left)
        block, ids = self._block(top, left), (self.index[top], self.index[left])
        a, b, similarity = spanning_tree(block, *ids, self.floor, one_set=one_set)
        self._wait(Candidates(self._position[a], self._position[b], similarity, similarity))

    def _block(self, top: Ints, left: Ints) -> Float64s:
        """Return the exact similarities of some positions with others."""
        a, b = (as_tensor(np.asarray(self.rows[self.index[side]])) for side in (top, left))
        block, wide = np.empty((len(top), len(left))), b.double().T
        for start in range(0, len(top), ROWS_PER_PRODUCT):
            part = slice(start, start + ROWS_PER_PRODUCT)
            block[part] = (a[part].double() @ wide).numpy()
        return block
