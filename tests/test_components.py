"""Near-duplicate components and the row each keeps, on cases small enough to do by hand."""

from __future__ import annotations

from math import cos, radians, sin
from pathlib import Path

import numpy as np
import oracle
import pytest
from numpy.typing import NDArray
from oracle import random_rows

from curate.duplicates import components as joining
from curate.duplicates.components import components
from curate.duplicates.forest import spanning_forest
from curate.duplicates.judge import distance_to_mean, judge
from curate.rows.select import band
from curate.vectors import exact, hits
from curate.vectors.assign import assign


def at_degrees(*angles: float) -> NDArray[np.float16]:
    return np.array([[cos(radians(a)), sin(radians(a))] for a in angles], np.float16)


def test_a_chain_of_0_20_40_degrees_is_one_component() -> None:
    """cos 20 = 0.94 joins neighbours, cos 40 = 0.77 does not; SemDeDup's triangle keeps two."""
    rows = at_degrees(0, 20, 40)
    assert components(rows, 0.86).tolist() == [0, 0, 0]
    d2 = assign(rows, at_degrees(0)).d2
    uids = np.arange(3, dtype=np.uint64)
    middle = judge(np.zeros(3, np.int64), d2, uids, keep="middle")
    assert middle.keep.tolist() == [False, True, False]
    near = judge(np.zeros(3, np.int64), d2, uids, keep="near")
    links = spanning_forest(rows, 0.8).weakest_links(0.86, near.keep)
    assert np.isinf(links[0])
    assert links[1:] == pytest.approx([0.94, 0.94], abs=2e-3)


def test_the_row_with_the_largest_clip_score_is_named_by_its_own_number() -> None:
    """The reference kept the position inside the group, as if it were a row number."""
    labels = np.array([0, 1, 0, 1, 1, 5])
    clip = np.array([0.1, 0.2, 0.3, 0.4, 0.4, 0.0])
    uids = np.array([10, 11, 12, 14, 13, 15], np.uint64)
    judged = judge(labels, np.zeros(6), uids, keep="clip_max", clip_scores=clip)
    assert np.flatnonzero(judged.keep).tolist() == [2, 4, 5]
    assert judged.survivor.tolist() == [2, 4, 2, 4, 4, 5]


def test_an_even_component_keeps_the_farther_middle_and_ties_go_by_uid() -> None:
    d2, labels = np.array([0.028, 0.010, 0.5, 0.5, 0.5]), np.array([0, 0, 2, 2, 2])
    uids = np.array([1, 2, 30, 10, 20], np.uint64)
    assert judge(labels, d2, uids, keep="middle").survivor.tolist() == [0, 0, 4, 4, 4]
    assert judge(labels, d2, uids, keep="far").survivor.tolist() == [0, 0, 2, 2, 2]
    assert judge(labels, d2, uids, keep="near").survivor.tolist() == [1, 1, 3, 3, 3]


def test_a_pair_exactly_at_the_threshold_is_not_joined() -> None:
    rows = random_rows(2, 768)
    rows[1] = ((rows[0].astype(np.float64) * 3 + rows[1]) / np.sqrt(10)).astype(np.float16)
    at = float(exact.pair_dots(rows, np.array([0]), np.array([1]))[0])
    assert components(rows, at).tolist() == [0, 1]
    assert components(rows, np.nextafter(at, 0.0)).tolist() == [0, 0]
    for scale in (1e-9, 1e-7, 1e-5):
        assert components(rows, at * (1 + scale)).tolist() == [0, 1]
        assert components(rows, at * (1 - scale)).tolist() == [0, 0]


def test_copies_of_a_short_row_are_not_duplicates_of_each_other() -> None:
    """Their similarity is |x|^2 = 0.81, below the threshold; a longer row may yet join them."""
    short = np.float16(0.9) * at_degrees(0, 0)
    assert components(short, 0.86).tolist() == [0, 1]
    assert components(np.vstack([short, at_degrees(0)]), 0.86).tolist() == [0, 0, 0]
    assert components(np.repeat(at_degrees(0, 90), 3, axis=0), 0.86).tolist() == [0, 0, 0, 3, 3, 3]


