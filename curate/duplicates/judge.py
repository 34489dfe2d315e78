"""Which row of every near-duplicate component stays."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from curate.vectors.exact import Float16Rows, Float64s, Uint64s

Ints: TypeAlias = NDArray[np.int64]
Masks: TypeAlias = NDArray[np.bool_]
Keep = Literal["middle", "far", "near", "clip_max", "inner_middle"]


@dataclass(frozen=True, slots=True)
class Judged:
    """Which rows stay: bool [n]; and for each row the row its component keeps: int64 [n]."""

    keep: Masks
    survivor: Ints


def judge(
    labels: Ints,
    d2: Float64s,
    uids: Uint64s,
    *,
    keep: Keep,
    clip_scores: Float64s | None = None,
    rows: Float16Rows | None = None,
) -> Judged:
    """Return which row of every component stays.

    A component of m rows is put in order and the row at one position stays; uid breaks ties:
    `middle` position m // 2 by d2 (so a pair keeps the farther row), `far` m - 1, `near` 0,
    `clip_max` the largest clip score, `inner_middle` position m // 2 by distance to the mean of the
    component's rows. That mean is rounded, so inner_middle alone is not exact.

    Args:
        labels: int64 [n], equal within a component (see components).
        d2: float64 [n], exact squared distance of each row to its own cluster's centroid.
        clip_scores: float64 [n], needed by clip_max.
        rows: float16 [n, d], needed by inner_middle.
    """
    order, starts, sizes = _grouped(labels, uids, _key(keep, labels, d2, clip_scores, rows))
    first = np.zeros_like(sizes)
    position = {"far": sizes - 1, "near": first, "clip_max": first}.get(keep, sizes // 2)
    winner = order[starts + position]
    is_kept = np.zeros(len(labels), np.bool_)
    is_kept[winner] = True
    survivor = np.empty(len(labels), np.int64)
    survivor[order] = np.repeat(winner, sizes)
    return Judged(is_kept, survivor)


def distance_to_mean(rows: Float16Rows, labels: Ints, *, block_rows: int = 4096) -> Float64s:
    """Return each row's squared distance to the mean of its component, in bounded memory."""
    order, starts, sizes = _grouped(labels)
    group = np.repeat(np.arange(len(starts)), sizes)
    distance = np.zeros(len(labels))
    cuts = np.append(np.unique(starts // block_rows, return_index=True)[1], len(starts))
    for first, last in zip(cuts[:-1], cuts[1:], strict=True):  # components whose means are held
        stop = starts[last - 1] + sizes[last - 1]
        parts = [
            slice(s, min(s + block_rows, stop)) for s in range(starts[first], stop, block_rows)
        ]
        means = np.zeros((last - first, rows.shape[1]))
        for part in parts:
            np.add.at(means, group[part] - first, rows[order[part]].astype(np.float64))
        means /= sizes[first:last, None]
        for part in parts:
            off = rows[order[part]] - means[group[part] - first]
            distance[order[part]] = np.einsum("nd,nd->n", off, off)
    return distance


def _key(
    keep: Keep,
    labels: Ints,
    d2: Float64s,
    clip_scores: Float64s | None,
    rows: Float16Rows | None,
) -> Float64s:
    if keep == "clip_max":
        if clip_scores is None:
            raise ValueError("clip_max needs clip_scores")
        return -clip_scores
    if keep == "inner_middle":
        if rows is None:
            raise ValueError("inner_middle needs rows")
        return distance_to_mean(rows, labels)
    return d2


def _grouped(labels: Ints, *minor_to_major: NDArray[Any]) -> tuple[Ints, Ints, Ints]:
    """Return the rows by label, then by the keys, the last one first; group starts and sizes."""
    order = np.lexsort((*minor_to_major, labels))
    ordered = labels[order]
    starts = np.flatnonzero(np.diff(ordered, prepend=ordered[:1] - 1))
    return order, starts, np.diff(starts, append=len(labels))
