"""Whole runs from the command line, held against the definition and opened as a user would."""

from __future__ import annotations

import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import yaml
from oracle import band, centroid_cosine, component_of, dot, nearest, sample, survivor, units
from proof_worlds import tar_recipe
from small_inputs import recipe_for, run_here, unit_rows, write_embeddings

from curate.vectors.exact import round_to_grid
from pipelines import ask

NUM_PARTS, NUM_ROWS, NUM_CLUSTERS = 3, 90, 5


def _write_world(folder: Path) -> tuple[dict[int, np.ndarray], dict[int, np.ndarray], np.ndarray]:
    """Write near-duplicates in all parts; return images by uid, texts by uid, and centroids."""
    images, texts = {}, {}
    shared = unit_rows(NUM_ROWS // 2, seed=50)
    for part in range(NUM_PARTS):
        rows, words = unit_rows(NUM_ROWS, seed=part), unit_rows(NUM_ROWS, seed=100 + part)
        noise = np.random.default_rng(part).normal(scale=0.05, size=shared.shape)
        moved = shared + noise
        rows[: len(shared)] = moved / np.linalg.norm(moved, axis=1, keepdims=True)
        write_embeddings(folder, part, rows, words)
        uids = [part << 24 | row for row in range(NUM_ROWS)]
        images |= dict(zip(uids, rows, strict=True))
        texts |= dict(zip(uids, words, strict=True))
    centroids = unit_rows(NUM_CLUSTERS, seed=7).astype(np.float32) * 0.8
    np.save(folder / "centroids.npy", centroids)
    return images, texts, round_to_grid(centroids)


def _coreset_by_definition(
    images: dict[int, np.ndarray], texts: dict[int, np.ndarray], centroids: np.ndarray, keep: str
) -> set[int]:
    rows = {uid: units(row) for uid, row in images.items()}
    grid = units(centroids)
    place = {uid: nearest(row, grid) for uid, row in rows.items()}
    clip = {uid: dot(rows[uid], units(texts[uid])) for uid in rows}
    kept = set()
    for cluster in range(NUM_CLUSTERS):
        uids = sorted(uid for uid in rows if place[uid][0] == cluster)
        labels = component_of(np.array([rows[uid] for uid in uids]), 0.86) if uids else []
        d2 = [place[uid][1] for uid in uids]
        for label in set(labels):
            members = [at for at, one in enumerate(labels) if one == label]
            kept.add(uids[survivor(members, d2, uids, [clip[uid] for uid in uids], keep)])
    left = band({uid: float(clip[uid]) for uid in kept}, "0.1", "0.8")
    cosine = {uid: centroid_cosine(rows[uid], grid[place[uid][0]]) for uid in left}
    return sample(band(cosine, "0.15", "0.9"), 40, seed=9)


@pytest.mark.parametrize("keep", ["middle", "far", "near", "clip_max"])
def test_the_command_line_gives_the_coreset_of_the_definition(tmp_path: Path, keep: str) -> None:
    images, texts, centroids = _write_world(tmp_path / "world")
    recipe = recipe_for(
        tmp_path / "world",
        "clip_retrieval",
        seed=9,
        cluster={"centroids": str(tmp_path / "world" / "centroids.npy")},
        dedup={"similarity_above": 0.86, "keep": keep},
        select={"clip_band": [0.1, 0.8], "centroid_band": [0.15, 0.9], "num_samples": 40},
    )
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    words = ["run", str(tmp_path / "recipe.yaml"), "--out", str(tmp_path / "run")]
    command = [sys.executable, "-m", "pipelines.cli", *words, "--executor", "local"]
    subprocess.run(command, check=True, cwd=Path(__file__).parents[1])
    coreset = pl.read_parquet(tmp_path / "run" / "coreset.parquet")
    wanted = _coreset_by_definition(images, texts, centroids, keep)
    assert len(wanted) == 40
    assert coreset["uid"].to_list() == sorted(wanted)
    scores = [dot(units(images[uid]), units(texts[uid])) for uid in sorted(wanted)]
    assert [Fraction(score) for score in coreset["clip_score"]] == scores


def test_polars_opens_every_table_of_a_run_by_one_pattern_per_stage(tmp_path: Path) -> None:
    run_here(tar_recipe(tmp_path / "world", num_pairs=200), tmp_path / "run")
    kept_before = None
    for stage, directory in ask.chain_of(str(tmp_path / "run")).items():
        record = directory.record()
        assert record is not None
        folder = "verdicts" if (Path(directory.path) / "verdicts").exists() else "."
        verdicts = pl.read_parquet(f"{directory.path}/{folder}/part-*.parquet")
        assert set(verdicts["stage"]) <= {stage}
        assert verdicts.height == record["rows_in"] == (kept_before or record["rows_in"])
        kept_before = verdicts["keep"].sum()
        tables = sorted(Path(directory.path).rglob("*.parquet"))
        assert sum(pl.read_parquet(path).height for path in tables) >= verdicts.height
