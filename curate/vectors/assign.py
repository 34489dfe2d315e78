"""The nearest centroid of every row, without a single wrong label.

A low-precision product (`products`) gives each score x.c - |c|^2 / 2 with a proven bound on its
error. Only centroids whose upper bound is not below the row's best lower bound can be nearest: two
or three a row. Their distances are then computed exactly, and compared as such.

Legend: N rows of a block, K centroids (T of them in a tile), D dimensions, P candidate pairs (row,
centroid).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from curate.vectors import products
from curate.vectors.distances import (
    ExactCentroids,
    dot_units,
    score_units,
    square_units,
)
from curate.vectors.exact import (
    GRID_BITS,
    MAX_ROW_NORM,
    Float16Rows,
    Float64s,
    round_to_grid,
)
from curate.vectors.hits import Hits, positions
from curate.vectors.products import Frame, Operand, Precision, engine_threads
from curate.vectors.rotation import rotated
from manifests.errors import UserError

if TYPE_CHECKING:
    import torch

Ints: TypeAlias = NDArray[np.int64]

BLOCK_ROWS = 2048
TILE_CENTROIDS = 4096
ROWS_PER_EXACT_STEP = 1 << 15


@dataclass(frozen=True, slots=True)
class Assigned:
    """Each row's cluster, exact squared distance to its centroid, and x.c / |c| (0 if c is 0)."""

    cluster: NDArray[np.uint32]
    d2: Float64s
    centroid_cosine: Float64s

    @staticmethod
    def joined(parts: list[Assigned]) -> Assigned:
        """Return several as one."""
        return Assigned(
            np.concatenate([np.empty(0, np.uint32), *(one.cluster for one in parts)]),
            np.concatenate([np.empty(0), *(one.d2 for one in parts)]),
            np.concatenate([np.empty(0), *(one.centroid_cosine for one in parts)]),
        )


@dataclass(frozen=True, slots=True)
class Centroids:
    """Distinct centroids, prepared for assigning many blocks; ascending in `number`."""

    grid: NDArray[np.float32]  # [K, d], multiples of 2^-24
    number: Ints  # position in the array that was given
    norm: Float64s
    exact: ExactCentroids
    frame: Frame  # how rows are put down
    operand: Operand  # offset has - |c|^2 / 2


def prepare(
    centroids: NDArray[np.floating[Any]],
    rows: Float16Rows | torch.Tensor,
    precision: Precision = "auto",
) -> Centroids:
    """Return centroids ready for rows like these (a sample: it says how an int8 step is chosen).

    Raises: UserError for unusable centroids, or rows of another dimension.
    """
    import torch

    grid_KD = round_to_grid(centroids)
    _check_dims(rows.shape[1], grid_KD.shape[1])
    device = rows.device if isinstance(rows, torch.Tensor) else torch.device("cpu")
    as_bytes = np.ascontiguousarray(grid_KD).view(np.dtype((np.void, grid_KD[0].nbytes)))
    number = np.sort(np.unique(as_bytes.ravel(), return_index=True)[1])  # copies never win a tie
    tensor = torch.from_numpy(grid_KD[number]).to(device)
    units = dot_units(tensor, tensor, is_long=True).cpu().numpy()
    square = np.ldexp(units.astype(np.float64), -2 * GRID_BITS)
    norm = np.sqrt(square)
    is_long = bool(norm.max() * MAX_ROW_NORM > 31.0)
    frames = _frames(tensor, rows, "fp32" if is_long else precision)
    half = torch.from_numpy(square / 2).to(device)
    operand = frames[1].operand(tensor)
    operand = replace(
        operand,
        offset=(operand.offset.double() - half).float(),
        slop=operand.slop + (half.float() + 1.0) * 2.0**-20,  # the bias in float32, added to a sum
    )
    exact = ExactCentroids(tensor, units, is_long)
    return Centroids(grid_KD[number], number, norm, exact, frames[0], operand)


def assign(
    rows: Float16Rows | torch.Tensor,
    centroids: NDArray[np.floating[Any]] | Centroids,
    *,
    block_rows: int = BLOCK_ROWS,
    precision: Precision = "auto",
) -> Assigned:
    """Return for every row argmin_k of the exact |x - c_k|^2, the smallest k on a tie.

    The result does not depend on `block_rows`, `precision`, threads or device. `d2` is the exact
    value, rounded to float64 only above 32.

    Args:
        rows: float16 [n, d], finite, norm at most MAX_ROW_NORM (see reject_reasons); a tensor is
            worked on where it is.
        centroids: [k, d], of any norm up to MAX_CENTROID_NORM, rounded to the grid here; or what
            `prepare` made of them.
    Raises:
        UserError: unusable centroids, or rows of another dimension.
    """
    ready = _ready(centroids, rows, precision)
    found = [
        _nearest(rows[part], ready, pairs)
        for part, pairs in _each_step(rows, ready, block_rows=block_rows)
    ]
    return Assigned.joined(found)


