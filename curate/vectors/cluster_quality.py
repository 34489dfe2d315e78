"""How good a clustering is: how near rows are to their centroids, and how even the clusters are."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

SHARES = (0.01, 0.1, 0.5, 0.9, 0.99)

IsTrainedOn = Callable[[npt.NDArray[np.uint64]], npt.NDArray[np.bool_]]


def measure(
    tables: Iterable[pa.Table], *, num_clusters: int, is_trained_on: IsTrainedOn
) -> dict[str, Any]:
    """Return the figures of an assignment, from ASSIGNMENTS tables (uid, cluster, d2).

    objective_held_out: mean |x - c|^2 of the rows that no centroid was trained on, None where all
    were. size_histogram: clusters by size, in powers of two: {"0": empty, "1": 1, "2": 2..3, ...}.
    largest_share: rows in the largest cluster, of all. size_variation: squared coefficient of
    variation of the sizes; pair work is rows^2 / clusters * (1 + it).
    """
    sizes = np.zeros(num_clusters, np.int64)
    sums: dict[bool, list[float]] = {True: [], False: []}
    counts = {True: 0, False: 0}
    for table in tables:
        sizes += np.bincount(table.column("cluster").to_numpy(), minlength=num_clusters)
        trained = is_trained_on(table.column("uid").to_numpy())
        d2 = table.column("d2").to_numpy()
        for kind in (True, False):
            sums[kind].append(float(d2[trained == kind].sum()))
            counts[kind] += int((trained == kind).sum())
    means = {kind: math.fsum(sums[kind]) / counts[kind] if counts[kind] else None for kind in sums}
    return {
        "objective_held_out": means[False],
        "rows_held_out": counts[False],
        "objective_trained": means[True],
        **size_figures(sizes),
    }


def size_figures(sizes: npt.NDArray[np.int64]) -> dict[str, Any]:
    """Return what there is to say of cluster sizes, int64 [K]."""
    powers = np.where(sizes > 0, 1 << np.frexp(np.maximum(sizes, 1))[1] - 1, 0)
    found, counts = np.unique(powers, return_counts=True)
    mean = float(sizes.mean())
    quantiles = np.quantile(sizes, SHARES, method="inverted_cdf").tolist()
    return {
        "clusters": len(sizes),
        "rows_largest": int(sizes.max()),
        "largest_share": float(sizes.max() / max(1, sizes.sum())),
        "size_quantiles": {
            f"{share:g}": int(q) for share, q in zip(SHARES, quantiles, strict=True)
        },
        "size_histogram": {str(p): int(n) for p, n in zip(found, counts, strict=True)},
        "size_variation": float(sizes.var() / mean**2) if mean else 0.0,
    }
