"""What a mix takes of the rows it is given, and in which order they are written.

    replaced                a text-only row that another source's rows stand for
    not_included, excluded  by its source's rules
    duplicate_conversation  a row taken before has the same images and turns
    not_sampled             its source's weight or num_rows left it out

The first that holds is a row's fate. Everything is decided by uid, key, images and the hash of the
conversation, so the result does not depend on how rows are cut into parts or given in order.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import polars as pl
import pyarrow as pa
from numpy.typing import NDArray

from curate.rows.mix_config import MixConfig, SourceMix
from curate.rows.row_rules import RowRule, meets
from curate.vectors.exact import Float64s, Uint64s, sample_hashes, splitmix64
from manifests.errors import UserError

REASONS = (
    "",
    "replaced",
    "not_included",
    "excluded",
    "duplicate_conversation",
    "not_sampled",
)
REPLACED = REASONS.index("replaced")
NOT_INCLUDED = REASONS.index("not_included")
EXCLUDED = REASONS.index("excluded")
DUPLICATE = REASONS.index("duplicate_conversation")
NOT_SAMPLED = REASONS.index("not_sampled")

_HASH_RANGE = 2.0**64
Copies = NDArray[np.uint32]
Positions = NDArray[np.intp]
Masks = NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Decisions:
    """Each row's fate. uids: uint64 [n] ascending; copies: uint32 [n], 0 for a dropped row.

    lost: uid, reason, score, cutoff, evidence_uid of the dropped rows, by uid. evidence_uid is the
    row that a duplicate lost to. The score of a row not sampled is its hash in 0..1, its cutoff the
    largest one that was sampled, null where none was.
    """

    uids: Uint64s
    copies: Copies
    lost: pa.Table


def decide(rows: pl.DataFrame, config: MixConfig, seed: int) -> Decisions:
    """Return the fate of every row.

    Args: rows: uid, source, key, num_images, first_image (null for text-only rows) and
    conversation_hash (16 bytes), in any order; uids are distinct.
    Raises: UserError for unreadable ids of a rule, or num_rows of a source without rows.
    """
    if not rows["uid"].is_sorted():
        rows = rows.sort("uid")
    fates = _Fates.all_taken(rows["uid"].to_numpy())
    _apply_replace(fates, rows, config)
    _apply_rules(fates, rows, config)
    if config.dedup == "all":
        _apply_dedup(fates, rows["conversation_hash"])
    _apply_sampling(fates, rows["source"], config, seed)
    return Decisions(fates.uids, fates.copies, fates.lost())


def shuffled(
    uids: Uint64s, copies: Copies, *, seed: int, shuffle: bool = True
) -> tuple[Uint64s, Copies]:
    """Return whose row stands at each output position, and which copy of it: uint64 and uint32 [m].

    Samples are ordered by (splitmix64(sample hash of uid and seed + splitmix64(copy)), uid, copy),
    or by (uid, copy) without shuffle. Sampling goes by the sample hash itself, so the rows that it
    was near to leave out do not gather anywhere.
    Args: uids: uint64 [n] ascending; copies: uint32 [n], 0 for a row that is not written.
    """
    ends = np.cumsum(copies, dtype=np.int64)
    total = int(ends[-1]) if len(ends) else 0
    owners = np.repeat(np.arange(len(uids)), copies)
    numbers = (np.arange(total) - (ends - copies)[owners]).astype(np.uint32)
    if not shuffle:
        return uids[owners], numbers
    hashes = splitmix64(sample_hashes(uids, seed)[owners] + splitmix64(numbers.astype(np.uint64)))
    order = np.argsort(hashes, kind="stable")  # rows come by (uid, copy), so ties do
    return uids[owners[order]], numbers[order]


def num_samples(num_rows: int, mix: SourceMix) -> int:
    """Return how many samples a source gives that has so many rows left, copies included.

    The weight is taken as the decimal it is written as. Example: 5 rows, weight 0.5 -> 3.
    """
    if mix.num_rows is not None:
        return mix.num_rows
    return math.floor(Fraction(repr(mix.weight)) * num_rows + Fraction(1, 2))


@dataclass(frozen=True, slots=True)
class _Fates:
    """Columns that the steps change, of length n. Scores and cutoffs are NaN where none is."""

    uids: Uint64s
    reasons: NDArray[np.uint8]  # index into REASONS
    copies: Copies
    winners: Uint64s  # of duplicates only
    scores: Float64s
    cutoffs: Float64s

    @classmethod
    def all_taken(cls, uids: Uint64s) -> _Fates:
        """Return the fates before the first step."""
        num = len(uids)
        return cls(
            uids,
            np.zeros(num, np.uint8),
            np.ones(num, np.uint32),
            np.zeros(num, np.uint64),
            np.full(num, np.nan),
            np.full(num, np.nan),
        )

    def drop(self, rows: Positions, code: int) -> None:
        """Drop the rows at these positions that no earlier step dropped."""
        left = rows[self.reasons[rows] == 0]
        self.reasons[left] = code
        self.copies[left] = 0

    def lost(self) -> pa.Table:
        """Return the dropped rows, by uid."""
        at = np.flatnonzero(self.reasons)
        codes = self.reasons[at]
        named = pa.DictionaryArray.from_arrays(codes.astype(np.int8), pa.array(REASONS))
        columns = {
            "uid": pa.array(self.uids[at]),
            "reason": named.cast(pa.string()),
            "score": _optional(self.scores[at]),
            "cutoff": _optional(self.cutoffs[at]),
            "evidence_uid": pa.array(self.winners[at], mask=codes != DUPLICATE),
        }
        return pa.table(columns)


def _apply_replace(fates: _Fates, rows: pl.DataFrame, config: MixConfig) -> None:
    if config.replace is None:
        return
    is_one = pl.col("source").is_in(config.replace.text_only_of) & (pl.col("num_images") == 0)
    fates.drop(np.flatnonzero(rows.select(is_one).to_series().to_numpy()), REPLACED)


def _apply_rules(fates: _Fates, rows: pl.DataFrame, config: MixConfig) -> None:
    for name, mix in config.sources.items():
        at = _of_source(rows["source"], name)
        if mix.include:
            fates.drop(at[~_meets_any(rows[at], mix.include)], NOT_INCLUDED)
        if mix.exclude:
            fates.drop(at[_meets_any(rows[at], mix.exclude)], EXCLUDED)


def _apply_dedup(fates: _Fates, hashes: pl.Series) -> None:
    """Keep the first of rows with one hash, by uid; the sort is stable."""
    at = np.flatnonzero(fates.reasons == 0)
    words = _words(hashes[at])
    order = np.lexsort((words[:, 1], words[:, 0]))
    words = words[order]
    is_first = np.ones(len(order), np.bool_)
    is_first[1:] = (words[1:] != words[:-1]).any(axis=1)
    first = order[np.flatnonzero(is_first)][np.cumsum(is_first) - 1]
    losers = at[order[~is_first]]
    fates.winners[losers] = fates.uids[at[first[~is_first]]]
    fates.drop(losers, DUPLICATE)


def _apply_sampling(fates: _Fates, sources: pl.Series, config: MixConfig, seed: int) -> None:
    for name, mix in config.sources.items():
        at = _of_source(sources, name)
        at = at[fates.reasons[at] == 0]
        wanted = num_samples(len(at), mix)
        if wanted != len(at):
            _sample(fates, at, wanted, seed=seed, source=name)


def _sample(fates: _Fates, at: Positions, wanted: int, *, seed: int, source: str) -> None:
    """Give each row wanted // n copies, and those with the smallest hashes one more."""
    if not len(at):
        raise UserError(
            f"recipe.mix.sources.{source}.num_rows is {wanted}, but the source has no row left.",
            "Every one was dropped before, or its file has none.",
            "See `warren counts` for where they went; give 0 if none is wanted.",
        )
    each, more = divmod(wanted, len(at))
    hashes = sample_hashes(fates.uids[at], seed)
    order = np.argsort(hashes)
    fates.copies[at] = each
    fates.copies[at[order[:more]]] += 1
    if each == 0:
        out = order[more:]
        fates.scores[at[out]] = hashes[out] / _HASH_RANGE
        fates.cutoffs[at[out]] = hashes[order[more - 1]] / _HASH_RANGE if more else np.nan
        fates.drop(at[out], NOT_SAMPLED)


def _of_source(sources: pl.Series, name: str) -> Positions:
    return np.flatnonzero((sources == name).to_numpy())


def _meets_any(rows: pl.DataFrame, rules: list[RowRule]) -> Masks:
    found: Masks = rows.select(pl.any_horizontal(map(meets, rules))).to_series().to_numpy()
    return found


def _words(hashes: pl.Series) -> Uint64s:
    """Return hashes of 16 bytes as uint64 [n, 2]; which words does not matter, only equality."""
    array = hashes.to_arrow().cast(pa.binary(16))
    data = np.frombuffer(array.buffers()[1], np.uint64, 2 * len(array), 16 * array.offset)
    return data.reshape(-1, 2)


def _optional(values: Float64s) -> pa.Array:
    return pa.array(values, pa.float64(), mask=np.isnan(values))