def test_row_numbers_are_integers_from_end_to_end() -> None:
    """Numbers above 2^24 do not survive a float32, nor uids above 2^53 a float64."""
    uids = np.array([2**63 + 1, 2**63, 2**24 + 1, 2**24], np.uint64)
    judged = judge(np.zeros(4, np.int64), np.ones(4), uids, keep="far")
    assert judged.survivor.tolist() == [0] * 4
    assert judged.survivor.dtype == np.int64
    assert band(np.ones(4), uids, 0.5, 1.0).keep.tolist() == [True, True, False, False]
    order = exact.sample_hashes(uids, seed=0)
    assert order.tolist() == [oracle.splitmix64(int(uid)) for uid in uids]


def planted_trees(num_rows: int, dim: int) -> NDArray[np.float16]:
    rng = np.random.default_rng(0)
    rows = random_rows(num_rows, dim).astype(np.float64)
    for i in range(1, num_rows):
        if rng.random() < 0.5:
            rows[i] = rows[rng.integers(i)] + rng.normal(size=dim) * 0.3 / np.sqrt(dim)
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float16)


def test_components_do_not_depend_on_blocks_buffers_or_the_kind_of_array(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    rows = planted_trees(400, 16)
    rows[77], rows[300] = rows[5], rows[5]
    truth = oracle.component_of(oracle.units(rows), 0.86)
    np.save(tmp_path / "rows.npy", rows)
    mapped = np.load(tmp_path / "rows.npy", mmap_mode="r")
    for block_rows in (7, 64, 399, 4096):
        assert components(mapped, 0.86, block_rows=block_rows).tolist() == truth
    assert components(rows[:40], 0.86, block_rows=1).tolist() == truth[:40]
    monkeypatch.setattr(joining, "EDGES_PER_RELABEL", 5)
    assert components(rows, 0.86, block_rows=50).tolist() == truth
    monkeypatch.setattr(joining, "DENSE_SHARE", 0.0)
    assert components(rows, 0.86, block_rows=50).tolist() == truth
    monkeypatch.setattr(hits, "LISTED_PAIRS", 3)
    monkeypatch.setattr(joining, "DOUBTS_PER_STEP", 2)
    for precision in ("fp32", "bf16", "int8"):
        assert components(rows, 0.86, precision=precision, device="cpu").tolist() == truth


def test_a_digest_that_always_collides_only_costs_time(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = planted_trees(100, 16)
    truth = components(rows, 0.86)
    monkeypatch.setattr(joining, "_row_digests", lambda given: np.zeros(len(given), np.int64))
    assert (components(rows, 0.86) == truth).all()


def test_nothing_and_one_row_are_clusters_too() -> None:
    assert components(np.zeros((0, 4), np.float16), 0.86).tolist() == []
    assert components(random_rows(1, 4), 0.86).tolist() == [0]
    nobody = judge(np.zeros(0, np.int64), np.zeros(0), np.zeros(0, np.uint64), keep="middle")
    assert len(nobody.keep) == len(nobody.survivor) == 0


def test_inner_middle_orders_a_component_by_the_distance_to_its_mean() -> None:
    rows = np.vstack([at_degrees(0, 1, 2, 30), at_degrees(90, 91, 100)])
    labels, uids = np.array([0, 0, 0, 0, 4, 4, 4]), np.arange(7, dtype=np.uint64)
    means = [rows[labels == k].astype(np.float64).mean(axis=0) for k in labels]
    truth = ((rows - np.array(means)) ** 2).sum(axis=1)
    for block_rows in (1, 3, 100):
        assert distance_to_mean(rows, labels, block_rows=block_rows) == pytest.approx(truth)
    judged = judge(labels, np.zeros(7), uids, keep="inner_middle", rows=rows)
    for group in (slice(0, 4), slice(4, 7)):
        ranked = group.start + np.argsort(truth[group])
        assert judged.survivor[group].tolist() == [ranked[len(ranked) // 2]] * len(ranked)


def test_a_policy_without_its_column_is_an_error() -> None:
    one = np.zeros(1, np.int64), np.zeros(1), np.zeros(1, np.uint64)
    for keep in ("clip_max", "inner_middle"):
        with pytest.raises(ValueError, match=keep):
            judge(*one, keep=keep)
