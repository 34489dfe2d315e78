"""Accounts and records: verdicts, tallies, fingerprints, what a finished stage tells."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from small_inputs import chain_with_losses, embeddings, good_tars, recipe_for, unit_rows

from curate.source_config import SourceConfig
from manifests import ledger, paths, record
from manifests.errors import StageFailed
from manifests.ledger import Tally
from manifests.schemas import VERDICTS, conform, empty
from manifests.work import StageDir
from pipelines.chain import build
from pipelines.recipe import parse

# ---- ledger and accounts


def verdicts_of(*reasons: str) -> pa.Table:
    return ledger.verdicts(
        "filter", np.arange(len(reasons), dtype=np.uint64), reasons=list(reasons)
    )


def test_a_tally_counts_each_fate_and_adds_up() -> None:
    table = verdicts_of(
        "", "small", "", "quarantine:bad_json", "small", "quarantine:empty_image", ""
    )
    counts = ledger.tally(table)
    assert counts == Tally(7, 3, {"small": 2}, {"bad_json": 1, "empty_image": 1})
    assert (counts.num_dropped, counts.num_quarantined, counts.adds_up) == (2, 2, True)
    assert counts + counts == ledger.tally(pa.concat_tables([table, table]))
    assert Tally.from_json(json.loads(json.dumps(counts.as_json()))) == counts
    assert ledger.tally(empty(VERDICTS)) == Tally()
    assert ledger.kept_uids(table).tolist() == [0, 2, 6]


def test_verdicts_hold_scores_only_where_there_is_one() -> None:
    table = ledger.verdicts(
        "dedup",
        np.array([1, 2], np.uint64),
        reasons=np.array(["", "near_duplicate"], object),
        scores=np.array([np.nan, 0.9]),
        cutoffs=np.array([np.nan, 0.86]),
        evidence=pa.array([None, 1], pa.uint64()),
    )
    assert table.schema.equals(VERDICTS)
    assert table.column("score").to_pylist() == [None, 0.9]
    assert table.column("evidence_uid").to_pylist() == [None, 1]
    assert table.column("keep").to_pylist() == [True, False]


def test_conform_refuses_what_is_not_in_the_schema() -> None:
    good = verdicts_of("")
    assert conform(good.drop_columns(["score"]), VERDICTS).column("score").null_count == 1
    with pytest.raises(ValueError, match="not in the schema"):
        conform(good.append_column("more", [[1]]), VERDICTS)
    with pytest.raises(ValueError, match="uid is missing"):
        conform(good.drop_columns(["uid"]), VERDICTS)
    with pytest.raises(ValueError, match="holds 1 nulls"):
        conform(good.set_column(0, "uid", pa.nulls(1, pa.uint64())), VERDICTS)


def test_accounts_that_do_not_add_up_or_lose_too_much_fail_the_stage() -> None:
    def check(counts: Tally, rows_in: int | None, limit: float) -> None:
        record.check_accounts("filter", counts, rows_in=rows_in, max_quarantine=limit)

    check(Tally(10, 8, {"a": 1}, {"b": 1}), 10, 0.1)
    check(Tally(), None, 0.0)
    with pytest.raises(StageFailed, match="do not add up"):
        check(Tally(10, 8, {"a": 1}, {}), 10, 1)
    with pytest.raises(StageFailed, match="11 rows expected, 10 judged"):
        check(Tally(10, 10), 11, 1)
    with pytest.raises(StageFailed, match="2 of 10 rows are quarantined"):
        check(Tally(10, 8, {}, {"b": 2}), 10, 0.19)


# ---- fingerprints


def marks(values: dict[str, Any]) -> dict[str, str]:
    return {link.stage.name: link.mark for link in build(parse(values), "out")}


def changed(before: dict[str, str], after: dict[str, str]) -> list[str]:
    return [name for name in before if before[name] != after[name]]


FOUR = {"num_clusters": 4, "min_rows_per_centroid": 1}


def test_a_fingerprint_depends_on_what_decides_the_result_and_on_nothing_else(
    tmp_path: Path,
) -> None:
    folder = embeddings(tmp_path / "in")
    base = recipe_for(folder, "clip_retrieval", filter={}, cluster=FOUR)
    first = marks(base)
    assert marks(base | {"filter": {"min_side": 0}}) == first, "a default written out"
    assert marks(base | {"max_quarantine_fraction": 1.0}) == first
    assert changed(first, marks(base | {"filter": {"min_side": 1}})) == [
        "filter",
        "centroids",
        "cluster",
    ]
    assert changed(first, marks(base | {"seed": 1})) == ["centroids", "cluster"], (
        "ingest and filter draw nothing"
    )
    assert changed(first, marks(base | {"cluster": FOUR | {"num_clusters": 5}})) == [
        "centroids",
        "cluster",
    ]
    assert len(set(first.values())) == 4


def test_each_key_of_dedup_makes_anew_only_the_stages_that_it_decides(tmp_path: Path) -> None:
    folder = embeddings(tmp_path / "in")
    base = recipe_for(folder, "clip_retrieval", cluster=FOUR, dedup={"floor": 0.8})
    first = marks(base)
    cases = {
        "dedup": [{"similarity_above": 0.9}, {"keep": "far"}],
        "forest dedup": [{"floor": 0.85}],
        "cluster forest dedup": [{"ghost_margin": 0.04}],
    }
    for stages_anew, keys in cases.items():
        for key in keys:
            made = marks(base | {"dedup": {"floor": 0.8} | key})
            assert changed(first, made) == stages_anew.split()
    assert changed(first, marks(base | {"dedup": {"floor": 0.8, "ghost_cap": 1}})) == ["dedup"]


def test_a_moved_source_is_the_same_and_a_changed_file_is_not(tmp_path: Path) -> None:
    for kind, folder in (
        ("webdataset", good_tars(tmp_path / "tars")),
        ("clip_retrieval", embeddings(tmp_path / "emb")),
    ):
        first = marks(recipe_for(folder, kind))
        moved = folder.rename(folder.with_name("moved" + folder.name))
        assert marks(recipe_for(moved, kind)) == first
        victim = next(path for path in moved.rglob("*") if path.is_file())
        stamp = victim.stat()
        os.utime(victim, ns=(stamp.st_atime_ns, stamp.st_mtime_ns + 1_000_000))
        assert marks(recipe_for(moved, kind)) != first
        os.utime(victim, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
        assert marks(recipe_for(moved, kind)) == first


def test_metadata_that_appear_beside_a_shard_are_another_input(tmp_path: Path) -> None:
    folder = good_tars(tmp_path / "in")
    first = marks(recipe_for(folder, "img2dataset"))
    pq.write_table(pa.table({"key": ["a"]}), folder / "00001.parquet")
    assert marks(recipe_for(folder, "img2dataset")) != first


def test_given_centroids_are_known_by_their_content(tmp_path: Path) -> None:
    folder = embeddings(tmp_path / "in")

    def with_centroids(name: str, rows: Any) -> dict[str, str]:
        np.save(tmp_path / name, rows)
        cluster = {"centroids": str(tmp_path / name)}
        return marks(recipe_for(folder, "clip_retrieval", cluster=cluster))

    first = with_centroids("a.npy", unit_rows(4).astype(np.float32))
    assert with_centroids("b.npy", unit_rows(4).astype(np.float64)) == first
    assert with_centroids("a.npy", unit_rows(4, seed=1)) != first


# ---- records


@pytest.fixture
def chain(tmp_path: Path) -> dict[str, StageDir]:
    return chain_with_losses(tmp_path)


def test_a_record_says_what_went_in_what_came_out_and_what_made_it(
    chain: dict[str, StageDir],
) -> None:
    found = chain["filter"].record()
    assert found is not None
    assert (found["stage"], found["rows_in"], found["kept"]) == ("filter", 5, 4)
    assert found["dropped"] == {"caption_words_below": 1}
    assert found["config"]["min_caption_words"] == 2
    assert found["inputs"] == {"ingest": chain["ingest"].record()["fingerprint"]}  # type: ignore[index]
    assert [part["item"] for part in found["parts"]] == ["part-00000", "part-00001", "part-00002"]
    assert found["versions"]["pyarrow"] == pa.__version__
    assert re.fullmatch(r"filter-[0-9a-f]{8}", paths.name_of(chain["filter"].path))


def test_canonical_json_is_one_text_per_value() -> None:
    assert record.canonical_json({"b": 1, "a": [1.5, "\u00e9"]}) == '{"a":[1.5,"\\u00e9"],"b":1}'
    with pytest.raises(ValueError, match="Out of range"):
        record.canonical_json(float("nan"))


def test_every_source_config_says_what_is_a_location() -> None:
    config = SourceConfig(kind="webdataset", path="a")
    assert "path" not in config.canonical()
