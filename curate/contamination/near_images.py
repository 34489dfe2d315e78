"""Which embeddings are nearer to an evaluation set's than a threshold, exactly.

Products of low precision, with a proven bound, only list what may be above it; the exact dot
decides (curate/vectors/exact.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from curate.contamination.pairs import Pairs, Ranked, joined, ranked
from curate.vectors import exact, hits, products
from curate.vectors.exact import Float16Rows
from manifests.errors import UserError

if TYPE_CHECKING:
    from curate.vectors.products import Frame, Operand

ROWS_PER_TILE = 2048


def near_pairs(ours: Float16Rows, theirs: Float16Rows, *, above: float, most: int) -> Ranked:
    """Return the pairs whose exact dot is above the threshold (strictly), the `most` largest a row.

    Args: ours float16 [n, d], theirs float16 [m, d], rows that `exact.reject_reasons` accepts.
    Raises: UserError when their dimensions differ.
    """
    if not len(ours) or not len(theirs):
        return joined([])
    if ours.shape[1] != theirs.shape[1]:
        raise UserError(
            f"The rows' embeddings have {ours.shape[1]} dimensions, those of the evaluation set "
            f"{theirs.shape[1]}.",
            "They were made by different models.",
            "Give decontaminate.embed the model that made the rows' embeddings.",
        )
    device = products.own_device()
    with products.engine_threads(device):
        items = products.as_tensor(theirs).to(device)
        frame = products.fit(items, num_compared=len(ours))
        starts = range(0, len(theirs), ROWS_PER_TILE)
        sides = {at: frame.operand(items[at : at + ROWS_PER_TILE]) for at in starts}
        found = (
            ranked(one, most=most, largest_first=True)
            for one in _blocks(ours, theirs, frame, sides, above=above, device=device)
        )
        return joined(found)


def _blocks(
    ours: Float16Rows,
    theirs: Float16Rows,
    frame: Frame,
    sides: dict[int, Operand],
    *,
    above: float,
    device: str,
) -> Iterator[Pairs]:
    """Yield the pairs above the threshold of each block of rows."""
    buffer = products.tile_buffer(frame, ROWS_PER_TILE * ROWS_PER_TILE, device)
    for top in range(0, len(ours), ROWS_PER_TILE):
        block = np.ascontiguousarray(ours[top : top + ROWS_PER_TILE])
        a = frame.operand(products.as_tensor(block).to(device))
        found = []
        for left, b in sides.items():
            may_be = hits.pairs_above(products.product(a, b, buffer), a, b, above)
            row, item = may_be.row, may_be.column + left
            dots = exact.row_dots(block[row], theirs[item])
            is_near = dots > above
            found.append((row[is_near] + top, item[is_near], dots[is_near]))
        yield Pairs(*(np.concatenate(column) for column in zip(*found, strict=True)))
