"""Every filter's bound holds: the exact dot of each pair is within the slack of its estimate."""

from __future__ import annotations

import numpy as np
import oracle
import pytest

from curate.vectors import products
from curate.vectors.exact import Float16Rows
from curate.vectors.hits import pairs_above
from curate.vectors.products import Precision


def with_large_dimensions(num_rows: int, dim: int, seed: int) -> Float16Rows:
    """Return unit rows of which a few dimensions hold most of the length."""
    spectrum = np.where(np.arange(dim) % 31 == 0, 8.0, 1.0)
    rows = np.random.default_rng(seed).normal(size=(num_rows, dim)) * spectrum + 0.2
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float16)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8"])
@pytest.mark.parametrize("dim", [3, 64, 96, 768])
def test_every_dot_is_within_the_slack_of_its_estimate(precision: Precision, dim: int) -> None:
    rows = with_large_dimensions(60, dim, seed=dim)
    units = oracle.units(rows)
    truth = (units @ units.T).astype(np.float64) / oracle.UNIT**2
    frame = products.fit(rows[:20], precision)
    operand = frame.operand(rows)
    tile = products.product(operand, operand, products.tile_buffer(frame, 60 * 60))
    pairs = pairs_above(tile, operand, operand, -10.0)
    assert len(pairs) == 60 * 60
    assert (np.abs(pairs.estimate - truth[pairs.row, pairs.column]) <= pairs.slack).all()


def test_rows_with_a_few_large_dimensions_are_rotated_to_a_finer_step() -> None:
    rows = with_large_dimensions(500, 768, seed=0)
    frame = products.fit(rows, "int8")
    assert frame.is_rotated
    plain = products.fitted_step(products.as_tensor(rows).float() - frame.center_D, frame.center_D)
    assert frame.step < 0.6 * plain
    even = np.random.default_rng(0).normal(size=(500, 768)).astype(np.float16)
    assert not products.fit(even, "int8").is_rotated
