"""The steps of `curate.rows.select` over parts that are loaded one at a time.

`find_cuts` streams over the parts and returns where each step cuts its order, as one or two rows.
With these cuts `judge` decides about any rows alone, without the others, and as `select` does.

Held in memory: one part, and per band the counts and the collected rows of `order_statistics`. The
policy `balanced` alone also holds all rows that the bands leave, about 40 bytes each while it ranks
them and 4 bytes after: a row's rank is among all rows of its cluster.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from curate.rows.order_statistics import (
    MAX_HELD_ROWS,
    Chunk,
    Float64s,
    Masks,
    Place,
    ReadChunks,
    Uint64s,
    descending_codes,
    key_of,
    rows_at,
)
from curate.rows.select import (
    CENTROID_ABOVE,
    CLIP_ABOVE,
    NOT_SAMPLED,
    SELECT_REASONS,
    Band,
    Policy,
    Selectable,
    Selected,
    Share,
    band_ranks,
    must_be_a_count,
    ranks_in_cluster,
)
from curate.vectors.exact import sample_hashes
from manifests.strict import Strict

LoadPart = Callable[[], Selectable]
Ranks = NDArray[np.uint32]


@dataclass(frozen=True, slots=True)
class Steps:
    """What decides, as the arguments of `curate.rows.select.select`; None leaves a step out."""

    clip_band: tuple[Share, Share] | None
    centroid_band: tuple[Share, Share] | None
    num_samples: int | None
    seed: int
    policy: Policy = "paper"


class Cut(Strict):
    """Which of the rows that reach a step it keeps: those from `first` to `last` in its order."""

    first: Place | None
    """Rows before it are above the band; None: no row is."""
    last: Place | None
    """Rows after it are below the band, or not sampled; None: every row that is not above is."""
    num_above: int
    num_kept: int
    num_below: int

    def above(self, codes: Uint64s, ties: Uint64s) -> Masks:
        """Return which rows come before those that are kept. bool [n]."""
        if self.first is None:
            return np.zeros(len(codes), np.bool_)
        return self.first.rows_before(codes, ties)

    def below(self, codes: Uint64s, ties: Uint64s) -> Masks:
        """Return which rows come after those that are kept. bool [n]."""
        if self.last is None:
            return ~self.above(codes, ties)
        return self.last.rows_after(codes, ties)


class Cuts(Strict):
    """Where each step cuts; None: the step is left out, or keeps every row."""

    seed: int
    policy: Policy
    clip_band: Cut | None = None
    centroid_band: Cut | None = None
    sample: Cut | None = None

    def nearest_kept(self) -> dict[str, float]:
        """Return the key nearest to the cut that stayed, for each reason that dropped any row."""
        found = {
            **_nearest_kept(self.clip_band, CLIP_ABOVE),
            **_nearest_kept(self.centroid_band, CENTROID_ABOVE),
        }
        cutoff = _sample_cutoff(self)
        return found if math.isnan(cutoff) else found | {SELECT_REASONS[NOT_SAMPLED]: cutoff}


def find_cuts(
    parts: Sequence[LoadPart], steps: Steps, *, num_rows: int, max_held: int = MAX_HELD_ROWS
) -> tuple[Cuts, list[Ranks] | None]:
    """Return the cuts, and per part what `judge` needs beside them: ranks for `balanced`, or None.

    Args: parts: each loads its rows anew, for one to a few passes per step; num_rows: of all
    parts; max_held: see `order_statistics.rows_at`.
    Raises: UserError as `select`, and for a key that is NaN; PartDamaged when the parts do not
    have `num_rows` rows.
    """
    cuts, num_left = Cuts(seed=steps.seed, policy=steps.policy), num_rows
    for name, ends, order in (
        ("clip_band", steps.clip_band, _by_clip_score),
        ("centroid_band", steps.centroid_band, _by_centroid_cosine),
    ):
        if ends is not None:
            read = _reader(parts, cuts, order)
            cut = _band_cut(read, ends, num_rows=num_left, max_held=max_held)
            cuts, num_left = cuts.model_copy(update={name: cut}), cut.num_kept
    if steps.num_samples is None:
        return cuts, None
    must_be_a_count(steps.num_samples)
    if steps.num_samples >= num_left:
        return cuts, None
    ranks = _balanced_ranks(parts, cuts) if steps.policy == "balanced" else None
    read = _reader(parts, cuts, _wanted_first, ranks)
    cut = _sample_cut(read, steps.num_samples, num_rows=num_left, max_held=max_held)
    return cuts.model_copy(update={"sample": cut}), ranks


def judge(rows: Selectable, cuts: Cuts, ranks: Ranks | None = None) -> Selected:
    """Return the fates of some rows; each is what it is among all rows of the selection.

    Args: ranks: uint32, for the policy `balanced` only: of the rows that the bands leave, in the
    order of `rows`.
    """
    fate = Selected.with_all_kept(len(rows.uid))
    for cut, keys, code_above in (
        (cuts.clip_band, rows.clip_score, CLIP_ABOVE),
        (cuts.centroid_band, rows.centroid_cosine, CENTROID_ABOVE),
    ):
        if cut is not None:
            left = np.flatnonzero(fate.keep)
            found = _band_of(cut, keys[left], rows.uid[left])
            fate.drop_outside(left, keys[left], found, code_above=code_above)
    if cuts.sample is not None:
        _judge_sample(fate, rows, cuts, cuts.sample, ranks)
    return fate


def _judge_sample(
    fate: Selected, rows: Selectable, cuts: Cuts, cut: Cut, ranks: Ranks | None
) -> None:
    left = np.flatnonzero(fate.keep)
    reaching = rows.take(left)
    out = cut.below(*_wanted_first(reaching, cuts, ranks))
    scores = {"paper": None, "top_clip": reaching.clip_score, "balanced": ranks}[cuts.policy]
    fate.drop(
        left[out],
        NOT_SAMPLED,
        scores=None if scores is None else scores[out].astype(np.float64),
        cutoff=_sample_cutoff(cuts),
    )


def _band_of(cut: Cut, keys: Float64s, uids: Uint64s) -> Band:
    codes = descending_codes(keys)
    above, below = cut.above(codes, uids), cut.below(codes, uids)
    if cut.first is None or cut.last is None:
        return Band(~(above | below), above, below, math.nan, math.nan)
    largest, smallest = key_of(cut.first.code), key_of(cut.last.code)
    return Band(~(above | below), above, below, largest, smallest)


def _band_cut(read: ReadChunks, ends: tuple[Share, Share], *, num_rows: int, max_held: int) -> Cut:
    start, stop = band_ranks(num_rows, *ends)
    ranks = [start, stop - 1] if start < stop else [start] if num_rows else []
    places = rows_at(read, ranks, num_rows=num_rows, max_held=max_held)
    return Cut(
        first=places[0] if places else None,
        last=places[1] if len(places) == 2 else None,
        num_above=start,
        num_kept=stop - start,
        num_below=num_rows - stop,
    )


def _sample_cut(read: ReadChunks, num_samples: int, *, num_rows: int, max_held: int) -> Cut:
    ranks = [num_samples - 1] if num_samples else []
    places = rows_at(read, ranks, num_rows=num_rows, max_held=max_held)
    return Cut(
        first=None,
        last=places[0] if places else None,
        num_above=0,
        num_kept=num_samples,
        num_below=num_rows - num_samples,
    )


Order = Callable[[Selectable, Cuts, Ranks | None], Chunk]
"""Returns the codes and ties by which a step orders some rows."""


def _reader(
    parts: Sequence[LoadPart], cuts: Cuts, order: Order, ranks: Sequence[Ranks] | None = None
) -> ReadChunks:
    """Return the stream of the rows that the cuts so far leave, in a step's order."""

    def read() -> Iterator[Chunk]:
        for number, load in enumerate(parts):
            yield order(_left_of(load(), cuts), cuts, None if ranks is None else ranks[number])

    return read


