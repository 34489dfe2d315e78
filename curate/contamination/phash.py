"""Perceptual hashes: pictures that look alike differ in few bits.

A picture, upright, becomes 32 x 32 luminance (ITU-R 601-2, Lanczos). Of its two-dimensional DCT-II
the 8 x 8 lowest frequencies but the mean make 63 bits: 1 above their median. Brightness is the mean
alone; contrast scales all alike. Another encoding or size moves only what is near the median.
Source: Zauner, Implementation and Benchmarking of Perceptual Image Hash Functions, 2010, section
3.2.1; the block begins at the mean, as in the ImageHash package, so that pictures of stripes have
bits too.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from curate.contamination.pairs import Pairs, Ranked, Uint64s, joined, ranked

if TYPE_CHECKING:
    from PIL import Image

SIDE = 32
FREQUENCIES = 8
MIN_DEVIATION = 1.0
"""Grey levels, of 255: a picture whose low frequencies deviate less is flat, and its bits noise."""
ROUNDED_TO = 6
"""Decimals: equal frequencies, as symmetric pictures have, compare equal on every machine."""
ROWS_PER_TILE, ITEMS_PER_TILE = 256, 1 << 14


def phash(image: Image.Image) -> int | None:
    """Return the hash of an RGB picture, below 2^64; None for a flat one, which is like any other.

    The lowest bit, the mean's, is 0.
    """
    from PIL import Image
    from scipy.fft import dctn

    small = image.convert("L").resize((SIDE, SIDE), Image.Resampling.LANCZOS)
    waves = dctn(np.asarray(small, np.float64), type=2, norm="ortho")
    low = np.round(waves[:FREQUENCIES, :FREQUENCIES].ravel()[1:], ROUNDED_TO)
    if np.sqrt(np.square(low).sum()) / SIDE < MIN_DEVIATION:  # norm="ortho" keeps sums of squares
        return None
    bits = np.concatenate([[False], low > np.median(low)])
    return int.from_bytes(np.packbits(bits, bitorder="little").tobytes(), "little")


def near_pairs(ours: Uint64s, theirs: Uint64s, *, at_most: int, most: int) -> Ranked:
    """Return the pairs that differ in at most `at_most` bits, the `most` nearest of each row.

    All are compared. Args: ours uint64 [n], theirs uint64 [m].
    """
    return joined(
        ranked(one, most=most, largest_first=False) for one in _blocks(ours, theirs, at_most)
    )


def _blocks(ours: Uint64s, theirs: Uint64s, at_most: int) -> Iterator[Pairs]:
    for top in range(0, len(ours), ROWS_PER_TILE):
        found = []
        for left in range(0, len(theirs), ITEMS_PER_TILE):
            differing = ours[top : top + ROWS_PER_TILE, None] ^ theirs[left : left + ITEMS_PER_TILE]
            distance = np.bitwise_count(differing)
            row, item = np.nonzero(distance <= at_most)
            found.append((row + top, item + left, distance[row, item].astype(np.float64)))
        if found:
            yield Pairs(*(np.concatenate(column) for column in zip(*found, strict=True)))
