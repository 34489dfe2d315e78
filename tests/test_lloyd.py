"""Exact k-means against its definition in integers, and FAISS's, one iteration at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from oracle import UNIT, Units, nearest, random_rows, units

from curate.vectors import kmeans, lloyd
from curate.vectors.assign import assign
from curate.vectors.exact import Float16Rows, round_to_grid
from curate.vectors.lloyd import first_rows, next_centroids, partial_sums, splits, step, train
from manifests.errors import UserError

Grid = NDArray[np.float32]


def distinct_rows(rows: Float16Rows, num_clusters: int, seed: int) -> Float16Rows:
    return rows[first_rows(len(rows), num_clusters, seed, lambda at: rows[at])]


def with_copies(num_rows: int, *, distinct: int, dim: int = 6, seed: int = 0) -> Float16Rows:
    """Return rows of which many are the same, so that there are ties and empty clusters."""
    which = np.random.default_rng(seed).integers(0, distinct, num_rows)
    return random_rows(distinct, dim, seed=seed)[which]


def one_iteration(rows: Units, centroids: Units) -> Units:
    """Return the next centroids, by the definition: Python's integers, fractions and floats."""
    label = [nearest(row, centroids)[0] for row in rows]
    members = [
        [row for row, k in zip(rows, label, strict=True) if k == c] for c in range(len(centroids))
    ]
    means = [
        [float(Fraction(int(sum(column)), len(own) * UNIT)) for column in zip(*own, strict=True)]
        for own in members
    ]
    sizes = [float(len(own)) for own in members]
    for empty in [c for c, size in enumerate(sizes) if not size]:
        largest = max(range(len(sizes)), key=lambda c: (sizes[c], -c))
        signs = [1 if at % 2 == 0 else -1 for at in range(rows.shape[1])]
        halves = [
            [m * (1.0 + side * sign / 1024) for m, sign in zip(means[largest], signs, strict=True)]
            for side in (1, -1)
        ]
        means[empty], means[largest] = halves
        sizes[empty] = sizes[largest] = sizes[largest] / 2
    return np.array([[round(Fraction(m) * UNIT) for m in mean] for mean in means], np.int64)


def defined(rows: Float16Rows, num_clusters: int, iterations: int, seed: int) -> list[Units]:
    """Return the centroids after each iteration until nothing moves any more."""
    found = [units(distinct_rows(rows, num_clusters, seed))]
    for _ in range(iterations):
        found.append(one_iteration(units(rows), found[-1]))
    return found[1:]


@pytest.mark.parametrize(
    ("rows", "num_clusters"),
    [
        (random_rows(90, 8), 11),
        (random_rows(40, 3, seed=1), 1),
        (random_rows(12, 5, seed=2), 12),
        (with_copies(80, distinct=9), 14),
        (with_copies(50, distinct=2, seed=3), 7),
        (np.repeat(random_rows(1, 4), 9, axis=0), 5),
        (np.round(random_rows(70, 2, seed=4) * 2).astype(np.float16) / 2 + np.float16(0.5), 9),
    ],
    ids=["plain", "one", "all", "copies", "two", "same", "lattice"],
)
def test_every_iteration_is_the_defined_one(rows: Float16Rows, num_clusters: int) -> None:
    seen: list[Units] = []
    settings: dict[str, Any] = {"num_clusters": num_clusters, "iterations": 5, "seed": 7}
    last = train(rows, **settings, on_iteration=lambda i, o, made: seen.append(units(made)))
    wanted = defined(rows, num_clusters, len(seen), seed=7)
    assert all((made == one).all() for made, one in zip(seen, wanted, strict=True))
    assert (units(last) == wanted[-1]).all()
    assert len(seen) == 5 or (seen[-1] == seen[-2]).all()


SETTINGS: dict[str, Any] = {"num_clusters": 30, "iterations": 6, "seed": 1}


def clustered(num_rows: int, dim: int, *, seed: int = 0, topics: int = 60) -> Float16Rows:
    rng = np.random.default_rng(seed)
    centers = np.random.default_rng(99).normal(size=(topics, dim))
    weights = 1.0 / np.arange(2, topics + 2)
    rows = centers[rng.choice(topics, num_rows, p=weights / weights.sum())]
    rows = rows + rng.normal(scale=0.8, size=rows.shape) + 0.5
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float16)


