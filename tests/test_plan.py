"""The plan of an epoch: every sample exactly its copies, the same steps for any number of ranks."""

from __future__ import annotations

import math
import time
from collections import Counter
from itertools import product
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from manifests.errors import UserError
from train.data.plan import (
    Columns,
    Cursor,
    Plan,
    PlanConfig,
    idle_share,
    make_plan,
    naive_padding_share,
    num_copies,
    num_steps,
    occurrences,
    order,
    padding_share,
    plan_hash,
    walk,
)

SOURCES = ("caption", "chat")
GOLDEN = [[[[1], [11]], [[8], [10, 4, 0]]], [[[6], [3]], [[5, 9, 2], [7]]]]


def columns(num_rows: int, *, seed: int = 0) -> Columns:
    """Return rows of two sources, of few to many tokens, with no image, one or two."""
    rng = np.random.default_rng(seed)
    return Columns(
        identity=rng.permutation(num_rows).astype(np.uint64) << np.uint64(7),
        tokens=rng.integers(0, 300, num_rows).astype(np.uint32),
        num_images=rng.integers(0, 3, num_rows).astype(np.uint16),
        source=rng.integers(0, 2, num_rows).astype(np.int32),
        sources=SOURCES,
    )


def plan_of(data: Columns, *, seed: int = 0, epoch: int = 0, ranks: int = 1, **config: Any) -> Plan:
    return make_plan(data, seed=seed, epoch=epoch, config=PlanConfig(**config), world_size=ranks)


def steps_of(plan: Plan) -> list[list[list[list[int]]]]:
    """Return step -> rank -> micro-batch -> rows."""
    return [
        [
            [micro.tolist() for micro in plan.micro_batches(step, rank)]
            for rank in range(plan.world_size)
        ]
        for step in range(plan.num_steps)
    ]


def cuts_of(plan: Plan) -> list[list[list[int]]]:
    """Return each step's micro-batches, of all ranks, in an order of their own."""
    return [sorted(micro for rank in step for micro in rank) for step in steps_of(plan)]


settled = st.fixed_dictionaries(
    {
        "global_batch_size": st.integers(1, 40),
        "tokens_per_micro_batch": st.integers(1, 3000),
        "micro_batches_multiple_of": st.sampled_from([1, 1, 2, 4]),
        "tokens_per_image": st.integers(0, 200),
        "max_length": st.integers(1, 800),
        "weights": st.dictionaries(st.sampled_from(SOURCES), st.floats(0.2, 3.0)),
    }
)
arguments = given(st.integers(1, 120), st.integers(0, 9), st.integers(0, 3), settled)
quick = settings(max_examples=60, deadline=None)


@quick
@arguments
def test_every_sample_comes_exactly_its_copies(
    num_rows: int, seed: int, epoch: int, config: dict[str, Any]
) -> None:
    data, settings_ = columns(num_rows), PlanConfig(**config)
    copies = num_copies(data, seed=seed, epoch=epoch, config=settings_)
    if not copies.sum():
        return
    plan = plan_of(data, seed=seed, epoch=epoch, ranks=3, **config)
    dealt = Counter(row for step in cuts_of(plan) for micro in step for row in micro)
    assert dealt == Counter(dict(enumerate(copies.tolist())))
    assert plan.num_steps == num_steps(data, seed=seed, epoch=epoch, config=settings_)
    for row, count in enumerate(copies.tolist()):
        weight = config["weights"].get(SOURCES[data.source[row]], 1.0)
        assert math.floor(weight) <= count <= math.ceil(weight)


@quick
@arguments
def test_batches_and_their_cut_do_not_depend_on_the_ranks(
    num_rows: int, seed: int, epoch: int, config: dict[str, Any]
) -> None:
    data = columns(num_rows)
    config["weights"] = {}
    alone, *others = (
        plan_of(data, seed=seed, epoch=epoch, ranks=ranks, **config) for ranks in (1, 2, 5)
    )
    for other in others:
        assert cuts_of(other) == cuts_of(alone)
    draws = order(data, seed=seed, epoch=epoch, config=PlanConfig(**config)).tolist()
    size = config["global_batch_size"]
    for step in range(alone.num_steps):
        assert sorted(alone.batch(step)) == sorted(draws[step * size : (step + 1) * size])


