"""What a run's dedup misses: a few rows against all rows, by brute force.

Sampled rows are compared with every row of the set, whatever its cluster; what is found is compared
in turn, until the components of the sampled rows are closed. They are then the true components, and
inside them it is known which pairs share a cluster and which are joined by ghosts.

A true component of m rows is met by m of all rows, so sampled rows weigh 1 / m: sums of weights
estimate numbers of components.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from curate.duplicates.components import connected
from curate.vectors import products
from curate.vectors.assign import Centroids, prepare
from curate.vectors.exact import Float16Rows, Float64s, Uint64s, pair_dots, sample_smallest
from curate.vectors.ghosts import ghosts_of
from curate.vectors.grouped import MEMBER, Members
from curate.vectors.hits import pairs_above

Ints: TypeAlias = NDArray[np.int64]
Blocks: TypeAlias = Callable[[], Iterable[tuple[Members, Float16Rows]]]

ROWS_PER_TILE = 2048


@dataclass(frozen=True, slots=True)
class Probe:
    """What was seen. All shares are of what was sampled; counts are of it, too.

    pairs: of near-duplicates with a sampled row, and the share of them that are compared within
    clusters and with ghosts. excess: rows kept beyond one per true component, as a share of the
    components. components_per_row: how many components, true or found, there are for a row.
    pairwise_max_per_row: rows kept by SemDeDup's rule (arXiv:2303.09540): of the rows of a cluster,
    farthest from the centroid first, each that has no near-duplicate before it. open_rows: sampled
    rows whose component grew too large to be followed; only the pairs count them.
    """

    rows: int
    sampled: int
    open_rows: int
    pairs: int
    pairs_found_within: float
    pairs_found_with_ghosts: float
    excess_within: float
    excess_with_ghosts: float
    components_per_row: float
    components_within_per_row: float
    components_with_ghosts_per_row: float
    pairwise_max_per_row: float

    def as_json(self) -> dict[str, Any]:
        """Return plain values."""
        return {name: getattr(self, name) for name in self.__slots__}


def probe(
    blocks: Blocks,
    centroids: NDArray[np.float32],
    *,
    similarity_above: float,
    ghost_margin: float,
    ghost_cap: int | None,
    num_sampled: int,
    most_rows: int,
    seed: int,
) -> Probe:
    """Return what comparing within clusters, and with ghosts, misses.

    Args:
        blocks: returns all rows anew at each call, MEMBER [n] with float16 [n, d] each.
        num_sampled: rows to start from, by sample hash. most_rows: compared with all, in all.
    """
    seen = _sampled(blocks, num_sampled, seed)
    num_sampled = len(seen.members)
    with products.engine_threads():
        while seen.num_compared < min(len(seen.members), most_rows):
            seen.compare_with_all(blocks, similarity_above, most_rows)
    ready = prepare(centroids, seen.rows)
    return _figures(seen, num_sampled, ready, ghost_margin, ghost_cap)


@dataclass(slots=True)
class _Seen:
    """The rows that were met; the first num_compared of them were compared with all rows."""

    members: Members
    rows: Float16Rows
    num_rows: int
    num_compared: int = 0
    row_a: Ints = field(default_factory=lambda: np.empty(0, np.int64))
    uid_b: Uint64s = field(default_factory=lambda: np.empty(0, np.uint64))

    def compare_with_all(self, blocks: Blocks, above: float, most_rows: int) -> None:
        """Compare the rows not compared yet, and add those that are near."""
        start, stop = self.num_compared, min(len(self.members), most_rows)
        near: list[tuple[Members, Float16Rows]] = [(self.members[:0], self.rows[:0])]
        for members, rows in blocks():
            a, b = _pairs(self.rows[start:stop], rows, above)
            is_other = self.members["uid"][a + start] != members["uid"][b]
            self.row_a = np.append(self.row_a, a[is_other] + start)
            self.uid_b = np.append(self.uid_b, members["uid"][b[is_other]])
            new = np.setdiff1d(members["uid"][b], self.members["uid"])
            at = np.flatnonzero(np.isin(members["uid"], new))
            near.append((members[at], rows[at]))
        self.num_compared = stop
        self.members = np.concatenate([self.members, *(one for one, _ in near)])
        self.rows = np.concatenate([self.rows, *(one for _, one in near)])

    def edges(self) -> tuple[Ints, Ints]:
        """Return the pairs of near-duplicates as positions among the rows that were met."""
        order = np.argsort(self.members["uid"])
        at = np.searchsorted(self.members["uid"], self.uid_b, sorter=order)
        return self.row_a, order[at]


def _sampled(blocks: Blocks, num_sampled: int, seed: int) -> _Seen:
    """Return the rows with the smallest sample hashes."""
    members: Members = np.empty(0, MEMBER)
    rows: Float16Rows | None = None
    num_rows = 0
    for some, vectors in blocks():
        num_rows += len(some)
        rows = vectors[:0] if rows is None else rows
        members, rows = np.append(members, some), np.concatenate([rows, vectors])
        chosen = sample_smallest(members["uid"], num_sampled, seed)
        members, rows = members[chosen], rows[chosen]
    return _Seen(members, np.zeros((0, 1), np.float16) if rows is None else rows, num_rows)


def _pairs(frontier: Float16Rows, rows: Float16Rows, above: float) -> tuple[Ints, Ints]:
    """Return all (row of the frontier, row) with exact similarity above the threshold."""
    frame = products.fit(rows)
    found = [(np.empty(0, np.int64), np.empty(0, np.int64))]
    buffer = products.tile_buffer(frame, ROWS_PER_TILE * ROWS_PER_TILE)
    tops = range(0, len(frontier), ROWS_PER_TILE)
    sides = {at: frame.operand(frontier[at : at + ROWS_PER_TILE]) for at in tops}
    for left in range(0, len(rows), ROWS_PER_TILE):
        b = frame.operand(rows[left : left + ROWS_PER_TILE])
        for top, a in sides.items():
            pairs = pairs_above(products.product(a, b, buffer), a, b, above)
            found.append((pairs.row + top, pairs.column + left))
    row_a, row_b = (np.concatenate(column) for column in zip(*found, strict=True))
    both = np.concatenate([frontier, rows])
    is_near = pair_dots(both, row_a, row_b + len(frontier)) > above
    return row_a[is_near], row_b[is_near]


def _figures(
    seen: _Seen, num_sampled: int, centroids: Centroids, margin: float, cap: int | None
) -> Probe:
    a, b = seen.edges()
    cluster = seen.members["cluster"].astype(np.int64)
    is_within = cluster[a] == cluster[b]
    is_met = is_within | _are_ghosts(seen, centroids, a, b, margin, cap)
    true = connected(len(cluster), a, b)
    is_closed = np.bincount(true, np.arange(len(true)) >= seen.num_compared) == 0
    counted = np.flatnonzero(is_closed[true[:num_sampled]])
    weight = 1.0 / np.bincount(true)[true[counted]]
    within, met = (
        _pieces(true, connected(len(true), a[is_one], b[is_one]))[true[counted]]
        for is_one in (is_within, is_met)
    )
    from_sample = a < num_sampled
    return Probe(
        rows=seen.num_rows,
        sampled=num_sampled,
        open_rows=num_sampled - len(counted),
        pairs=int(from_sample.sum()),
        pairs_found_within=_mean(is_within[from_sample]),
        pairs_found_with_ghosts=_mean(is_met[from_sample]),
        excess_within=float((weight * (within - 1)).sum() / max(weight.sum(), 1e-300)),
        excess_with_ghosts=float((weight * (met - 1)).sum() / max(weight.sum(), 1e-300)),
        components_per_row=_mean(weight),
        components_within_per_row=_mean(weight * within),
        components_with_ghosts_per_row=_mean(weight * met),
        pairwise_max_per_row=_mean(~_has_one_before(seen, a, b, is_within)[:num_sampled]),
    )


def _are_ghosts(
    seen: _Seen, centroids: Centroids, a: Ints, b: Ints, margin: float, cap: int | None
) -> NDArray[np.bool_]:
    """Return which pairs meet because one row is a ghost of the other's cluster."""
    row, ghost = ghosts_of(seen.rows, centroids, margin=margin, cap=cap)
    known = set(zip(row.tolist(), ghost.tolist(), strict=True))
    cluster = seen.members["cluster"].tolist()
    pairs = zip(a.tolist(), b.tolist(), strict=True)
    return np.array(
        [(i, cluster[j]) in known or (j, cluster[i]) in known for i, j in pairs], np.bool_
    )


def _pieces(true: NDArray[np.int32], found: NDArray[np.int32]) -> Ints:
    """Return how many found components each true one is in, by its label, its smallest row."""
    is_label = found == np.arange(len(found))
    return np.bincount(true[is_label], minlength=len(true))


def _has_one_before(seen: _Seen, a: Ints, b: Ints, is_within: NDArray[np.bool_]) -> NDArray[Any]:
    """Return which rows have a near-duplicate before them in their cluster, farthest first."""
    d2, uid = seen.members["d2"], seen.members["uid"]
    is_before = (d2[b] > d2[a]) | ((d2[b] == d2[a]) & (uid[b] < uid[a]))
    found = np.zeros(len(d2), np.bool_)
    found[a[is_within & is_before]] = True
    return found


def _mean(values: NDArray[Any] | Float64s) -> float:
    return float(values.mean()) if len(values) else 1.0
