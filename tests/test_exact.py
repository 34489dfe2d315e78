"""The arithmetic of the selection, the nearest centroids, and the centroids themselves."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import oracle
import pytest
import torch
from oracle import random_rows

from curate.vectors import exact
from curate.vectors.assign import assign
from curate.vectors.kmeans import train_centroids
from manifests.errors import UserError

# The arithmetic


def test_dots_of_unit_rows_are_the_integers_they_stand_for() -> None:
    a, b = random_rows(50, 768), random_rows(50, 768, seed=1)
    truth = [oracle.dot(x, y) for x, y in zip(oracle.units(a), oracle.units(b), strict=True)]
    assert [Fraction(s) for s in exact.clip_score(a, b)] == truth
    assert (exact.clip_score(a[:, ::-1], b[:, ::-1]) == exact.clip_score(a, b)).all()
    assert (exact.pair_dots(np.vstack([a, b]), np.arange(50), np.arange(50, 100)) == truth).all()


def test_blocks_do_not_change_a_dot(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = random_rows(37, 24)
    whole = exact.squared_norms(rows)
    monkeypatch.setattr(exact, "BLOCK_BYTES", 1)
    assert (exact.squared_norms(rows) == whole).all()


def test_the_fp32_error_bound_holds_and_grows_with_the_dimension() -> None:
    for dim in (2, 64, 768, 4096):
        a, b = random_rows(300, dim), random_rows(300, dim, seed=1)
        rough = (torch.from_numpy(a).float() @ torch.from_numpy(b).float().T).double().numpy()
        error = np.abs(rough - a.astype(np.float64) @ b.astype(np.float64).T).max()
        norms = np.sqrt([exact.squared_norms(a).max(), exact.squared_norms(b).max()])
        assert error <= exact.fp32_dot_error_bound(dim, *norms)
    assert exact.fp32_dot_error_bound(768, 1.0, 1.0) == pytest.approx(4.58e-5, rel=1e-3)


def test_each_bad_row_has_its_reason_and_odd_good_rows_have_none() -> None:
    good = np.full(4, 0.5, np.float16)
    image = np.array([good] * 9 + [[6e-8, 0, 0, 0], [5, 0, 0, 0], [5, 0.01, 0, 0]], np.float16)
    text = np.array([good] * 12)
    image[1, 2], image[2, 0], image[3], image[4] = np.nan, -np.inf, 0.0, 100.0
    text[5, 3], text[6] = np.inf, 0.0
    image[7], text[7] = 0.0, np.nan  # two reasons: the first in the list
    clip = np.array([0.5] * 8 + [np.nan] + [0.5] * 3)
    reasons = np.array(exact.REJECT_REASONS)[exact.reject_reasons(image, text, clip_scores=clip)]
    nan, zero, long, score = exact.REJECT_REASONS[1:]
    expected = ["", nan, nan, zero, long, nan, zero, nan, score, "", "", long]
    assert reasons.tolist() == expected
    assert exact.reject_reasons(image[:4]).tolist() == [0, 1, 1, 2]


def test_rows_that_are_not_float16_or_not_paired_are_refused() -> None:
    rows = random_rows(3, 4)
    for image, text in ((rows.astype(np.float32), rows), (rows, rows[:2]), (rows[0], rows[0])):
        with pytest.raises(UserError):
            exact.clip_score(image, text)


def test_the_grid_holds_every_float16_and_rounds_the_rest_once() -> None:
    rows = random_rows(20, 16)
    assert (exact.round_to_grid(rows) == rows).all()
    off_grid = np.array([[0.1, 1 / 3, -(2.0**-26), 1.7, -0.0]])
    grid = exact.round_to_grid(off_grid)
    assert grid.dtype == np.float32
    assert (grid.astype(np.float64) * 2**24 % 1 == 0).all()
    assert np.abs(grid[0, :3] - off_grid[0, :3]).max() <= 2.0**-25
    assert not np.signbit(grid[0, [2, 4]]).any()
    assert (exact.round_to_grid(grid) == grid).all()


def test_unusable_centroids_are_refused() -> None:
    for bad in (np.nan, np.inf, 1e39, 200.0):
        with pytest.raises(UserError, match="Centroid 1"):
            exact.round_to_grid(np.array([[0.0, 1.0], [bad, 0.0]]))
    for shape in ((4,), (0, 4)):
        with pytest.raises(UserError, match="shape"):
            exact.round_to_grid(np.zeros(shape))


def test_splitmix64_gives_the_published_stream() -> None:
    """Source: rosettacode.org/wiki/Pseudo-random_numbers/Splitmix64, seed 1234567."""
    published = [
        6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431,
        16408922859458223821,
    ]  # fmt: skip
    golden = 0x9E3779B97F4A7C15
    states = np.array([(1234567 + i * golden) % 2**64 for i in range(5)], np.uint64)
    assert exact.splitmix64(states).tolist() == published
    assert [oracle.splitmix64(int(state)) for state in states] == published
    seeded = [exact.sample_hashes(states[:1], seed)[0] for seed in range(5)]
    assert seeded == published  # output number `seed` of the generator seeded with the uid


def test_a_sample_is_the_same_in_any_order_and_grows_by_adding() -> None:
    uids = np.arange(1000, dtype=np.uint64) << np.uint64(24)
    order = np.random.default_rng(0).permutation(1000)
    small, large = (exact.sample_smallest(uids, m, seed=3) for m in (100, 200))
    assert small.sum() == 100
    assert not (small & ~large).any()
    assert (exact.sample_smallest(uids[order], 100, seed=3) == small[order]).all()
    assert (exact.sample_smallest(uids, 100, seed=4) != small).any()
    assert [exact.sample_smallest(uids, m, seed=0).sum() for m in (0, 1000, 5000)] == [
        0,
        1000,
        1000,
    ]
    assert exact.sample_smallest(uids, 100, seed=-1).sum() == 100


# Assignment


@pytest.mark.parametrize(("row_norm", "centroid_norm"), [(0.7, 1), (4.9, 0.5), (4.9, 100)])
def test_a_float32_product_would_choose_wrongly_where_assign_does_not(
    row_norm: float, centroid_norm: float
) -> None:
    """A row of equal neighbours is as far from a centroid as from its copy with neighbours swapped.

    Between long rows and long centroids a float64 product would choose wrongly too.
    """
    rows = np.repeat(random_rows(500, 32), 2, axis=1) * np.float16(row_norm / np.sqrt(2))
    centroids = random_rows(20, 64, seed=1).astype(np.float32) * np.float32(centroid_norm)
    swapped = centroids.reshape(20, 32, 2)[:, :, ::-1].reshape(20, 64)
    found = assign(rows, np.vstack([centroids, swapped]))
    assert (found.cluster < 20).all()
    both = torch.from_numpy(np.vstack([centroids, swapped]))
    rough = (both.square().sum(1) / 2 - torch.from_numpy(rows).float() @ both.T).argmin(1)
    assert (rough >= 20).any()


@pytest.mark.parametrize("num_copies", [1, 3000])
def test_copies_of_a_centroid_never_win_and_cost_nothing(num_copies: int) -> None:
    rows = random_rows(200, 16)
    centroids = random_rows(5, 16, seed=1).astype(np.float32)
    found = assign(rows, np.vstack([np.tile(centroids[2], (num_copies, 1)), centroids]))
    alone = assign(rows, centroids)
    moved = alone.cluster + np.uint32(num_copies)
    assert (found.cluster == np.where(alone.cluster == 2, 0, moved)).all()
    assert (found.d2 == alone.d2).all()


def test_centroids_too_long_for_float64_are_compared_as_integers() -> None:
    """x.c is about 400, where float64 steps by 2^-44: the order of addition would decide."""
    rng = np.random.default_rng(0)
    rows = np.repeat(rng.integers(-2000, 2000, size=(300, 16)) / 2.0**24, 2, axis=1)
    centroids = rng.integers(-(2**20), 2**20, size=(20, 32)) / 2.0**24
    rows[:, :2], centroids[:, :2] = 3.0, 70.0
    swapped = centroids.reshape(20, 16, 2)[:, :, ::-1].reshape(20, 32)
    found = assign(rows.astype(np.float16), np.vstack([centroids, swapped]))
    assert (found.cluster < 20).all()


def test_zero_and_very_long_centroids_are_measured_exactly() -> None:
    rows = np.vstack([random_rows(40, 8), random_rows(5, 8) * np.float16(4.9)])
    centroids = np.vstack([np.zeros((1, 8)), random_rows(6, 8, seed=2), random_rows(3, 8) * 100])
    found = assign(rows, centroids)
    grid = oracle.units(exact.round_to_grid(centroids))
    truth = [oracle.nearest(x, grid) for x in oracle.units(rows)]
    assert found.cluster.tolist() == [k for k, _ in truth]
    assert found.d2.tolist() == [float(d2) for _, d2 in truth]
    zero = assign(rows, np.zeros((2, 8), np.float32))
    assert not zero.cluster.any()
    assert not zero.centroid_cosine.any()
    assert (zero.d2 == exact.squared_norms(rows)).all()


def test_tiles_blocks_and_tensors_give_the_same_labels(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, centroids = random_rows(300, 24), random_rows(70, 24, seed=1).astype(np.float64)
    whole = assign(rows, centroids)
    monkeypatch.setattr("curate.vectors.assign.TILE_CENTROIDS", 16)
    monkeypatch.setattr("curate.vectors.distances.PAIRS_PER_CHUNK", 7)
    for given in (rows, torch.from_numpy(rows)):
        for block_rows in (1, 37, 300):
            found = assign(given, centroids, block_rows=block_rows)
            assert (found.cluster == whole.cluster).all()
            assert (found.d2 == whole.d2).all()
            assert (found.centroid_cosine == whole.centroid_cosine).all()
    assert whole.cluster.dtype == np.uint32
    assert whole.d2.dtype == whole.centroid_cosine.dtype == np.float64


def test_assign_refuses_what_it_cannot_compare() -> None:
    with pytest.raises(UserError, match="dimensions"):
        assign(random_rows(3, 4), np.ones((2, 5)))
    for bad in (np.nan, np.inf, 40.0):
        with pytest.raises(ValueError, match="reject_reasons"):
            assign(np.full((2, 4), bad, np.float16), np.ones((2, 4)))
    assert len(assign(np.zeros((0, 4), np.float16), np.ones((2, 4))).cluster) == 0


def test_a_lowered_matrix_precision_is_lifted_and_put_back() -> None:
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu"), exact.full_precision_gemm():
            assert torch.get_float32_matmul_precision() == "highest"
            assert not torch.is_autocast_enabled("cpu")
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")


# Centroids


def test_centroids_are_seeded_on_the_grid_and_leave_the_threads_alone() -> None:
    import faiss

    rows, before = random_rows(2000, 16), faiss.omp_get_max_threads()
    settings = {"num_clusters": 20, "iterations": 5, "num_threads": before + 1}
    found = train_centroids(rows, **settings, seed=0)
    assert faiss.omp_get_max_threads() == before
    assert found.shape == (20, 16)
    assert (exact.round_to_grid(found) == found).all()
    assert (train_centroids(rows, **settings, seed=0) == found).all()
    assert (train_centroids(rows, **settings, seed=1) != found).any()
    assert assign(rows, found).d2.mean() < assign(rows, rows[:20].astype(np.float32)).d2.mean()


def test_as_many_clusters_as_rows_are_the_rows_and_one_is_their_mean(
    capfd: pytest.CaptureFixture[str],
) -> None:
    rows = random_rows(30, 8)
    settings = {"iterations": 3, "seed": 0, "num_threads": 1}
    assert (train_centroids(rows, num_clusters=30, **settings) == rows).all()
    mean = rows.astype(np.float64).mean(axis=0)
    assert np.abs(train_centroids(rows, num_clusters=1, **settings)[0] - mean).max() < 1e-6
    copies = np.repeat(rows[:2], 10, axis=0)  # fewer distinct rows than clusters
    assert train_centroids(copies, num_clusters=5, **settings).shape == (5, 8)
    assert capfd.readouterr().out == ""


@pytest.mark.parametrize("wrong", [{"num_clusters": 0}, {"num_clusters": 31}, {"iterations": 0}])
def test_impossible_clusterings_are_refused(wrong: dict[str, int]) -> None:
    settings = {"num_clusters": 3, "iterations": 3, "seed": 0, "num_threads": 1} | wrong
    with pytest.raises(UserError):
        train_centroids(random_rows(30, 8), **settings)
