"""Pairs of many small clusters: those of brute force, in every precision and however cut."""

from __future__ import annotations

from fractions import Fraction
from math import floor as floor_of

import numpy as np
import oracle
import pytest
from test_forest import planted

from curate.duplicates import small_clusters
from curate.duplicates.forest import kruskal, spanning_forest
from curate.duplicates.small_clusters import pairs_within
from curate.vectors.exact import Float16Rows

FLOOR = 0.8


def world(seed: int) -> tuple[Float16Rows, list[slice]]:
    """Return rows with ties and copies, and parts of them: empty ones, gaps between, all sizes."""
    rng = np.random.default_rng(seed)
    rows = planted(rng, 240, int(rng.choice([3, 8, 64])))
    ends = np.sort(rng.choice(241, 14))
    return rows, [slice(int(a), int(b)) for a, b in zip(ends[::2], ends[1::2], strict=True)]


def brute_force(rows: Float16Rows, parts: list[slice]) -> list[tuple[int, int, float]]:
    units, limit = oracle.units(rows), floor_of(Fraction(FLOOR) * oracle.UNIT**2)
    dots = units @ units.T
    return sorted(
        (i, j, int(dots[i, j]) / oracle.UNIT**2)
        for part in parts
        for i in range(part.start, part.stop)
        for j in range(i + 1, part.stop)
        if dots[i, j] > limit
    )


@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8"])
def test_the_pairs_are_those_of_brute_force(
    precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(small_clusters, "PAIRS_PER_ROW", 10**6)
    for seed in range(12):
        rows, parts = world(seed)
        monkeypatch.setattr(small_clusters, "PANEL_ROWS", [512, 7, 1][seed % 3])
        monkeypatch.setattr(small_clusters, "ROWS_PER_OPERAND", [1 << 14, 30][seed % 2])
        found = pairs_within(rows, parts, FLOOR, precision=precision)
        pairs = zip(found.row_a, found.row_b, found.similarity, strict=True)
        assert sorted((int(a), int(b), float(s)) for a, b, s in pairs) == brute_force(rows, parts)
        assert found.dense == ()


def test_dense_parts_are_named_and_the_others_forests_are_theirs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(small_clusters, "PAIRS_PER_ROW", 1)
    num_dense = 0
    for seed in range(12):
        rows, parts = world(seed)
        # which parts are dense depends on how near to the floor a product tells: here always alike
        found = pairs_within(rows, parts, FLOOR, precision="int8")
        kept = kruskal(len(rows), found.row_a, found.row_b, found.similarity)
        edges = set(zip(found.row_a[kept].tolist(), found.row_b[kept].tolist(), strict=True))
        for number, part in enumerate(parts):
            forest = spanning_forest(rows[part], FLOOR)
            wanted = set(
                zip(
                    (forest.row_a + part.start).tolist(),
                    (forest.row_b + part.start).tolist(),
                    strict=True,
                )
            )
            mine = {(a, b) for a, b in edges if part.start <= a < part.stop}
            assert mine == (set() if number in found.dense else wanted)
        num_dense += len(found.dense)
    assert num_dense > 3


def test_no_part_has_no_pair() -> None:
    rows, _ = world(0)
    for parts in ([], [slice(3, 3)], [slice(0, 0), slice(5, 6)]):
        found = pairs_within(rows, parts, FLOOR)
        assert (len(found.row_a), found.dense) == (0, ())
