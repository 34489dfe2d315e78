"""The cluster stage in whole runs: given centroids, which rows have a cluster, user errors."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from small_inputs import (
    embeddings,
    recipe_for,
    record,
    run_here,
    stages,
    unit_rows,
    write_embeddings,
)

from manifests.errors import UserError


def test_given_centroids_are_assigned_by_the_definition(tmp_path: Path) -> None:
    folder = embeddings(tmp_path / "in", num_rows=60)
    centroids = (unit_rows(7, seed=9).astype(np.float32) * np.float32(1.5)).astype(np.float32)
    centroids[3] = centroids[1]
    np.save(tmp_path / "c.npy", centroids)
    recipe = recipe_for(folder, "clip_retrieval", cluster={"centroids": str(tmp_path / "c.npy")})
    chain = stages(run_here(recipe, tmp_path / "out"))
    grid = np.round(centroids.astype(np.float64) * 2**24) / 2**24
    for part, path in enumerate(chain["cluster"].files()):
        images = np.load(folder / "img_emb" / f"img_emb_{part:04d}.npy").astype(np.float64)
        d2 = ((images[:, None, :] - grid[None]) ** 2).sum(axis=2)
        table = pq.read_table(path)
        assert table.column("uid").to_pylist() == [part << 24 | row for row in range(60)]
        assert table.column("cluster").to_pylist() == d2.argmin(axis=1).tolist()
        assert np.allclose(table.column("d2").to_numpy(), d2.min(axis=1), rtol=0, atol=1e-12)


def test_filtered_and_quarantined_rows_are_in_no_cluster_and_no_training(tmp_path: Path) -> None:
    images = unit_rows(30)
    images[3] = 0
    folder = write_embeddings(tmp_path / "in", 0, images, unit_rows(30, seed=1))
    recipe = recipe_for(
        folder,
        "clip_retrieval",
        filter={"max_caption_chars": 19},
        cluster={"num_clusters": 9, "min_rows_per_centroid": 1},
    )
    chain = stages(run_here(recipe, tmp_path / "out"))
    uids = pq.read_table(chain["cluster"].files()[0]).column("uid").to_pylist()
    assert uids == [0, 1, 2, 4, 5, 6, 7, 8, 9]
    notes = record(chain["centroids"])["notes"]["centroids"]
    assert (notes["clusters"], notes["training_rows"]) == (9, 9)


def test_more_clusters_than_rows_and_no_rows_at_all_are_user_errors(tmp_path: Path) -> None:
    folder = write_embeddings(tmp_path / "in", 0, unit_rows(5))
    recipe = recipe_for(
        folder, "clip_retrieval", filter={}, cluster={"num_clusters": 6, "min_rows_per_centroid": 1}
    )
    with pytest.raises(UserError, match="6 clusters were asked for, from 5 rows"):
        run_here(recipe, tmp_path / "out")
    with pytest.raises(UserError, match="No row is left to cluster"):
        run_here(recipe | {"filter": {"min_caption_chars": 999}}, tmp_path / "out")


def test_given_centroids_that_are_no_centroids_are_user_errors(tmp_path: Path) -> None:
    folder = embeddings(tmp_path / "in")
    path, npz = tmp_path / "c.npy", tmp_path / "c.npz"
    np.savez(npz, unit_rows(2))
    bad: list[tuple[Callable[[], object], str]] = [
        (lambda: None, "cannot be read"),
        (lambda: path.write_bytes(b"junk"), "cannot be read"),
        (lambda: shutil.copy(npz, path), "cannot be read"),
        (lambda: np.save(path, np.zeros(5, np.float32)), "finite float array"),
        (lambda: np.save(path, np.zeros((0, 16), np.float32)), "finite float array"),
        (lambda: np.save(path, np.full((2, 16), np.nan)), "finite float array"),
        (lambda: np.save(path, np.zeros((2, 16), np.int64)), "finite float array"),
    ]
    recipe = recipe_for(folder, "clip_retrieval", cluster={"centroids": str(path)})
    for make, message in bad:
        make()
        with pytest.raises(UserError, match=message):
            run_here(recipe, tmp_path / "out")
    np.save(path, unit_rows(4))
    both = recipe | {
        "cluster": {"centroids": str(path), "num_clusters": 5, "min_rows_per_centroid": 1}
    }
    with pytest.raises(UserError, match="num_clusters is 5, but"):
        run_here(both, tmp_path / "out")
    folder_instead = recipe | {"cluster": {"centroids": str(tmp_path)}}
    with pytest.raises(UserError, match="cannot be read"):
        run_here(folder_instead, tmp_path / "out")
