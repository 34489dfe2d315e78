"""Exact distances of pairs of a row and a centroid, as counts of 2^-48."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
from numpy.typing import NDArray

from curate.vectors import products
from curate.vectors.exact import (
    BLOCK_BYTES,
    GRID_BITS,
    Float16Rows,
    Float64s,
    one_thread,
    squared_norms,
)

if TYPE_CHECKING:
    import torch

Ints: TypeAlias = NDArray[np.int64]

PAIRS_PER_CHUNK = 128  # on tensors: what fits a core's cache
PAIRS_PER_DEVICE_CHUNK = 1 << 16
FEWEST_PAIRS_PER_PRODUCT = 8


@dataclass(frozen=True, slots=True)
class ExactCentroids:
    """Centroids as the exact step needs them."""

    tensor: torch.Tensor  # float32 [K, d], multiples of 2^-24, on the rows' device
    square_units: Ints  # |c|^2 * 2^48
    is_long: bool  # then a float64 dot may round, and dots are counted in int64


def score_units(
    rows: Float16Rows | torch.Tensor, centroids: ExactCentroids, row: Ints, centroid: Ints
) -> Ints:
    """Return the exact |x - c|^2 - |x|^2 of pairs, which orders the centroids of a row: int64."""
    import torch

    if centroids.is_long or isinstance(rows, torch.Tensor):
        with one_thread():
            x_ND = products.as_tensor(rows).float()
            index = (torch.from_numpy(row), torch.from_numpy(centroid))
            index = tuple(one.to(x_ND.device) for one in index)  # type: ignore[assignment]
            dot = dot_units(x_ND, centroids.tensor, *index, is_long=centroids.is_long)
            dots = dot.cpu().numpy()
    else:
        dots = np.ldexp(_pair_dots(rows, centroids.tensor, row, centroid), 48).astype(np.int64)
    return np.asarray(centroids.square_units[centroid] - 2 * dots)


def square_units(rows: Float16Rows | torch.Tensor) -> Ints:
    """Return |x|^2 as int64 counts of 2^-48."""
    host = rows if isinstance(rows, np.ndarray) else rows.cpu().numpy()
    return np.ldexp(squared_norms(host), 2 * GRID_BITS).astype(np.int64)


def _pair_dots(rows: Float16Rows, grid: torch.Tensor, row: Ints, centroid: Ints) -> Float64s:
    """Return the dots of pairs in float64, which rounds nothing, a centroid at a time.

    A float64 sum of multiples of 2^-48 below 32 is exact in any order, so BLAS may do it.
    """
    import torch

    order = np.argsort(centroid, kind="stable")
    ends = np.flatnonzero(np.diff(centroid[order], append=-1)) + 1
    dots = np.empty(len(row))
    step = max(FEWEST_PAIRS_PER_PRODUCT, BLOCK_BYTES // (8 * rows.shape[1]))
    start = 0
    while start < len(order):
        last = int(ends[np.searchsorted(ends, start, side="right")])
        is_one = min(last, start + step) - start >= FEWEST_PAIRS_PER_PRODUCT
        stop = min(last if is_one else len(order), start + step)  # small groups together
        part = order[start:stop]
        wide = torch.from_numpy(rows[row[part]]).double()  # much faster than numpy's
        if is_one:
            found = torch.mv(wide, grid[int(centroid[part[0]])].double())
        else:
            found = wide.mul_(grid[torch.from_numpy(centroid[part])]).sum(dim=1)
        dots[part] = found.numpy()
        start = stop
    return dots


def dot_units(
    a_ND: torch.Tensor,
    b_KD: torch.Tensor,
    a_index: torch.Tensor | None = None,
    b_index: torch.Tensor | None = None,
    *,
    is_long: bool,
) -> torch.Tensor:
    """Return the exact dots of a[a_index[p]] and b[b_index[p]] as int64 counts of 2^-48.

    A float64 sum of multiples of 2^-48 is exact below 32. An int64 sum wraps around, and is exact
    whenever its end is below 2^15, whatever happened on the way.
    """
    import torch

    kind = torch.int64 if is_long else torch.float64
    num_pairs = len(a_ND) if a_index is None else len(a_index)
    units = torch.empty(num_pairs, dtype=torch.int64, device=a_ND.device)
    step = PAIRS_PER_CHUNK if a_ND.device.type == "cpu" else PAIRS_PER_DEVICE_CHUNK
    for start in range(0, num_pairs, step):
        part = slice(start, start + step)
        a = a_ND[part if a_index is None else a_index[part]].mul(1 << GRID_BITS).to(kind)
        b = b_KD[part if b_index is None else b_index[part]].mul(1 << GRID_BITS).to(kind)
        units[part] = a.mul_(b).sum(dim=1)
    return units
