"""Ghost clusters equal their definition, in integers; without a cap they lose no pair."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import oracle
import pytest
from test_selection_oracle import make_world

from curate.vectors.assign import assign, prepare
from curate.vectors.exact import Float16Rows, reject_reasons, round_to_grid
from curate.vectors.ghosts import ghosts_of


def by_definition(
    rows: Float16Rows, centroids: np.ndarray, margin: float, cap: int | None
) -> list[tuple[int, int]]:
    grid, found = oracle.units(round_to_grid(centroids)), []
    numbers = sorted({tuple(c): k for k, c in reversed(list(enumerate(grid.tolist())))}.values())
    limit = 4 * Fraction(repr(margin)) ** 2
    for i, x in enumerate(oracle.units(rows)):
        ranked = sorted((sum(int(v) ** 2 for v in x - grid[k]), k) for k in numbers)
        least, own = ranked[0]
        for d2, k in ranked[1 : None if cap is None else cap + 1]:
            gap = sum(int(v) ** 2 for v in grid[own] - grid[k])
            if (d2 - least) ** 2 <= limit * gap * oracle.UNIT**2:
                found.append((i, k))
    return found


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_ghosts_are_those_of_the_definition(precision: str) -> None:
    found = 0
    for seed in range(24):
        world = make_world(seed)
        rows = world.images[reject_reasons(world.images, world.texts) == 0][:60]
        margin, cap = [0.0, 0.04, 0.2646, 0.5][seed % 4], [1, 3, None][seed % 3]
        if not len(rows):
            continue
        ready = prepare(world.centroids, rows, precision)
        row, ghost = ghosts_of(rows, ready, margin=margin, cap=cap)
        truth = by_definition(rows, world.centroids, margin, cap)
        assert list(zip(row.tolist(), ghost.tolist(), strict=True)) == truth
        found += len(truth)
    assert found > 500


def test_with_the_full_margin_and_no_cap_every_near_pair_is_met() -> None:
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(400, 8))
    rows[200:] = rows[:200] + 0.2 * rng.normal(size=(200, 8))
    rows = (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float16)
    cluster = assign(rows, rows[:20].astype(np.float32)).cluster
    above = 0.86
    margin = float(np.sqrt(2 - 2 * above) / 2 + 1e-3)
    row, ghost = ghosts_of(rows, rows[:20].astype(np.float32), margin=margin, cap=None)
    meets = {(int(i), int(k)) for i, k in zip(row, ghost, strict=True)}
    dots = rows.astype(np.float64) @ rows.astype(np.float64).T
    pairs = [(i, j) for i, j in np.argwhere(np.triu(dots > above, 1)) if cluster[i] != cluster[j]]
    assert len(pairs) > 50
    assert all((i, cluster[j]) in meets or (j, cluster[i]) in meets for i, j in pairs)
