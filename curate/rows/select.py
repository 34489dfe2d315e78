"""Which rows make the coreset: two rank bands, then a sample.

    clip band      rows by clip score, largest first; ranks lo..hi stay
    centroid band  the rest by x.c / |c|, largest first, ranked anew; ranks lo..hi stay
    sample         the num_samples rows with the smallest hash of (uid, seed)

Bands are half open and their ends exact decimals, so bands that touch lose no row and share none.
Nothing depends on the order in which rows are given. Source: Bunny, arXiv:2402.11530, section 2.3.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from curate.vectors.exact import Float64s, Uint64s, sample_hashes, sample_smallest
from manifests.errors import UserError

Masks: TypeAlias = NDArray[np.bool_]
Share: TypeAlias = str | float | Decimal | Fraction
Policy = Literal["paper", "top_clip", "balanced"]

SELECT_REASONS = (
    "",
    "clip_band_above",
    "clip_band_below",
    "centroid_band_above",
    "centroid_band_below",
    "not_sampled",
)


@dataclass(frozen=True, slots=True)
class Band:
    """Where each row stands to a band: masks bool [n], and the largest and smallest key kept.

    The two keys are NaN when no row is kept. A row outside may have the same key as one inside:
    then its uid decided.
    """

    keep: Masks
    above: Masks
    below: Masks
    largest_key: float
    smallest_key: float


@dataclass(frozen=True, slots=True)
class Selectable:
    """The rows to select from, as columns of equal length.

    uid uint64, distinct; clip_score float64; centroid_cosine float64; cluster uint32.
    """

    uid: Uint64s
    clip_score: Float64s
    centroid_cosine: Float64s
    cluster: NDArray[np.uint32]


@dataclass(frozen=True, slots=True)
class Selected:
    """Each row's fate: keep; reason, an index into SELECT_REASONS; score and cutoff.

    A band's score is the row's key and its cutoff the nearest key that stayed. NaN means none.
    """

    keep: Masks
    reason: NDArray[np.uint8]
    score: Float64s
    cutoff: Float64s


def band(keys: Float64s, uids: Uint64s, lo: Share, hi: Share) -> Band:
    """Return the rows ranked floor(lo * n) <= rank < floor(hi * n) by key, largest first.

    Equal keys rank by uid, smallest first. `lo` and `hi` are taken as the decimals they are written
    as: 0.29 of 100 rows is 29.

    Example: n = 10, lo = "0.4", hi = "0.6" -> the fifth and the sixth largest keys.
    Raises:
        UserError: not 0 <= lo < hi <= 1.
    """
    start, stop = (math.floor(end * len(keys)) for end in _ends(lo, hi))
    order = np.lexsort((uids, -keys))
    rank = np.empty(len(keys), np.int64)
    rank[order] = np.arange(len(keys))
    above, below = rank < start, rank >= stop
    largest = float(keys[order[start]]) if start < stop else math.nan
    smallest = float(keys[order[stop - 1]]) if start < stop else math.nan
    return Band(~(above | below), above, below, largest, smallest)


def select(
    rows: Selectable,
    *,
    clip_band: tuple[Share, Share] | None,
    centroid_band: tuple[Share, Share] | None,
    num_samples: int | None,
    seed: int,
    policy: Policy = "paper",
) -> Selected:
    """Return each row's fate after the clip band, the centroid band and the sample, in that order.

    A step that is None is left out. The policy says which `num_samples` rows stay in the last step
    (all of them when there are not so many):
    `paper` the smallest sample hashes; `top_clip` the largest clip scores, ties to the smallest
    uid; `balanced` at most c rows of each cluster, by sample hash, with the largest c that fits and
    the rest from the clusters that have more, one each, by sample hash.

    Raises:
        UserError: a band is not 0 <= lo < hi <= 1, or num_samples is negative.
    """
    n = len(rows.uid)
    fate = Selected(
        np.ones(n, np.bool_), np.zeros(n, np.uint8), np.full(n, np.nan), np.full(n, np.nan)
    )
    if clip_band is not None:
        _apply_band(fate, rows.clip_score, rows.uid, clip_band, code_above=1)
    if centroid_band is not None:
        _apply_band(fate, rows.centroid_cosine, rows.uid, centroid_band, code_above=3)
    if num_samples is not None:
        _apply_sample(fate, rows, num_samples, seed, policy)
    return fate


def _apply_band(
    fate: Selected, keys: Float64s, uids: Uint64s, ends: tuple[Share, Share], *, code_above: int
) -> None:
    left = np.flatnonzero(fate.keep)
    found = band(keys[left], uids[left], *ends)
    for code, outside, cutoff in (
        (code_above, found.above, found.largest_key),
        (code_above + 1, found.below, found.smallest_key),
    ):
        _drop(fate, left[outside], code)
        fate.score[left[outside]] = keys[left[outside]]
        fate.cutoff[left[outside]] = cutoff


def _apply_sample(
    fate: Selected, rows: Selectable, num_samples: int, seed: int, policy: Policy
) -> None:
    if num_samples < 0:
        raise UserError(
            f"select.num_samples is {num_samples}.",
            "It is a count of rows.",
            "Give 0 or more, or null to keep all.",
        )
    left = np.flatnonzero(fate.keep)
    uids = rows.uid[left]
    if policy == "paper":
        _drop(fate, left[~sample_smallest(uids, num_samples, seed)], code=5)
        return
    score, order = _wanted_first(rows, left, seed, policy)
    out = left[order[num_samples:]]
    _drop(fate, out, code=5)
    fate.score[out] = score[order[num_samples:]]
    if 0 < num_samples <= len(left):
        fate.cutoff[out] = score[order[num_samples - 1]]


def _wanted_first(
    rows: Selectable, left: NDArray[np.intp], seed: int, policy: Policy
) -> tuple[Float64s, NDArray[np.intp]]:
    """Return the score of the rows `left` and their order, the most wanted first.

    Taking rows by (rank within their cluster, hash) fills all clusters evenly: after m rows each
    cluster has given c rows, or all it has, or c + 1 where its hash came first.
    """
    if policy == "top_clip":
        clip = rows.clip_score[left]
        return clip, np.lexsort((rows.uid[left], -clip))
    hashes, cluster = sample_hashes(rows.uid[left], seed), rows.cluster[left]
    order = np.lexsort((hashes, cluster))
    starts = np.flatnonzero(np.append(True, np.diff(cluster[order].astype(np.int64)) != 0))
    sizes = np.diff(starts, append=len(order))
    rank = np.empty(len(order))
    rank[order] = np.arange(len(order)) - np.repeat(starts, sizes)
    return rank, np.lexsort((hashes, rank))


def _drop(fate: Selected, out: NDArray[np.intp], code: int) -> None:
    fate.keep[out] = False
    fate.reason[out] = code


def _ends(lo: Share, hi: Share) -> tuple[Fraction, Fraction]:
    ends = _exact_decimal(lo), _exact_decimal(hi)
    if not 0 <= ends[0] < ends[1] <= 1:
        raise UserError(
            f"The band [{lo}, {hi}] is not a part of the ranking.",
            "A band keeps the rows from share lo to share hi, counted from the largest.",
            "Give 0 <= lo < hi <= 1, such as [0.40, 0.60].",
        )
    return ends


def _exact_decimal(share: Share) -> Fraction:
    """Return the decimal as written: the shortest one that reads back as the float, for a float."""
    if isinstance(share, float):
        share = repr(float(share))
    try:
        return Fraction(share)
    except (ValueError, OverflowError) as error:  # "x", "nan", "inf"
        raise UserError(
            f"{share!r} is not a share.", str(error), "Write a decimal between 0 and 1."
        ) from error
