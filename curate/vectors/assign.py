"""The nearest centroid of every row, without a single wrong label.

A float32 matrix product gives each score |c|^2 / 2 - x.c less a proven error bound, a lower bound
that costs no extra pass. Only centroids whose lower bound is not above the row's best upper bound
can be nearest (about one a row); their distances are then computed exactly, counted in units of
2^-48 as int64, and compared as integers.

Legend: N rows of a block, K centroids (T of them in a tile), D dimensions, P candidate pairs (row,
centroid).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from curate.vectors.exact import (
    GRID_BITS,
    MAX_ROW_NORM,
    Float16Rows,
    Float64s,
    fp32_dot_error_bound,
    full_precision_gemm,
    load_block,
    round_to_grid,
)

if TYPE_CHECKING:
    import torch

TILE_CENTROIDS = 2048
PAIRS_PER_CHUNK = 128  # of the exact step on a CPU: what fits a core's cache
PAIRS_PER_DEVICE_CHUNK = 1 << 16


@dataclass(frozen=True, slots=True)
class Assigned:
    """Each row's cluster, exact squared distance to its centroid, and x.c / |c| (0 if c is 0)."""

    cluster: NDArray[np.uint32]
    d2: Float64s
    centroid_cosine: Float64s


@dataclass(frozen=True, slots=True)
class _Centroids:
    """Distinct centroids on the rows' device, in ascending order of `number`."""

    rows_KD: torch.Tensor  # float32, multiples of 2^-24
    number: torch.Tensor  # int64 [K], position in the array that was given
    norm: torch.Tensor  # float64 [K]
    square_units: torch.Tensor  # int64 [K], |c|^2 * 2^48
    is_long: bool  # then a float64 dot may round, and dots are counted in int64


def assign(
    rows: Float16Rows | torch.Tensor,
    centroids: NDArray[np.floating[Any]],
    *,
    block_rows: int = 4096,
) -> Assigned:
    """Return for every row argmin_k of the exact |x - c_k|^2, the smallest k on a tie.

    The result does not depend on `block_rows`, threads or device. `d2` is the exact value, rounded
    to float64 only above 32.

    Args:
        rows: float16 [n, d], finite, norm at most MAX_ROW_NORM (see reject_reasons); a tensor is
            worked on where it is.
        centroids: [k, d], of any norm up to MAX_CENTROID_NORM; rounded to the grid here.
    Raises:
        UserError: unusable centroids, or rows of another dimension.
    """
    import torch

    device = rows.device if isinstance(rows, torch.Tensor) else torch.device("cpu")
    grid = _prepare(round_to_grid(centroids), device)
    _check_dims(rows.shape[1], grid.rows_KD.shape[1])
    x_ND = torch.empty((min(block_rows, len(rows)), rows.shape[1]), device=device)
    score_buffer = torch.empty(len(x_ND) * TILE_CENTROIDS, device=device)
    found = []
    with full_precision_gemm(device.type):
        for start in range(0, len(rows), block_rows):
            block = load_block(rows, slice(start, start + block_rows), x_ND)
            row, centroid = _candidates(block, grid, score_buffer)
            with _one_thread():
                found.append(_nearest(block, grid, row, centroid))
    return _assigned(found)


def _prepare(grid_KD: NDArray[np.float32], device: torch.device) -> _Centroids:
    import torch

    as_bytes = np.ascontiguousarray(grid_KD).view(np.dtype((np.void, grid_KD[0].nbytes)))
    number = np.sort(np.unique(as_bytes.ravel(), return_index=True)[1])  # copies never win a tie
    rows_KD = torch.from_numpy(grid_KD[number]).to(device)
    square_units = _dot_units(rows_KD, rows_KD, is_long=True)
    norm = np.sqrt(np.ldexp(square_units.cpu().numpy().astype(np.float64), -2 * GRID_BITS))
    return _Centroids(
        rows_KD=rows_KD,
        number=torch.from_numpy(number).to(device),
        norm=torch.from_numpy(norm).to(device),  # torch's own sqrt on a CPU can be a bit off
        square_units=square_units,
        is_long=bool(norm.max() * MAX_ROW_NORM > 31.0),
    )


