"""The order of training, as a pure function: which samples make up which step, on which rank.

An epoch is planned as a whole and from nothing but its arguments, so a run goes on from a cursor
(epoch, step) exactly, and neither workers nor the number of ranks change what a step learns from:

1. each sample is drawn as often as its source's weight says;
2. draws are ordered by a hash of sample, copy, seed and epoch;
3. the order is cut into global batches, one an optimizer step;
4. a global batch is sorted by length, longest first, and cut into micro-batches whose size, padding
   included, stays within a budget of tokens; a mean over its tokens does not depend on that cut;
5. its micro-batches are dealt to the ranks, the largest first, each to the rank with the least.

The hash is splitmix64 (Steele, Lea and Flood 2014, https://doi.org/10.1145/2714064.2660195), the
dealing Graham's longest processing time rule (1969, https://doi.org/10.1137/0117039).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from manifests.errors import UserError
from manifests.strict import Strict, unknown_key
from train.data.cuts import Ints, cut_by_budget, fitting_padded, fitting_sum

PLAN_VERSION = 2
"""Part of every plan's hash; raised when the same arguments give another plan."""

Hashes = NDArray[np.uint64]

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


class PlanConfig(Strict):
    """How samples become steps. Lengths and budgets are in tokens, image tokens included."""

    global_batch_size: int = Field(default=256, ge=1)
    """Samples of one optimizer step, on all ranks together."""
    tokens_per_micro_batch: int = Field(default=16_384, ge=1)
    """Upper limit of rows times padded length, or of the sum of lengths where rows are packed; a
    single longer sample is a micro-batch alone."""
    packing: bool = False
    """Whether a micro-batch's rows are laid one after another, without padding, or side by side."""
    rows_per_micro_batch: int | None = Field(default=None, ge=1)
    """As many rows in each, in the order in which they are drawn, whatever their lengths: LLaVA's
    and Bunny's way. None: by tokens."""
    micro_batches_multiple_of: int = Field(default=1, ge=1)
    """Cuts a step into about the next multiple of this many micro-batches, all of about one size.
    The number of ranks lets them finish together; it is set here, as the cut must be the same when
    a run goes on with other ranks."""
    tokens_per_image: int = Field(default=729, ge=0)
    max_length: int = Field(default=2048, ge=1)
    """Longer samples are cut to this, so their length counts as this."""
    lengths: Literal["exact", "estimate"] = "exact"
    """exact: all conversations are tokenized first, and refused ones are left out before global
    batches are cut. estimate: curation's guess, for data that takes too long to read: budgets may
    be exceeded, and steps be smaller."""
    weights: dict[str, float] = {}
    """Copies of each sample an epoch, by source; 1 where a source is not named. Of a fraction,
    epochs take turns: at 0.5, each sample is in every other epoch."""
    keep_last: bool = True
    """Whether the samples that are left over make a last, smaller global batch."""

    @model_validator(mode="after")
    def _one_way_to_cut(self) -> Self:
        if self.rows_per_micro_batch is not None and self.micro_batches_multiple_of != 1:
            raise ValueError("micro_batches_multiple_of is for a cut by tokens, not by rows")
        return self


@dataclass(frozen=True, eq=False)
class Columns:
    """What a plan is made from: for each row of an index, what is known without reading it.

    identity: uint64 [n], all different. tokens: int [n], of the text. num_images: int [n].
    source: int [n], a position in `sources`.
    """

    identity: Hashes
    tokens: NDArray[np.integer[Any]]
    num_images: NDArray[np.integer[Any]]
    source: NDArray[np.integer[Any]]
    sources: tuple[str, ...]

    @cached_property
    def digest(self) -> str:
        """The SHA-256 of all columns, in hex."""
        found = hashlib.sha256(json.dumps(self.sources).encode())
        for column in (self.identity, self.tokens, self.num_images, self.source):
            found.update(column.astype("<u8").tobytes())
        return found.hexdigest()

    def lengths(self, config: PlanConfig) -> Ints:
        """Return each row's length in tokens, images included: int64 [n], from 1 to max_length."""
        whole = self.tokens.astype(np.int64) + self.num_images * np.int64(config.tokens_per_image)
        return np.clip(whole, 1, config.max_length)


