"""The forest stage: the same edges however clusters are cut, and what a cut of them needs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import oracle
import pyarrow.parquet as pq
import pytest
from proof_worlds import embeddings_recipe
from small_inputs import recipe_for, record, rows_of, run_here, stages, unit_rows, write_embeddings

from curate.duplicates import forest_stage, small_clusters
from curate.duplicates.forest_stage import buckets, strongest
from curate.vectors.exact import round_to_grid
from manifests.checks import check
from manifests.work import StageDir

MARGIN, CAP = 0.1, 2


def few_clusters(folder: Path, **dedup: Any) -> dict[str, Any]:
    recipe = embeddings_recipe(folder, num_parts=3, num_rows=120)
    recipe["cluster"] = {"num_clusters": 3, "iterations": 2}
    recipe["dedup"] = {"similarity_above": 0.9, "floor": 0.8} | dedup
    return recipe


def edges_of(forest: StageDir, folder: str = "") -> list[tuple[int, int, float]]:
    found = [tuple(row.values()) for row in rows_of(forest, folder)]
    return sorted(found)  # type: ignore[arg-type]


@pytest.mark.parametrize("dedup", [{}, {"ghost_margin": MARGIN, "ghost_cap": None}])
def test_clusters_cut_into_blocks_give_the_forest_of_whole_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dedup: dict[str, Any]
) -> None:
    recipe = few_clusters(tmp_path / "world", **dedup)
    whole = stages(run_here(recipe, tmp_path / "whole"))
    monkeypatch.setattr(forest_stage, "ROWS_PER_BUCKET", 50)
    monkeypatch.setattr(forest_stage, "BLOCK_ROWS", 40)
    monkeypatch.setattr(small_clusters, "PAIRS_PER_ROW", 1)
    cut = stages(run_here(recipe, tmp_path / "cut"))
    assert len(list(Path(cut["forest"].path, "pieces").glob("*.parquet"))) > 12
    for folder in ("", "cross"):
        assert edges_of(cut["forest"], folder) == edges_of(whole["forest"], folder)
    assert len(edges_of(whole["forest"])) > 50
    assert bool(edges_of(whole["forest"], "cross")) == bool(dedup)
    assert kept_uids(cut["dedup"]) == kept_uids(whole["dedup"])
    assert all(one.holds for one in check(str(tmp_path / "cut"), cut))


def kept_uids(dedup: StageDir) -> list[int]:
    return sorted(row["uid"] for row in rows_of(dedup) if row["keep"])


def test_another_threshold_is_a_cut_that_reads_no_embedding(tmp_path: Path) -> None:
    recipe = few_clusters(tmp_path / "world")
    first = stages(run_here(recipe, tmp_path / "out", until="dedup"))
    for folder in ("rows", "ends"):  # members are read, embeddings are not
        for path in Path(first["cluster"].path, folder).glob("*.npy"):
            np.save(path, np.zeros_like(np.load(path)) if folder == "rows" else np.load(path))
    for threshold, keep in ((0.8, "far"), (0.86, "near"), (0.93, "middle"), (0.95, "clip_max")):
        cut = {"similarity_above": threshold, "keep": keep}
        changed = recipe | {"dedup": cut | {"floor": 0.8}}
        found = stages(run_here(changed, tmp_path / "out", until="dedup"))
        assert found["forest"] == first["forest"]
        alone = stages(run_here(recipe | {"dedup": cut}, tmp_path / "fresh", until="dedup"))
        assert rows_of(found["dedup"]) == rows_of(alone["dedup"])


def ghost_world(folder: Path) -> tuple[dict[int, np.ndarray], np.ndarray]:
    """Write near-duplicates that straddle the borders of given centroids; return rows by uid."""
    shared, found = unit_rows(60, dim=8, seed=1), {}
    for part in range(3):
        noise = np.random.default_rng(part).normal(scale=0.12, size=shared.shape)
        rows = shared + noise
        rows = (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float16)
        write_embeddings(folder, part, rows, unit_rows(60, dim=8, seed=50 + part))
        found |= {part << 24 | at: row for at, row in enumerate(rows)}
    centroids = unit_rows(6, dim=8, seed=9).astype(np.float32) * np.float32(0.8)
    np.save(folder / "centroids.npy", centroids)
    return found, round_to_grid(centroids)


def components_with_ghosts(
    rows: Mapping[int, np.ndarray], centroids: np.ndarray, above: float
) -> tuple[dict[int, int], dict[int, int]]:
    """Return uid -> smallest uid of its component, and uid -> d2 in units, by the definition."""
    from test_ghosts import by_definition

    uids = sorted(rows)
    vectors = np.array([rows[uid] for uid in uids])
    units, grid = oracle.units(vectors), oracle.units(centroids)
    ghosts: dict[int, set[int]] = {at: set() for at in range(len(uids))}
    for at, cluster in by_definition(vectors, centroids, MARGIN, CAP):
        ghosts[at].add(cluster)
    place = [oracle.nearest(row, grid) for row in units]
    similar = units @ units.T > int(above * oracle.UNIT**2)
    label = list(range(len(uids)))
    for i in range(len(uids)):
        for j in range(i + 1, len(uids)):
            a, b = place[i][0], place[j][0]
            meet = a == b or b in ghosts[i] or a in ghosts[j]
            if similar[i, j] and meet and label[i] != label[j]:
                old, new = max(label[i], label[j]), min(label[i], label[j])
                label = [new if one == old else one for one in label]
    named = {uid: uids[one] for uid, one in zip(uids, label, strict=True)}
    return named, {uid: place[at][1] for at, uid in enumerate(uids)}  # type: ignore[misc]


def test_with_ghosts_components_are_global_and_those_of_the_definition(tmp_path: Path) -> None:
    rows, centroids = ghost_world(tmp_path / "world")
    recipe = recipe_for(
        tmp_path / "world",
        "clip_retrieval",
        cluster={"centroids": str(tmp_path / "world" / "centroids.npy")},
        dedup={"similarity_above": 0.9, "floor": 0.7, "ghost_margin": MARGIN, "ghost_cap": CAP},
    )
    chain = stages(run_here(recipe, tmp_path / "out"))
    component, d2 = components_with_ghosts(rows, centroids, 0.9)
    wanted = set()
    for label in set(component.values()):
        members = [uid for uid, one in component.items() if one == label]
        ranked = sorted(members, key=lambda uid: (d2[uid], uid))
        wanted.add(ranked[len(ranked) // 2])
    assert kept_uids(chain["dedup"]) == sorted(wanted)
    plain = recipe | {"dedup": {"similarity_above": 0.9}}
    without = stages(run_here(plain, tmp_path / "out"))
    assert without["centroids"] == chain["centroids"]
    assert len(kept_uids(without["dedup"])) > len(wanted) + 5
    assert record(chain["dedup"])["notes"]["part-00000"]["components"] == len(wanted)


def test_a_dropped_rows_score_is_where_it_parts_from_its_survivor(tmp_path: Path) -> None:
    recipe = few_clusters(tmp_path / "world")
    found = stages(run_here(recipe, tmp_path / "out", until="dedup"))
    verdicts = rows_of(found["dedup"])
    dropped = sorted((row for row in verdicts if not row["keep"]), key=lambda row: row["score"])
    one = dropped[len(dropped) // 2]
    cut = recipe | {"dedup": {"floor": 0.8, "similarity_above": one["score"]}}
    again = stages(run_here(cut, tmp_path / "out", until="dedup"))
    joined = {row["uid"]: row["evidence_uid"] or row["uid"] for row in rows_of(again["dedup"])}
    assert joined[one["uid"]] != joined[one["evidence_uid"]]
    assert all(row["score"] > row["cutoff"] == 0.9 for row in dropped)


def test_kept_rows_are_written_with_what_select_needs(tmp_path: Path) -> None:
    recipe = few_clusters(tmp_path / "world")
    found = stages(run_here(recipe, tmp_path / "out", until="dedup"))
    tables = [pq.read_table(path) for path in found["dedup"].files("kept")]
    uids = [uid for table in tables for uid in table.column("uid").to_pylist()]
    assert sorted(uids) == kept_uids(found["dedup"])
    assert all(
        table.column("uid").to_pylist() == sorted(table.column("uid").to_pylist())
        for table in tables
    )


def test_buckets_hold_every_cluster_once_and_cut_only_what_is_too_large(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(forest_stage, "ROWS_PER_BUCKET", 100)
    monkeypatch.setattr(forest_stage, "BLOCK_ROWS", 60)
    sizes = np.array([[10, 0], [80, 30], [0, 0], [500, 90], [5, 5], [100, 0], [0, 0]])
    found = buckets(sizes)
    runs = [(one.first, one.end, one.num_blocks) for one in found]
    assert runs == [
        (0, 1, (0, 0)),
        (1, 2, (2, 1)),
        (2, 3, (0, 0)),
        (3, 4, (9, 2)),
        (4, 6, (0, 0)),
        (6, 7, (0, 0)),
    ]
    assert buckets(np.zeros((0, 2), np.int64)) == []


def test_the_strongest_edges_of_overlapping_forests_are_one_forest() -> None:
    a = np.array([1, 1, 5, 1, 1], np.uint64)
    b = np.array([5, 9, 9, 5, 9], np.uint64)
    similarity = np.array([0.9, 0.8, 0.95, 0.9, 0.8])
    found = strongest((a, b, similarity))
    assert [one.tolist() for one in found] == [[1, 5], [5, 9], [0.9, 0.95]]
