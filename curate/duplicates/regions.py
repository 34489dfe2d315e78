"""Which rows are compared with which: rows, ghosts, and the two sides of a set cut in blocks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from curate.duplicates.components import first_copies
from curate.duplicates.tiles import Extent
from curate.vectors.exact import Float16Rows

Ints: TypeAlias = NDArray[np.int64]
Masks: TypeAlias = NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Copies:
    """Rows with the bytes of an earlier row of their region: row and original int64 [c].

    are_compared: bool [c], whether the two are a pair that the scan would have met.
    """

    row: Ints
    original: Ints
    are_compared: Masks


@dataclass(frozen=True, slots=True)
class Regions:
    """Row numbers in scan order, and where the regions begin in it."""

    order: Ints
    extent: Extent

    @classmethod
    def one(cls, num_rows: int) -> Regions:
        """Return the region in which every row is compared with every other."""
        return cls(np.arange(num_rows), Extent(num_rows, num_rows))

    @classmethod
    def of(cls, is_ghost: Masks, is_right: Masks | None = None) -> Regions:
        """Return the regions of rows of which some are ghosts: they do not meet each other.

        With `is_right`, left rows meet right ones only; ghosts are all on one side then, or the
        left side has none.
        """
        right = np.zeros(len(is_ghost), np.bool_) if is_right is None else is_right
        order = np.lexsort((np.arange(len(is_ghost)), is_ghost, right))
        first_right = int((~right).sum()) if is_right is not None else None
        first_ghost = len(order) - int((is_ghost & (right | (is_right is None))).sum())
        return cls(order, Extent(len(order), first_ghost, first_right))

    def without_copies(self, rows: Float16Rows) -> tuple[Regions, Copies]:
        """Return the regions of the different rows, and the copies that were taken out."""
        first, ends = np.arange(len(rows)), self.extent.ends()
        compared = np.zeros(len(rows), np.bool_)
        for start, stop in zip(ends[:-1], ends[1:], strict=True):
            part = np.sort(self.order[start:stop])
            same = first_copies(rows if len(part) == len(rows) else np.asarray(rows[part]))
            first[part] = part[same]
            compared[part] = self.extent.first_right is None and start < self.extent.first_ghost
        copy = np.flatnonzero(first != np.arange(len(rows)))
        is_different = first[self.order] == self.order
        number = np.append(0, np.cumsum(is_different))
        extent = Extent(
            int(number[-1]),
            int(number[self.extent.first_ghost]),
            None if self.extent.first_right is None else int(number[self.extent.first_right]),
        )
        return Regions(self.order[is_different], extent), Copies(copy, first[copy], compared[copy])
