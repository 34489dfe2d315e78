"""Rows by cluster: what is read back is what a sort of everything gives, however it is cut."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from oracle import random_rows

from curate.vectors import grouped
from curate.vectors.grouped import MEMBER, Grouped, Members, content, starts_of
from manifests import store
from manifests.errors import PartDamaged

NUM_CLUSTERS = 7


def write_groups(folder: Path, *, num_files: int = 3) -> tuple[Members, np.ndarray]:
    """Write rows of several files with ghosts; return all members and rows in group order."""
    rng = np.random.default_rng(0)
    members, rows = [], []
    for number in range(num_files):
        own = np.zeros(40, MEMBER)
        own["uid"] = (number << 24) + np.arange(40)
        own["cluster"] = rng.choice([0, 1, 1, 1, 3, 6], 40)
        ghost = own[rng.choice(40, 15, replace=False)]
        ghost["cluster"], ghost["is_ghost"] = (ghost["cluster"] + 1) % NUM_CLUSTERS, True
        both = np.concatenate([own, ghost])
        images = random_rows(60, 12, seed=number)
        row = both["uid"].astype(np.int64) % (1 << 24) + 20
        shuffled = rng.permutation(len(both))
        files = content(
            f"part-{number:05d}-000", images, row[shuffled], both[shuffled], NUM_CLUSTERS
        )
        for name, what in files.items():
            store.write(str(folder), name, what)
        members.append(both)
        rows.append(images[row])
    every, vectors = np.concatenate(members), np.concatenate(rows)
    order = np.lexsort((every["uid"], every["is_ghost"], every["cluster"]))
    return every[order], vectors[order]


@pytest.mark.parametrize("rows_per_write", [1, 7, 1 << 13])
def test_every_run_of_clusters_is_read_in_group_order(
    tmp_path: Path, rows_per_write: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grouped, "ROWS_PER_WRITE", rows_per_write)
    every, vectors = write_groups(tmp_path)
    groups = Grouped.at(str(tmp_path))
    for first in range(NUM_CLUSTERS):
        for end in range(first, NUM_CLUSTERS + 1):
            wanted = (every["cluster"] >= first) & (every["cluster"] < end)
            members, rows = groups.read(first, end)
            assert (members == every[wanted]).all()
            assert (rows == vectors[wanted]).all()
            assert (groups.members(first, end) == every[wanted]).all()


def test_a_block_of_a_cluster_is_that_part_of_its_rows_or_of_its_ghosts(tmp_path: Path) -> None:
    every, vectors = write_groups(tmp_path)
    groups = Grouped.at(str(tmp_path))
    for ghosts in (False, True):
        mine = (every["cluster"] == 1) & (every["is_ghost"] == ghosts)
        for start, stop in ((0, 5), (3, 30), (0, 10_000), (4, 4)):
            members, rows = groups.block(1, start, stop, ghosts=ghosts)
            assert (members == every[mine][start:stop]).all()
            assert (rows == vectors[mine][start:stop]).all()


def test_sizes_count_own_rows_and_ghosts_of_every_cluster(tmp_path: Path) -> None:
    every, _ = write_groups(tmp_path)
    sizes = Grouped.at(str(tmp_path)).sizes()
    assert sizes.shape == (NUM_CLUSTERS, 2)
    for cluster in range(NUM_CLUSTERS):
        mine = every[every["cluster"] == cluster]
        assert sizes[cluster].tolist() == [(~mine["is_ghost"]).sum(), mine["is_ghost"].sum()]


def test_starts_are_those_of_own_rows_and_ghosts(tmp_path: Path) -> None:
    every, _ = write_groups(tmp_path)
    found = starts_of(every)
    assert list(found) == sorted(set(every["cluster"].tolist()))
    for cluster, (start, ghosts, end) in found.items():
        assert (every["cluster"][start:end] == cluster).all()
        assert not every["is_ghost"][start:ghosts].any()
        assert every["is_ghost"][ghosts:end].all()


def test_a_file_that_is_cut_short_is_damaged_and_not_a_shorter_group(tmp_path: Path) -> None:
    write_groups(tmp_path)
    path = tmp_path / "rows" / "part-00001-000.npy"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(PartDamaged, match="1 bytes are missing"):
        Grouped.at(str(tmp_path)).read(0, NUM_CLUSTERS)


def test_a_slice_of_an_npy_file_is_read_into_a_given_array(tmp_path: Path) -> None:
    array = np.arange(60, dtype=np.int32).reshape(20, 3)
    np.save(tmp_path / "a.npy", array)
    path, out = str(tmp_path / "a.npy"), np.zeros((9, 3), np.int32)
    found = store.read_slice(path, 4, 11, out)
    assert (found == array[4:11]).all()
    assert np.shares_memory(found, out)
    assert (store.read_slice(path, 15, 99) == array[15:]).all()
    assert store.length_of(path) == 20
    np.save(tmp_path / "f.npy", np.asfortranarray(array))
    with pytest.raises(PartDamaged, match="C order"):
        store.read_slice(str(tmp_path / "f.npy"), 0, 1)
