"""The maximum spanning forest of a dense block of similarities, by Prim's algorithm.

Where thousands of rows are near copies of each other, listing their pairs costs more than the
products did; Prim's algorithm on the block itself takes one vector step per row.

Legend: P, Q rows of the two sides.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

Ints: TypeAlias = NDArray[np.int64]
Float64s: TypeAlias = NDArray[np.float64]


def spanning_tree(
    similarity_PQ: Float64s, ids_P: Ints, ids_Q: Ints, floor: float, *, one_set: bool
) -> tuple[Ints, Ints, Float64s]:
    """Return the forest's edges as (id_a, id_b, similarity) with id_a < id_b.

    Edges join a row of P with one of Q when their similarity is above the floor; ties go to the
    smaller (id_a, id_b), so that the forest is unique.

    Args:
        similarity_PQ: float64, exact. ids: distinct row numbers of each side.
        one_set: P and Q are the same rows, and similarity_PQ is symmetric.
    """
    growth = _Growth.of(similarity_PQ, ids_P, ids_Q, one_set=one_set)
    edges: list[tuple[int, int]] = []
    found: list[float] = []
    for root in range(len(growth.ids)):
        node = root
        while not growth.is_done[node]:
            growth.reach(node)
            node, strength = growth.nearest()
            if strength <= floor:
                break
            edges.append(growth.edge_to(node))
            found.append(strength)
    pairs = np.array(edges, np.int64).reshape(-1, 2)
    return pairs[:, 0], pairs[:, 1], np.array(found)


@dataclass(slots=True)
class _Growth:
    """A tree that grows by its strongest edge outwards.

    nodes: those of P, then those of Q (only P for one set). best[v]: similarity of v's strongest
    edge to the tree, through the tree's node with id `via[v]`; inf once v is in the tree, where
    `open_best` has -inf.
    """

    rows: Float64s  # [P, Q]
    columns: Float64s  # [Q, P]
    num_first: int
    one_set: bool
    ids: Ints
    best: Float64s
    open_best: Float64s
    via: Ints
    is_done: NDArray[np.bool_]

    @classmethod
    def of(cls, similarity_PQ: Float64s, ids_P: Ints, ids_Q: Ints, *, one_set: bool) -> _Growth:
        """Return a growth with an empty tree."""
        ids = ids_P if one_set else np.append(ids_P, ids_Q)
        columns = similarity_PQ if one_set else np.ascontiguousarray(similarity_PQ.T)
        never = np.full(len(ids), -np.inf)
        done = np.zeros(len(ids), np.bool_)
        via = np.full(len(ids), -1, np.int64)
        return cls(similarity_PQ, columns, len(ids_P), one_set, ids, never.copy(), never, via, done)

    def reach(self, node: int) -> None:
        """Put a node into the tree and offer its edges."""
        self.is_done[node] = True
        self.best[node], self.open_best[node] = np.inf, -np.inf
        if node < self.num_first:
            offers, side = self.rows[node], slice(0 if self.one_set else self.num_first, None)
        else:
            offers, side = self.columns[node - self.num_first], slice(0, self.num_first)
        best = self.best[side]
        better = offers > best
        equal = offers == best
        if equal.any():
            for at in (np.flatnonzero(equal) + side.start).tolist():
                if self._pair(at, self.ids[node]) < self._pair(at, self.via[at]):
                    self.via[at] = self.ids[node]
        np.copyto(best, offers, where=better)
        np.copyto(self.open_best[side], offers, where=better)
        self.via[side][better] = self.ids[node]

    def nearest(self) -> tuple[int, float]:
        """Return the node outside at the strongest edge, and that edge's similarity."""
        strongest = self.open_best.max()
        if np.isneginf(strongest):
            return 0, float(strongest)
        ties: list[int] = np.flatnonzero(self.open_best == strongest).tolist()
        return min(ties, key=self.edge_to), float(strongest)

    def edge_to(self, node: int) -> tuple[int, int]:
        """Return the strongest edge of a node to the tree, smaller id first."""
        return self._pair(node, self.via[node])

    def _pair(self, node: int, other: int) -> tuple[int, int]:
        one, two = int(self.ids[node]), int(other)
        return (one, two) if one < two else (two, one)
