"""The select stage, part by part, writes what `select` decides with all rows in memory."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow.parquet as pq
import pytest
from small_inputs import (
    good_tars,
    recipe_for,
    record,
    rows_of,
    run_here,
    stages,
    unit_rows,
    write_embeddings,
)

from curate.duplicates import forest_stage
from curate.rows.select import SELECT_REASONS, Selectable, select
from manifests import checks, lineage, store
from manifests.errors import PartDamaged
from manifests.schemas import CORESET, SELECTABLE
from manifests.work import StageDir, View

CASES = {
    "paper": {"clip_band": [0.1, 0.9], "centroid_band": [0.15, 0.85], "num_samples": 40},
    "top_clip": {"centroid_band": [0.0, 0.7], "num_samples": 33, "policy": "top_clip"},
    "balanced": {"clip_band": [0.05, 0.95], "num_samples": 50, "policy": "balanced"},
    "none wanted": {"num_samples": 0, "policy": "balanced"},
    "an empty band": {"clip_band": [0.5, 0.501]},
    "everything": {},
}


def tied_world(folder: Path) -> Path:
    """Write 4 parts of 50 rows that are copies of 30 images and 6 texts: keys tie everywhere."""
    rng = np.random.default_rng(0)
    images, texts = unit_rows(30, seed=1), unit_rows(6, seed=2)
    for part in range(4):
        write_embeddings(
            folder, part, images[rng.integers(30, size=50)], texts[rng.integers(6, size=50)]
        )
    return folder


def recipe(folder: Path, case: Mapping[str, Any], *, has_dedup: bool) -> dict[str, Any]:
    dedup = {"dedup": {"similarity_above": 0.999, "keep": "far"}} if has_dedup else {}
    source = {"kind": "clip_retrieval", "path": str(folder), "shards_per_part": 1}
    return {
        "source": source,
        "seed": 4,
        "cluster": {"num_clusters": 6, "min_rows_per_centroid": 1},
        **dedup,
        "select": case,
    }


def all_rows(chain: Mapping[str, StageDir]) -> Selectable:
    """Return what the stage before select kept, joined from the tables of all parts at once."""
    before = list(chain)[list(chain).index("select") - 1]
    verdicts = rows_of(chain[before], "verdicts") or rows_of(chain[before])
    kept = pl.DataFrame({"uid": [row["uid"] for row in verdicts if row["keep"]]})
    samples = pl.concat(pl.read_parquet(path) for path in chain["ingest"].files())
    clusters = pl.concat(pl.read_parquet(path) for path in chain["cluster"].files())
    found = (
        kept.cast(pl.UInt64)
        .join(samples.select("uid", "clip_score"), on="uid")
        .join(clusters, on="uid")
    )
    assert found.height == kept.height
    names = ("uid", "clip_score", "centroid_cosine", "cluster")
    return Selectable(*(found[name].to_numpy() for name in names))


def wanted(rows: Selectable, case: Mapping[str, Any]) -> dict[int, tuple[Any, ...]]:
    """Return each row's verdict by the function that holds all rows."""
    usual = {"clip_band": None, "centroid_band": None, "num_samples": None, "seed": 4}
    fate = select(rows, **(usual | dict(case)))
    reasons = [SELECT_REASONS[code] for code in fate.reason]
    figures = ([None if np.isnan(v) else v for v in one] for one in (fate.score, fate.cutoff))
    return dict(zip(rows.uid.tolist(), zip(reasons, *figures, strict=True), strict=True))


def verdicts(chain: Mapping[str, StageDir]) -> dict[int, tuple[Any, ...]]:
    found = rows_of(chain["select"])
    assert all(row["keep"] == (row["reason"] == "") for row in found)
    by_uid = {row["uid"]: (row["reason"], row["score"], row["cutoff"]) for row in found}
    assert len(by_uid) == len(found)
    return by_uid


def assert_coreset(out: Path, chain: Mapping[str, StageDir], kept: list[int]) -> None:
    """Check every column of the coreset against the tables it comes from."""
    coreset = pq.read_table(out / "coreset.parquet")
    assert coreset.schema.equals(CORESET)
    assert coreset.column("uid").to_pylist() == sorted(kept)
    rows = all_rows(chain)
    figures = pl.DataFrame({name: getattr(rows, name) for name in SELECTABLE.names})
    samples = pl.concat(pl.read_parquet(path) for path in chain["ingest"].files())
    truth = figures.filter(pl.col("uid").is_in(kept)).join(
        samples.select("uid", "key", "shard", "caption"), on="uid"
    )
    assert pl.DataFrame(coreset).equals(truth.sort("uid").select(coreset.column_names))


