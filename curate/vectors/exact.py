"""The exact arithmetic that every selection decision rests on.

A float16 value is an integer multiple of 2^-24, so the product of two is a multiple of 2^-48. A
float64 holds 53 bits: every multiple of 2^-48 below 2^5 = 32 is a float64. Two rows of norm at most
5 have sum |x_i y_i| <= 25 (Cauchy-Schwarz), so each partial sum of their float64 dot, in whatever
order it is added, is itself a float64. Nothing is ever rounded: the dot is exact, and the same
under every block size, thread count, BLAS and device.

Single-precision matrix products are only a filter: `fp32_dot_error_bound` proves how far off one
can be, and whatever lies that near to a decision is computed again in float64.

Legend: N rows, D dimensions, P pairs, K centroids.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from manifests.errors import UserError

if TYPE_CHECKING:
    pass

Float16Rows: TypeAlias = NDArray[np.float16]
Float64s: TypeAlias = NDArray[np.float64]
Uint64s: TypeAlias = NDArray[np.uint64]

GRID_BITS = 24  # a float16 value is an integer multiple of 2^-24
MAX_ROW_NORM = 5.0
MAX_CENTROID_NORM = 128.0  # keeps |x - c|^2 below 2^15, which an int64 count of 2^-48 can hold
REJECT_REASONS = (
    "",
    "non_finite_embedding",
    "zero_embedding",
    "embedding_norm_too_large",
    "non_finite_clip_score",
)
BLOCK_BYTES = 1 << 20  # of the float64 terms of a blockwise sum: what fits a core's cache

_GOLDEN_GAMMA = 0x9E3779B97F4A7C15
_UINT64_MASK = (1 << 64) - 1


def reject_reasons(
    image_rows: Float16Rows,
    text_rows: Float16Rows | None = None,
    *,
    clip_scores: Float64s | None = None,
) -> NDArray[np.uint8]:
    """Return per row the index into REJECT_REASONS, 0 for a row that may be used.

    A row is judged by its image embedding, its text embedding and its given clip score, each where
    there is one. Where several reasons hold, the one that stands first in REJECT_REASONS is given.

    Raises:
        UserError: the rows are not float16 [n, d], or the shapes differ.
    """
    reasons = np.zeros(len(image_rows), np.uint8)
    if clip_scores is not None:
        reasons[~np.isfinite(clip_scores)] = 4
    squares = [squared_norms(image_rows)]
    if text_rows is not None:
        _check_rows(text_rows, like=image_rows)
        squares.append(squared_norms(text_rows))
    for code, is_bad in ((3, _is_too_long), (2, _is_zero), (1, _is_not_finite)):
        for square in squares:
            reasons[is_bad(square)] = code
    return reasons


def squared_norms(rows: Float16Rows) -> Float64s:
    """Return |x|^2 of each row, exact up to MAX_ROW_NORM; not finite only where a value is not."""
    return row_dots(rows, rows)


def clip_score(image_rows: Float16Rows, text_rows: Float16Rows) -> Float64s:
    """Return the exact dot of each image row with its text row: float64 [n].

    Raises:
        UserError: the rows are not float16 [n, d], or the shapes differ.
    """
    return row_dots(image_rows, text_rows)


def row_dots(rows_a: Float16Rows, rows_b: Float16Rows) -> Float64s:
    """Return the exact float64 dot of each row of one array with the same row of the other."""
    _check_rows(rows_a)
    _check_rows(rows_b, like=rows_a)
    dots = np.empty(len(rows_a), np.float64)
    with one_thread():
        for part in _blocks(len(rows_a), rows_a.shape[1]):
            dots[part] = _float64_dots(rows_a[part], rows_b[part])
    return dots


def pair_dots(
    rows: Float16Rows, row_a: NDArray[np.integer[Any]], row_b: NDArray[np.integer[Any]]
) -> Float64s:
    """Return the exact float64 dot of rows[row_a[p]] and rows[row_b[p]] for every pair p."""
    _check_rows(rows)
    dots = np.empty(len(row_a), np.float64)
    with one_thread():
        for part in _blocks(len(row_a), rows.shape[1]):
            dots[part] = _float64_dots(rows[row_a[part]], rows[row_b[part]])
    return dots


def round_to_grid(centroids: NDArray[np.floating[Any]]) -> NDArray[np.float32]:
    """Return the centroids rounded to multiples of 2^-24, half to even, as float32.

    Up to a magnitude of 1 the error is at most 2^-25 and float32 holds the result exactly; beyond,
    every float32 is such a multiple. Rounding twice changes nothing.

    Raises:
        UserError: not a [k, d] array, a value that is not finite, or a norm above
            MAX_CENTROID_NORM.
    """
    if centroids.ndim != 2 or len(centroids) == 0:
        raise UserError(
            f"The centroids have shape {centroids.shape}.",
            "One row per cluster is needed, and at least one cluster.",
            "Give a two-dimensional array [num_clusters, dim].",
        )
    wide = centroids.astype(np.result_type(centroids, np.float32))
    with np.errstate(over="ignore"):  # what overflows becomes inf, and is refused
        counts = np.rint(np.ldexp(wide, GRID_BITS)) + 0.0  # no negative zero
        grid: NDArray[np.float32] = np.ldexp(counts, -GRID_BITS).astype(np.float32)
    norms = np.sqrt(np.einsum("kd,kd->k", grid, grid, dtype=np.float64))
    _refuse_centroids(np.flatnonzero(~(norms <= MAX_CENTROID_NORM)), norms)
    return grid


def fp32_dot_error_bound(dim: int, norm_a: float, norm_b: float) -> float:
    """Return a bound on |fp32 dot - exact dot| of two vectors held exactly in float32.

    Proof: each of the `dim` products goes through at most `dim` roundings (its own and dim - 1
    additions), in any order of addition and with or without fused multiply-add; hence |error| <=
    gamma_dim * sum |a_i b_i| <= gamma_dim * |a| |b| with gamma_n = n u / (1 - n u), u = 2^-24. Grid
    values have no product under 2^-48, so nothing underflows.
    Source: Higham, Accuracy and Stability of Numerical Algorithms, 2nd ed., section 3.1. The last
    factor covers norms that were themselves rounded in float64.
    """
    unit_roundoff = 2.0**-24
    gamma = dim * unit_roundoff / (1.0 - dim * unit_roundoff)
    return gamma * norm_a * norm_b * (1.0 + 2.0**-40)


@contextmanager
def one_thread() -> Iterator[None]:
    """Keep short operations off the thread pool: on a busy machine each waits for all of it."""
    import torch

    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(num_threads)


@contextmanager
def full_precision_gemm(device_type: str = "cpu") -> Iterator[None]:
    """Make float32 products really float32 inside the block: no TF32, bfloat16 or autocast."""
    import torch

    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.autocast(device_type, enabled=False), torch.no_grad():
            yield
    finally:
        torch.set_float32_matmul_precision(precision)


def splitmix64(values: Uint64s) -> Uint64s:
    """Return the first output of the splitmix64 generator whose state is set to each value.

    The generator adds the golden gamma to its state and mixes the sum; so output number i (from 0)
    of the generator seeded with x is splitmix64(x + i * 0x9E3779B97F4A7C15 mod 2^64). A bijection:
    distinct values never tie.

    Example: splitmix64(1234567) -> 6457827717110365317.
    Source: Steele, Lea, Flood, Fast Splittable Pseudorandom Number Generators, OOPSLA 2014;
    https://prng.di.unimi.it/splitmix64.c
    """
    mixed = np.asarray(values, np.uint64).reshape(-1) + np.uint64(_GOLDEN_GAMMA)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))


def sample_hashes(uids: Uint64s, seed: int) -> Uint64s:
    """Return splitmix64(uid + seed * golden gamma mod 2^64): rows are sampled in its order."""
    shift = np.uint64(seed * _GOLDEN_GAMMA & _UINT64_MASK)
    return splitmix64(np.asarray(uids, np.uint64) + shift)


def sample_smallest(uids: Uint64s, num_samples: int, seed: int) -> NDArray[np.bool_]:
    """Return the mask of the `num_samples` rows with the smallest sample hash, or of all."""
    if num_samples >= len(uids):
        return np.ones(len(uids), np.bool_)
    if num_samples <= 0:
        return np.zeros(len(uids), np.bool_)
    hashes = sample_hashes(uids, seed)
    is_small: NDArray[np.bool_] = hashes <= np.partition(hashes, num_samples - 1)[num_samples - 1]
    return is_small


def _is_not_finite(square: Float64s) -> NDArray[np.bool_]:
    return ~np.isfinite(square)  # float16 squares cannot overflow a float64


def _is_zero(square: Float64s) -> NDArray[np.bool_]:
    return np.equal(square, 0.0)  # the smallest float16 squares to 2^-48, not to zero


def _is_too_long(square: Float64s) -> NDArray[np.bool_]:
    return np.greater(square, MAX_ROW_NORM**2)


def _blocks(num_rows: int, dim: int) -> Iterator[slice]:
    step = max(1, BLOCK_BYTES // (8 * max(dim, 1)))
    for start in range(0, num_rows, step):
        yield slice(start, min(start + step, num_rows))


def _float64_dots(rows_a: Float16Rows, rows_b: Float16Rows) -> Float64s:
    """Add up products that float32 holds exactly; torch widens float16 much faster than numpy."""
    import torch

    a, b = (torch.from_numpy(np.require(x, requirements=("C", "W"))) for x in (rows_a, rows_b))
    terms = a.float().mul_(b.float()).double()
    dots: Float64s = torch.mv(terms, torch.ones(terms.shape[1], dtype=torch.float64)).numpy()
    return dots


def _check_rows(rows: Float16Rows, *, like: Float16Rows | None = None) -> None:
    if rows.ndim != 2 or rows.dtype != np.float16:
        raise UserError(
            f"Embeddings of type {rows.dtype} and shape {rows.shape} cannot be compared exactly.",
            "The selection is defined on float16 rows [num_rows, dim].",
            "Save the embeddings as a two-dimensional float16 array.",
        )
    if like is not None and rows.shape != like.shape:
        raise UserError(
            f"Embeddings of shape {rows.shape} are paired with embeddings of shape {like.shape}.",
            "Row i of one belongs to row i of the other.",
            "Give image and text embeddings of the same samples, from the same model.",
        )


def _refuse_centroids(bad: NDArray[np.intp], norms: Float64s) -> None:
    if len(bad):
        raise UserError(
            f"Centroid {bad[0]} has norm {norms[bad[0]]}; {len(bad)} of {len(norms)} are unusable.",
            f"A centroid must be finite and have a norm of at most {MAX_CENTROID_NORM:g}.",
            "Train the centroids on the same embeddings, or repair the centroid file.",
        )
