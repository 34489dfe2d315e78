"""The selection by its definition, slowly: each function is what the fast one must equal.

Embeddings become integers (a float16 is a multiple of 2^-24), so nothing here can round: dots are
integer sums, thresholds and band ends are fractions, sorting is Python's own.
"""

from __future__ import annotations

from collections.abc import Sequence
from decimal import Decimal
from fractions import Fraction
from math import floor, isfinite, sqrt

import numpy as np
from numpy.typing import NDArray

Units = NDArray[np.int64]
UNIT = 2**24


def units(values: NDArray[np.floating]) -> Units:
    """Return the values as integer counts of 2^-24, or fail where one is no such multiple."""
    counts = (values.astype(np.float64) * UNIT).astype(np.int64)
    assert (counts / UNIT == values).all()
    return counts


def is_usable(image: Sequence[float], text: Sequence[float]) -> bool:
    """Return whether both embeddings are finite, not zero and of norm at most 5."""
    return all(
        all(isfinite(v) for v in row) and 0 < sum(Fraction(v) ** 2 for v in row) <= 25
        for row in (image, text)
    )


def dot(a: Units, b: Units) -> Fraction:
    """Return the dot of two rows."""
    return Fraction(sum(int(x) * int(y) for x, y in zip(a, b, strict=True)), UNIT**2)


def nearest(x: Units, centroids: Units) -> tuple[int, Fraction]:
    """Return (the centroid at the least squared distance, the smallest on a tie; that distance)."""
    distances = [int(np.dot(x - c, x - c)) for c in centroids]
    best = min(range(len(centroids)), key=lambda k: (distances[k], k))
    return best, Fraction(distances[best], UNIT**2)


def centroid_cosine(x: Units, c: Units) -> float:
    """Return x.c / |c|, each of the three operations rounded once; 0 for a zero centroid."""
    return float(dot(x, c)) / sqrt(float(dot(c, c))) if c.any() else 0.0


def component_of(rows: Units, similarity_above: float) -> list[int]:
    """Return per row the smallest row that a path of similarities above the threshold leads to."""
    is_edge = rows @ rows.T > floor(Fraction(similarity_above) * UNIT**2)
    label = [-1] * len(rows)
    for first in range(len(rows)):
        stack = [first] if label[first] < 0 else []
        while stack:
            row = stack.pop()
            if label[row] < 0:
                label[row] = first
                stack.extend(j for j in np.flatnonzero(is_edge[row]) if label[j] < 0)
    return label


def survivor(
    members: Sequence[int],
    d2: Sequence[Fraction],
    uids: Sequence[int],
    clip: Sequence[Fraction],
    keep: str,
) -> int:
    """Return the member that a component keeps."""
    if keep == "clip_max":
        return min(members, key=lambda i: (-clip[i], uids[i]))
    ranked = sorted(members, key=lambda i: (d2[i], uids[i]))
    return ranked[{"middle": len(ranked) // 2, "far": -1, "near": 0}[keep]]


def band(keys: dict[int, float], lo: str, hi: str) -> set[int]:
    """Return the uids of rank floor(lo n) to floor(hi n) - 1, largest key first, then uid."""
    ranked = sorted(keys, key=lambda uid: (-keys[uid], uid))
    start, stop = (floor(Fraction(Decimal(end)) * len(ranked)) for end in (lo, hi))
    return set(ranked[start:stop])


def sample(uids: set[int], num_samples: int, seed: int) -> set[int]:
    """Return the uids with the smallest splitmix64(uid + seed * golden gamma)."""
    ranked = sorted(uids, key=lambda uid: splitmix64(uid + seed * 0x9E3779B97F4A7C15))
    return set(ranked[:num_samples])


def splitmix64(state: int) -> int:
    """Return the next output of the published generator from this state."""
    z = (state + 0x9E3779B97F4A7C15) % 2**64
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
    return z ^ (z >> 31)


def random_rows(num_rows: int, dim: int, *, seed: int = 0) -> NDArray[np.float16]:
    """Return rows of norm 1 in random directions."""
    rows = np.random.default_rng(seed).normal(size=(num_rows, dim))
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float16)
