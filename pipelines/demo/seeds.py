"""One independent random stream per (seed, purpose, index), so that every row can be made alone."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import TypeVar

import numpy as np

T = TypeVar("T")


def rng_for(seed: int, purpose: str, index: int) -> np.random.Generator:
    """Return the generator of one (seed, purpose, index); no global state is touched."""
    return np.random.default_rng([seed, zlib.crc32(purpose.encode()), index])


def pick(rng: np.random.Generator, options: Sequence[T]) -> T:
    """Return one of `options`, each as likely (much faster than `rng.choice` on short lists)."""
    return options[int(rng.integers(len(options)))]
