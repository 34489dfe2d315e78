"""The maximum spanning forest equals Kruskal's on integers, whatever the filter and the blocks."""

from __future__ import annotations

from fractions import Fraction
from math import floor as floor_of

import numpy as np
import oracle
import pytest
from numpy.typing import NDArray

from curate.duplicates import forest as growing
from curate.duplicates import tiles
from curate.duplicates.components import components
from curate.duplicates.forest import spanning_forest
from curate.duplicates.regions import Regions
from curate.vectors import hits
from curate.vectors.exact import Float16Rows

Edges = list[tuple[int, int, float]]


def kruskal(rows: Float16Rows, floor: float, is_compared: NDArray[np.bool_]) -> Edges:
    """Return the forest by its definition: edges (similarity descending, row, row), no cycles."""
    units = oracle.units(rows)
    dots, limit = units @ units.T, floor_of(Fraction(floor) * oracle.UNIT**2)
    n = len(rows)
    edges = sorted(
        (-int(dots[i, j]), i, j)
        for i in range(n)
        for j in range(i + 1, n)
        if is_compared[i, j] and dots[i, j] > limit
    )
    tree, found = list(range(n)), []
    for negative, i, j in edges:
        ends = i, j
        roots = []
        for end in ends:
            while tree[end] != end:
                end = tree[end]
            roots.append(end)
        if roots[0] != roots[1]:
            tree[roots[0]] = roots[1]
            found.append((i, j, -negative / oracle.UNIT**2))
    return sorted(found)


def planted(rng: np.random.Generator, n: int, dim: int) -> Float16Rows:
    """Return copies, near copies, chains and lattice rows, of norms around 1: ties everywhere."""
    rows = rng.normal(size=(n, dim))
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    for i in np.flatnonzero(rng.random(n) < 0.4):
        rows[i] = 0
        rows[i, rng.choice(dim, min(4, dim), replace=False)] = rng.choice([-0.5, 0.5], min(4, dim))
    for i in np.flatnonzero(rng.random(n) < 0.6)[1:]:
        noise = rng.choice([0, 0, 1e-3, 0.2, 0.5]) * rng.normal(size=dim) / np.sqrt(dim)
        near = rows[rng.integers(i)] + noise
        rows[i] = near / np.linalg.norm(near) if noise.any() else near
    return (rows * rng.choice([1, 1, 1, 0.97, 1.03, 0.5], n)[:, None]).astype(np.float16)


@pytest.mark.parametrize("first_seed", range(0, 60, 15))
def test_the_forest_is_kruskals(first_seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "ROWS_PER_PIVOT", 7)
    for seed in range(first_seed, first_seed + 15):
        rng = np.random.default_rng(seed)
        n, dim = int(rng.choice([1, 2, 3, 10, 60, 150])), int(rng.choice([2, 3, 4, 8, 64]))
        rows, floor = planted(rng, n, dim), float(rng.choice([0.25, 0.5, 0.8, 0.86, 0.95]))
        regions, is_compared = regions_for(rng, n, kind=seed % 3)
        monkeypatch.setattr(growing, "CANDIDATES_PER_MERGE", 20 if seed % 4 == 0 else 1 << 18)
        monkeypatch.setattr(growing, "FEWEST_DENSE", 0 if seed % 5 == 0 else 1 << 18)
        monkeypatch.setattr(growing, "MANY_CANDIDATES", 5 if seed % 3 == 0 else 1 << 13)
        monkeypatch.setattr(growing, "FEW_CANDIDATES", 7 if seed % 2 == 0 else 1 << 12)
        monkeypatch.setattr(growing, "CELLS_PER_PAIR", 1000 if seed % 2 == 0 else 24)
        monkeypatch.setattr(growing, "LEVEL_BYTES", 0 if seed % 7 == 0 else 24 << 20)
        monkeypatch.setattr(hits, "LISTED_PAIRS", 9 if seed % 4 == 1 else 1 << 17)
        monkeypatch.setattr(tiles, "FEWEST_ROWS_TO_SORT", 8 if seed % 2 else 8192)
        truth = kruskal(rows, floor, is_compared)
        for precision in ("fp32", "bf16", "int8"):
            for block_rows in (2048, 1 + n // 5):
                found = spanning_forest(
                    rows, floor, regions=regions, precision=precision, block_rows=block_rows
                )
                edges = zip(found.row_a, found.row_b, found.similarity, strict=True)
                assert [(int(a), int(b), float(s)) for a, b, s in edges] == truth, seed


def regions_for(
    rng: np.random.Generator, n: int, *, kind: int
) -> tuple[Regions | None, NDArray[np.bool_]]:
    """Return all pairs; or all but those of two ghosts; or those of a left and a right row."""
    is_ghost, is_right = rng.random(n) < 0.3, rng.random(n) < 0.5
    if kind == 0:
        return None, np.ones((n, n), np.bool_)
    if kind == 1:
        return Regions.of(is_ghost), ~(is_ghost[:, None] & is_ghost)
    return Regions.of(is_ghost & is_right, is_right), is_right[:, None] != is_right


def test_every_cut_is_the_components_at_that_threshold() -> None:
    for seed in range(12):
        rng = np.random.default_rng(seed)
        rows = planted(rng, 120, int(rng.choice([3, 8, 64])))
        forest = spanning_forest(rows, 0.8)
        for threshold in (0.8, 0.83, 0.86, 0.9, 0.95, 1.0):
            cut = forest.cut(threshold)
            assert cut.tolist() == oracle.component_of(oracle.units(rows), threshold)
            assert (cut == components(rows, threshold)).all()
        with pytest.raises(ValueError, match="floor"):
            forest.cut(0.79)


def test_the_weakest_link_is_the_last_threshold_that_joins_a_row_to_its_end() -> None:
    rows = planted(np.random.default_rng(5), 80, 8)
    forest = spanning_forest(rows, 0.5)
    labels = forest.cut(0.6)
    is_end = labels == np.arange(len(rows))
    links = forest.weakest_links(0.6, is_end)
    assert np.isinf(links[is_end]).all()
    assert (~is_end).sum() > 20
    for row in np.flatnonzero(~is_end):
        joined_below = forest.cut(np.nextafter(links[row], 0.0))
        apart_at = forest.cut(links[row])
        assert joined_below[row] == joined_below[labels[row]]
        assert apart_at[row] != apart_at[labels[row]]
