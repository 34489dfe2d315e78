"""What clustering misses, and what ghosts give back: excess of the rows kept, and the work.

    python tests/benchmarks/bench_ghosts.py [--quick] [--out DIR]

Truth is the components of all rows at once. Excess is the share of rows kept beyond one of each.
Work is the number of pairs compared. SemDeDup keeps a row unless an earlier one of its cluster is
too similar, which keeps several of a chain.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import numpy as np
import report
from alternatives import upper_triangle_max
from numpy.typing import NDArray
from report import Options, Row
from synthetic import DIM, World

from curate.duplicates.components import components
from curate.duplicates.forest import spanning_forest
from curate.duplicates.regions import Regions
from curate.vectors import lloyd
from curate.vectors.assign import assign, prepare
from curate.vectors.ghosts import ghosts_of

ABOVE = 0.86
MARGIN, CAP = 0.04, 3
LEAST_PLAIN_EXCESS = 0.04

Ints: TypeAlias = NDArray[np.int64]
Clusters: TypeAlias = NDArray[np.uint32]
Rows: TypeAlias = NDArray[np.float16]


@dataclass(frozen=True, slots=True)
class Ghosts:
    """Row row[g] is a ghost of cluster[g]."""

    row: Ints
    cluster: Clusters

    @classmethod
    def none(cls) -> Ghosts:
        """Return no ghosts."""
        return cls(np.arange(0), np.zeros(0, np.uint32))


def global_components(rows: Rows, cluster: Clusters, ghosts: Ghosts) -> Ints:
    """Return a component number for every row: the edges within clusters and to their ghosts."""
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import connected_components

    ends = [np.zeros((2, 0), np.int64)]
    for number in np.unique(cluster):
        own, near = np.flatnonzero(cluster == number), ghosts.row[ghosts.cluster == number]
        here = np.append(own, near)
        is_ghost = np.arange(len(here)) >= len(own)
        forest = spanning_forest(rows[here], ABOVE, regions=Regions.of(is_ghost))
        ends.append(here[np.stack([forest.row_a, forest.row_b])])
    a, b = np.concatenate(ends, axis=1)
    graph = coo_matrix((np.ones(len(a), np.int8), (a, b)), shape=(len(rows), len(rows)))
    return np.asarray(connected_components(graph, directed=False)[1], np.int64)


def pairs_compared(cluster: Clusters, ghosts: Ghosts) -> int:
    """Return how many pairs are compared: rows of a cluster, and those with its ghosts."""
    size = np.bincount(cluster)
    near = np.bincount(ghosts.cluster, minlength=len(size))[: len(size)]
    return int((size * (size - 1) // 2 + size * near).sum())


def pairs_found(rows: Rows, cluster: Clusters, ghosts: Ghosts, sample: Ints) -> float:
    """Return the share of the sampled rows' duplicate pairs that are compared."""
    wide, found, total = rows.astype(np.float32), 0, 0
    meets = set(zip(ghosts.row.tolist(), ghosts.cluster.tolist(), strict=True))
    for block in np.array_split(sample, 1 + len(sample) // 256):
        place, other = np.nonzero(wide[block] @ wide.T > ABOVE)
        row = block[place]
        row, other = row[row != other], other[row != other]
        apart = cluster[row] != cluster[other]
        ends = zip(row[apart].tolist(), other[apart].tolist(), strict=True)
        found += sum((a, cluster[b]) in meets or (b, cluster[a]) in meets for a, b in ends)
        found, total = found + int((~apart).sum()), total + len(row)
    return found / max(1, total)


def compare(options: Options) -> Iterator[Row]:
    """Yield the rows of every number of clusters."""
    num_rows, counts = (3000, (6,)) if options.quick else (120_000, (50, 200))
    world = World.of(0, 64 if options.quick else DIM)
    rows = world.parts(num_rows)
    true = len(np.unique(components(rows, ABOVE)))
    sample = np.random.default_rng(0).choice(len(rows), min(2000, len(rows)), replace=False)
    for num_clusters in counts:
        yield from _one_clustering(rows, num_clusters, true, sample)


def _one_clustering(rows: Rows, num_clusters: int, true: int, sample: Ints) -> Iterator[Row]:
    what = f"{len(rows):,} rows, {num_clusters} clusters"
    centroids = lloyd.train(rows, num_clusters=num_clusters, iterations=10, seed=0)
    ready = prepare(centroids, rows)
    cluster, plain = assign(rows, ready).cluster, Ghosts.none()
    ghosts = Ghosts(*ghosts_of(rows, ready, margin=MARGIN, cap=CAP))
    kept = [len(np.unique(global_components(rows, cluster, one))) for one in (plain, ghosts)]
    excess = [one / true - 1 for one in kept]
    words = [f"{one:.2%} of {true:,}" for one in excess]
    yield Row(f"{what}: excess, no ghosts", words[0], ratio=excess[0], at_least=LEAST_PLAIN_EXCESS)
    name = f"{what}: excess, ghosts ({MARGIN}, cap {CAP})"
    yield Row(name, *words[::-1], excess[1], at_most=0.015)
    work = [pairs_compared(cluster, one) for one in (ghosts, plain)]
    words = [f"{one:,}" for one in work]
    yield Row(f"{what}: pairs compared", *words, work[0] / work[1], at_most=1.8)
    share = [pairs_found(rows, cluster, one, sample) for one in (ghosts, plain)]
    yield Row(f"{what}: duplicate pairs that meet", *(f"{one:.2%}" for one in share))
    semdedup = sum(_kept_by_semdedup(rows[cluster == one]) for one in range(num_clusters))
    yield Row(
        f"{what}: kept within clusters, one a component or by SemDeDup",
        f"{kept[0]:,}",
        f"{semdedup:,}",
        semdedup / kept[0],
    )


def _kept_by_semdedup(rows: Rows) -> int:
    import torch

    return int(upper_triangle_max(torch.from_numpy(rows).float(), ABOVE).sum())


if __name__ == "__main__":
    report.run(Path(__file__).stem, __doc__, compare)
