"""Near-duplicates within many small clusters at once: what a cluster costs beside its products.

Rows of all clusters are put down as operands together, each cluster's pairs are scanned in panels,
and what is found is measured and made a forest together. A cluster so dense that its pairs are too
many to list is left to `forest`, which lists few of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
from numpy.typing import NDArray

from curate.vectors import products
from curate.vectors.exact import Float16Rows, Float64s, pair_dots
from curate.vectors.hits import above_diagonal, hits_above, pairs_of
from curate.vectors.products import Operand, Precision, engine_threads

if TYPE_CHECKING:
    import torch

Ints: TypeAlias = NDArray[np.int64]

MOST_ROWS = 4096
"""Of a small cluster: beyond, the scan of `forest` costs little beside its products."""
PANEL_ROWS = 512
ROWS_PER_OPERAND = 1 << 14
PAIRS_PER_ROW = 64
"""More of them in a panel, and its cluster is dense."""


@dataclass(frozen=True, slots=True)
class Found:
    """Pairs row_a < row_b: int64 [p], with exact similarity float64 [p], and what was left out."""

    row_a: Ints
    row_b: Ints
    similarity: Float64s
    dense: tuple[int, ...]


def pairs_within(
    rows: Float16Rows,
    parts: Sequence[slice],
    floor: float,
    *,
    precision: Precision = "auto",
    device: str | None = None,
) -> Found:
    """Return all pairs of rows of one part with similarity above the floor; dense parts' numbers.

    Args:
        rows: float16 [n, d], finite, norm at most 5. parts: ascending, apart, of MOST_ROWS at most.
        device: where the products are made; "cpu" by default.
    """
    with engine_threads(device or "cpu"):
        found, dense = [_NONE], []
        for number, listed in _scanned(rows, parts, floor, precision, device or "cpu"):
            if listed is None:
                dense.append(number)
            else:
                found.append(listed)
    a, b = (np.concatenate(column) for column in zip(*found, strict=True))
    similarity = pair_dots(rows, a, b)
    above = similarity > floor
    return Found(a[above], b[above], similarity[above], tuple(dense))


_Listed: TypeAlias = tuple[Ints, Ints]
_NONE: _Listed = (np.empty(0, np.int64), np.empty(0, np.int64))


def _scanned(
    rows: Float16Rows, parts: Sequence[slice], floor: float, precision: Precision, device: str
) -> Iterator[tuple[int, _Listed | None]]:
    """Yield each part's number with the pairs that may be above the floor, or None if too many."""
    if not parts:
        return
    frame = products.fit(products.as_tensor(rows).to(device), precision)
    buffer = products.tile_buffer(frame, PANEL_ROWS * MOST_ROWS, device)
    for numbers in _batches(parts):
        first, last = parts[numbers[0]].start, parts[numbers[-1]].stop
        operand = frame.operand(products.as_tensor(rows[first:last]).to(device))
        for number in numbers:
            start, stop = parts[number].start - first, parts[number].stop - first
            listed = _listed(operand.part(slice(start, stop)), floor, buffer)
            if listed is not None:
                listed = (listed[0] + parts[number].start, listed[1] + parts[number].start)
            yield number, listed


def _batches(parts: Sequence[slice]) -> Iterator[list[int]]:
    """Yield runs of parts of about ROWS_PER_OPERAND rows from the first to the last."""
    batch: list[int] = []
    for number, part in enumerate(parts):
        if batch and part.stop - parts[batch[0]].start > ROWS_PER_OPERAND:
            yield batch
            batch = []
        batch.append(number)
    if batch:
        yield batch


def _listed(rows: Operand, floor: float, buffer: torch.Tensor) -> _Listed | None:
    """Return the pairs of a cluster's rows that may be above the floor, or None if too many."""
    found = [_NONE]
    for top in range(0, len(rows), PANEL_ROWS):
        a, b = rows.part(slice(top, top + PANEL_ROWS)), rows.part(slice(top, None))
        tile = products.product(a, b, buffer)
        hits = hits_above(tile, a, b, floor)
        if not len(hits.row):
            continue
        hits = above_diagonal(hits)
        if hits.count() > PAIRS_PER_ROW * len(b):
            return None
        pairs = pairs_of(hits, tile, a, b)
        pairs = pairs.take(pairs.estimate + pairs.slack > floor)
        found.append((pairs.row + top, pairs.column + top))
    row_a, row_b = (np.concatenate(column) for column in zip(*found, strict=True))
    return row_a, row_b
