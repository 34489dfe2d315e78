"""Which row is like which item of an evaluation set, by one method."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]
Uint64s = npt.NDArray[np.uint64]


class Pairs(NamedTuple):
    """Some pairs: row, item int64 [p] by position; score float64 [p], NaN where there is none."""

    row: Ints
    item: Ints
    score: npt.NDArray[np.float64]


class Ranked(NamedTuple):
    """The nearest pairs of each row: and in `num_items`, int64 [p], how many its row had in all."""

    row: Ints
    item: Ints
    score: npt.NDArray[np.float64]
    num_items: Ints


def equal_pairs(ours: npt.NDArray[Any], theirs: npt.NDArray[Any]) -> Pairs:
    """Return the pairs of equal values, without score."""
    order = np.argsort(theirs, kind="stable")
    first = np.searchsorted(theirs, ours, side="left", sorter=order)
    counts = np.searchsorted(theirs, ours, side="right", sorter=order) - first
    row = np.repeat(np.arange(len(ours)), counts)
    within = np.arange(len(row)) - np.repeat(np.cumsum(counts) - counts, counts)
    return Pairs(row, order[np.repeat(first, counts) + within], np.full(len(row), np.nan))


def ranked(pairs: Pairs, *, most: int, largest_first: bool) -> Ranked:
    """Return at most `most` pairs of each row: the best score first, then the smallest item."""
    score = -pairs.score if largest_first else pairs.score
    order = np.lexsort((pairs.item, score, pairs.row))
    row = pairs.row[order]
    is_first = np.ones(len(row), np.bool_)
    is_first[1:] = row[1:] != row[:-1]
    starts = np.flatnonzero(is_first)
    counts = np.diff(np.append(starts, len(row)))
    place = np.arange(len(row)) - np.repeat(starts, counts)
    chosen = order[place < most]
    num_items = np.repeat(counts, counts)[place < most]
    return Ranked(pairs.row[chosen], pairs.item[chosen], pairs.score[chosen], num_items)


def joined(found: Iterable[Ranked]) -> Ranked:
    """Return pairs of several blocks of rows in one."""
    none = Ranked(np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0), np.empty(0, np.int64))
    return Ranked(*(np.concatenate(column) for column in zip(none, *found, strict=True)))