@dataclass(frozen=True, eq=False)
class Plan:
    """One epoch's steps, each with its micro-batches for every rank.

    rows: int64 [m], rows of the index, step by step. lengths: int64 [m], theirs, in tokens.
    step_starts: int64 [num_steps + 1], positions in `rows`.
    starts, stops: int64 [k], each micro-batch's positions in `rows`, by step, rank and size.
    padded: int64 [k], tokens that each computes: rows times the longest, or their sum when packed.
    firsts: int64 [num_steps * world_size + 1], the first micro-batch of each step and rank.
    """

    seed: int
    epoch: int
    world_size: int
    plan_hash: str
    rows: Ints
    lengths: Ints
    step_starts: Ints
    starts: Ints
    stops: Ints
    padded: Ints
    firsts: Ints

    @property
    def num_steps(self) -> int:
        """The number of optimizer steps."""
        return len(self.step_starts) - 1

    def batch(self, step: int) -> Ints:
        """Return the rows of a global batch, longest first: int64 [n]; a copy counts each time.

        By rows_per_micro_batch, they are in the order in which they are drawn.
        """
        return self.rows[self.step_starts[step] : self.step_starts[step + 1]]

    def micro_batches(self, step: int, rank: int) -> list[Ints]:
        """Return the rows of a rank's micro-batches in a step, largest first; it may have none."""
        if not 0 <= step < self.num_steps or not 0 <= rank < self.world_size:
            raise IndexError(f"step {step} of {self.num_steps}, rank {rank} of {self.world_size}")
        first, stop = self.firsts[step * self.world_size + rank :][:2]
        spans = zip(self.starts[first:stop], self.stops[first:stop], strict=True)
        return [self.rows[start:end] for start, end in spans]


class Cursor(NamedTuple):
    """The step that comes next; all that a checkpoint needs to go on with the same data."""

    epoch: int = 0
    step: int = 0


START = Cursor()


def make_plan(
    columns: Columns, *, seed: int, epoch: int, config: PlanConfig, world_size: int
) -> Plan:
    """Return an epoch's plan; the same arguments give the same plan on every machine.

    Global batches and their cut into micro-batches do not depend on `world_size`.
    Raises: UserError when a weight names no source or the epoch has no step.
    """
    rows = order(columns, seed=seed, epoch=epoch, config=config)
    step_starts = _cuts(len(rows), config)
    lengths = columns.lengths(config)[rows[: step_starts[-1]]]
    if config.rows_per_micro_batch is None:
        step_of = np.repeat(np.arange(len(step_starts) - 1), np.diff(step_starts))
        by_length = np.lexsort((-lengths, step_of))
        rows, lengths = rows[by_length], lengths[by_length]
    starts = _cut(lengths, step_starts, config)
    stops: Ints = np.append(starts[1:], step_starts[-1])
    padded = _padded(lengths, starts, stops, config)
    step = np.searchsorted(step_starts, starts, side="right") - 1
    rank = _dealt(step, padded, world_size)
    by_rank = np.lexsort((-padded, rank, step))
    owner = (step * world_size + rank)[by_rank]
    firsts = np.searchsorted(owner, np.arange((len(step_starts) - 1) * world_size + 1))
    named = plan_hash(columns, seed=seed, config=config, epoch=epoch, world_size=world_size)
    return Plan(
        *(seed, epoch, world_size, named, rows[: step_starts[-1]], lengths, step_starts),
        *(starts[by_rank], stops[by_rank], padded[by_rank], firsts),
    )


