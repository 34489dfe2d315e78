"""The whole selection equals its definition, row for row, on 200 planted worlds.

Each world has duplicate trees, chains, exact copies, lattice rows (which tie exactly, in similarity
and in distance), equal clip scores, degenerate rows, empty clusters and copies of centroids.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from fractions import Fraction

import numpy as np
import oracle
import pytest
import torch
from numpy.typing import NDArray

from curate.duplicates.components import components
from curate.duplicates.judge import judge
from curate.rows.select import Selectable, select
from curate.vectors.assign import assign
from curate.vectors.exact import clip_score, reject_reasons, round_to_grid

KEEPS = ("middle", "far", "near", "clip_max")
BIG_SEEDS = (40, 80, 120, 160)  # worlds of 3000 rows; the others have at most 250
BATCH = 20


@dataclass(frozen=True)
class World:
    """A planted input and the settings it is selected with."""

    images: NDArray[np.float16]
    texts: NDArray[np.float16]
    uids: NDArray[np.uint64]
    centroids: NDArray[np.float32]
    similarity_above: float
    clip_band: tuple[str, str]
    centroid_band: tuple[str, str]
    num_samples: int
    seed: int


Steps = dict[str, set[int]]  # the uids left after each step


def make_world(seed: int) -> World:
    rng = np.random.default_rng(seed)
    num_rows = 3000 if seed in BIG_SEEDS else int(rng.choice([1, 2, 3, 5, 20, 60, 120, 250]))
    dim = int(rng.choice([2, 3, 4, 8, 64]))
    images = plant_rows(rng, num_rows, dim)
    texts = plant_lattice(rng, num_rows, dim)  # few distinct values: clip scores tie
    break_some(rng, images, texts)
    ends = [str(end / 100) for end in np.sort(rng.choice(101, 4, replace=False))]
    return World(
        images,
        texts,
        rng.choice(1 << 40, num_rows, replace=False).astype(np.uint64),
        plant_centroids(rng, images),
        similarity_above=plant_threshold(rng, images),
        clip_band=(ends[0], ends[2]),
        centroid_band=(ends[1], ends[3]),
        num_samples=int(rng.integers(0, num_rows + 1)),
        seed=seed,
    )


def plant_rows(rng: np.random.Generator, num_rows: int, dim: int) -> NDArray[np.float16]:
    """Return rows of which most are copies, or near-duplicates, of another row before them."""
    rows = unit(rng.normal(size=(num_rows, dim)))
    lattice = rng.random(num_rows) < 0.4
    rows[lattice] = plant_lattice(rng, num_rows, dim)[lattice]
    twins = rng.random(num_rows) < 0.2
    rows[twins] = unit(rows[twins] + swapped(rows[twins]) + 1e-3)  # see plant_centroids
    for i in np.flatnonzero(rng.random(num_rows) < 0.6)[1:]:
        parent = i - 1 if rng.random() < 0.3 else rng.integers(i)  # chains, and trees
        noise = rng.choice([0.0, 0.0, 1e-3, 0.2, 0.5]) * rng.normal(size=dim) / np.sqrt(dim)
        rows[i] = unit(rows[parent] + noise) if noise.any() else rows[parent]
    return rows.astype(np.float16)


def plant_lattice(rng: np.random.Generator, num_rows: int, dim: int) -> NDArray[np.float16]:
    """Return rows with four entries of +-1/2: similarities are multiples of 1/4, exactly."""
    rows = np.zeros((num_rows, dim), np.float16)
    for row in rows:
        row[rng.choice(dim, min(4, dim), replace=False)] = rng.choice([-0.5, 0.5], min(4, dim))
    return rows


def plant_threshold(rng: np.random.Generator, images: NDArray[np.float16]) -> float:
    """Return a round threshold, or one that some pair hits exactly or misses by one bit."""
    one = images[rng.integers(len(images))].astype(np.float64)
    with np.errstate(invalid="ignore"):
        hits = images.astype(np.float64) @ one
    hits = hits[(hits > 0.3) & (hits < 0.99)]
    if rng.random() < 0.4 or not len(hits):
        return float(rng.choice([0.86, 0.75, 0.5, 0.96, 1.0]))
    hit = rng.choice(hits)
    return float(np.nextafter(hit, rng.choice([hit, 0.0])))


def swapped(rows: NDArray[np.floating]) -> NDArray[np.floating]:
    """Return the rows with every two neighbouring dimensions exchanged."""
    order = np.arange(rows.shape[1])
    even = len(order) // 2 * 2
    order[:even] = order[:even].reshape(-1, 2)[:, ::-1].ravel()
    return rows[:, order]


def unit(rows: NDArray[np.float64]) -> NDArray[np.float64]:
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


def break_some(
    rng: np.random.Generator, images: NDArray[np.float16], texts: NDArray[np.float16]
) -> None:
    """Overwrite a few rows: NaN, infinite, zero, too long (all rejected), and odd but good."""
    oddities = (np.nan, np.inf, 0.0, 40.0, 6e-8, 0.01, 3.0 / np.sqrt(images.shape[1]))
    for values in (images, texts):
        for i in np.flatnonzero(rng.random(len(values)) < 0.04):
            odd = rng.choice(oddities)
            values[i] = np.float16(odd)
            if not np.isfinite(odd):
                values[i, 1:] = 0.5


def plant_centroids(rng: np.random.Generator, images: NDArray[np.float16]) -> NDArray[np.float32]:
    """Return rows, means of rows, copies of both, a zero centroid and some that no row is near to.

    A centroid and its swapped twin are equally far from a row whose neighbouring dimensions are
    equal, though a float32 product seldom says so; a nudged twin differs by about 2^-24.
    """
    usable = images[np.isfinite(images).all(axis=1)].astype(np.float32)
    usable = np.vstack([usable, np.ones((1, images.shape[1]), np.float32)])
    picked = usable[rng.integers(len(usable), size=(int(rng.integers(1, 12)), 2))]
    centroids = np.where(rng.random(len(picked))[:, None] < 0.5, picked[:, 0], picked.mean(axis=1))
    zero, far = np.zeros((1, images.shape[1])), np.full((1, images.shape[1]), 9.0)
    twins = swapped(centroids)
    nudged = twins + rng.choice([-1, 0, 1], size=twins.shape) / 2**24
    extra = [zero, far, centroids[:2], centroids[-1:], twins, nudged]
    centroids = np.vstack([centroids, *extra]).astype(np.float32)
    return rng.permutation(np.clip(centroids, -9, 9))


def by_definition(world: World) -> dict[str, Steps]:
    """Return, per keep policy, the uids left after each step, from the definitions in oracle.py."""
    usable = [
        i
        for i in range(len(world.uids))
        if oracle.is_usable(world.images[i].tolist(), world.texts[i].tolist())
    ]
    rows, texts = oracle.units(world.images[usable]), oracle.units(world.texts[usable])
    uids = [int(uid) for uid in world.uids[usable]]
    centroids = oracle.units(round_to_grid(world.centroids))
    near = [oracle.nearest(x, centroids) for x in rows]
    clip = [oracle.dot(a, b) for a, b in zip(rows, texts, strict=True)]
    cosine = {
        uid: oracle.centroid_cosine(x, centroids[k])
        for uid, x, (k, _) in zip(uids, rows, near, strict=True)
    }
    groups = planted_components(rows, [k for k, _ in near], world.similarity_above)
    d2, clip_of = [d2 for _, d2 in near], dict(zip(uids, clip, strict=True))
    found = {}
    for keep in KEEPS:
        kept = {uids[oracle.survivor(one, d2, uids, clip, keep)] for one in groups}
        in_clip = oracle.band({uid: clip_of[uid] for uid in kept}, *world.clip_band)
        in_both = oracle.band({uid: cosine[uid] for uid in in_clip}, *world.centroid_band)
        sampled = oracle.sample(in_both, world.num_samples, world.seed)
        found[keep] = {
            "usable": set(uids),
            "dedup": kept,
            "clip": in_clip,
            "cosine": in_both,
            "sample": sampled,
        }
    return found


def planted_components(
    rows: oracle.Units, clusters: list[int], similarity_above: float
) -> list[list[int]]:
    groups: dict[tuple[int, int], list[int]] = defaultdict(list)
    for cluster in sorted(set(clusters)):
        members = [i for i, k in enumerate(clusters) if k == cluster]
        labels = oracle.component_of(rows[members], similarity_above)
        for i, label in zip(members, labels, strict=True):
            groups[cluster, label].append(i)
    return list(groups.values())


def by_warren(world: World, *, block_rows: int) -> dict[str, Steps]:
    """Return the same from the functions under test."""
    usable = reject_reasons(world.images, world.texts) == 0
    rows, uids = world.images[usable], world.uids[usable]
    clip = clip_score(rows, world.texts[usable])
    near = assign(rows, world.centroids, block_rows=block_rows)
    labels = np.empty(len(rows), np.int64)
    for cluster in np.unique(near.cluster):
        members = np.flatnonzero(near.cluster == cluster)
        labels[members] = members[
            components(rows[members], world.similarity_above, block_rows=block_rows)
        ]
    found = {}
    for keep in KEEPS:
        kept = judge(labels, near.d2, uids, keep=keep, clip_scores=clip).keep
        table = Selectable(uids[kept], clip[kept], near.centroid_cosine[kept], near.cluster[kept])
        found[keep] = {
            "usable": as_ids(uids),
            "dedup": as_ids(table.uid),
            **selected_steps(world, table),
        }
    return found


def selected_steps(world: World, table: Selectable) -> Steps:
    steps = {"clip": world.clip_band, "cosine": world.centroid_band, "sample": world.num_samples}
    names = ("clip_band", "centroid_band", "num_samples")
    found: Steps = {}
    for last, step in enumerate(steps, start=1):
        settings = dict.fromkeys(names) | dict(list(zip(names, steps.values(), strict=True))[:last])
        found[step] = as_ids(table.uid[select(table, seed=world.seed, **settings).keep])
    return found


def as_ids(uids: NDArray[np.uint64]) -> set[int]:
    return {int(uid) for uid in uids}


@contextmanager
def torch_threads(num_threads: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("first_seed", range(0, 200, BATCH))
def test_every_step_keeps_exactly_the_rows_of_the_definition(first_seed: int) -> None:
    for seed in range(first_seed, first_seed + BATCH):
        world = make_world(seed)
        truth = by_definition(world)
        order = np.random.default_rng(seed).permutation(len(world.uids))
        shuffled = replace(
            world, images=world.images[order], texts=world.texts[order], uids=world.uids[order]
        )
        with torch_threads(2):
            assert by_warren(world, block_rows=4096) == truth, seed
        with torch_threads(1):
            assert by_warren(shuffled, block_rows=1 + len(order) // 9) == truth, seed


def test_the_worlds_have_the_ties_and_the_trouble_they_are_for() -> None:
    worlds = [make_world(seed) for seed in range(200) if seed not in BIG_SEEDS]
    tied, empty, single, exact_edges = 0, 0, 0, 0
    for world in worlds:
        usable = reject_reasons(world.images, world.texts) == 0
        rows = world.images[usable].astype(np.float64)
        tied += len(np.unique(clip_score(world.images[usable], world.texts[usable]))) < len(rows)
        sizes = np.bincount(
            assign(world.images[usable], world.centroids).cluster, minlength=len(world.centroids)
        )
        empty += bool((sizes == 0).any())
        single += bool((sizes == 1).any())
        exact_edges += bool((np.triu(rows @ rows.T, 1) == world.similarity_above).any())
    assert min(tied, empty, single, exact_edges) > 40
    wrong = [fp32_labels(world) != exact_labels(world) for world in worlds]
    assert sum(wrong) > 40  # a float32 product alone would fail
    seen = np.unique(np.concatenate([reject_reasons(w.images, w.texts) for w in worlds]))
    assert seen.tolist() == [0, 1, 2, 3]


def exact_labels(world: World) -> list[int]:
    usable = reject_reasons(world.images, world.texts) == 0
    return assign(world.images[usable], world.centroids).cluster.tolist()


def fp32_labels(world: World) -> list[int]:
    rows = world.images[reject_reasons(world.images, world.texts) == 0].astype(np.float32)
    centroids = round_to_grid(world.centroids)
    return ((centroids**2).sum(axis=1) / 2 - rows @ centroids.T).argmin(axis=1).tolist()


def test_clip_scores_and_distances_equal_the_fractions() -> None:
    world = make_world(7)
    usable = reject_reasons(world.images, world.texts) == 0
    rows, texts = world.images[usable], world.texts[usable]
    centroids = oracle.units(round_to_grid(world.centroids))
    near = assign(rows, world.centroids)
    truth = [oracle.nearest(x, centroids) for x in oracle.units(rows)]
    assert [int(k) for k in near.cluster] == [k for k, _ in truth]
    assert [Fraction(d2) for d2 in near.d2] == [d2 for _, d2 in truth]
    scores = [
        oracle.dot(a, b) for a, b in zip(oracle.units(rows), oracle.units(texts), strict=True)
    ]
    assert [Fraction(score) for score in clip_score(rows, texts)] == scores
