"""Rows by cluster: from files in any order to each cluster's rows together, in MB of rows a second.

    python tests/benchmarks/bench_grouping.py [--quick] [--out DIR]

The files are in the page cache (nothing can be promised about a disk), and ours writes its sorted
files and reads them again within the time; the alternatives write nothing.
"""

from __future__ import annotations

import tempfile
from collections import deque
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import report
from alternatives import Groups, gather_rows, list_rows
from numpy.typing import NDArray
from report import Options, Row
from synthetic import DIM

BUCKET_BYTES = 64 << 20


def group_and_read(folder: Path, clusters: NDArray[np.int64]) -> Groups:
    """Yield (cluster, its rows): each part sorted into a file once, then bucket after bucket read.

    Args:
        folder: holds part-*.npy, float16 [n, d] each. clusters: of all rows, in their order.
    """
    parts = sorted(folder.glob("part-*.npy"))
    sorted_clusters = [np.empty(0, np.int64)] * len(parts)
    start = 0
    for number, path in enumerate(parts):
        rows = np.load(path)
        here = clusters[start : start + len(rows)]
        order = np.argsort(here, kind="stable")
        np.save(folder / f"sorted-{path.name}", rows[order])
        sorted_clusters[number], start = here[order], start + len(rows)
    maps = [np.load(folder / f"sorted-{path.name}", mmap_mode="r") for path in parts]
    for first, last in _buckets(clusters, maps[0][0].nbytes):
        yield from _bucket(maps, sorted_clusters, first, last)


def _buckets(clusters: NDArray[np.int64], row_bytes: int) -> list[tuple[int, int]]:
    """Return ranges of clusters (first, after the last) of about BUCKET_BYTES."""
    bucket = np.cumsum(np.bincount(clusters)) * row_bytes // BUCKET_BYTES
    ends = [0, *(np.flatnonzero(np.diff(bucket)) + 1).tolist(), len(bucket)]
    return list(zip(ends[:-1], ends[1:], strict=True))


def _bucket(
    maps: list[NDArray[np.float16]], clusters: list[NDArray[np.int64]], first: int, last: int
) -> Groups:
    """Yield the clusters of one bucket: its slice of every file, sorted by cluster."""
    ends = [np.searchsorted(one, [first, last]) for one in clusters]
    slices = [slice(*end) for end in ends]
    here = np.concatenate([one[part] for one, part in zip(clusters, slices, strict=True)])
    rows = np.concatenate([one[part] for one, part in zip(maps, slices, strict=True)])
    rows = rows[np.argsort(here, kind="stable")]
    numbers, starts, counts = np.unique(np.sort(here), return_index=True, return_counts=True)
    for number, start, count in zip(numbers, starts, counts, strict=True):
        yield int(number), rows[start : start + count]


def write_parts(folder: Path, num_rows: int, dim: int, num_parts: int = 4) -> list[Path]:
    """Write parts of random rows (what is in them does not matter here), return their paths."""
    rng = np.random.default_rng(0)
    paths = [folder / f"part-{number:02d}.npy" for number in range(num_parts)]
    for path in paths:
        bits = rng.integers(1 << 14, size=(num_rows // num_parts, dim), dtype=np.uint16)
        np.save(path, bits.view(np.float16))
    return paths


def compare(options: Options) -> Iterator[Row]:
    """Yield MB/s beside the per-row gather and beside the reference's lists."""
    num_rows, num_clusters, dim = (2000, 30, 64) if options.quick else (400_000, 2000, DIM)
    share = 1.0 / np.arange(1, num_clusters + 1) ** 0.5
    clusters = np.random.default_rng(1).choice(num_clusters, num_rows, p=share / share.sum())
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        paths = write_parts(folder, num_rows, dim)
        ways = {
            "ours": partial(group_and_read, folder, clusters),
            "row after row from a memmap": partial(gather_rows, paths, clusters),
            "np.where a cluster, lists of rows, 10 passes": partial(list_rows, paths, clusters),
        }
        work = {name: lambda way=way: deque(way(), maxlen=0) for name, way in ways.items()}
        seconds = report.turns(options, work, rounds=3)
    speed = {name: num_rows * dim * 2 / 1e6 / one for name, one in seconds.items()}
    for name in list(ways)[1:]:
        what = f"{num_rows:,} rows into {num_clusters:,} clusters / {name}"
        words = [f"{one:,.0f} MB/s" for one in (speed["ours"], speed[name])]
        yield Row(what, *words, speed["ours"] / speed[name], at_least=8.0)


if __name__ == "__main__":
    report.run(Path(__file__).stem, __doc__, compare)