def _candidates(
    x_ND: torch.Tensor, grid: _Centroids, score_buffer: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the (row, centroid) pairs that may be nearest; every nearest pair is among them."""
    import torch

    error_K = _score_errors(x_ND, grid)
    bias_K = (grid.norm.square() / 2 - error_K).float()
    width_K = (2 * error_K).float()
    best_N = torch.full((len(x_ND),), torch.inf, device=x_ND.device)
    pieces = []
    for start in range(0, len(grid.rows_KD), TILE_CENTROIDS):
        tile = slice(start, start + TILE_CENTROIDS)
        c_TD = grid.rows_KD[tile]
        low_NT = score_buffer[: len(x_ND) * len(c_TD)].view(len(x_ND), len(c_TD))
        torch.addmm(bias_K[tile], x_ND, c_TD.T, alpha=-1, out=low_NT)
        least = low_NT.min(dim=1)
        best_N = torch.minimum(best_N, least.values + width_K[tile][least.indices])
        place = _true_positions(low_NT <= best_N[:, None])
        row = place // len(c_TD)
        pieces.append((row, place - row * len(c_TD) + start, low_NT.view(-1)[place]))
    row, centroid, low = (torch.cat(column) for column in zip(*pieces, strict=True))
    near = low <= best_N[row]
    return row[near], centroid[near]


def _score_errors(x_ND: torch.Tensor, grid: _Centroids) -> torch.Tensor:
    """Return per centroid a bound on the error of its float32 score: float64 [K].

    The score sums d products and |c|^2 / 2: as fp32_dot_error_bound with d + 1 terms. Seven terms
    more and one percent cover the rounding of the bias, of the bound itself and of the comparison;
    norms in float32 are good to one part in a thousand.
    """
    import torch

    row_norm = float(torch.linalg.vector_norm(x_ND, dim=1).max()) * 1.001
    if not row_norm <= MAX_ROW_NORM * 1.01:
        raise ValueError(
            "rows must be finite and of norm at most 5: drop what reject_reasons names"
        )
    gamma = fp32_dot_error_bound(x_ND.shape[1] + 8, 1.0, 1.0) * 1.01
    return gamma * (row_norm * grid.norm + grid.norm.square() / 2)


def _nearest(
    x_ND: torch.Tensor, grid: _Centroids, row_P: torch.Tensor, centroid_P: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return cluster, d2 and centroid_cosine of every row, from its candidate centroids."""
    import torch

    square_N = _dot_units(x_ND, x_ND, is_long=False)
    dot_P = _dot_units(x_ND, grid.rows_KD, row_P, centroid_P, is_long=grid.is_long)
    d2_P = square_N[row_P] + grid.square_units[centroid_P] - 2 * dot_P
    d2_N = _least_per_row(d2_P, row_P, len(x_ND))
    is_least = d2_P == d2_N[row_P]
    nearest_N = _least_per_row(centroid_P[is_least], row_P[is_least], len(x_ND))
    twice_dot_N = square_N + grid.square_units[nearest_N] - d2_N
    dot_N = (twice_dot_N // 2).double() * 2.0 ** (-2 * GRID_BITS)
    norm_N = grid.norm[nearest_N]
    cosine_N = torch.where(norm_N > 0, dot_N / norm_N.clamp_min(2.0**-24), 0.0)
    return grid.number[nearest_N], d2_N.double() * 2.0 ** (-2 * GRID_BITS), cosine_N


def _least_per_row(value_P: torch.Tensor, row_P: torch.Tensor, num_rows: int) -> torch.Tensor:
    import torch

    most = torch.full((num_rows,), torch.iinfo(torch.int64).max, device=value_P.device)
    return most.scatter_reduce_(0, row_P, value_P, "amin")


def _dot_units(
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


@contextmanager
def _one_thread() -> Iterator[None]:
    """Keep short operations off the thread pool: on a busy machine each waits for all of it."""
    import torch

    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(num_threads)


def _true_positions(mask: torch.Tensor) -> torch.Tensor:
    """Return the flat positions of the set cells; on a CPU numpy is much faster than torch."""
    import torch

    if mask.device.type == "cpu":
        return torch.from_numpy(np.flatnonzero(mask.numpy()))
    return mask.view(-1).nonzero().view(-1)


def _assigned(found: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]) -> Assigned:
    import torch

    if not found:
        return Assigned(np.empty(0, np.uint32), np.empty(0), np.empty(0))
    cluster, d2, cosine = (torch.cat(column).cpu().numpy() for column in zip(*found, strict=True))
    return Assigned(cluster.astype(np.uint32), d2, cosine)


def _check_dims(row_dim: int, centroid_dim: int) -> None:
    from manifests.errors import UserError

    if row_dim != centroid_dim:
        raise UserError(
            f"The rows have {row_dim} dimensions and the centroids {centroid_dim}.",
            "Both must come from the same embedding model.",
            "Train centroids on these embeddings, or give the centroid file that belongs to them.",
        )