def labels(
    rows: Float16Rows, centroids: NDArray[np.floating[Any]] | Centroids
) -> NDArray[np.uint32]:
    """Return the clusters alone: a row with one candidate needs no exact distance then."""
    ready = _ready(centroids, rows, "auto")
    found = [np.empty(0, np.uint32)]
    for part, (row, centroid) in _each_step(rows, ready):
        size = len(rows[part])
        count = np.bincount(row, minlength=size)
        best = np.empty(size, np.int64)
        best[row] = centroid
        several = np.flatnonzero(count > 1)
        if len(several):
            doubtful = count[row] > 1
            place = np.searchsorted(several, row[doubtful])
            pairs = place, centroid[doubtful]
            scores = score_units(rows[part][several], ready.exact, *pairs)
            best[several] = pairs[1][_first(*pairs, scores)]
        found.append(ready.number[best].astype(np.uint32))
    return np.concatenate(found)


def candidates_with_scores(
    rows: Float16Rows | torch.Tensor, centroids: Centroids, *, within: float
) -> tuple[Ints, Ints, Ints]:
    """Return (row, centroid position, d2 - |x|^2 in units of 2^-48) of all that may be near.

    Every centroid whose d2 is at most the row's least one + 2 `within` is among them.
    """
    found = []
    for part, (row, centroid) in _each_step(rows, centroids, window=within):
        scores = score_units(rows[part], centroids.exact, row, centroid)
        found.append((row + part.start, centroid, scores))
    if not found:
        none = np.empty(0, np.int64)
        return none, none, none
    row, centroid, scores = (np.concatenate(column) for column in zip(*found, strict=True))
    return row, centroid, scores


def _ready(
    centroids: NDArray[np.floating[Any]] | Centroids,
    rows: Float16Rows | torch.Tensor,
    precision: Precision,
) -> Centroids:
    if isinstance(centroids, Centroids):
        _check_dims(rows.shape[1], centroids.grid.shape[1])
        return centroids
    return prepare(centroids, rows, precision)


