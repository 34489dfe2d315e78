"""Embeddings laid down by cluster: each row is written once, and read once per use.

The cluster stage writes, for every npy file that it reads, the same rows in order of their cluster:

    rows/<name>.npy      float16 [n, d]   by (cluster, own rows before ghosts, uid)
    members/<name>.npy   MEMBER [n]       who they are
    ends/<name>.npy      int64 [2 K + 1]  where in it cluster c begins: at ends[2 c] its own rows,
                                          at ends[2 c + 1] its ghosts

A run of clusters is then one stretch of every file, so a reader takes it in as many reads as there
are files, and nobody has to know the sizes of clusters while the rows are written.

Legend: n rows of a file, K clusters, d dimensions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, BinaryIO, TypeAlias

import numpy as np
from numpy.typing import NDArray

from curate.vectors.exact import Float16Rows
from manifests import paths, store
from manifests.store import Content

Ints: TypeAlias = NDArray[np.int64]
Members: TypeAlias = NDArray[np.void]

MEMBER = np.dtype(
    [
        ("uid", "<u8"),
        ("cluster", "<u4"),
        ("is_ghost", "?"),
        ("d2", "<f8"),
        ("centroid_cosine", "<f8"),
        ("clip_score", "<f8"),
    ]
)
"""One row of a group. The figures of a ghost are those of its own cluster."""
ROWS_PER_WRITE = 1 << 13


def content(
    name: str, rows: Float16Rows, row: Ints, members: Members, num_clusters: int
) -> dict[str, Content]:
    """Return the three files of some rows.

    Args:
        rows: float16 [m, d], in memory. row: int64 [n], which of them each member is.
        members: MEMBER [n], in any order.
    """
    order = np.lexsort((members["uid"], members["is_ghost"], members["cluster"]))
    members, row = members[order], row[order]
    slot = 2 * members["cluster"].astype(np.int64) + members["is_ghost"]
    return {
        f"rows/{name}.npy": _in_order(rows, row),
        f"members/{name}.npy": members,
        f"ends/{name}.npy": np.searchsorted(slot, np.arange(2 * num_clusters + 1)),
    }


def _in_order(rows: Float16Rows, row: Ints) -> Callable[[BinaryIO], None]:
    """Return what writes rows[row] as npy, a block at a time."""

    def write(file: BinaryIO) -> None:
        header: dict[str, Any] = {
            "descr": np.lib.format.dtype_to_descr(rows.dtype),
            "fortran_order": False,
            "shape": (len(row), rows.shape[1]),
        }
        np.lib.format.write_array_header_1_0(file, header)
        for start in range(0, len(row), ROWS_PER_WRITE):
            file.write(rows.take(row[start : start + ROWS_PER_WRITE], axis=0).data)

    return write


@dataclass(frozen=True, slots=True)
class Grouped:
    """The groups in a finished cluster stage's directory. names: of its files, in source order."""

    path: str
    names: tuple[str, ...]

    @classmethod
    def at(cls, path: str) -> Grouped:
        """Return the groups of a directory."""
        names = [
            name.removesuffix(".npy") for name in paths.list_names(_join(path, "ends"), ".npy")
        ]
        return cls(path, tuple(sorted(names)))

    def sizes(self) -> Ints:
        """Return how many own rows and ghosts each cluster has: int64 [K, 2]."""
        total: Ints = np.zeros((0, 2), np.int64)
        for name in self.names:
            ends = store.read_slice(self._file("ends", name), 0, 1 << 62)
            counts = np.diff(np.append(ends, self._length(name)))[:-1].reshape(-1, 2)
            total = counts if not len(total) else total + counts
        return total

    def members(self, first: int, end: int) -> Members:
        """Return the members of clusters first..end-1, by (cluster, is_ghost, uid)."""
        found = [np.empty(0, MEMBER)]
        for name, start, stop in self._stretches(2 * first, 2 * end):
            found.append(store.read_slice(self._file("members", name), start, stop))
        whole = np.concatenate(found)
        return whole[_by_group(whole)]

    def stream(self, num_rows: int) -> Iterator[tuple[Members, Float16Rows]]:
        """Yield all own rows, file after file, from blocks of `num_rows` rows with their ghosts."""
        for name in self.names:
            for start in range(0, self._length(name), num_rows):
                part = (start, start + num_rows)
                members = store.read_slice(self._file("members", name), *part)
                rows = store.read_slice(self._file("rows", name), *part)
                own = ~members["is_ghost"]
                yield members[own], rows if own.all() else rows[own]

    def read(self, first: int, end: int) -> tuple[Members, Float16Rows]:
        """Return the members of clusters first..end-1 and their rows, by (cluster, is_ghost, uid).

        Memory: the rows, and one stretch of a file beside them.
        """
        return self._read(2 * first, 2 * end, slice(None))

    def block(
        self, cluster: int, start: int, stop: int, *, ghosts: bool
    ) -> tuple[Members, Float16Rows]:
        """Return rows start..stop of one cluster's own rows, or of its ghosts, by uid."""
        slot = 2 * cluster + int(ghosts)
        return self._read(slot, slot + 1, slice(start, stop))

    def _read(self, first: int, end: int, part: slice) -> tuple[Members, Float16Rows]:
        stretches = self._stretches(first, end)
        pieces = [store.read_slice(self._file("members", n), a, b) for n, a, b in stretches]
        members = np.concatenate([np.empty(0, MEMBER), *pieces])
        order = _by_group(members)[part]
        place = np.full(len(members), -1)
        place[order] = np.arange(len(order))
        rows = np.empty((len(order), self._dim()), np.float16)
        at = 0
        for (name, start, _), piece in zip(stretches, pieces, strict=True):
            to = place[at : at + len(piece)]
            at += len(piece)
            wanted = np.flatnonzero(to >= 0)
            if len(wanted):
                low, high = int(wanted[0]), int(wanted[-1]) + 1
                found = store.read_slice(self._file("rows", name), start + low, start + high)
                rows[to[wanted]] = found[wanted - low]
        return members[order], rows

    def _stretches(self, first: int, end: int) -> list[tuple[str, int, int]]:
        """Return (file, start, stop) of the slots first..end-1, where there are any rows."""
        found = []
        for name in self.names:
            ends = store.read_slice(self._file("ends", name), first, end + 1)
            if ends[0] < ends[-1]:
                found.append((name, int(ends[0]), int(ends[-1])))
        return found

    def _dim(self) -> int:
        return _dim_of(self._file("rows", self.names[0]))

    def _length(self, name: str) -> int:
        return store.length_of(self._file("members", name))

    def _file(self, kind: str, name: str) -> str:
        return _join(self.path, f"{kind}/{name}.npy")


@lru_cache(maxsize=8)
def _dim_of(path: str) -> int:
    return int(store.read_slice(path, 0, 0).shape[1])


def _by_group(members: Members) -> Ints:
    """Return the order by (cluster, is_ghost, uid); files are in uid order, and so in order."""
    slot = 2 * members["cluster"].astype(np.int64) + members["is_ghost"]
    return np.lexsort((members["uid"], slot))


def _join(folder: str, name: str) -> str:
    return paths.join(folder, name)


def starts_of(members: Members) -> Mapping[int, tuple[int, int, int]]:
    """Return cluster -> (first own row, first ghost, end) of members in group order."""
    clusters, first = np.unique(members["cluster"], return_index=True)
    ends = np.append(first[1:], len(members))
    own = [int((~members["is_ghost"][a:b]).sum()) for a, b in zip(first, ends, strict=True)]
    return {
        int(cluster): (int(a), int(a) + num_own, int(b))
        for cluster, a, num_own, b in zip(clusters, first, own, ends, strict=True)
    }
