"""An orthogonal turn that spreads each entry of a row over many, so that one step suits them all.

Legend: N rows, D dimensions, W the width of the turn.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

from curate.vectors.exact import fp32_dot_error_bound

if TYPE_CHECKING:
    import torch


def rotated(x_ND: torch.Tensor) -> torch.Tensor:
    """Return rows turned by an orthogonal matrix that spreads each entry over many.

    A Hadamard matrix with random signs on every D/W-th entry, W the largest power of 4 that divides
    D, up to 64: its entries are +-1/sqrt(W), so the matrix itself is without rounding.
    """
    turn_WW = _turn(_width(x_ND.shape[1]), x_ND.device.type)
    num_rows, dim = x_ND.shape
    strands = x_ND.reshape(num_rows, len(turn_WW), dim // len(turn_WW)).transpose(1, 2)
    return (strands.reshape(-1, len(turn_WW)) @ turn_WW).view(x_ND.shape)


def rotation_error(dim: int) -> float:
    """Return a bound on the length that `rotated` loses or adds by rounding, relative to the row's.

    Each new entry is off by gamma_W |x| / sqrt(W) sqrt(W) at most; W of them make sqrt(W) gamma_W.
    """
    width = _width(dim)
    return float(np.sqrt(width)) * fp32_dot_error_bound(width + 8, 1.01, 1.0)


def _width(dim: int) -> int:
    return next(width for width in (64, 16, 4, 1) if dim % width == 0)


@lru_cache(maxsize=4)
def _turn(width: int, device_type: str) -> torch.Tensor:
    import torch

    sign = np.random.default_rng(0).choice([-1.0, 1.0], (width, 1)).astype(np.float32)
    hadamard = np.ones((1, 1), np.float32)
    while len(hadamard) < width:
        hadamard = np.kron(np.array([[1, 1], [1, -1]], np.float32), hadamard)
    return torch.from_numpy(sign * hadamard / np.sqrt(np.float32(width))).to(device_type)
