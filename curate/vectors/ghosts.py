"""Ghosts: rows near the border of a neighbouring cluster, which are compared with its rows too.

k-means puts some near-duplicates into two clusters. Row y of cluster a also meets cluster b when b
is among the `cap` clusters nearest after a (by exact d2, then number) and

    d2(y, b) - d2(y, a) <= 2 * margin * |c_a - c_b|

which says that y is at most `margin` away from the plane halfway between the two centroids. Two
rows with similarity above t lie at most sqrt(2 - 2 t) apart, so with margin sqrt(2 - 2 t) / 2 and
no cap one of them always is that near: every pair is met.
"""

from __future__ import annotations

from fractions import Fraction
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from curate.vectors.assign import Centroids, candidates_with_distances, prepare
from curate.vectors.exact import GRID_BITS, Float16Rows

Ints: TypeAlias = NDArray[np.int64]
_DOUBT = 2.0**-40  # relative: float64 rounding of both sides is far below


def ghosts_of(
    rows: Float16Rows,
    centroids: NDArray[np.floating] | Centroids,
    cluster: NDArray[np.uint32],
    *,
    margin: float,
    cap: int | None,
) -> tuple[Ints, NDArray[np.uint32]]:
    """Return (row int64 [g], its ghost cluster uint32 [g]), by row, then by distance.

    Exact: where float64 cannot tell, integers and the decimal of `margin` decide.

    Args:
        rows: float16 [n, d]; centroids: [k, d] or prepared; cluster: uint32 [n], from `assign`.
        margin: an L2 distance, 0 or more. cap: ghost clusters per row; None for no limit.
    """
    ready = centroids if isinstance(centroids, Centroids) else prepare(centroids, rows)
    spread = 2.0 * float(ready.operand.length.max())  # no two centroids are farther apart
    if ready.operand.values.dtype.is_floating_point:
        spread = 2.0 * float(ready.norm.max())
    within = margin * spread * 1.001 + 2.0**-30
    row, centroid, d2 = candidates_with_distances(rows, ready, within=within)
    order = np.lexsort((centroid, d2, row))
    row, centroid, d2 = row[order], centroid[order], d2[order]
    first = np.searchsorted(row, row)  # each row's own cluster is its first candidate
    rank = np.arange(len(row)) - first
    is_near = rank > 0 if cap is None else (rank > 0) & (rank <= cap)
    at = np.flatnonzero(is_near)
    own = first[at]
    assert np.array_equal(ready.number[centroid[first]], cluster[row]), "cluster is not assign's"
    meets = _meets(ready, centroid[own], centroid[at], d2[at] - d2[own], margin)
    return row[at][meets], ready.number[centroid[at][meets]].astype(np.uint32)


def _meets(
    centroids: Centroids, a: Ints, b: Ints, difference: Ints, margin: float
) -> NDArray[np.bool_]:
    """Return whether difference <= 2 margin |c_a - c_b|; differences are counts of 2^-48, >= 0."""
    gap = np.empty(len(a))
    for start in range(0, len(a), 4096):
        part = slice(start, start + 4096)
        off = centroids.grid[a[part]].astype(np.float64) - centroids.grid[b[part]]
        gap[part] = np.sqrt(np.einsum("pd,pd->p", off, off))
    left = np.ldexp(difference.astype(np.float64), -2 * GRID_BITS)
    right = 2.0 * margin * gap
    found = left <= right
    for p in np.flatnonzero(np.abs(left - right) <= _DOUBT * np.maximum(left, right)):
        found[p] = _meets_exactly(centroids, int(a[p]), int(b[p]), int(difference[p]), margin)
    return np.asarray(found, np.bool_)


def _meets_exactly(centroids: Centroids, a: int, b: int, difference: int, margin: float) -> bool:
    """Return difference^2 <= 4 margin^2 |c_a - c_b|^2, in integers."""
    units = np.ldexp(centroids.grid[[a, b]].astype(np.float64), GRID_BITS).astype(object)
    squared_gap = sum(int(x - y) ** 2 for x, y in zip(*units, strict=True))
    exact_margin = Fraction(repr(float(margin)))
    return bool(difference**2 <= 4 * exact_margin**2 * squared_gap * 4**GRID_BITS)
