"""The rank bands, the sample and the policies beside it, on cases small enough to do by hand."""

from __future__ import annotations

from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest

from curate.rows.select import SELECT_REASONS, Selectable, band, select
from curate.vectors import exact
from manifests.errors import UserError


def table(clip: list[float], cluster: list[int] | None = None) -> Selectable:
    n = len(clip)
    return Selectable(
        np.arange(n, dtype=np.uint64),
        np.array(clip, np.float64),
        np.array(clip, np.float64),
        np.array(cluster if cluster is not None else [0] * n, np.uint32),
    )


def test_a_band_of_a_fifth_of_1000_rows_has_200_and_starts_at_rank_400() -> None:
    """The reference's slice gave 199, lost ranks 0, 200, 400, and for lo = 0 the best row."""
    keys, uids = -np.arange(1000.0), np.arange(1000, dtype=np.uint64)
    found = band(keys, uids, "0.4", "0.6")
    assert np.flatnonzero(found.keep).tolist() == list(range(400, 600))
    assert (found.largest_key, found.smallest_key) == (-400.0, -599.0)
    assert found.above.sum() == found.below.sum() == 400
    assert np.flatnonzero(band(keys, uids, 0, 0.1).keep).tolist() == list(range(100))


@pytest.mark.parametrize(
    "share", ["0.29", 0.29, Decimal("0.29"), np.float64(0.29), Fraction(29, 100)]
)
def test_29_percent_of_100_rows_are_29_however_it_is_written(share: object) -> None:
    """int(.29 * 100) is 28."""
    keys, uids = np.arange(100.0), np.arange(100, dtype=np.uint64)
    assert band(keys, uids, 0, share).keep.sum() == 29


def test_bands_that_touch_share_the_rows_out() -> None:
    rng = np.random.default_rng(0)
    for num_rows in (0, 1, 2, 3, 7, 10, 101):
        keys = rng.integers(4, size=num_rows) / 4.0  # ties everywhere
        uids = rng.permutation(num_rows).astype(np.uint64)
        ends = ["0", "0.07", "0.29", "0.4", "0.6", "1"]
        masks = [band(keys, uids, lo, hi).keep for lo, hi in zip(ends, ends[1:], strict=False)]
        assert (np.sum(masks, axis=0) == 1).all()


def test_a_band_that_holds_no_row_keeps_none() -> None:
    """The reference's [-0:-1] kept all but one."""
    found = band(np.arange(5.0), np.arange(5, dtype=np.uint64), "0.01", "0.05")
    assert not found.keep.any()
    assert found.below.all()
    assert np.isnan([found.largest_key, found.smallest_key]).all()


@pytest.mark.parametrize(
    "ends", [(0.6, 0.4), (0.5, 0.5), (-0.1, 1), (0, 1.01), ("x", 1), (0, float("nan"))]
)
def test_bands_outside_the_ranking_are_refused(ends: tuple[object, object]) -> None:
    with pytest.raises(UserError):
        band(np.arange(5.0), np.arange(5, dtype=np.uint64), *ends)


def test_clip_then_centroid_ranks_the_second_band_on_what_is_left() -> None:
    """The reference sorted all rows and then indexed the clip-filtered ones: an IndexError."""
    rows = table([0.0] * 10)
    clip, cosine = np.arange(10.0), np.array([9, 8, 7, 6, 0, 1, 2, 3, 5, 4.0])
    rows = Selectable(rows.uid, clip, cosine, rows.cluster)
    fate = select(rows, clip_band=(0.2, 0.6), centroid_band=(0.25, 0.75), num_samples=1, seed=0)
    reasons = [SELECT_REASONS[code] for code in fate.reason]
    assert reasons[:4] == ["clip_band_below"] * 4
    assert reasons[8:] == ["clip_band_above"] * 2
    assert reasons[4] == "centroid_band_below"
    assert reasons[7] == "centroid_band_above"
    assert sorted(reasons[5:7]) == ["", "not_sampled"]
    assert fate.keep.sum() == 1
    assert fate.score[[0, 9, 4, 7]].tolist() == [0.0, 9.0, 0.0, 3.0]
    assert fate.cutoff[[0, 9, 4, 7]].tolist() == [4.0, 7.0, 1.0, 2.0]
    assert np.isnan(fate.score[5:7]).all()


def test_without_bands_and_a_sample_every_row_stays() -> None:
    settings = {"clip_band": None, "centroid_band": None, "num_samples": None, "seed": 0}
    fate = select(table([0.3, 0.1]), **settings)
    assert fate.keep.all()
    assert not fate.reason.any()
    with pytest.raises(UserError):
        select(table([0.3]), **(settings | {"num_samples": -1}))


def test_top_clip_takes_the_largest_scores_and_the_smaller_uid() -> None:
    settings = {"clip_band": None, "centroid_band": None, "seed": 0, "policy": "top_clip"}
    fate = select(table([0.1, 0.4, 0.3, 0.3, 0.2]), num_samples=2, **settings)
    assert fate.keep.tolist() == [False, True, True, False, False]
    assert fate.cutoff[[0, 3, 4]].tolist() == [0.3] * 3
    assert select(table([0.1, 0.4]), num_samples=9, **settings).keep.all()


@pytest.mark.parametrize("num_samples", [0, 1, 4, 5, 17, 30, 31, 45, 100])
def test_balanced_fills_all_clusters_to_one_level_and_hits_the_number(num_samples: int) -> None:
    sizes = [1, 2, 12, 30]
    cluster = np.repeat([7, 3, 9, 0], sizes).tolist()
    rows = table([0.0] * 45, cluster)
    settings = {"clip_band": None, "centroid_band": None, "seed": 5}
    fate = select(rows, num_samples=num_samples, policy="balanced", **settings)
    counts = [int(fate.keep[np.array(cluster) == k].sum()) for k in (7, 3, 9, 0)]
    assert sum(counts) == min(num_samples, 45)
    cap = max(c for c in range(46) if sum(min(c, size) for size in sizes) <= num_samples)
    assert all(min(cap, s) <= n <= min(cap + 1, s) for n, s in zip(counts, sizes, strict=True))
    hashes = exact.sample_hashes(rows.uid, 5)
    for k in (7, 3, 9, 0):  # within a cluster, the smallest hashes
        members = np.array(cluster) == k
        out = hashes[members & ~fate.keep]
        assert not len(out) or not (hashes[members & fate.keep] > out.min()).any()


def test_balanced_does_not_depend_on_the_order_of_the_rows() -> None:
    rng = np.random.default_rng(0)
    rows = table([0.0] * 60, rng.integers(7, size=60).tolist())
    order = rng.permutation(60)
    moved = Selectable(
        rows.uid[order], rows.clip_score[order], rows.centroid_cosine[order], rows.cluster[order]
    )
    settings = {"clip_band": None, "centroid_band": None, "seed": 5, "policy": "balanced"}
    kept = select(rows, num_samples=23, **settings).keep
    assert (select(moved, num_samples=23, **settings).keep == kept[order]).all()
