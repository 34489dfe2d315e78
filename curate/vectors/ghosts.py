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
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
from numpy.typing import NDArray

from curate.vectors.assign import (
    Assigned,
    Centroids,
    assigned_to,
    candidates_with_scores,
    prepare,
)
from curate.vectors.exact import GRID_BITS, Float16Rows

if TYPE_CHECKING:
    import torch

Ints: TypeAlias = NDArray[np.int64]
_DOUBT = 2.0**-40  # relative: float64 rounding of both sides is far below


def ghosts_of(
    rows: Float16Rows,
    centroids: NDArray[np.floating] | Centroids,
    *,
    margin: float,
    cap: int | None,
) -> tuple[Ints, NDArray[np.uint32]]:
    """Return (row int64 [g], its ghost cluster uint32 [g]), by row, then by distance.

    Args: as nearest_and_ghosts; centroids [k, d] or prepared.
    """
    ready = centroids if isinstance(centroids, Centroids) else prepare(centroids, rows)
    return nearest_and_ghosts(rows, ready, margin=margin, cap=cap)[1:]


def nearest_and_ghosts(
    rows: Float16Rows | torch.Tensor, centroids: Centroids, *, margin: float, cap: int | None
) -> tuple[Assigned, Ints, NDArray[np.uint32]]:
    """Return what `assign` does, and (row int64 [g], its ghost cluster uint32 [g]) of all ghosts.

    One pass over the scores serves both. Ghosts are by row, then by distance. Exact: where float64
    cannot tell, integers and the decimal of `margin` decide.

    Args:
        rows: float16 [n, d]; a tensor is worked on where it is.
        margin: an L2 distance, 0 or more. cap: ghost clusters per row; None for no limit.
    """
    spread = 2.0 * float(centroids.operand.length.max())  # no two centroids are farther apart
    if centroids.operand.values.dtype.is_floating_point:
        spread = 2.0 * float(centroids.norm.max())
    within = margin * spread * 1.001 + 2.0**-30
    row, centroid, score = candidates_with_scores(rows, centroids, within=within)
    order = np.lexsort((centroid, score, row))
    row, centroid, score = row[order], centroid[order], score[order]
    first = np.searchsorted(row, np.arange(len(rows)))  # each row's own cluster comes first
    own = first[row]
    rank = np.arange(len(row)) - own
    at = np.flatnonzero((rank > 0) if cap is None else (rank > 0) & (rank <= cap))
    meets = _meets(centroids, centroid[own[at]], centroid[at], score[at] - score[own[at]], margin)
    at = at[meets]
    assigned = assigned_to(rows, centroids, centroid[first], score[first])
    return assigned, row[at], centroids.number[centroid[at]].astype(np.uint32)


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
