"""Cluster centroids by FAISS k-means, one iteration at a time, so that each can be saved.

FAISS keeps no state between iterations, not even for its splitting of empty clusters, so n single
iterations are n in one go. (Spherical ones are normalised once more at each start, which may change
a last bit.) The result depends on the sample, the settings and the seed, not on the number of
threads on the machines where that was tried; `num_threads` is pinned all the same, because nothing
in BLAS promises it. Lloyd's iterations in `lloyd` do promise it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray

from curate.vectors.exact import Float16Rows, round_to_grid
from curate.vectors.lloyd import first_rows
from manifests.errors import UserError

Float32s = NDArray[np.float32]


def train_centroids(
    sample_rows: Float16Rows,
    *,
    num_clusters: int,
    iterations: int,
    seed: int,
    num_threads: int,
    spherical: bool = False,
) -> Float32s:
    """Return centroids float32 [num_clusters, d] on the grid 2^-24, by Lloyd's algorithm (L2).

    Every row given is used in every iteration. With as many clusters as rows the centroids are the
    rows.

    Args:
        sample_rows: float16 [n, d], finite.
        iterations: Lloyd iterations, 1 or more.
        seed: of the first choice of centroids, any integer.
        num_threads: OpenMP threads, 1 or more; the process's own setting is put back afterwards.
        spherical: keep the centroids at norm 1.
    Raises:
        UserError: num_clusters is not between 1 and the number of rows, or iterations or
        num_threads is below 1.
    """
    if iterations < 1 or num_threads < 1:
        raise UserError(
            f"K-means was asked for {iterations} iterations on {num_threads} threads.",
            "Both are counts of 1 or more.",
            "Set cluster.iterations (20 is usual) and the number of threads to at least 1.",
        )
    chosen = first_rows(len(sample_rows), num_clusters, seed, lambda at: sample_rows[at])
    centroids = sample_rows[chosen].astype(np.float32)
    wide = sample_rows.astype(np.float32)
    for _ in range(iterations):
        centroids, _ = iterate(wide, centroids, num_threads=num_threads, spherical=spherical)
    return round_to_grid(centroids)


def iterate(
    rows: Float16Rows | Float32s, centroids: Float32s, *, num_threads: int, spherical: bool = False
) -> tuple[Float32s, float]:
    """Return the centroids after one more iteration, not rounded, and the mean |x - c|^2 before."""
    if len(centroids) == len(rows):
        return rows.astype(np.float32), 0.0
    import faiss

    num_clusters, dim = centroids.shape
    with _omp_threads(num_threads):
        clustering = faiss.Clustering(dim, num_clusters)
        clustering.niter = 1
        clustering.spherical = spherical
        clustering.max_points_per_centroid = len(rows)  # never subsample what was sampled
        clustering.min_points_per_centroid = 1  # no warning printed
        faiss.copy_array_to_vector(np.ascontiguousarray(centroids).ravel(), clustering.centroids)
        clustering.train(np.ascontiguousarray(rows, dtype=np.float32), faiss.IndexFlatL2(dim))
        found = faiss.vector_to_array(clustering.centroids).reshape(num_clusters, dim)
        stats: Any = clustering.iteration_stats  # a C++ vector, whatever its type says
        objective = float(stats.at(0).obj) / len(rows)
    return np.asarray(found, np.float32), objective


@contextmanager
def _omp_threads(num_threads: int) -> Iterator[None]:
    import faiss

    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(num_threads)
    try:
        yield
    finally:
        faiss.omp_set_num_threads(before)