@pytest.fixture(autouse=True)
def threads() -> Iterator[Callable[[int], None]]:
    """Start with one thread: on a busy machine several wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield torch.set_num_threads
    torch.set_num_threads(before)


def test_precision_threads_and_the_kind_of_array_change_no_bit(
    threads: Callable[[int], None],
) -> None:
    rows = clustered(3000, 24)
    wanted = train(rows, **SETTINGS)
    for precision in ("fp32", "int8"):
        assert (train(rows, **SETTINGS, precision=precision) == wanted).all()
    assert (train(torch.from_numpy(rows), **SETTINGS) == wanted).all()
    threads(2)
    assert (train(rows, **SETTINGS) == wanted).all()
    assert (train(rows, **SETTINGS | {"seed": 2}) != wanted).any()


@pytest.mark.parametrize("num_shards", [1, 2, 5])
def test_partial_sums_over_any_split_add_up_to_the_same_bits(num_shards: int) -> None:
    rows = clustered(2000, 24)
    shards = np.array_split(rows[np.random.default_rng(num_shards).permutation(2000)], num_shards)
    centroids = distinct_rows(rows, 30, 1).astype(np.float32)
    before: list[Any] = [None] * num_shards
    for _ in range(6):
        before = [step(s, centroids, b) for s, b in zip(shards, before, strict=True)]
        total = sum((one[0] for one in before[1:]), start=before[0][0])
        centroids = next_centroids(total.sums, total.counts)
    assert (centroids == train(rows, **SETTINGS)).all()


def test_sums_are_exact_however_they_are_made() -> None:
    rows = clustered(500, 5) * np.float16(4)  # norm 4
    label = np.random.default_rng(0).integers(0, 7, 500).astype(np.uint32)
    found = partial_sums(rows, label, 9)
    for k in range(9):
        assert (units(found.sums[k]) == units(rows[label == k]).sum(axis=0)).all()
    assert found.counts.tolist() == np.bincount(label, minlength=9).tolist()
    assert found.square_units == sum(int(x) ** 2 for x in units(rows).ravel())
    there = partial_sums(torch.from_numpy(rows), label, 9)
    assert (there.sums == found.sums).all()
    assert there.square_units == found.square_units


def test_moving_few_rows_gives_the_sums_made_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = clustered(2000, 24)
    first = distinct_rows(rows, 30, 1).astype(np.float32)
    before = step(rows, first)
    moved = next_centroids(before[0].sums, before[0].counts)
    monkeypatch.setattr(lloyd, "MOVED_SHARE", 1.0)
    quick, (anew, label) = step(rows, moved, before), step(rows, moved)
    assert (quick[0].sums == anew.sums).all()
    assert (quick[0].counts == anew.counts).all()
    assert quick[0].square_units == anew.square_units
    assert (quick[1] == label).all()
    assert 0 < (label != before[1]).sum() < 2000


def test_the_objective_is_the_mean_squared_distance() -> None:
    rows = clustered(400, 12)
    centroids = distinct_rows(rows, 9, 0).astype(np.float32)
    found, _ = step(rows, centroids)
    truth = [nearest(row, units(centroids))[1] for row in units(rows)]
    assert found.objective(centroids) == pytest.approx(float(sum(truth) / 400), rel=1e-14)


def test_the_largest_cluster_is_split_for_each_empty_one_in_turn() -> None:
    assert splits(np.array([0, 8, 0, 8, 3, 0, 0])) == [(0, 1), (2, 3), (5, 0), (6, 1)]
    assert splits(np.array([0, 5, 0, 0])) == [(0, 1), (2, 0), (3, 1)]
    assert splits(np.array([1, 2, 3])) == []


def test_a_range_of_centroids_is_that_range_of_all_of_them() -> None:
    counts = np.array([0, 8, 0, 8, 3, 0, 0, 5])
    sums = np.random.default_rng(0).integers(-(2**24), 2**24, (8, 6)) / 2.0**24
    sums[counts == 0] = 0
    for spherical in (False, True):
        whole = next_centroids(sums, counts, spherical=spherical)
        parts = [
            next_centroids(sums, counts, spherical=spherical, part=slice(at, at + 3))
            for at in (0, 3, 6)
        ]
        assert (np.concatenate(parts) == whole).all()
        assert len(np.unique(whole, axis=0)) == 8


def test_spherical_centroids_have_norm_1_and_their_labels_the_largest_cosine() -> None:
    rows = clustered(3000, 24)
    found = train(rows, **SETTINGS, spherical=True)
    assert np.abs(np.linalg.norm(found.astype(np.float64), axis=1) - 1).max() < 1e-6
    cosine = rows.astype(np.float64) @ found.astype(np.float64).T
    taken = cosine[np.arange(3000), assign(rows, found).cluster]
    assert (cosine.max(axis=1) - taken).max() < 1e-6
    assert (found != train(rows, **SETTINGS)).any()
    ids = distinct_rows(rows, 5, 0)
    longer = lloyd.first_centroids(ids * np.float16(3), spherical=True)
    assert np.abs(longer - ids).max() < 2e-3


def test_first_centroids_are_distinct_rows_as_far_as_there_are() -> None:
    rows = with_copies(300, distinct=40)
    for num_clusters, distinct in ((25, 25), (40, 40), (60, 40)):
        chosen = first_rows(300, num_clusters, 5, lambda at: rows[at])
        assert len(set(chosen.tolist())) == num_clusters
        assert (np.diff(chosen) > 0).all()
        assert len(np.unique(rows[chosen], axis=0)) == distinct
    assert (
        first_rows(300, 25, 5, rows.__getitem__) == first_rows(300, 25, 5, rows.__getitem__)
    ).all()
    assert (
        first_rows(300, 25, 6, rows.__getitem__) != first_rows(300, 25, 5, rows.__getitem__)
    ).any()


@pytest.mark.parametrize("num_clusters", [0, 41])
def test_impossible_numbers_of_clusters_are_refused(num_clusters: int) -> None:
    with pytest.raises(UserError, match=f"{num_clusters} clusters were asked for, from 40 rows"):
        train(random_rows(40, 4), num_clusters=num_clusters, iterations=2, seed=0)


# FAISS


def test_held_out_rows_are_as_near_as_with_faiss() -> None:
    rows, held_out = clustered(20_000, 64, topics=400), clustered(4000, 64, seed=1, topics=400)
    settings: dict[str, Any] = {"num_clusters": 150, "iterations": 10, "seed": 3}
    ours = assign(held_out, train(rows, **settings)).d2.mean()
    theirs = assign(held_out, kmeans.train_centroids(rows, **settings, num_threads=1)).d2.mean()
    assert ours <= theirs * 1.005
    assert ours >= theirs * 0.98


@pytest.mark.parametrize("copies", [False, True])
def test_faiss_iterations_one_by_one_are_those_in_one_go(copies: bool) -> None:
    import faiss

    rows = with_copies(600, distinct=25, dim=16) if copies else clustered(600, 16)
    first = rows[:40].astype(np.float32)
    found, objectives = first, []
    for _ in range(6):
        found, objective = kmeans.iterate(rows, found, num_threads=1)
        objectives.append(objective)
    whole = faiss.Clustering(16, 40)
    whole.niter, whole.min_points_per_centroid, whole.max_points_per_centroid = 6, 1, 600
    faiss.copy_array_to_vector(first.ravel(), whole.centroids)
    whole.train(rows.astype(np.float32), faiss.IndexFlatL2(16))
    assert (faiss.vector_to_array(whole.centroids).reshape(40, 16) == found).all()
    stats: Any = whole.iteration_stats
    assert objectives == [pytest.approx(stats.at(i).obj / 600, rel=1e-6) for i in range(6)]
    assert copies == (stats.at(0).nsplit > 0)


def test_faiss_centroids_stay_on_the_sphere() -> None:
    settings: dict[str, Any] = {"num_clusters": 20, "iterations": 5, "seed": 0, "num_threads": 1}
    found = kmeans.train_centroids(clustered(1000, 16), **settings, spherical=True)
    assert np.abs(np.linalg.norm(found, axis=1) - 1).max() < 1e-6
    assert (round_to_grid(found) == found).all()