def _frames(
    centroids: torch.Tensor, rows: Float16Rows | torch.Tensor, precision: Precision
) -> tuple[Frame, Frame]:
    """Return the frames of rows and of centroids, which share a centre."""
    device = centroids.device.type
    chosen = products.fastest_precision(device) if precision == "auto" else precision
    if chosen != "int8":  # bfloat16 has no room for the bias beside the dot
        frame = Frame("fp16" if chosen == "fp16" else "fp32")
        return frame, frame
    center = centroids.mean(dim=0)
    few = rows[:: max(1, -(-len(rows) // products.FITTED_ROWS))]
    frame = products.int8_frame(products.as_tensor(few).float() - center, center)
    turned = rotated(centroids - center) if frame.is_rotated else centroids - center
    return frame, replace(frame, step=products.fitted_step(turned, center))


def _each_step(
    rows: Float16Rows | torch.Tensor,
    centroids: Centroids,
    *,
    block_rows: int = BLOCK_ROWS,
    window: float = 0.0,
) -> Iterator[tuple[slice, tuple[Ints, Ints]]]:
    """Yield runs of rows with their candidate pairs (row within the run, centroid), by row."""
    size = min(TILE_CENTROIDS, len(centroids.grid))
    with engine_threads(centroids.exact.tensor.device.type):
        buffer = products.tile_buffer(
            centroids.frame,
            min(block_rows, max(1, len(rows))) * size,
            centroids.exact.tensor.device,
        )
        for start in range(0, len(rows), ROWS_PER_EXACT_STEP):
            part = slice(start, min(start + ROWS_PER_EXACT_STEP, len(rows)))
            found = []
            for first in range(part.start, part.stop, block_rows):
                block = centroids.frame.operand(rows[first : min(first + block_rows, part.stop)])
                row, centroid = _candidates(block, centroids, buffer, window)
                found.append((row + (first - start), centroid))
            yield part, tuple(np.concatenate(column) for column in zip(*found, strict=True))  # type: ignore[misc]


def _candidates(
    block: Operand, centroids: Centroids, buffer: torch.Tensor, window: float
) -> tuple[Ints, Ints]:
    """Return the pairs (row, centroid) that may be within `window` of nearest, by row.

    Scores are compared: x.c - |c|^2 / 2, which is (|x|^2 - d2) / 2.
    """
    import torch

    _check_length(block, centroids.frame)
    best = torch.full((len(block),), -torch.inf, dtype=torch.float64, device=buffer.device)
    pieces = []
    for start in range(0, len(centroids.operand), TILE_CENTROIDS):
        side = centroids.operand.part(slice(start, start + TILE_CENTROIDS))
        tile = products.product(block, side, buffer)
        if tile.dtype.is_floating_point:
            tile += side.offset
        unit = block.unit(side) if tile.dtype == torch.int32 else 1.0
        slack = block.error.double() * float(side.length.max())
        slack += block.length.double() * float(side.error.max())
        slack += block.slop.double() + float(side.slop.max())
        best = torch.maximum(best, tile.amax(dim=1).double() * unit - slack)
        cut = (best - slack - window) / unit
        cut = (cut.floor() - 1).to(tile.dtype) if unit != 1.0 else (cut - 1e-6 * cut.abs()).float()
        row, column = positions(
            Hits(torch.arange(len(block), device=tile.device), tile >= cut[:, None])
        )
        value = tile[row, column].double() * unit
        own = block.error[row].double() * side.length[column]
        own += side.error[column].double() * block.length[row]
        own += block.slop[row].double() + side.slop[column]
        pieces.append((row, column + start, value, own))
    row, centroid, value, own = (torch.cat(column) for column in zip(*pieces, strict=True))
    lower = torch.full_like(best, -torch.inf).scatter_reduce_(0, row, value - own, "amax")
    near = value + own >= lower[row] - window
    rows, columns = row[near].cpu().numpy(), centroid[near].cpu().numpy()
    order = np.argsort(rows, kind="stable")
    return rows[order], columns[order]


def _nearest(
    rows: Float16Rows | torch.Tensor, centroids: Centroids, pairs: tuple[Ints, Ints]
) -> Assigned:
    """Return cluster, d2 and centroid_cosine of every row, from its candidate centroids by row."""
    row, centroid = pairs
    scores = score_units(rows, centroids.exact, row, centroid)
    first = _first(row, centroid, scores)
    return assigned_to(rows, centroids, centroid[first], scores[first])


def assigned_to(
    rows: Float16Rows | torch.Tensor, centroids: Centroids, nearest: Ints, scores: Ints
) -> Assigned:
    """Return cluster, d2 and centroid_cosine of every row.

    Args: nearest: int64 [n], positions in `centroids`; scores: int64 [n], d2 - |x|^2 in units of
    2^-48.
    """
    own = square_units(rows)
    least = own + scores
    dot = np.ldexp(
        ((own + centroids.exact.square_units[nearest] - least) // 2).astype(np.float64), -48
    )
    norm = centroids.norm[nearest]
    cosine = np.where(norm > 0, dot / np.maximum(norm, 2.0**-24), 0.0)
    return Assigned(
        centroids.number[nearest].astype(np.uint32),
        np.ldexp(least.astype(np.float64), -2 * GRID_BITS),
        cosine,
    )


def _first(row: Ints, centroid: Ints, scores: Ints) -> Ints:
    """Return of each row, from 0, which of its pairs has the least score, then centroid."""
    order = np.lexsort((centroid, scores, row))
    return order[np.flatnonzero(np.diff(row[order], prepend=-1))]


def _check_length(block: Operand, frame: Frame) -> None:
    """Check, roughly, that no row is longer than MAX_ROW_NORM. Raises: ValueError."""
    center = 0.0 if frame.center_D is None else float(frame.center_D.norm())
    longest = float((block.length - block.error).max()) if len(block) else 0.0
    if not longest <= 1.02 * (MAX_ROW_NORM + center):
        raise ValueError(
            "rows must be finite and of norm at most 5: drop what reject_reasons names"
        )


def _check_dims(row_dim: int, centroid_dim: int) -> None:
    if row_dim != centroid_dim:
        raise UserError(
            f"The rows have {row_dim} dimensions and the centroids {centroid_dim}.",
            "Both must come from the same embedding model.",
            "Train centroids on these embeddings, or give the centroid file that belongs to them.",
        )
