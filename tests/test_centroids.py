"""The centroids stage: the same bits in any number of shards, resumed anywhere; its limits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
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

from curate.vectors import kmeans, lloyd
from curate.vectors.centroids import ClusterConfig, is_sampled, is_trained_on
from manifests.errors import UserError
from manifests.work import StageDir
from pipelines.executors import LocalExecutor
from pipelines.progress import Progress, quality_text
from pipelines.recipe import parse
from pipelines.run import run

SETTINGS = {"num_clusters": 5, "iterations": 6, "min_rows_per_centroid": 1}


def recipe(folder: Path, **cluster: Any) -> dict[str, Any]:
    return recipe_for(folder, "clip_retrieval", seed=2, cluster=SETTINGS | cluster)


def centroids(stage: StageDir) -> np.ndarray:
    found: np.ndarray = np.load(Path(stage.path) / "centroids.npy")
    return found


def rows_in(folder: Path) -> np.ndarray:
    files = sorted((folder / "img_emb").glob("*.npy"))
    return np.concatenate([np.load(path) for path in files])


@pytest.mark.parametrize("spherical", [False, True])
def test_rounds_in_any_number_of_shards_are_lloyds_of_all_rows(
    tmp_path: Path, spherical: bool
) -> None:
    folder = embeddings(tmp_path / "in", num_parts=4)
    wanted = lloyd.train(rows_in(folder), num_clusters=5, iterations=6, seed=2, spherical=spherical)
    for shards in (1, 3, 99):
        values = recipe(folder, training_shards=shards, spherical=spherical)
        made = stages(run_here(values, tmp_path / f"out-{shards}"))["centroids"]
        assert (centroids(made) == wanted).all()


def test_rounds_end_when_nothing_moves(tmp_path: Path) -> None:
    folder = embeddings(tmp_path / "in", num_parts=2, num_rows=20)
    made = stages(run_here(recipe(folder, iterations=60), tmp_path / "out"))["centroids"]
    notes = record(made)["notes"]["centroids"]
    assert 2 <= notes["iterations"] < 40
    assert notes["objectives"] == sorted(notes["objectives"], reverse=True)
    assert not (Path(made.path) / "training" / "centroids-060.npy").exists()


class _Stops(LocalExecutor):
    """Does a number of phases and then fails, as if killed."""

    def __init__(self, num_phases: int) -> None:
        super().__init__()
        self._left = num_phases

    def map(self, *args: Any) -> Any:
        """Run a phase, or stop here."""
        if not self._left:
            raise KeyboardInterrupt
        self._left -= 1
        return super().map(*args)


def test_a_run_stopped_between_rounds_goes_on_with_the_next_one(tmp_path: Path) -> None:
    folder = embeddings(tmp_path / "in")
    values = parse(recipe(folder))
    out = str(tmp_path / "out")
    with pytest.raises(KeyboardInterrupt):
        run(values, out, executor=_Stops(8), progress=Progress(out))
    (unfinished,) = (tmp_path / "out").glob("centroids-*")
    there = {path: path.stat().st_mtime_ns for path in unfinished.rglob("training/*.npy")}
    assert there
    done = stages(run(values, out, executor=LocalExecutor(), progress=Progress(out)))["centroids"]
    assert {path: path.stat().st_mtime_ns for path in there} == there
    whole = stages(run_here(recipe(folder), tmp_path / "whole"))["centroids"]
    assert (centroids(done) == centroids(whole)).all()


def test_faiss_trains_in_rounds_and_repeats(tmp_path: Path) -> None:
    folder = embeddings(tmp_path / "in", num_parts=3)
    first, second = (
        stages(run_here(recipe(folder, engine="faiss"), tmp_path / name))["centroids"]
        for name in ("a", "b")
    )
    wanted = kmeans.train_centroids(
        rows_in(folder), num_clusters=5, iterations=6, seed=2, num_threads=2
    )
    assert (centroids(first) == wanted).all()
    assert (centroids(second) == wanted).all()
    assert not list(Path(first.path).rglob("sums-*"))


def test_about_the_wanted_share_of_rows_is_trained_on_and_the_rest_is_held_out(
    tmp_path: Path,
) -> None:
    uids = np.arange(100_000, dtype=np.uint64)
    chosen = is_sampled(uids, 20_000, 100_000, seed=3)
    assert abs(int(chosen.sum()) - 20_000) < 5 * np.sqrt(16_000)
    assert (is_sampled(uids, 20_000, 100_000, seed=4) != chosen).any()
    assert is_sampled(uids, 100_000, 100_000, seed=3).all()
    folder = write_embeddings(tmp_path / "in", 0, unit_rows(500))
    chain = stages(run_here(recipe(folder, rows_per_centroid=40), tmp_path / "out"))
    trained = is_trained_on(chain["centroids"], 2)(np.arange(500, dtype=np.uint64))
    notes = record(chain["centroids"])["notes"]["centroids"]
    assert 120 < notes["training_rows"] == trained.sum() < 280
    quality = record(chain["cluster"])["notes"]["quality"]
    rows, made = rows_in(folder).astype(np.float64), centroids(chain["centroids"])
    d2 = ((rows[:, None] - made) ** 2).sum(axis=2)
    assert quality["rows_held_out"] == 500 - trained.sum()
    assert quality["objective_held_out"] == pytest.approx(d2.min(axis=1)[~trained].mean())
    sizes = np.bincount(d2.argmin(axis=1), minlength=5)
    assert quality["rows_largest"] == sizes.max()
    assert quality["largest_share"] == sizes.max() / 500
    assert sum(quality["size_histogram"].values()) == 5
    assert quality["size_variation"] == pytest.approx(sizes.var() / sizes.mean() ** 2)
    assert f"largest {sizes.max()}" in quality_text(quality)


@pytest.mark.parametrize(
    ("num_rows", "clusters"),
    [(30, 1), (400, 10), (2600, 64), (64 * 20_000, 64), (2 * 10**9, 10**5)],
)
def test_auto_is_one_cluster_for_20k_rows_and_at_least_64_where_there_are_rows(
    num_rows: int, clusters: int
) -> None:
    from curate.vectors.centroids import checked_number

    assert checked_number(ClusterConfig(num_clusters="auto"), num_rows) == clusters


def test_more_clusters_than_rows_by_39_are_refused_unless_told_otherwise(tmp_path: Path) -> None:
    folder = embeddings(tmp_path / "in")
    strict = recipe(folder, num_clusters=4, min_rows_per_centroid=39)
    with pytest.raises(UserError, match=r"4 clusters .* from 120 rows(.|\n)*to 3 or less"):
        run_here(strict, tmp_path / "out")
    chain = stages(run_here(recipe(folder, num_clusters=4), tmp_path / "out"))
    assert len(centroids(chain["centroids"])) == 4
