"""Cuts found part by part decide what `select` decides with all rows before it, and the oracle."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from typing import Any

import numpy as np
import oracle
import pytest
from test_selection_oracle import World, as_ids, make_world

from curate.rows.cuts import Cuts, Steps, find_cuts, judge
from curate.rows.select import SELECT_REASONS, Selectable, Selected, select
from curate.vectors.assign import assign
from curate.vectors.exact import clip_score, reject_reasons
from manifests.errors import UserError

POLICIES = ("paper", "top_clip", "balanced")


def tied_rows(rng: np.random.Generator, num_rows: int) -> Selectable:
    """Return rows whose keys have few values, zeros of both signs and negative ones among them."""
    values = np.array([-0.5, -0.25, -0.0, 0.0, 0.25, 0.5])
    return Selectable(
        rng.permutation(3 * num_rows + 1)[:num_rows].astype(np.uint64),
        rng.choice(values, num_rows),
        rng.choice(values, num_rows),
        rng.integers(4, size=num_rows).astype(np.uint32),
    )


def some_steps(rng: np.random.Generator, num_rows: int, policy: Any) -> Steps:
    ends = [str(end / 100) for end in np.sort(rng.choice(101, 4, replace=False))]
    left_out = rng.random(3) < 0.2
    num_samples = int(rng.choice([0, 1, rng.integers(num_rows + 1), 2 * num_rows]))
    return Steps(
        clip_band=None if left_out[0] else (ends[0], ends[2]),
        centroid_band=None if left_out[1] else (ends[1], ends[3]),
        num_samples=None if left_out[2] else num_samples,
        seed=int(rng.integers(1000)),
        policy=policy,
    )


def in_memory(rows: Selectable, steps: Steps) -> Selected:
    return select(
        rows,
        clip_band=steps.clip_band,
        centroid_band=steps.centroid_band,
        num_samples=steps.num_samples,
        seed=steps.seed,
        policy=steps.policy,
    )


def by_parts(
    rows: Selectable, steps: Steps, places: list[np.ndarray], max_held: int
) -> tuple[Selected, Cuts]:
    """Return the fates that parts at these positions give, each judged alone, and the cuts."""
    parts = [rows.take(at) for at in places]
    loads: list[Callable[[], Selectable]] = [lambda part=part: part for part in parts]
    num_rows = len(rows.uid)
    cuts, ranks = find_cuts(loads, steps, num_rows=num_rows, max_held=max_held)
    cuts = Cuts.model_validate_json(cuts.model_dump_json())  # as the stage keeps them
    whole = Selected.with_all_kept(num_rows)
    for number, at in enumerate(places):
        fate = judge(parts[number], cuts, None if ranks is None else ranks[number])
        for name in ("keep", "reason", "score", "cutoff"):
            getattr(whole, name)[at] = getattr(fate, name)
    return whole, cuts


def cut_up(rng: np.random.Generator, num_rows: int) -> list[np.ndarray]:
    """Return the positions of parts of any size, some empty, in any order."""
    ends = np.sort(rng.integers(0, num_rows + 1, size=rng.integers(0, 12)))
    return np.split(rng.permutation(num_rows), ends)


def assert_same(found: Selected, wanted: Selected) -> None:
    for name in ("keep", "reason", "score", "cutoff"):
        np.testing.assert_array_equal(getattr(found, name), getattr(wanted, name), err_msg=name)


def nearest_kept(fate: Selected) -> dict[str, float]:
    """Return each reason's cutoff, from the rows."""
    found = {}
    for code, reason in enumerate(SELECT_REASONS):
        cutoffs = np.unique(fate.cutoff[(fate.reason == code) & ~np.isnan(fate.cutoff)])
        if code and len(cutoffs):
            (found[reason],) = cutoffs.tolist()
    return found


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("seed", range(60))
def test_parts_judged_alone_are_judged_as_all_rows_together(seed: int, policy: str) -> None:
    rng = np.random.default_rng(seed)
    num_rows = int(rng.choice([0, 1, 2, 9, 80, 400]))
    rows, steps = tied_rows(rng, num_rows), some_steps(rng, num_rows, policy)
    wanted = in_memory(rows, steps)
    for max_held in (0, 3, 1 << 20):
        found, cuts = by_parts(rows, steps, cut_up(rng, num_rows), max_held)
        assert_same(found, wanted)
        assert cuts.nearest_kept() == nearest_kept(wanted)