@quick
@arguments
def test_budgets_are_kept_and_ranks_get_the_largest_first(
    num_rows: int, seed: int, epoch: int, config: dict[str, Any]
) -> None:
    data = columns(num_rows)
    config["weights"] = {}
    lengths = data.lengths(PlanConfig(**config))
    plan = plan_of(data, seed=seed, epoch=epoch, ranks=2, **config)
    for step, rank in product(range(plan.num_steps), range(2)):
        micros = plan.micro_batches(step, rank)
        padded = [int(lengths[micro].max()) * len(micro) for micro in micros]
        for micro, tokens in zip(micros, padded, strict=True):
            assert tokens <= config["tokens_per_micro_batch"] or len(micro) == 1
        assert padded == sorted(padded, reverse=True)
    assert plan.lengths.max() <= config["max_length"]


@quick
@arguments
def test_a_cursor_goes_on_exactly(
    num_rows: int, seed: int, epoch: int, config: dict[str, Any]
) -> None:
    data = columns(num_rows)
    run: dict[str, Any] = {
        "seed": seed,
        "config": PlanConfig(**config | {"weights": {}}),
        "world_size": 2,
        "num_epochs": 2,
    }
    whole = [(at, plan.batch(at.step).tolist()) for plan, at in walk(data, **run)]
    middle = len(whole) // 2
    again = walk(data, cursor=whole[middle][0], **run)
    rest = [(at, plan.batch(at.step).tolist()) for plan, at in again]
    assert rest == whole[middle:]
    ended = Cursor(0, num_steps(data, seed=seed, epoch=0, config=run["config"]))
    assert next(walk(data, cursor=ended, **run))[1] == Cursor(1, 0)


def test_the_same_arguments_give_the_same_plan_and_others_another() -> None:
    data = columns(500)
    base = {"seed": 1, "epoch": 2, "ranks": 2, "global_batch_size": 32}
    first = plan_of(data, **base)
    assert steps_of(plan_of(columns(500), **base)) == steps_of(first)
    assert plan_of(columns(500), **base).plan_hash == first.plan_hash
    for change in ({"seed": 2}, {"epoch": 3}, {"ranks": 3}, {"max_length": 100}):
        other = plan_of(data, **base | change)
        assert other.plan_hash != first.plan_hash
        assert steps_of(other) != steps_of(first)


def test_every_argument_is_in_the_hash() -> None:
    data, config = columns(50), PlanConfig()
    base = plan_hash(data, seed=0, config=config)
    for field in ("identity", "tokens", "num_images", "source"):
        changed = columns(50)
        getattr(changed, field)[7] += 1
        assert plan_hash(changed, seed=0, config=config) != base
    others: dict[str, Any] = {
        "global_batch_size": 1,
        "tokens_per_micro_batch": 1,
        "micro_batches_multiple_of": 2,
        "tokens_per_image": 1,
        "max_length": 1,
        "weights": {"chat": 2.0},
        "keep_last": False,
        "packing": True,
        "rows_per_micro_batch": 3,
        "lengths": "estimate",
    }
    assert set(others) == set(PlanConfig.model_fields)
    for name, value in others.items():
        assert plan_hash(data, seed=0, config=PlanConfig(**{name: value})) != base


def test_a_plan_is_the_same_on_every_machine() -> None:
    plan = plan_of(columns(12), global_batch_size=6, tokens_per_micro_batch=1000, ranks=2)
    assert steps_of(plan) == GOLDEN


def test_a_subset_is_met_in_the_same_order() -> None:
    data, config = columns(300), PlanConfig(weights={"chat": 1.5})
    chosen = np.flatnonzero(np.random.default_rng(3).random(300) < 0.4)
    fields = ("identity", "tokens", "num_images", "source")
    fewer = Columns(**{name: getattr(data, name)[chosen] for name in fields}, sources=SOURCES)
    whole = order(data, seed=5, epoch=1, config=config)
    part = order(fewer, seed=5, epoch=1, config=config)
    assert chosen[part].tolist() == [row for row in whole.tolist() if row in set(chosen.tolist())]


def test_orders_are_as_random_as_a_shuffle() -> None:
    data, config = columns(4000), PlanConfig()
    orders = [order(data, seed=s, epoch=e, config=config) for s in range(2) for e in range(2)]
    for at, one in enumerate(orders):
        assert abs(np.corrcoef(one, np.arange(4000))[0, 1]) < 0.06
        assert abs(np.corrcoef(one, data.identity[np.arange(4000)])[0, 1]) < 0.06
        for other in orders[:at]:
            assert (one == other).mean() < 0.01


