"""Cluster centroids by FAISS k-means on a sample of the embeddings.

The result depends on the sample, the settings and the seed, not on the number of threads on the
machines where that was tried; `num_threads` is pinned all the same, because nothing in BLAS
promises it. Everything after this step is exact.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from numpy.typing import NDArray

from curate.vectors.exact import Float16Rows, round_to_grid
from manifests.errors import UserError


def train_centroids(
    sample_rows: Float16Rows,
    *,
    num_clusters: int,
    iterations: int,
    seed: int,
    num_threads: int,
) -> NDArray[np.float32]:
    """Return centroids float32 [num_clusters, d] on the grid 2^-24, by Lloyd's algorithm (L2).

    Every row given is used in every iteration. The centroids are not normalised. With as many
    clusters as rows the centroids are the rows.

    Args:
        sample_rows: float16 [n, d], finite.
        iterations: Lloyd iterations, 1 or more.
        seed: of the first choice of centroids, any integer; FAISS takes its low 31 bits.
        num_threads: OpenMP threads, 1 or more; the process's own setting is put back afterwards.
    Raises:
        UserError: num_clusters is not between 1 and the number of rows, or iterations or
        num_threads is below 1.
    """
    _check_request(len(sample_rows), num_clusters, iterations, num_threads)
    if num_clusters == len(sample_rows):
        return round_to_grid(sample_rows)
    import faiss

    with _omp_threads(num_threads):
        kmeans = faiss.Kmeans(
            sample_rows.shape[1],
            num_clusters,
            niter=iterations,
            seed=seed & 0x7FFFFFFF,
            max_points_per_centroid=len(sample_rows),  # never subsample what was sampled
            min_points_per_centroid=1,  # no warning printed
            verbose=False,
        )
        kmeans.train(sample_rows.astype(np.float32))
    return round_to_grid(np.asarray(kmeans.centroids))


@contextmanager
def _omp_threads(num_threads: int) -> Iterator[None]:
    import faiss

    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(num_threads)
    try:
        yield
    finally:
        faiss.omp_set_num_threads(before)


def _check_request(num_rows: int, num_clusters: int, iterations: int, num_threads: int) -> None:
    if not 1 <= num_clusters <= num_rows:
        raise UserError(
            f"{num_clusters} clusters were asked for, from {num_rows} rows.",
            "Each cluster needs at least one row to start from.",
            f"Set cluster.num_clusters between 1 and {num_rows}, or train on more rows.",
        )
    if iterations < 1 or num_threads < 1:
        raise UserError(
            f"K-means was asked for {iterations} iterations on {num_threads} threads.",
            "Both are counts of 1 or more.",
            "Set cluster.iterations (20 is usual) and the number of threads to at least 1.",
        )
