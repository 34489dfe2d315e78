"""Lloyd's k-means without rounding between iterations: the same centroids on any machine.

Labels are exact (assign). Embeddings are multiples of 2^-24 of at most 5, so a float64 sum of up to
100 million of them rounds nothing: partial sums over any split of the rows, in any order, by any
number of workers, on CPU or GPU, add up to the same bits. A centroid is that sum over its count, to
the nearest float64, then to the grid 2^-24.

Legend: N rows, K centroids, D dimensions.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, TypeAlias, cast

import numpy as np
from numpy.typing import NDArray

from curate.vectors.assign import labels, prepare
from curate.vectors.exact import (
    GRID_BITS,
    Float16Rows,
    Float64s,
    round_to_grid,
    sample_hashes,
    squared_norms,
)
from curate.vectors.products import Precision, as_tensor, own_device
from manifests.errors import UserError

if TYPE_CHECKING:
    import torch

ROWS_PER_BLOCK = 1 << 13
ROWS_PER_DEVICE_BLOCK = 1 << 16
SPLIT = 1.0 / 1024
"""How far the halves of a split cluster are moved from its centroid, relative to each entry."""
MOVED_SHARE = 0.4
"""Where more rows than this have changed their cluster, sums are made anew: it is less work."""
FIRST_ROWS_STREAM = 1 << 32
"""Added to the seed: the first centroids do not depend on which rows were sampled, and why."""

Grid: TypeAlias = NDArray[np.float32]
Labels: TypeAlias = NDArray[np.uint32]
Ints: TypeAlias = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Sums:
    """What some rows add, exactly.

    sums: float64 [K, D], of the rows of each cluster. counts: int64 [K]. square_units: the sum of
    all |x|^2, in units of 2^-48.
    """

    sums: Float64s
    counts: Ints
    square_units: int

    def __add__(self, other: Sums) -> Sums:
        """Return both together."""
        units = self.square_units + other.square_units
        return Sums(self.sums + other.sums, self.counts + other.counts, units)

    def objective(self, centroids: Grid) -> float:
        """Return the mean |x - c|^2 of the rows to the centroids that they were labelled with.

        Rounded, but in an order that no machine changes.
        """
        terms: list[float] = []
        for start in range(0, len(centroids), ROWS_PER_BLOCK):
            part = slice(start, start + ROWS_PER_BLOCK)
            wide = centroids[part].astype(np.float64)
            rest = wide * self.counts[part, None] - 2.0 * self.sums[part]
            terms += (wide * rest).sum(axis=0).tolist()  # row after row
        squares = self.square_units / (1 << 2 * GRID_BITS)
        return (squares + math.fsum(terms)) / max(1, int(self.counts.sum()))


class RowsByNumber(Protocol):
    """Sums float64 [K, D], of which some rows can be had: an array, or several added up."""

    def __getitem__(self, which: Ints, /) -> Float64s:
        """Return the rows of these clusters."""


def first_rows(
    num_rows: int, num_clusters: int, seed: int, rows_at: Callable[[Ints], Float16Rows]
) -> Ints:
    """Return which rows are the first centroids, ascending: a seeded sample of distinct ones.

    Where fewer are distinct than clusters, copies fill up. Args: rows_at: returns rows by number.
    Raises: UserError when there are fewer rows than clusters.
    """
    if not 1 <= num_clusters <= num_rows:
        raise UserError(
            f"{num_clusters} clusters were asked for, from {num_rows} rows.",
            "Each cluster needs at least one row to start from.",
            f"Set cluster.num_clusters between 1 and {num_rows}, or train on more rows.",
        )
    hashes = sample_hashes(np.arange(num_rows, dtype=np.uint64), seed + FIRST_ROWS_STREAM)
    order = np.argsort(hashes)
    chosen, rows = order[:0], rows_at(order[:0])
    for start in range(0, num_rows, num_clusters):
        more = order[start : start + num_clusters]
        chosen, rows = np.concatenate([chosen, more]), np.concatenate([rows, rows_at(more)])
        distinct = np.sort(np.unique(_as_bytes(rows), return_index=True)[1])[:num_clusters]
        chosen, rows = chosen[distinct], rows[distinct]
        if len(chosen) == num_clusters:
            break
    copies = order[~np.isin(order, chosen)][: num_clusters - len(chosen)]
    return np.sort(np.concatenate([chosen, copies]))


def first_centroids(rows: Float16Rows, *, spherical: bool = False) -> Grid:
    """Return the chosen first rows as centroids."""
    return _on_grid(rows.astype(np.float64), spherical=spherical)


def step(
    rows: Float16Rows | torch.Tensor,
    centroids: Grid,
    before: tuple[Sums, Labels] | None = None,
    *,
    precision: Precision = "auto",
) -> tuple[Sums, Labels]:
    """Return what these rows add to the next centroids, and their labels.

    Args:
        rows: float16 [n, d]; a tensor is worked on where it is.
        before: what the last step returned for these rows: as sums are exact, only rows with
            another label than then are moved.
        precision: of the filter; the result does not depend on it.
    """
    found = labels(cast(Float16Rows, rows), prepare(centroids, rows, precision))
    moved = np.arange(0) if before is None else np.flatnonzero(found != before[1])
    if before is None or len(moved) > MOVED_SHARE * len(found):
        return partial_sums(rows, found, len(centroids)), found
    sums, old = before
    few = rows[moved]
    came, left = (_cluster_sums(few, label[moved], len(centroids)) for label in (found, old))
    counts = np.bincount(found, minlength=len(centroids))
    return Sums(sums.sums + came - left, counts, sums.square_units), found


def partial_sums(rows: Float16Rows | torch.Tensor, label: Labels, num_clusters: int) -> Sums:
    """Return the exact sums and counts of the rows of every label."""
    counts = np.bincount(label, minlength=num_clusters)
    return Sums(_cluster_sums(rows, label, num_clusters), counts, _square_units(_host(rows)))


def _cluster_sums(rows: Float16Rows | torch.Tensor, label: Labels, num_clusters: int) -> Float64s:
    if isinstance(rows, np.ndarray):
        return _sums(rows, label, num_clusters)
    return _sums_there(rows, label, num_clusters)


def _sums(rows: Float16Rows, label: Labels, num_clusters: int) -> Float64s:
    """Add up blocks of rows, sorted by label, by a sparse product of ones."""
    import torch
    from scipy.sparse import csr_matrix

    sums = np.zeros((num_clusters, rows.shape[1]))
    order = np.argsort(label, kind="stable")
    wide = np.empty((min(ROWS_PER_BLOCK, len(order)), rows.shape[1]))
    for start in range(0, len(order), ROWS_PER_BLOCK):
        part = order[start : start + ROWS_PER_BLOCK]
        block = wide[: len(part)]
        torch.from_numpy(block).copy_(torch.from_numpy(rows[part]))  # much faster than numpy's
        owners, place = np.unique(label[part], return_inverse=True)
        ones = (np.ones(len(part)), (place, np.arange(len(part))))
        sums[owners] += csr_matrix(ones, (len(owners), len(part))) @ block
    return sums


def _sums_there(rows: torch.Tensor, label: Labels, num_clusters: int) -> Float64s:
    """Add up the rows of a tensor on its device; the order of its additions does not matter."""
    import torch

    sums = torch.zeros((num_clusters, rows.shape[1]), dtype=torch.float64, device=rows.device)
    owner = torch.from_numpy(label.astype(np.int64)).to(rows.device)
    for start in range(0, len(rows), ROWS_PER_DEVICE_BLOCK):
        part = slice(start, start + ROWS_PER_DEVICE_BLOCK)
        sums.index_add_(0, owner[part], rows[part].double())
    found: Float64s = sums.cpu().numpy()
    return found


def _square_units(rows: Float16Rows) -> int:
    """Return the sum of |x|^2 in units of 2^-48, in two halves that int64 can hold."""
    units = np.ldexp(squared_norms(rows), 2 * GRID_BITS).astype(np.int64)
    return (int((units >> 24).sum()) << 24) + int((units & ((1 << 24) - 1)).sum())


def next_centroids(
    sums: RowsByNumber,
    counts: Ints,
    *,
    spherical: bool = False,
    part: slice = slice(None),
) -> Grid:
    """Return the means; clusters without rows take halves of the largest ones (`splits`).

    Args:
        counts: int64 [K], of all rows; at least one is not 0.
        spherical: divide each centroid by its norm.
        part: which centroids to return; the others are made only as far as these need them.
    """
    wanted, plan = np.arange(len(counts))[part], splits(counts)
    needed = np.union1d(wanted, np.array(plan, np.int64).ravel())
    means = sums[needed] / np.maximum(counts[needed], 1)[:, None]
    moved = SPLIT * np.where(np.arange(means.shape[1]) % 2 == 0, 1.0, -1.0)
    for empty, largest in np.searchsorted(needed, np.array(plan, np.int64).reshape(-1, 2)):
        means[empty] = means[largest] * (1.0 + moved)
        means[largest] *= 1.0 - moved
    return _on_grid(means[np.searchsorted(needed, wanted)], spherical=spherical)


def splits(counts: Ints) -> list[tuple[int, int]]:
    """Return (empty cluster, the largest one then) in the order of splitting.

    Empty clusters in ascending order; each takes half of the rows, as if, of the largest; the
    smallest number among equals.
    """
    heap = [(-float(count), k) for k, count in enumerate(counts.tolist()) if count]
    heapq.heapify(heap)
    plan = []
    for empty in np.flatnonzero(counts == 0).tolist():
        size, largest = heap[0]
        heapq.heapreplace(heap, (size / 2, largest))
        heapq.heappush(heap, (size / 2, empty))
        plan.append((empty, largest))
    return plan


def train(
    rows: Float16Rows | torch.Tensor,
    *,
    num_clusters: int,
    iterations: int,
    seed: int,
    spherical: bool = False,
    precision: Precision = "auto",
    on_iteration: Callable[[int, float, Grid], None] | None = None,
) -> Grid:
    """Return centroids float32 [num_clusters, d] on the grid 2^-24.

    Bit for bit the same on every machine. Stops early when no label changes any more.

    Args:
        rows: float16 [n, d], finite, norm at most 5; a tensor is worked on where it is.
        spherical: keep the centroids at norm 1; the nearest one has the largest cosine then.
        precision: of the filter; the result does not depend on it.
        on_iteration: called with the iteration, from 0, the mean |x - c|^2 to the centroids that it
            started from, and those it made.
    Raises:
        UserError: num_clusters is not between 1 and the number of rows.
    """
    chosen = first_rows(len(rows), num_clusters, seed, lambda at: _host(rows[at]))
    centroids = first_centroids(_host(rows[chosen]), spherical=spherical)
    before: tuple[Sums, Labels] | None = None
    for iteration in range(iterations):
        found = step(rows, centroids, before, precision=precision)
        objective = found[0].objective(centroids)
        centroids = next_centroids(found[0].sums, found[0].counts, spherical=spherical)
        if on_iteration is not None:
            on_iteration(iteration, objective, centroids)
        if before is not None and np.array_equal(found[1], before[1]):
            break
        before = found
    return centroids


def on_own_device(rows: Float16Rows) -> Float16Rows | torch.Tensor:
    """Return the rows on this process's GPU, or as they are where it has none."""
    return as_tensor(rows).cuda() if own_device() == "cuda" else rows


def _on_grid(means: Float64s, *, spherical: bool) -> Grid:
    if spherical:
        squares = np.ascontiguousarray((means * means).T).sum(axis=0)  # one after the other
        norms = np.sqrt(squares)
        means = means / np.where(norms > 0, norms, 1.0)[:, None]
    return round_to_grid(means)


def _host(rows: Float16Rows | torch.Tensor) -> Float16Rows:
    return rows if isinstance(rows, np.ndarray) else np.asarray(rows.cpu().numpy())


def _as_bytes(rows: Float16Rows) -> NDArray[np.void]:
    kind = np.dtype((np.void, max(1, rows.dtype.itemsize * rows.shape[1])))
    return np.ascontiguousarray(rows).view(kind).ravel()
