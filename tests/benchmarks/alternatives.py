"""What Warren is measured against, each written from its description.

Rows are torch tensors [n, d] on any device; which precision they are multiplied in is theirs.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

Ints: TypeAlias = NDArray[np.int64]
Groups: TypeAlias = Iterator[tuple[int, NDArray[np.float16]]]

OUTPUTS_PER_PRODUCT = 700_000


def batch_bfs(rows: torch.Tensor, similarity_above: float) -> Ints:
    """Return each row's component as its smallest row: the published dedup of Bunny's data.

    Breadth first: the frontier against all rows that are left; those above the threshold are the
    next frontier and leave the matrix, which is copied without them at every level.
    """
    label = np.empty(len(rows), np.int64)
    left, index = rows, torch.arange(len(rows), device=rows.device)
    while len(left):
        frontier, members = left[:1], [index[:1]]
        left, index = left[1:], index[1:]
        while len(frontier) and len(left):
            is_near = _nearest(frontier, left) > similarity_above
            frontier = left[is_near]
            members.append(index[is_near])
            left, index = left[~is_near], index[~is_near]
        found = torch.cat(members).cpu().numpy()
        label[found] = found.min()
    return label


def _nearest(frontier: torch.Tensor, left: torch.Tensor) -> torch.Tensor:
    """Return for each row that is left its largest similarity to the frontier."""
    height = max(1, OUTPUTS_PER_PRODUCT // len(left))
    tops = [(part @ left.T).amax(dim=0) for part in frontier.split(height)]
    return torch.stack(tops).amax(dim=0)


def upper_triangle_max(
    rows: torch.Tensor, similarity_above: float, *, chunk_rows: int = 1024, skips_later: bool = True
) -> torch.Tensor:
    """Return which rows stay, bool [n]: SemDeDup's rule, in chunks as in BAAI's use of it.

    A row stays unless an earlier one is more similar than the threshold. Args: skips_later:
    multiply a chunk with earlier rows only, not with all rows and mask what is later.
    """
    largest = torch.empty(len(rows), device=rows.device)
    for start in range(0, len(rows), chunk_rows):
        chunk = rows[start : start + chunk_rows]
        others = rows[: start + len(chunk)] if skips_later else rows
        similarity = chunk @ others.T
        largest[start : start + len(chunk)] = similarity.tril_(start - 1).amax(dim=1)
    return largest <= similarity_above


def flat_index(centroids: NDArray[np.float32]) -> Any:
    """Return FAISS's flat index of the centroids: the usual way to assign rows to k-means."""
    import faiss

    index = faiss.IndexFlatL2(centroids.shape[1])
    index.add(centroids)
    return index


def flat_torch(queries: torch.Tensor, centroids: torch.Tensor) -> torch.Tensor:
    """Return the nearest centroids by float32 products in blocks: where there is no FAISS."""
    half = centroids.square().sum(dim=1) / 2
    return torch.cat([(part @ centroids.T - half).argmax(dim=1) for part in queries.split(2048)])


def gather_rows(files: list[Path], cluster: Ints, *, reads_ahead: bool = True) -> Groups:
    """Yield (cluster, its rows) by reading row after row from the mapped files.

    Args:
        cluster: of every row, in the order of the files. reads_ahead: let the kernel read what
        follows a row as well, which pays where all of it stays in memory until it is used.
    """
    maps = [np.load(path, mmap_mode="r") for path in files]
    for one in maps if not reads_ahead else []:
        one._mmap.madvise(mmap.MADV_RANDOM)
    first = np.cumsum([0, *map(len, maps)])
    order = np.argsort(cluster, kind="stable")
    file = np.searchsorted(first, order, side="right") - 1
    ends = np.searchsorted(cluster[order], np.arange(cluster.max() + 2))
    for number, (start, stop) in enumerate(zip(ends[:-1], ends[1:], strict=True)):
        rows = np.empty((stop - start, maps[0].shape[1]), np.float16)
        where = zip(file[start:stop].tolist(), order[start:stop].tolist(), strict=True)
        for place, (source, row) in enumerate(where):
            rows[place] = maps[source][row - first[source]]
        if len(rows):
            yield number, rows


def list_rows(files: list[Path], cluster: Ints, *, passes: int = 10) -> Groups:
    """Yield (cluster, its rows) as the reference groups them.

    Clusters in 10 passes, each over all files: per cluster one search of all the file's labels,
    and the rows found are appended to a list.
    """
    everything = np.array_split(np.arange(cluster.max() + 1), passes)
    for numbers in everything:
        lists: dict[int, list[NDArray[np.float16]]] = {int(number): [] for number in numbers}
        start = 0
        for path in files:
            rows = np.load(path)
            here = cluster[start : start + len(rows)]
            for number, found in lists.items():
                found.extend(rows[row] for row in np.where(here == number)[0])
            start += len(rows)
        yield from ((number, np.stack(found)) for number, found in lists.items() if found)
