"""Which pairs of a tile may be above a threshold, or surely are, by the bounds of `products`.

Legend: N, M rows of the two sides, h rows that have a hit, p pairs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from curate.vectors.products import Operand

if TYPE_CHECKING:
    import torch

LISTED_PAIRS = 1 << 17
"""Pairs of a tile that are listed at once: some 100 bytes each."""


@dataclass(frozen=True, slots=True)
class Pairs:
    """Some pairs of a tile: row, column int64 [p]; estimate and slack float64 [p]."""

    row: NDArray[np.int64]
    column: NDArray[np.int64]
    estimate: NDArray[np.float64]
    slack: NDArray[np.float64]

    def take(self, which: NDArray[np.bool_] | NDArray[np.intp]) -> Pairs:
        """Return some of the pairs."""
        return Pairs(self.row[which], self.column[which], self.estimate[which], self.slack[which])

    def __len__(self) -> int:
        return len(self.row)


@dataclass(frozen=True, slots=True)
class Hits:
    """Where a tile may be above a threshold: `mask` bool [h, M] of the tile's rows `row` int64 [h].

    No other row has a hit.
    """

    row: torch.Tensor
    mask: torch.Tensor

    def count(self) -> int:
        """Return how many pairs are hit."""
        return int(self.count_by_row().sum())

    def count_by_row(self) -> NDArray[np.int64]:
        """Return how many pairs are hit in each of its rows: int64 [h]."""
        if self.mask.device.type == "cpu":  # much faster than torch's
            return np.asarray(np.count_nonzero(self.mask.numpy(), axis=1))
        counts: NDArray[np.int64] = self.mask.count_nonzero(dim=1).cpu().numpy()
        return counts


def hits_above(tile: torch.Tensor, a: Operand, b: Operand, threshold: float) -> Hits:
    """Return where the exact dot may be above the threshold; a little more, never less."""
    cut_N = _row_cuts(tile, a, b, threshold)
    row = (tile.amax(dim=1) >= cut_N).nonzero().view(-1)  # most rows of most tiles have none
    if not len(row):
        return Hits(row, tile[:0] > 0)
    return Hits(row, _at_least(tile, row, cut_N))


def in_parts(hits: Hits) -> Iterator[Hits]:
    """Yield the hits by blocks of rows, LISTED_PAIRS at a time or one row."""
    if hits.mask.numel() <= LISTED_PAIRS:
        yield hits
        return
    ends = np.cumsum(hits.count_by_row())
    start, before = 0, 0
    while start < len(ends):
        stop = max(start + 1, int(np.searchsorted(ends, before + LISTED_PAIRS, side="right")))
        if ends[stop - 1] > before:
            yield Hits(hits.row[start:stop], hits.mask[start:stop])
        start, before = stop, int(ends[stop - 1])


def pairs_of(hits: Hits, tile: torch.Tensor, a: Operand, b: Operand) -> Pairs:
    """Return the hit pairs with their estimates."""
    row, column = positions(hits)
    value = tile[row, column].double()
    estimate = value * a.unit(b) + a.offset[row]
    slack = a.error[row].double() * b.length[column] + b.error[column].double() * a.length[row]
    slack += a.slop[row].double() + b.slop[column]
    return Pairs(*(one.cpu().numpy() for one in (row, column, estimate, slack)))


def pairs_above(tile: torch.Tensor, a: Operand, b: Operand, threshold: float) -> Pairs:
    """Return every pair of the tile whose exact dot may be above the threshold."""
    found = pairs_of(hits_above(tile, a, b, threshold), tile, a, b)
    return found.take(found.estimate + found.slack >= threshold)


def above_diagonal(hits: Hits) -> Hits:
    """Return the hits of a tile of rows against themselves with each pair once: row < column."""
    import torch

    column = torch.arange(hits.mask.shape[1], device=hits.mask.device)
    return Hits(hits.row, (column > hits.row[:, None]).logical_and_(hits.mask))


def sure_hits(
    tile: torch.Tensor, hits: Hits, a: Operand, b: Operand, threshold: float
) -> NDArray[np.bool_]:
    """Return bool [h, M]: which of the hits' rows and columns are surely above the threshold."""
    cut_N = (threshold - a.offset.double() + _row_slack(a, b)) / a.unit(b)
    if tile.dtype.is_floating_point:
        cut_N = (cut_N + cut_N.abs() * 2.0**-20 + 2.0**-40).float()
    else:
        cut_N = (cut_N.ceil() + 1).clamp_(-(2.0**31), 2.0**31 - 1).to(tile.dtype)
    is_sure: NDArray[np.bool_] = _at_least(tile, hits.row, cut_N).cpu().numpy()
    return is_sure


def _at_least(tile: torch.Tensor, row: torch.Tensor, cut_N: torch.Tensor) -> torch.Tensor:
    """Return for some rows of a tile which values reach the row's cut: bool [h, M]."""
    if 4 * len(row) < len(tile):
        return tile[row] >= cut_N[row, None]
    mask = tile >= cut_N[:, None]  # copying most of the tile would cost more
    return mask if len(row) == len(tile) else mask[row]


def _row_cuts(tile: torch.Tensor, a: Operand, b: Operand, threshold: float) -> torch.Tensor:
    """Return per row the least tile value that may mean a dot above the threshold."""
    cut = (threshold - a.offset.double() - _row_slack(a, b)) / a.unit(b)
    if tile.dtype.is_floating_point:
        return (cut - cut.abs() * 2.0**-20 - 2.0**-40).float()
    return (cut.floor() - 1).clamp_(-(2.0**31), 2.0**31 - 1).to(tile.dtype)


def _row_slack(a: Operand, b: Operand) -> torch.Tensor:
    """Return per row of `a` the largest slack of its pairs: float64 [N]."""
    slack = a.error.double() * float(b.length.max()) + a.length.double() * float(b.error.max())
    return slack + (a.slop.double() + float(b.slop.max()))


def positions(hits: Hits) -> tuple[torch.Tensor, torch.Tensor]:
    """Return row and column of the hits in the tile: int64 [p] each."""
    import torch

    if hits.mask.device.type != "cpu":
        row, column = hits.mask.nonzero(as_tuple=True)
        return hits.row[row], column
    place = torch.from_numpy(np.flatnonzero(hits.mask.numpy()))  # much faster than torch's
    row = torch.div(place, max(1, hits.mask.shape[1]), rounding_mode="floor")
    return hits.row[row], place - row * hits.mask.shape[1]
