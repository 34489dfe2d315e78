"""The maximum spanning forest of a dense block of similarities, by Prim's algorithm.

Where thousands of rows are near copies of each other, listing their pairs costs more than the
products did; Prim's algorithm on the block itself takes one vector step per row.

Legend: P, Q rows of the two sides; V = P + Q nodes, or P for one set.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

Ints: TypeAlias = NDArray[np.int64]
Float64s: TypeAlias = NDArray[np.float64]
Masks: TypeAlias = NDArray[np.bool_]
Edge: TypeAlias = tuple[int, int]


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
    edges: list[Edge] = []
    found: list[float] = []
    for root in range(len(growth.ids)):
        node = root
        while growth.is_open[node]:
            growth.reach(node)
            node, strength = growth.nearest()
            if strength <= floor:
                break
            edges.append(growth.edge_to(node, strength))
            found.append(strength)
    pairs = np.array(edges, np.int64).reshape(-1, 2)
    return pairs[:, 0], pairs[:, 1], np.array(found)


@dataclass(slots=True)
class _Growth:
    """A tree that grows by its strongest edge outwards.

    nodes: those of P, then those of Q (only P for one set). best[v]: similarity of v's strongest
    edge to the tree, -inf once v is in the tree.
    """

    similarity_PQ: Float64s
    num_first: int
    one_set: bool
    ids: Ints
    best: Float64s  # [V]
    is_open: Masks  # [V]

    @classmethod
    def of(cls, similarity_PQ: Float64s, ids_P: Ints, ids_Q: Ints, *, one_set: bool) -> _Growth:
        """Return a growth with an empty tree."""
        ids = ids_P if one_set else np.append(ids_P, ids_Q)
        best, is_open = np.full(len(ids), -np.inf), np.ones(len(ids), np.bool_)
        return cls(similarity_PQ, len(ids_P), one_set, ids, best, is_open)

    def reach(self, node: int) -> None:
        """Put a node into the tree and offer its edges."""
        self.is_open[node], self.best[node] = False, -np.inf
        offers, side = self._across(node)
        best = self.best[side]
        np.maximum(best, offers, out=best, where=self.is_open[side])

    def nearest(self) -> tuple[int, float]:
        """Return the node outside at the strongest edge, and that edge's similarity."""
        first = int(self.best.argmax())
        strongest = float(self.best[first])
        is_tie = self.best == strongest
        if strongest == -np.inf or np.count_nonzero(is_tie) == 1:
            return first, strongest
        ties: list[int] = np.flatnonzero(is_tie).tolist()
        return min(ties, key=lambda node: self.edge_to(node, strongest)), strongest

    def edge_to(self, node: int, strength: float) -> Edge:
        """Return the smallest edge of that strength from a node outside to the tree."""
        offers, side = self._across(node)
        is_end = offers == strength
        is_end &= ~self.is_open[side]
        own, others = int(self.ids[node]), self.ids[side][is_end].tolist()
        return min((own, other) if own < other else (other, own) for other in others)

    def _across(self, node: int) -> tuple[Float64s, slice]:
        """Return a node's similarities with the other side, and which nodes these are."""
        if self.one_set:
            return self.similarity_PQ[node], slice(0, None)
        if node < self.num_first:
            return self.similarity_PQ[node], slice(self.num_first, None)
        return self.similarity_PQ[:, node - self.num_first], slice(0, self.num_first)