def test_fractions_take_turns_over_epochs() -> None:
    data = columns(1000)
    config = PlanConfig(weights={"caption": 0.5, "chat": 2.25})
    epochs = [num_copies(data, seed=0, epoch=epoch, config=config) for epoch in range(4)]
    half = data.source == 0
    assert 0.4 < epochs[0][half].mean() < 0.6
    assert (epochs[0][half] + epochs[1][half] == 1).all()
    assert (sum(epochs)[~half] == 9).all()
    assert (num_copies(data, seed=1, epoch=0, config=config) != epochs[0]).any()


def test_copies_of_a_sample_are_spread_over_the_epoch() -> None:
    data = columns(1000)
    draws = order(data, seed=0, epoch=0, config=PlanConfig(weights={"caption": 2.0, "chat": 2.0}))
    gaps = [int(np.diff(np.flatnonzero(draws == row))[0]) for row in range(0, 1000, 5)]
    assert 500 < np.mean(gaps) < 830  # two random places of 2,000: a third apart, in the mean


def test_rows_of_one_uid_are_told_apart() -> None:
    uids = np.array([7, 5, 7, 0, 7, 5], np.uint64)
    found = occurrences(uids)
    assert found[[0, 1, 3]].tolist() == [7, 5, 0]
    assert len(set(found.tolist())) == 6


def test_sorting_saves_padding_and_ranks_are_evenly_loaded() -> None:
    rng = np.random.default_rng(0)
    num_rows = 20_000
    images = (rng.random(num_rows) < 0.9).astype(np.uint16)
    tokens = rng.lognormal(5, 1, num_rows).astype(np.uint32)
    nothing = np.zeros(num_rows, np.int32)
    data = Columns(np.arange(num_rows, dtype=np.uint64), tokens, images, nothing, ("mix",))
    plan = plan_of(data, ranks=8, global_batch_size=128, micro_batches_multiple_of=8)
    assert padding_share(plan) < 0.1 < 0.3 < naive_padding_share(plan)
    assert idle_share(plan) < 0.1
    greedy = plan_of(data, ranks=8, global_batch_size=128)
    assert len(greedy.starts) <= len(plan.starts)


def test_two_million_samples_are_planned_in_seconds() -> None:
    num_rows = 2_000_000
    data = columns(num_rows)
    begun = time.process_time()
    plan = plan_of(data, ranks=8, micro_batches_multiple_of=8)
    assert time.process_time() - begun < 10
    assert np.array_equal(np.sort(plan.rows), np.arange(num_rows))


def test_shares_are_those_counted_by_hand() -> None:
    lengths = np.array([10, 10, 4, 4, 1], np.uint32)
    nothing = np.zeros(5, np.int32)
    data = Columns(np.arange(5, dtype=np.uint64), lengths, nothing, nothing, ("a",))
    plan = plan_of(data, ranks=2, global_batch_size=5, tokens_per_micro_batch=20)
    assert sorted(plan.padded) == [12, 20]  # 10 + 10, and 4 + 4 + 1 of 3 x 4
    assert padding_share(plan) == pytest.approx(3 / 32)
    assert idle_share(plan) == pytest.approx(8 / 40)
    lonely = plan_of(data, ranks=3, global_batch_size=5, tokens_per_micro_batch=20)
    assert idle_share(lonely) == pytest.approx(28 / 60)


def test_a_rest_makes_a_last_batch_or_none() -> None:
    data = columns(25)
    assert plan_of(data, global_batch_size=10).num_steps == 3
    assert plan_of(data, global_batch_size=10, keep_last=False).num_steps == 2
    assert plan_of(data, global_batch_size=5, keep_last=False).num_steps == 5


def test_what_cannot_be_planned_says_why() -> None:
    with pytest.raises(UserError, match="'chat'"):
        plan_of(columns(5), weights={"chatt": 1.0})
    with pytest.raises(UserError, match="no step"):
        plan_of(columns(5), keep_last=False)
    with pytest.raises(UserError, match="no step"):
        plan_of(columns(5), weights={"chat": 0.0, "caption": 0.0})
    with pytest.raises(UserError, match="negative"):
        plan_of(columns(5), weights={"chat": -1.0})
    with pytest.raises(IndexError):
        plan_of(columns(5)).micro_batches(0, 1)