@pytest.mark.parametrize("policy", POLICIES)
def test_rows_that_all_tie_are_cut_by_uid(policy: Any) -> None:
    rng = np.random.default_rng(0)
    same = np.full(500, 0.3)
    rows = Selectable(rng.permutation(500).astype(np.uint64), same, same, np.zeros(500, np.uint32))
    steps = Steps(("0.1", "0.9"), ("0.25", "0.75"), 50, seed=1, policy=policy)
    found, _ = by_parts(rows, steps, cut_up(rng, 500), max_held=2)
    assert_same(found, in_memory(rows, steps))
    assert found.keep.sum() == 50
    reached = np.sort(rows.uid[(found.reason == 0) | (found.reason == 5)])
    assert reached.tolist() == list(range(150, 350))


@pytest.mark.parametrize("seed", [3, 7, 11, 26, 40, 53])
def test_the_oracle_keeps_the_same_rows(seed: int) -> None:
    world = make_world(seed)
    rows = usable_rows(world)
    steps = Steps(world.clip_band, world.centroid_band, world.num_samples, seed=world.seed)
    clip = dict(zip(rows.uid.tolist(), rows.clip_score.tolist(), strict=True))
    cosine = dict(zip(rows.uid.tolist(), rows.centroid_cosine.tolist(), strict=True))
    left = oracle.band(clip, *world.clip_band)
    left = oracle.band({uid: cosine[uid] for uid in left}, *world.centroid_band)
    wanted = oracle.sample(left, world.num_samples, world.seed)
    rng = np.random.default_rng(seed)
    found, _ = by_parts(rows, steps, cut_up(rng, len(rows.uid)), max_held=4)
    assert as_ids(rows.uid[found.keep]) == wanted


def usable_rows(world: World) -> Selectable:
    usable = reject_reasons(world.images, world.texts) == 0
    images = world.images[usable]
    near = assign(images, world.centroids)
    scores = clip_score(images, world.texts[usable])
    return Selectable(world.uids[usable], scores, near.centroid_cosine, near.cluster)


def test_wrong_settings_and_missing_keys_are_refused() -> None:
    rows = tied_rows(np.random.default_rng(0), 4)
    rows.clip_score[2] = np.nan
    for steps in (
        Steps(None, None, -1, seed=0),
        Steps(("0.6", "0.4"), None, None, seed=0),
        Steps(("0.1", "0.4"), None, None, seed=0),
    ):
        with pytest.raises(UserError):
            find_cuts([lambda: rows], steps, num_rows=4)


@pytest.mark.parametrize("policy", ["paper", "top_clip"])
def test_finding_cuts_takes_no_more_memory_for_more_parts(policy: Any) -> None:
    def part(number: int) -> Selectable:
        rows = tied_rows(np.random.default_rng(number), 1000)
        return Selectable(
            np.arange(number * 1000, (number + 1) * 1000, dtype=np.uint64),
            rows.clip_score,
            rows.centroid_cosine,
            rows.cluster,
        )

    peaks = []
    for num_parts in (8, 64):
        loads = [lambda number=number: part(number) for number in range(num_parts)]
        steps = Steps(("0.2", "0.8"), ("0.1", "0.7"), 1000, seed=0, policy=policy)
        tracemalloc.start()
        find_cuts(loads, steps, num_rows=1000 * num_parts, max_held=500)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.2 * peaks[0]
    assert peaks[1] < 4 << 20
