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
CLIP_ABOVE = SELECT_REASONS.index("clip_band_above")
CENTROID_ABOVE = SELECT_REASONS.index("centroid_band_above")
NOT_SAMPLED = SELECT_REASONS.index("not_sampled")


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

    def take(self, at: NDArray[np.intp]) -> Selectable:
        """Return the rows at these positions."""
        return Selectable(
            self.uid[at], self.clip_score[at], self.centroid_cosine[at], self.cluster[at]
        )


@dataclass(frozen=True, slots=True)
class Selected:
    """Each row's fate: keep; reason, an index into SELECT_REASONS; score and cutoff.

    A band's score is the row's key and its cutoff the nearest key that stayed. NaN means none.
    """

    keep: Masks
    reason: NDArray[np.uint8]
    score: Float64s
    cutoff: Float64s

    @classmethod
    def with_all_kept(cls, num_rows: int) -> Selected:
        """Return the fates before the first step, for the steps to change."""
        nothing = np.full(num_rows, np.nan), np.full(num_rows, np.nan)
        return cls(np.ones(num_rows, np.bool_), np.zeros(num_rows, np.uint8), *nothing)

    def drop(
        self,
        rows: NDArray[np.intp],
        code: int,
        *,
        scores: Float64s | None = None,
        cutoff: float = math.nan,
    ) -> None:
        """Drop the rows at these positions: `code` is the reason's, scores float64 [len(rows)]."""
        self.keep[rows] = False
        self.reason[rows] = code
        if scores is not None:
            self.score[rows] = scores
        self.cutoff[rows] = cutoff

    def drop_outside(
        self, left: NDArray[np.intp], keys: Float64s, found: Band, *, code_above: int
    ) -> None:
        """Drop those of the rows at `left`, with these keys, that are outside the band."""
        for code, outside, cutoff in (
            (code_above, found.above, found.largest_key),
            (code_above + 1, found.below, found.smallest_key),
        ):
            self.drop(left[outside], code, scores=keys[outside], cutoff=cutoff)


def band(keys: Float64s, uids: Uint64s, lo: Share, hi: Share) -> Band:
    """Return the rows ranked floor(lo * n) <= rank < floor(hi * n) by key, largest first.

    Equal keys rank by uid, smallest first. `lo` and `hi` are taken as the decimals they are written
    as: 0.29 of 100 rows is 29.

    Example: n = 10, lo = "0.4", hi = "0.6" -> the fifth and the sixth largest keys.
    Raises:
        UserError: not 0 <= lo < hi <= 1.
    """
    start, stop = band_ranks(len(keys), lo, hi)
    order = np.lexsort((uids, -keys))
    rank = np.empty(len(keys), np.int64)
    rank[order] = np.arange(len(keys))
    above, below = rank < start, rank >= stop
    largest = float(keys[order[start]]) if start < stop else math.nan
    smallest = float(keys[order[stop - 1]]) if start < stop else math.nan
    return Band(~(above | below), above, below, largest, smallest)


def band_ranks(num_rows: int, lo: Share, hi: Share) -> tuple[int, int]:
    """Return the 0-based ranks [start, stop) of the rows that a band keeps of so many.

    Raises: UserError: not 0 <= lo < hi <= 1.
    """
    start, stop = (math.floor(end * num_rows) for end in _ends(lo, hi))
    return start, stop


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
    fate = Selected.with_all_kept(len(rows.uid))
    if clip_band is not None:
        _apply_band(fate, rows.clip_score, rows.uid, clip_band, code_above=CLIP_ABOVE)
    if centroid_band is not None:
        _apply_band(fate, rows.centroid_cosine, rows.uid, centroid_band, code_above=CENTROID_ABOVE)
    if num_samples is not None:
        _apply_sample(fate, rows, num_samples, seed, policy)
    return fate


def _apply_band(
    fate: Selected, keys: Float64s, uids: Uint64s, ends: tuple[Share, Share], *, code_above: int
) -> None:
    left = np.flatnonzero(fate.keep)
    found = band(keys[left], uids[left], *ends)
    fate.drop_outside(left, keys[left], found, code_above=code_above)


def _apply_sample(
    fate: Selected, rows: Selectable, num_samples: int, seed: int, policy: Policy
) -> None:
    must_be_a_count(num_samples)
    left = np.flatnonzero(fate.keep)
    uids = rows.uid[left]
    if policy == "paper":
        fate.drop(left[~sample_smallest(uids, num_samples, seed)], NOT_SAMPLED)
        return
    score, order = _wanted_first(rows, left, seed, policy)
    out, cutoff = order[num_samples:], math.nan
    if 0 < num_samples <= len(left):
        cutoff = float(score[order[num_samples - 1]])
    fate.drop(left[out], NOT_SAMPLED, scores=score[out], cutoff=cutoff)


def must_be_a_count(num_samples: int) -> None:
    """Check the number of rows to sample. Raises: UserError when it is negative."""
    if num_samples < 0:
        raise UserError(
            f"select.num_samples is {num_samples}.",
            "It is a count of rows.",
            "Give 0 or more, or null to keep all.",
        )


def _wanted_first(
    rows: Selectable, left: NDArray[np.intp], seed: int, policy: Policy
) -> tuple[Float64s, NDArray[np.intp]]:
    """Return the score of the rows `left` and their order, the most wanted first."""
    if policy == "top_clip":
        clip = rows.clip_score[left]
        return clip, np.lexsort((rows.uid[left], -clip))
    hashes = sample_hashes(rows.uid[left], seed)
    rank = ranks_in_cluster(hashes, rows.cluster[left])
    return rank.astype(np.float64), np.lexsort((hashes, rank))


def ranks_in_cluster(hashes: Uint64s, clusters: NDArray[np.uint32]) -> NDArray[np.uint32]:
    """Return each row's 0-based rank among its cluster's rows by sample hash, uint32 [n].

    Taking rows by (rank within their cluster, hash) fills all clusters evenly: after m rows each
    cluster has given c rows, or all it has, or c + 1 where its hash came first.
    """
    order = np.lexsort((hashes, clusters))
    starts = np.flatnonzero(np.append(True, np.diff(clusters[order].astype(np.int64)) != 0))
    sizes = np.diff(starts, append=len(order))
    rank = np.empty(len(order), np.uint32)
    rank[order] = np.arange(len(order)) - np.repeat(starts, sizes)
    return rank


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
