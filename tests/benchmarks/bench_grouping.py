"""Rows by cluster: from files in any order to each cluster's rows together, in MB of rows a second.

    python tests/benchmarks/bench_grouping.py [--quick] [--out DIR]

Ours is what the cluster and forest stages do: each part is laid down by cluster (hashed and
synced), then bucket after bucket is read, all within the time; the alternatives write nothing.
Cold: the parts are taken out of the page cache first, and so is what ours wrote before it is read
again; a row that is gathered is read alone, as with more rows than memory what is read beside it is
gone before its turn. That is the case that counts, as rows that fit in memory need no grouping;
warm stands beside it. Seconds are wall seconds.
"""

from __future__ import annotations

import os
import shutil
import statistics
import tempfile
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import report
from alternatives import Groups, gather_rows, list_rows
from numpy.typing import NDArray
from report import Options, Row
from synthetic import DIM

from curate.vectors import grouped
from manifests import store

BUCKET_BYTES = 64 << 20


def group_and_read(folder: Path, clusters: NDArray[np.int64], *, is_cold: bool = False) -> Groups:
    """Yield (cluster, its rows): each part laid down by cluster, then bucket after bucket read.

    Args:
        folder: holds part-*.npy, float16 [n, d] each. clusters: of all rows, in their order.
    """
    start, num_clusters = 0, int(clusters.max()) + 1
    groups = folder / "groups"
    for path in sorted(folder.glob("part-*.npy")):
        rows = np.load(path)
        members = np.zeros(len(rows), grouped.MEMBER)
        members["uid"] = np.arange(start, start + len(rows))
        members["cluster"] = clusters[start : start + len(rows)]
        every = np.arange(len(rows))
        for name, made in grouped.content(path.stem, rows, every, members, num_clusters).items():
            store.write(str(groups), name, made)
        start += len(rows)
    if is_cold:
        forget(groups)
    for first, end in _buckets(clusters, rows[0].nbytes):
        members, rows = grouped.Grouped.at(str(groups)).read(first, end)
        for cluster, (own, _, stop) in grouped.starts_of(members).items():
            yield cluster, rows[own:stop]


def _buckets(clusters: NDArray[np.int64], row_bytes: int) -> list[tuple[int, int]]:
    """Return ranges of clusters (first, after the last) of about BUCKET_BYTES."""
    bucket = np.cumsum(np.bincount(clusters)) * row_bytes // BUCKET_BYTES
    ends = [0, *(np.flatnonzero(np.diff(bucket)) + 1).tolist(), len(bucket)]
    return list(zip(ends[:-1], ends[1:], strict=True))


def forget(folder: Path) -> None:
    """Take the files below a folder out of the page cache."""
    os.sync()
    for path in folder.rglob("*.npy"):
        file = os.open(path, os.O_RDONLY)
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(file)


def write_parts(folder: Path, num_rows: int, dim: int, num_parts: int = 4) -> list[Path]:
    """Write parts of random rows (what is in them does not matter here), return their paths."""
    rng = np.random.default_rng(0)
    paths = [folder / f"part-{number:02d}.npy" for number in range(num_parts)]
    for path in paths:
        bits = rng.integers(1 << 14, size=(num_rows // num_parts, dim), dtype=np.uint16)
        np.save(path, bits.view(np.float16))
    return paths


def compare(options: Options) -> Iterator[Row]:
    """Yield MB/s beside the per-row gather and beside the reference's lists, cold and warm."""
    num_rows, num_clusters, dim = (2000, 30, 64) if options.quick else (400_000, 2000, DIM)
    share = 1.0 / np.arange(1, num_clusters + 1) ** 0.5
    clusters = np.random.default_rng(1).choice(num_clusters, num_rows, p=share / share.sum())
    wall = replace(options, threads=2)  # a disk is waited for: wall seconds
    with tempfile.TemporaryDirectory(dir=options.out if options.out.exists() else None) as name:
        folder = Path(name)
        paths = write_parts(folder, num_rows, dim)
        for is_cold in (True, False):
            ways = {
                "ours": partial(group_and_read, folder, clusters, is_cold=is_cold),
                "row after row from a memmap": partial(
                    gather_rows, paths, clusters, reads_ahead=not is_cold
                ),
                "np.where a cluster, lists of rows, 10 passes": partial(list_rows, paths, clusters),
            }
            seconds = {name: _seconds(wall, folder, way, is_cold) for name, way in ways.items()}
            speed = {name: num_rows * dim * 2 / 1e6 / one for name, one in seconds.items()}
            for name in list(ways)[1:]:
                what = f"{num_rows:,} rows, {num_clusters:,} clusters, {STATE[is_cold]} / {name}"
                words = [f"{one:,.0f} MB/s" for one in (speed["ours"], speed[name])]
                target = {"at_least": 8.0} if is_cold else {}
                yield Row(what, *words, speed["ours"] / speed[name], **target)


STATE = {True: "not in the page cache", False: "in the page cache"}


def _seconds(options: Options, folder: Path, way: Callable[[], Groups], is_cold: bool) -> float:
    """Return the median of three rounds."""
    found = []
    for _ in range(1 if options.quick else 3):
        shutil.rmtree(folder / "groups", ignore_errors=True)
        if is_cold:
            forget(folder)
        found.append(options.seconds(lambda: deque(way(), maxlen=0)))
    return statistics.median(found)


if __name__ == "__main__":
    report.run(Path(__file__).stem, __doc__, compare)