def _left_of(rows: Selectable, cuts: Cuts) -> Selectable:
    if cuts.clip_band is None and cuts.centroid_band is None:
        return rows
    return rows.take(np.flatnonzero(judge(rows, cuts).keep))


def _by_clip_score(rows: Selectable, cuts: Cuts, ranks: Ranks | None) -> Chunk:
    return descending_codes(rows.clip_score), rows.uid


def _by_centroid_cosine(rows: Selectable, cuts: Cuts, ranks: Ranks | None) -> Chunk:
    return descending_codes(rows.centroid_cosine), rows.uid


def _wanted_first(rows: Selectable, cuts: Cuts, ranks: Ranks | None) -> Chunk:
    if cuts.policy == "top_clip":
        return _by_clip_score(rows, cuts, ranks)
    hashes = sample_hashes(rows.uid, cuts.seed)
    if cuts.policy == "paper":
        return hashes, rows.uid
    assert ranks is not None, "balanced orders by rank in the cluster"
    return ranks.astype(np.uint64), hashes


def _balanced_ranks(parts: Sequence[LoadPart], cuts: Cuts) -> list[Ranks]:
    """Return per part the ranks, within their clusters, of the rows that the bands leave."""
    hashes, clusters = [np.zeros(0, np.uint64)], [np.zeros(0, np.uint32)]
    for load in parts:
        left = _left_of(load(), cuts)
        hashes.append(sample_hashes(left.uid, cuts.seed))
        clusters.append(left.cluster)
    ends = np.cumsum([len(one) for one in hashes[1:-1]])
    return np.split(ranks_in_cluster(np.concatenate(hashes), np.concatenate(clusters)), ends)


def _nearest_kept(cut: Cut | None, code_above: int) -> dict[str, float]:
    if cut is None or cut.first is None or cut.last is None:
        return {}
    sides = (
        (cut.num_above, SELECT_REASONS[code_above], cut.first),
        (cut.num_below, SELECT_REASONS[code_above + 1], cut.last),
    )
    return {reason: key_of(place.code) for num, reason, place in sides if num}


def _sample_cutoff(cuts: Cuts) -> float:
    """Return the last sampled row's clip score or rank in its cluster; NaN where it has none."""
    if cuts.sample is None or cuts.sample.last is None or cuts.policy == "paper":
        return math.nan
    code = cuts.sample.last.code
    return key_of(code) if cuts.policy == "top_clip" else float(code)