def walk(
    columns: Columns,
    *,
    seed: int,
    config: PlanConfig,
    world_size: int,
    num_epochs: int,
    cursor: Cursor = START,
) -> Iterator[tuple[Plan, Cursor]]:
    """Yield each step from the cursor on, with the plan that it is in; one plan at a time is made.

    A cursor at an epoch's end goes on with the next epoch. Raises: as make_plan.
    """
    for epoch in range(cursor.epoch, num_epochs):
        plan = make_plan(columns, seed=seed, epoch=epoch, config=config, world_size=world_size)
        for step in range(cursor.step if epoch == cursor.epoch else 0, plan.num_steps):
            yield plan, Cursor(epoch, step)


def plan_hash(
    columns: Columns,
    *,
    seed: int,
    config: PlanConfig,
    epoch: int | None = None,
    world_size: int | None = None,
) -> str:
    """Return the SHA-256 of everything that decides a plan, in hex.

    Without epoch and world size, it is one for the run: equal in two runs that learn from the same
    steps in every epoch, on however many ranks.
    """
    decides = {
        "version": PLAN_VERSION,
        "seed": seed,
        "epoch": epoch,
        "world_size": world_size,
        "config": config.canonical(),
        "columns": columns.digest,
    }
    return hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()


def order(columns: Columns, *, seed: int, epoch: int, config: PlanConfig) -> Ints:
    """Return an epoch's draws: int64 [m], rows of the index, each as often as it has copies.

    The order of two samples does not depend on which others there are, so a subset of the rows is
    met in the same order. Raises: UserError when a weight names no source.
    """
    copies = num_copies(columns, seed=seed, epoch=epoch, config=config)
    rows = np.repeat(np.arange(len(copies)), copies)
    copy = np.arange(len(rows)) - np.repeat(np.cumsum(copies) - copies, copies)
    salt = _salted(seed, "order", epoch)
    return rows[np.argsort(_mixed(columns.identity[rows] ^ salt, copy), kind="stable")]


def num_copies(columns: Columns, *, seed: int, epoch: int, config: PlanConfig) -> Ints:
    """Return how often each row is drawn in an epoch: int64 [n].

    Over the first E epochs a row of weight w is drawn floor(E w) or ceil(E w) times.
    Raises: UserError when a weight names no source of the index.
    """
    for name in config.weights:
        if name not in columns.sources:
            raise unknown_key(name, list(columns.sources), where="weights")
    by_source = np.array([_weight(config, name) for name in columns.sources], np.float64)
    weight = by_source[columns.source]
    # Where in its cycle of epochs a sample begins, in [0, 1). Of 32 bits: with more, the sum with a
    # whole number might be rounded up to the next.
    phase = (_mixed(columns.identity ^ _salted(seed, "copies")) >> np.uint64(32)) * 2.0**-32
    copies: Ints = np.floor((epoch + 1) * weight + phase).astype(np.int64)
    copies -= np.floor(epoch * weight + phase).astype(np.int64)
    return copies


def num_steps(columns: Columns, *, seed: int, epoch: int, config: PlanConfig) -> int:
    """Return an epoch's number of steps, without planning it. Raises: as make_plan."""
    total = int(num_copies(columns, seed=seed, epoch=epoch, config=config).sum())
    return len(_cuts(total, config)) - 1


def padding_share(plan: Plan) -> float:
    """Return which share of the tokens that are computed is padding, from 0 to 1."""
    return 1 - int(plan.lengths.sum()) / int(plan.padded.sum())


def naive_padding_share(plan: Plan) -> float:
    """Return the padding share of the same samples in random batches of the same mean size."""
    shuffled = np.random.default_rng(0).permutation(plan.lengths)
    starts = np.arange(0, len(shuffled), max(round(len(shuffled) / len(plan.starts)), 1))
    longest = np.maximum.reduceat(shuffled, starts)
    padded = longest * np.diff(starts, append=len(shuffled))
    return 1 - int(shuffled.sum()) / int(padded.sum())


