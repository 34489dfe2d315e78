"""`warren whatif` says what a run with those settings then does, and changes nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner
from proof_worlds import embeddings_recipe
from small_inputs import record, rows_of, run_here, snapshot, stages

from manifests.errors import UserError
from pipelines.cli import main
from pipelines.whatif import whatif


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    """Return a recipe with a floor and the directory of its run."""
    folder = tmp_path_factory.mktemp("whatif")
    recipe = embeddings_recipe(folder / "world", num_parts=3, num_rows=120)
    recipe["cluster"] = {"num_clusters": 6, "iterations": 3}
    recipe["dedup"] = {"similarity_above": 0.9, "floor": 0.8}
    run_here(recipe, folder / "out")
    return recipe, folder / "out"


def test_its_answer_is_what_such_a_run_keeps(
    made: tuple[dict[str, Any], Path], tmp_path: Path
) -> None:
    recipe, out = made
    before = snapshot(out)
    settings = ["dedup.similarity_above=0.82", "dedup.keep=far", "select.num_samples=70"]
    answer = {row["stage"]: row for row in whatif(str(out), settings)}
    assert snapshot(out) == before
    changed = recipe | {
        "dedup": {"similarity_above": 0.82, "floor": 0.8, "keep": "far"},
        "select": recipe["select"] | {"num_samples": 70},
    }
    truth = stages(run_here(changed, tmp_path / "out"))
    now = stages(run_here(recipe, out))
    for name, directory in truth.items():
        found = record(directory)
        assert (answer[name]["kept"], answer[name]["dropped"]) == (found["kept"], found["dropped"])
        assert answer[name]["kept_now"] == record(now[name])["kept"]
    assert answer["select"]["kept"] == 70
    for name in ("dedup", "select"):
        old, new = ({r["uid"] for r in rows_of(d[name]) if r["keep"]} for d in (now, truth))
        assert answer[name]["shared"] == len(old & new)
    assert [name for name, row in answer.items() if not row["is_finished"]] == ["dedup", "select"]


def test_below_the_floor_and_other_clusters_it_says_what_would_have_to_run(
    made: tuple[dict[str, Any], Path],
) -> None:
    out = str(made[1])
    for setting, stage in (
        ("dedup.floor=0.7", "forest"),
        ("dedup.ghost_margin=0.04", "cluster"),
        ("cluster.iterations=4", "centroids"),
        ("filter.min_caption_chars=9", "filter"),
    ):
        with pytest.raises(UserError, match=f"The {stage} stage of these settings is not there"):
            whatif(out, [setting])
    with pytest.raises(UserError, match=r"floor 0\.8 is above similarity_above 0\.7"):
        whatif(out, ["dedup.similarity_above=0.7"])
    with pytest.raises(UserError, match="no run directory"):
        whatif(out + "/nowhere", [])


def test_the_command_prints_a_table_and_json_from_any_folder(
    made: tuple[dict[str, Any], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(made[1].parent)
    words = ["whatif", made[1].name, "--set", "dedup.similarity_above=0.95"]
    table = CliRunner().invoke(main, words)
    assert table.exit_code == 0
    assert table.output.count("as it is") == 5
    answer = CliRunner().invoke(main, [*words, "--json"])
    rows = json.loads(answer.stdout)
    assert [row["stage"] for row in rows][-2:] == ["dedup", "select"]


def test_a_recipe_whose_floor_is_above_the_threshold_is_refused(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(
        yaml.safe_dump(
            {
                "source": {"kind": "clip_retrieval", "path": "x"},
                "cluster": {"num_clusters": "auto"},
                "dedup": {"floor": 0.9},
            }
        )
    )
    answer = CliRunner().invoke(main, ["plan", str(tmp_path / "r.yaml")])
    assert answer.exit_code == 2
