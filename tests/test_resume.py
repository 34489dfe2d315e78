"""Runs that were cut, damaged, failed or interrupted, and how they go on."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from small_inputs import (
    contents,
    embeddings,
    events,
    good_tars,
    pair,
    recipe_for,
    record,
    run_here,
    snapshot,
    stages,
    unit_rows,
    write_tars,
)

from manifests import store
from manifests.errors import PartDamaged, StageFailed, UserError
from manifests.record import read_latest
from pipelines import ask

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.fixture
def tars(tmp_path: Path) -> Path:
    return good_tars(tmp_path / "in", num_shards=4, num_pairs=3)


# ---- what is left of a stage


def test_a_stage_directory_without_its_record_is_gone_on_with(tmp_path: Path, tars: Path) -> None:
    recipe = recipe_for(tars, "webdataset")
    directory = Path(stages(run_here(recipe, tmp_path / "out"))["ingest"].path)
    whole = contents(tmp_path / "out")
    (directory / "record.json").unlink()
    (directory / "_done" / "part-00001.json").unlink()
    (directory / "part-00002.parquet").write_bytes(b"cut")
    (directory / ".part-00001.parquet.0123456789ab.tmp").write_bytes(b"left by a kill")
    (tmp_path / "out" / ".latest.json.0123456789ab.tmp").write_bytes(b"")
    before = snapshot(tmp_path / "out")
    run_here(recipe, tmp_path / "out")
    assert contents(tmp_path / "out") == whole
    assert not list((tmp_path / "out").rglob("*.tmp"))
    redone = {
        name for name, stamp in snapshot(tmp_path / "out").items() if before.get(name) != stamp
    }
    parts = {name.split("/", 1)[1] for name in redone if "part-" in name}
    assert {name.rsplit("/", 1)[-1].split(".")[0] for name in parts} == {"part-00001", "part-00002"}


def test_a_marker_of_another_payload_is_not_believed(tmp_path: Path, tars: Path) -> None:
    recipe = recipe_for(tars, "webdataset")
    directory = stages(run_here(recipe, tmp_path / "out"))["ingest"]
    marker = directory.markers()[0]
    (Path(directory.path) / "record.json").unlink()
    store.write_json(directory.path, "_done/part-00000.json", marker | {"payload": {"part": 5}})
    run_here(recipe, tmp_path / "out")
    assert directory.markers()[0]["payload"] == marker["payload"]


# ---- damage


def test_a_finished_stage_that_lost_a_file_stops_the_run(tmp_path: Path, tars: Path) -> None:
    recipe = recipe_for(tars, "webdataset", filter={})
    chain = stages(run_here(recipe, tmp_path / "out"))
    part = Path(chain["ingest"].files()[2])
    content = part.read_bytes()
    marker = Path(chain["ingest"].path) / "_done" / "part-00002.json"
    for harm in (part.unlink, lambda: part.write_bytes(content[:-1]), marker.unlink):
        harm()
        with pytest.raises(PartDamaged, match="is missing or cut"):
            run_here(recipe, tmp_path / "out")
        part.write_bytes(content)
    shutil.rmtree(chain["ingest"].path)
    assert stages(run_here(recipe, tmp_path / "out")) == chain


def test_a_directory_with_the_record_of_another_fingerprint_is_not_reused(
    tmp_path: Path, tars: Path
) -> None:
    recipe = recipe_for(tars, "webdataset")
    directory = stages(run_here(recipe, tmp_path / "out"))["ingest"]
    store.write_json(directory.path, "record.json", record(directory) | {"fingerprint": "f" * 64})
    with pytest.raises(PartDamaged, match="another fingerprint"):
        run_here(recipe, tmp_path / "out")


# ---- failures


def break_items(tmp_path: Path) -> tuple[dict[str, Any], Path]:
    """Return a recipe whose filter fails on one part, whose table was overwritten with zeros."""
    tars = good_tars(tmp_path / "in", num_shards=3, num_pairs=3)
    recipe = recipe_for(tars, "webdataset", filter={"min_caption_words": 2})
    directory = stages(run_here(recipe, tmp_path / "out", until="ingest"))["ingest"]
    part = Path(directory.files()[1])
    part.rename(part.with_suffix(".kept"))
    part.write_bytes(bytes(part.with_suffix(".kept").stat().st_size))
    return recipe, part


def test_a_failed_item_fails_the_stage_after_the_others_and_the_next_run_does_only_it(
    tmp_path: Path,
) -> None:
    recipe, part = break_items(tmp_path)
    with pytest.raises(StageFailed, match="filter: 1 of 3 items failed") as caught:
        run_here(recipe, tmp_path / "out")
    assert "part-00001: PartDamaged" in str(caught.value)
    assert "tried 3 times" in str(caught.value)
    filtered = next((tmp_path / "out").glob("filter-*"))
    assert not (filtered / "record.json").exists()
    assert sorted(path.name for path in filtered.glob("part-*")) == [
        "part-00000.parquet",
        "part-00002.parquet",
    ]
    assert list(read_latest(str(tmp_path / "out"))) == ["ingest"]
    failed = [event for event in events(tmp_path / "out") if event["event"] == "item_failed"]
    assert [event["item"] for event in failed] == ["part-00001"]
    assert "Traceback" in failed[0]["traceback"]
    assert "cannot be read" in failed[0]["traceback"]
    assert events(tmp_path / "out")[-1]["event"] == "stage_failed"
    before = snapshot(tmp_path / "out")
    part.with_suffix(".kept").rename(part)
    chain = stages(run_here(recipe, tmp_path / "out"))
    assert record(chain["filter"])["kept"] == 9
    after = snapshot(tmp_path / "out")
    assert all(
        after[name] == stamp
        for name, stamp in before.items()
        if "/part-" in name and "filter" in name
    )


def test_too_many_quarantined_rows_fail_the_stage_and_a_higher_limit_reuses_all_parts(
    tmp_path: Path,
) -> None:
    shards = {f"{n}.tar": [*pair("good"), ("bad.jpg", b""), ("bad.txt", b"x")] for n in range(3)}
    recipe = recipe_for(write_tars(tmp_path / "in", shards), "webdataset", filter={})
    with pytest.raises(StageFailed, match="3 of 6 rows are quarantined(.|\n)*'empty_image': 3"):
        run_here(recipe, tmp_path / "out")
    before = snapshot(tmp_path / "out")
    assert len([name for name in before if "quarantine/" in name]) == 3
    assert list(read_latest(str(tmp_path / "out"))) == []
    chain = stages(run_here(recipe | {"max_quarantine_fraction": 0.5}, tmp_path / "out"))
    after = snapshot(tmp_path / "out")
    assert all(after[name] == stamp for name, stamp in before.items() if "part-" in name)
    assert record(chain["ingest"])["quarantined"] == {"empty_image": 3}


def test_an_error_of_the_user_in_the_middle_leaves_a_run_that_goes_on(tmp_path: Path) -> None:
    folder = embeddings(tmp_path / "in")
    np.save(tmp_path / "c.npy", unit_rows(4, dim=8).astype(np.float32))
    recipe = recipe_for(folder, "clip_retrieval", cluster={"centroids": str(tmp_path / "c.npy")})
    with pytest.raises(UserError, match="centroids have 8 columns"):
        run_here(recipe, tmp_path / "out")
    last = events(tmp_path / "out")[-1]
    assert (last["event"], last["stage"], last["error"]) == ("stage_failed", "cluster", "UserError")
    np.save(tmp_path / "c.npy", unit_rows(4).astype(np.float32))
    assert record(stages(run_here(recipe, tmp_path / "out"))["cluster"])["kept"] == 120


# ---- interruption


SLOW_RUN = """
import sys, time
from pathlib import Path
import yaml
from manifests import work
from pipelines.executors import LocalExecutor
from pipelines.progress import Progress
from pipelines.recipe import load
from pipelines.run import run
class Slow(Progress):
    def item_done(self, stage, marker):
        super().item_done(stage, marker)
        print("done", flush=True)
        time.sleep(0.2)
recipe, out = load(sys.argv[1]), sys.argv[2]
run(recipe, out, executor=LocalExecutor(), progress=Slow(out))
"""


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_an_interrupted_run_goes_on_to_the_same_bytes(
    tmp_path: Path, tars: Path, stop: signal.Signals
) -> None:
    recipe = recipe_for(tars, "webdataset", filter={"min_caption_words": 2})
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(recipe))
    run_here(recipe, tmp_path / "whole")
    command = [sys.executable, "-c", SLOW_RUN, str(tmp_path / "r.yaml"), str(tmp_path / "out")]
    with subprocess.Popen(
        command, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as process:
        assert process.stdout is not None
        for _ in range(6):  # four parts of ingest, two of filter
            process.stdout.readline()
        process.send_signal(stop)
        assert process.wait(timeout=30) != 0
    states = {one.stage: one.state for one in ask.status(str(tmp_path / "out"))}
    assert states == {"ingest": "finished", "filter": "unfinished"}
    run_here(recipe, tmp_path / "out")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert not list((tmp_path / "out").rglob("*.tmp"))