def idle_share(plan: Plan) -> float:
    """Return which share of the ranks' time is waiting for the slowest of a step, from 0 to 1.

    Time is counted in padded tokens.
    """
    loads = np.add.reduceat(np.append(plan.padded, 0), plan.firsts[:-1])
    loads[plan.firsts[:-1] == plan.firsts[1:]] = 0  # reduceat gives an empty rank its neighbour's
    slowest = loads.reshape(-1, plan.world_size).max(axis=1)
    return 1 - int(loads.sum()) / int(slowest.sum() * plan.world_size)


def _weight(config: PlanConfig, source: str) -> float:
    weight = config.weights.get(source, 1.0)
    if weight < 0:
        raise UserError(f"weights.{source} is {weight}.", "Copies are not negative.", "Give 0 up.")
    return weight


def _cuts(num_draws: int, config: PlanConfig) -> Ints:
    """Return where global batches begin, and where the last ends: int64 [num_steps + 1]."""
    size = config.global_batch_size
    cuts = np.arange(0, num_draws + 1, size)
    if config.keep_last and num_draws % size:
        cuts = np.append(cuts, num_draws)
    if len(cuts) < 2:
        raise UserError(
            f"An epoch of {num_draws} samples has no step.",
            f"A step takes {size} samples (global_batch_size), keep_last is {config.keep_last}.",
            "Give more data, a smaller global_batch_size or keep_last: true.",
        )
    return cuts


def _cut(lengths: Ints, step_starts: Ints, config: PlanConfig) -> Ints:
    """Return where micro-batches begin: int64 [k] ascending."""
    if config.rows_per_micro_batch is not None:
        size = config.rows_per_micro_batch
        of_steps = zip(step_starts[:-1], step_starts[1:], strict=True)
        return np.concatenate([np.arange(start, stop, size) for start, stop in of_steps])
    fitting = fitting_sum(lengths) if config.packing else fitting_padded(lengths)
    most, multiple_of = config.tokens_per_micro_batch, config.micro_batches_multiple_of
    return cut_by_budget(fitting, step_starts, most=most, multiple_of=multiple_of)


def _padded(lengths: Ints, starts: Ints, stops: Ints, config: PlanConfig) -> Ints:
    """Return how many tokens each micro-batch computes: int64 [k]. `starts` ascends."""
    if config.packing:
        return np.add.reduceat(lengths, starts)
    longest: Ints = np.maximum.reduceat(lengths, starts)
    return longest * (stops - starts)


def _dealt(step: Ints, padded: Ints, world_size: int) -> Ints:
    """Return each micro-batch's rank: int64 [k]. `step` ascends."""
    by_size = np.lexsort((-padded, step))
    turn = np.arange(len(step)) - np.searchsorted(step, step)  # same for `step[by_size]`
    by_turn = by_size[np.argsort(turn, kind="stable")]
    loads = np.zeros((int(step[-1]) + 1, world_size), np.int64)
    rank = np.empty(len(step), np.int64)
    for now in np.split(by_turn, np.cumsum(np.bincount(turn))[:-1]):
        rank[now] = loads[step[now]].argmin(axis=1)
        loads[step[now], rank[now]] += padded[now]
    return rank


def occurrences(uids: Hashes) -> Hashes:
    """Return an identity for each row, also where a uid comes more than once: uint64 [n].

    A uid's first row has the uid itself; a later one, the uid mixed with its number.
    """
    by_uid = np.argsort(uids, kind="stable")
    ordered = uids[by_uid]
    number = np.empty(len(uids), np.uint64)
    number[by_uid] = np.arange(len(uids)) - np.searchsorted(ordered, ordered)
    return uids ^ _mixed(number)


def _salted(seed: int, purpose: str, epoch: int = 0) -> np.uint64:
    text = json.dumps([seed, purpose, epoch]).encode()
    return np.uint64(int.from_bytes(hashlib.sha256(text).digest()[:8], "little"))


def _mixed(values: Hashes, copy: Ints | int = 0) -> Hashes:
    """Return splitmix64's output for each value, `copy` steps on; 0 becomes 0."""
    mixed: Hashes = values + np.asarray(copy).astype(np.uint64) * _GOLDEN
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed ^= mixed >> np.uint64(31)
    return mixed