@pytest.mark.parametrize("has_dedup", [False, True], ids=["after cluster", "after dedup"])
@pytest.mark.parametrize("name", CASES)
def test_verdicts_and_coreset_are_those_of_select_in_memory(
    tmp_path: Path, name: str, has_dedup: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(forest_stage, "ROWS_PER_BUCKET", 20)
    monkeypatch.setattr(store, "ROW_GROUP_ROWS", 7)
    out = tmp_path / "out"
    world = tied_world(tmp_path / "in")
    chain = stages(run_here(recipe(world, CASES[name], has_dedup=has_dedup), out))
    assert len(chain["select"].files()) > 3
    truth = wanted(all_rows(chain), CASES[name])
    assert verdicts(chain) == truth
    assert_coreset(out, chain, [uid for uid, verdict in truth.items() if not verdict[0]])
    cutoffs = {reason: cutoff for reason, _, cutoff in truth.values() if cutoff is not None}
    assert record(chain["select"])["notes"] == ({"cuts": cutoffs} if cutoffs else {})
    assert [one for one in checks.check(str(out), chain) if not one.holds] == []


def test_the_cuts_are_written_with_how_many_rows_each_step_kept(tmp_path: Path) -> None:
    values = recipe(tied_world(tmp_path / "in"), CASES["paper"], has_dedup=False)
    directory = stages(run_here(values, tmp_path / "out"))["select"]
    cuts = json.loads((Path(directory.path) / "cuts.json").read_text())
    steps = [cuts[name] for name in ("clip_band", "centroid_band", "sample")]
    counts = [[one[f"num_{side}"] for side in ("above", "kept", "below")] for one in steps]
    assert counts == [[20, 160, 20], [24, 112, 24], [0, 40, 72]]
    assert record(directory)["kept"] == 40


def test_dedup_writes_what_select_reads_of_each_kept_row(tmp_path: Path) -> None:
    values = recipe(tied_world(tmp_path / "in"), {}, has_dedup=True)
    chain = stages(run_here(values, tmp_path / "out"))
    rows = all_rows(chain)
    kept = pl.concat(pl.read_parquet(path) for path in chain["dedup"].files("kept"))
    assert all(pq.read_schema(path).equals(SELECTABLE) for path in chain["dedup"].files("kept"))
    truth = pl.DataFrame({name: getattr(rows, name) for name in SELECTABLE.names})
    assert kept.sort("uid").equals(truth.sort("uid"))


def test_rows_without_embeddings_can_be_sampled_and_their_figures_are_null(tmp_path: Path) -> None:
    values = recipe_for(good_tars(tmp_path / "in"), "webdataset", select={"num_samples": 5})
    chain = stages(run_here(values, tmp_path / "out"))
    coreset = rows_of(StageDir("select", chain["select"].path), "kept")
    assert len(coreset) == 5
    assert {(r["clip_score"], r["cluster"], r["centroid_cosine"]) for r in coreset} == {
        (None, None, None)
    }
    assert pq.read_table(tmp_path / "out" / "coreset.parquet").num_rows == 5


def test_a_dropped_row_says_why_in_its_part(tmp_path: Path) -> None:
    values = recipe(tied_world(tmp_path / "in"), CASES["paper"], has_dedup=True)
    chain = stages(run_here(values, tmp_path / "out"))
    uid, (reason, score, cutoff) = next(
        (uid, verdict) for uid, verdict in verdicts(chain).items() if verdict[2] is not None
    )
    (story,) = lineage.why(chain, str(uid))
    assert story.fate == f"dropped by select: {reason}"
    assert story.steps[-1].facts == {"score": score, "cutoff": cutoff}


def test_a_part_without_a_kept_row_s_figures_is_damaged(tmp_path: Path) -> None:
    values = recipe(tied_world(tmp_path / "in"), {}, has_dedup=False)
    (*_, link) = run_here(values, tmp_path / "out")
    path = link.view.before["cluster"].files()[2]
    pq.write_table(pq.read_table(path).slice(1), path)
    view: View = link.view
    (item,) = (
        one for one in link.stage.plan(link.stage.phases[1], view) if one.payload["part"] == 2
    )
    with pytest.raises(PartDamaged, match="was kept, but the tables of its part do not have it"):
        link.stage.work(link.stage.phases[1], view, item)
