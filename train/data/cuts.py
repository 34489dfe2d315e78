"""Where micro-batches begin: global batches cut by a budget of tokens."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]

Fitting = Callable[[Ints, Ints], Ints]
"""(first rows of micro-batches, their budgets) -> how many rows fit, one at least."""


def fitting_padded(lengths: Ints) -> Fitting:
    """Return how many rows fit side by side. lengths: int64 [n], falling within each step.

    The first row of a micro-batch is its longest, so it says how many fit.
    """
    return lambda at, budgets: np.maximum(budgets // lengths[at], 1)


def fitting_sum(lengths: Ints) -> Fitting:
    """Return how many rows fit one after another: as many as the sum of lengths allows."""
    ends = np.append(0, np.cumsum(lengths))
    return lambda at, budgets: np.maximum(
        np.searchsorted(ends, ends[at] + budgets, side="right") - 1 - at, 1
    )


def cut_by_budget(fitting: Fitting, step_starts: Ints, *, most: int, multiple_of: int) -> Ints:
    """Return where micro-batches begin: int64 [k] ascending.

    step_starts: int64 [num_steps + 1]. Each step has a budget of its own, `most` tokens or less:
    the smallest that needs no more micro-batches than the next multiple of `multiple_of`, so that
    they are of one size. Found by bisection: a larger budget never needs more of them.
    """
    highest = np.full(len(step_starts) - 1, most)
    full = _cut(fitting, step_starts, highest)
    if multiple_of == 1:  # full ones and a small rest are easier to deal evenly than all of a size
        return full
    allowed = -(-_num_by_step(full, step_starts) // multiple_of) * multiple_of
    low, high = np.zeros_like(highest), highest
    while (high - low > 1).any():
        middle = (low + high + 1) // 2
        enough = _num_by_step(_cut(fitting, step_starts, middle), step_starts) <= allowed
        low, high = np.where(enough, low, middle), np.where(enough, middle, high)
    return _cut(fitting, step_starts, high)


def _num_by_step(starts: Ints, step_starts: Ints) -> Ints:
    """Return each step's number of micro-batches: int64 [num_steps]."""
    return np.diff(np.searchsorted(starts, step_starts))


def _cut(fitting: Fitting, step_starts: Ints, budgets: Ints) -> Ints:
    """Return where micro-batches begin by each step's budget; all steps are cut side by side."""
    at, stops, found = step_starts[:-1], step_starts[1:], []
    while len(at):
        found.append(at)
        at = at + fitting(at, budgets)
        live = at < stops
        at, stops, budgets = at[live], stops[live], budgets[live]
    return np.sort(np.concatenate(found))
