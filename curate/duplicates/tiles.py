"""The scan of all pairs of a set of rows, tile by tile, in low precision.

A tile is a block of rows against a block of rows. The sink says which tiles are worth a product and
takes each tile with its hits: the pairs whose similarity may be above the floor. Blocks are put
down as operands in panels, so that memory does not grow with the rows: two panels, one tile and
what the sink holds; rows may be a memory-mapped file.

Legend: N, M rows of a tile, D dimensions.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from curate.vectors import products
from curate.vectors.exact import Float16Rows
from curate.vectors.hits import Hits, hits_above
from curate.vectors.products import Frame, Operand, Precision

if TYPE_CHECKING:
    import torch

Ints: TypeAlias = NDArray[np.int64]

BLOCK_ROWS, DEVICE_BLOCK_ROWS = 2048, 8192
PANEL_BYTES, DEVICE_PANEL_BYTES = 20 << 20, 1 << 30
ROWS_PER_PIVOT = 1024
FEWEST_ROWS_TO_SORT = 8192


@dataclass(frozen=True, slots=True)
class Tile:
    """A tile of the scan: rows top.. against rows left.. of the scanned set.

    values [N, M] and hits as in products; a and b are the operands of its sides. On the diagonal
    (top == left) each pair is there twice, and each row beside itself.
    """

    top: int
    left: int
    values: torch.Tensor
    hits: Hits
    a: Operand
    b: Operand


class Sink(Protocol):
    """What is done with the tiles."""

    def threshold(self, top: slice, left: slice) -> float:
        """Return above which similarity a pair of that tile could matter; inf for none."""
        ...

    def take(self, tile: Tile) -> None:
        """Take a tile that has hits."""
        ...


@dataclass(frozen=True, slots=True)
class Extent:
    """Which pairs of `num_rows` rows are compared: all, less those within [first_ghost, num_rows),
    and only across `first_right` where it is given (two blocks of a set too large for one scan).
    """

    num_rows: int
    first_ghost: int
    first_right: int | None = None

    def ends(self) -> list[int]:
        """Return where regions begin and end, ascending."""
        return sorted({0, self.first_right or 0, self.first_ghost, self.num_rows})

    def blocks(self, block_rows: int) -> list[slice]:
        """Return blocks that no boundary cuts."""
        ends = self.ends()
        return [
            slice(start, min(start + block_rows, stop))
            for first, stop in zip(ends[:-1], ends[1:], strict=True)
            for start in range(first, stop, block_rows)
        ]

    def compares(self, top: slice, left: slice) -> bool:
        """Return whether the pairs of two blocks, top before left, are to be compared."""
        if top.start >= self.first_ghost:
            return False
        return self.first_right is None or top.start < self.first_right <= left.start


def scan(
    rows: Float16Rows,
    index: Ints,
    extent: Extent,
    *,
    sink: Sink,
    precision: Precision = "auto",
    block_rows: int | None = None,
    device: str | None = None,
) -> None:
    """Hand the sink every tile of the extent in which a similarity may be above its threshold.

    Args:
        rows: float16 [*, d]; index: which of them make the scanned set, in scan order.
        block_rows: side of a tile; by default what suits the device.
        device: where the products are made, "cpu" by default; values and hits of a tile are there.
    """
    place = device or "cpu"
    frame = products.fit(_sampled(rows, index, place), precision, num_compared=len(index))
    blocks = extent.blocks(block_rows or _default_block_rows(len(index), place))
    widest = max((block.stop - block.start for block in blocks), default=0)
    buffer = products.tile_buffer(frame, widest * widest, place)
    room = PANEL_BYTES if place == "cpu" else DEVICE_PANEL_BYTES
    per_panel = max(1, room // max(1, widest * rows.shape[1] * frame.bytes_per_value))
    panels = [blocks[at : at + per_panel] for at in range(0, len(blocks), per_panel)]
    panel_of = _Panels(frame, rows, index, place)
    for number, upper in enumerate(panels):
        tops = lefts = panel_of(upper)
        for lower in panels[number:]:
            if lower is not upper:
                del lefts  # before the next is made: two panels at a time
                lefts = panel_of(lower)
            for top, left in _tiles(upper, lower, extent):
                _take_tile(sink, tops[top.start], lefts[left.start], top, left, buffer)
        del tops, lefts


def _take_tile(
    sink: Sink, a: Operand, b: Operand, top: slice, left: slice, buffer: torch.Tensor
) -> None:
    threshold = sink.threshold(top, left)
    if threshold == np.inf:
        return
    values = products.product(a, b, buffer)
    hits = hits_above(values, a, b, threshold)
    if len(hits.row):
        sink.take(Tile(top.start, left.start, values, hits, a, b))


def _default_block_rows(num_rows: int, device: str) -> int:
    """Return a side of tiles: small enough that few of a small set lie on the diagonal."""
    if device != "cpu":
        return DEVICE_BLOCK_ROWS
    if num_rows > 8 * BLOCK_ROWS:
        return BLOCK_ROWS
    return min(BLOCK_ROWS // 2, max(BLOCK_ROWS // 4, -(-num_rows // 2)))


def _tiles(upper: list[slice], lower: list[slice], extent: Extent) -> Iterator[tuple[slice, slice]]:
    for top in upper:
        for left in lower:
            if top.start <= left.start and extent.compares(top, left):
                yield top, left


@dataclass(frozen=True, slots=True)
class _Panels:
    """Makes the operands of some blocks, by where each starts."""

    frame: Frame
    rows: Float16Rows
    index: Ints
    device: str

    def __call__(self, blocks: list[slice]) -> dict[int, Operand]:
        return {
            block.start: self.frame.operand(_on(self.device, self.rows, self.index[block]))
            for block in blocks
        }


def _on(device: str, rows: Float16Rows, index: Ints) -> torch.Tensor:
    """Return some rows on a device."""
    return products.as_tensor(np.asarray(rows[as_slice(index)])).to(device)


def _sampled(rows: Float16Rows, index: Ints, device: str) -> torch.Tensor:
    return _on(device, rows, index[:: max(1, -(-len(index) // products.FITTED_ROWS))])


def as_slice(index: Ints) -> slice | Ints:
    """Return a run of indices as a slice, which reads faster."""
    if len(index) and (np.diff(index) == 1).all():
        return slice(int(index[0]), int(index[-1]) + 1)
    return index


def sorted_by_likeness(
    rows: Float16Rows,
    index: Ints,
    extent: Extent,
    *,
    precision: Precision = "auto",
    device: str | None = None,
) -> Ints:
    """Return the index with like rows side by side, within the extent's regions.

    Rows go by the nearest of a few of them, roughly: the order changes no result, but then most
    tiles have no hits and the others many. Costs 1 / ROWS_PER_PIVOT of the scan.
    """
    if len(index) < FEWEST_ROWS_TO_SORT:
        return index
    place = device or "cpu"
    block_rows = _default_block_rows(len(index), place)
    region = np.searchsorted(extent.ends(), np.arange(len(index)), side="right")
    pivots = index[::ROWS_PER_PIVOT]
    frame = products.fit(_sampled(rows, index, place), precision, num_compared=len(pivots))
    pivot_rows = frame.operand(_on(place, rows, pivots))
    buffer = products.tile_buffer(frame, block_rows * len(pivots), place)
    nearest = np.empty(len(index), np.int32)
    for start in range(0, len(index), block_rows):
        part = slice(start, start + block_rows)
        block = frame.operand(_on(place, rows, index[part]))
        nearest[part] = products.product(block, pivot_rows, buffer).argmax(dim=1).cpu().numpy()
    return index[np.lexsort((nearest, region))]
