"""Runs: what is reused, done again, fails and goes on; the commands that tell about a run."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import chdir
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml
from click.testing import CliRunner, Result
from small_inputs import (
    embeddings,
    good_tars,
    pair,
    recipe_for,
    run_here,
    stages,
    unit_rows,
    write_embeddings,
    write_tars,
)

from manifests import store
from manifests.errors import PartDamaged, StageFailed, UserError
from manifests.ledger import Tally
from manifests.record import read_latest
from manifests.work import Item, StageDir
from pipelines import ask
from pipelines.chain import build
from pipelines.cli import main
from pipelines.executors import Failed, LocalExecutor, Resources
from pipelines.progress import Progress
from pipelines.recipe import parse
from pipelines.run import run

REPOSITORY = Path(__file__).resolve().parent.parent


def snapshot(folder: Path) -> dict[str, int]:
    """Return path -> modification time of every file in the stages' directories."""
    files = (path for path in folder.glob("*-*/**/*") if path.is_file())
    return {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in files}


def contents(folder: Path) -> dict[str, bytes]:
    """Return path -> bytes of every table of a run."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*.parquet")}


def events(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "events.jsonl").read_text().splitlines()]


def record(directory: StageDir) -> dict[str, Any]:
    found = directory.record()
    assert found is not None
    return found


@pytest.fixture
def tars(tmp_path: Path) -> Path:
    return good_tars(tmp_path / "in", num_shards=4, num_pairs=3)


# ---- reuse


def test_the_same_recipe_again_does_nothing_anew(tmp_path: Path, tars: Path) -> None:
    recipe = recipe_for(tars, "webdataset", filter={"min_caption_words": 2})
    first = run_here(recipe, tmp_path / "out")
    before = snapshot(tmp_path / "out")
    again = run_here(recipe, tmp_path / "out")
    assert [link.directory for link in again] == [link.directory for link in first]
    assert snapshot(tmp_path / "out") == before
    assert [e["event"] for e in events(tmp_path / "out")][-2:] == ["stage_reused"] * 2


def test_a_changed_config_makes_a_new_directory_and_shares_everything_before_it(
    tmp_path: Path,
) -> None:
    folder = embeddings(tmp_path / "in")
    recipe = recipe_for(folder, "clip_retrieval", filter={}, cluster={"num_clusters": 4})
    first = stages(run_here(recipe, tmp_path / "out"))
    before = snapshot(tmp_path / "out")
    other = stages(run_here(recipe | {"filter": {"min_caption_chars": 1}}, tmp_path / "out"))
    assert first["ingest"] == other["ingest"]
    assert first["filter"] != other["filter"]
    assert first["cluster"] != other["cluster"]
    assert before.items() <= snapshot(tmp_path / "out").items(), "nothing finished was touched"
    assert stages(run_here(recipe, tmp_path / "out")) == first


def test_a_stage_can_be_run_alone_on_what_the_stage_before_made(tmp_path: Path, tars: Path) -> None:
    recipe = recipe_for(tars, "webdataset", filter={"min_side": 1})
    assert list(stages(run_here(recipe, tmp_path / "out", until="ingest"))) == ["ingest"]
    before = snapshot(tmp_path / "out")
    assert list(stages(run_here(recipe, tmp_path / "out"))) == ["ingest", "filter"]
    assert before.items() <= snapshot(tmp_path / "out").items()
    with pytest.raises(UserError, match="no stage 'cluster'"):
        run_here(recipe, tmp_path / "out", until="cluster")


class ElsewhereExecutor(LocalExecutor):
    """Works in another folder than the driver, as the workers of a cluster may."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self._folder = folder

    def map(
        self,
        make_worker: Callable[[], Callable[[Any], Any]],
        items: Sequence[Any],
        resources: Resources,
    ) -> Iterator[Any]:
        def make() -> Callable[[Any], Any]:
            work = make_worker()

            def elsewhere(item: Any) -> Any:
                with chdir(self._folder):
                    return work(item)

            return elsewhere

        return super().map(make, items, resources)


@pytest.mark.parametrize("kind", ["webdataset", "clip_retrieval"])
def test_relative_paths_mean_the_same_to_a_worker_in_another_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    (embeddings if kind == "clip_retrieval" else good_tars)(tmp_path / "in")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    values = recipe_for("in", kind, filter={})
    if kind == "clip_retrieval":
        np.save("c.npy", unit_rows(4))
        values["cluster"] = {"centroids": "c.npy"}
    workers = ElsewhereExecutor(tmp_path / "elsewhere")
    links = run(parse(values), "out", executor=workers, progress=Progress("out"))
    assert all(record(link.directory)["kept"] for link in links)
    assert not list((tmp_path / "elsewhere").iterdir())
    assert yaml.safe_load((tmp_path / "out" / "recipe.yaml").read_text())["source"]["path"] == "in"
    assert [one.state for one in ask.status("out")] == ["finished"] * len(links)


def test_two_runs_of_one_recipe_write_the_same_bytes(tmp_path: Path, tars: Path) -> None:
    recipe = recipe_for(tars, "webdataset", filter={"min_caption_words": 9})
    for name in ("a", "b"):
        run_here(recipe, tmp_path / name)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


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


def test_items_run_costliest_first(tmp_path: Path) -> None:
    sizes = [2, 9, 1, 5]
    shards = {
        f"{n}.tar": [m for row in range(size) for m in pair(f"{n}-{row}")]
        for n, size in enumerate(sizes)
    }
    run_here(recipe_for(write_tars(tmp_path / "in", shards), "webdataset"), tmp_path / "out")
    done = [event["item"] for event in events(tmp_path / "out") if event["event"] == "item_done"]
    assert done == ["part-00001", "part-00003", "part-00000", "part-00002"]


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


# ---- clusters


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
        folder, "clip_retrieval", filter={"max_caption_chars": 19}, cluster={"num_clusters": 9}
    )
    chain = stages(run_here(recipe, tmp_path / "out"))
    uids = pq.read_table(chain["cluster"].files()[0]).column("uid").to_pylist()
    assert uids == [0, 1, 2, 4, 5, 6, 7, 8, 9]
    assert record(chain["cluster"])["notes"]["centroids"] == {"clusters": 9, "training_rows": 9}


def test_more_clusters_than_rows_and_no_rows_at_all_are_user_errors(tmp_path: Path) -> None:
    folder = write_embeddings(tmp_path / "in", 0, unit_rows(5))
    recipe = recipe_for(folder, "clip_retrieval", filter={}, cluster={"num_clusters": 6})
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
    both = recipe | {"cluster": {"centroids": str(path), "num_clusters": 5}}
    with pytest.raises(UserError, match="num_clusters is 5, but"):
        run_here(both, tmp_path / "out")
    folder_instead = recipe | {"cluster": {"centroids": str(tmp_path)}}
    with pytest.raises(UserError, match="cannot be read"):
        run_here(folder_instead, tmp_path / "out")


# ---- lock, latest, interruption


def test_a_second_run_in_the_same_place_is_refused(tmp_path: Path, tars: Path) -> None:
    recipe = recipe_for(tars, "webdataset")
    run_here(recipe, tmp_path / "out")
    with (tmp_path / "out" / ".lock").open("r+b") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(UserError, match=f"It is process {os.getpid()} on"):
            run_here(recipe, tmp_path / "out")
    run_here(recipe, tmp_path / "out")


def test_an_out_that_cannot_be_a_folder_is_a_user_error(tmp_path: Path, tars: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    for out in (tmp_path / "file", tmp_path / "file" / "deep"):
        with pytest.raises(UserError, match="cannot be used"):
            run_here(recipe_for(tars, "webdataset"), out)


def test_latest_names_one_chain_whose_every_stage_was_made_from_those_before(
    tmp_path: Path,
) -> None:
    folder = embeddings(tmp_path / "in")
    old = recipe_for(folder, "clip_retrieval", filter={}, cluster={"num_clusters": 4})
    new = old | {"filter": {"min_caption_chars": 1}}
    out = tmp_path / "out"
    first = stages(run_here(old, out))
    assert read_latest(str(out)) == first
    run_here(old, out, until="ingest")
    assert read_latest(str(out)) == first, "what was made from this very ingest stays named"
    filtered = stages(run_here(new, out, until="filter"))
    assert read_latest(str(out)) == filtered, "the old clusters came from another filter"
    second = stages(run_here(new, out))
    assert read_latest(str(out)) == second
    unclustered = recipe_for(folder, "clip_retrieval", cluster={"num_clusters": 4})
    third = stages(run_here(unclustered, out))
    assert list(third) == ["ingest", "cluster"]
    assert read_latest(str(out)) == third


def test_a_stage_about_to_be_made_anew_is_not_told_as_finished(tmp_path: Path) -> None:
    folder = embeddings(tmp_path / "in")
    old = recipe_for(folder, "clip_retrieval", filter={}, cluster={"num_clusters": 4})
    out = tmp_path / "out"
    run_here(old, out)
    with pytest.raises(UserError, match="999 clusters"):
        run_here(old | {"cluster": {"num_clusters": 999}}, out)
    assert [(one.stage, one.state) for one in ask.status(str(out))] == [
        ("ingest", "finished"),
        ("filter", "finished"),
        ("cluster", "unfinished"),
    ]
    assert list(ask.chain_of(str(out))) == ["ingest", "filter"]


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


# ---- progress


def test_what_is_left_is_told_from_the_items_done_in_this_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = iter([0.0, 10.0, 10.0, 10.0])
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    progress = Progress(str(tmp_path), interval_seconds=5)
    progress.phase_started("filter", num_items=100, num_done=90)
    counts = Tally(50, 40, {"small": 10}).as_json()
    progress.item_done("filter", {"item": "part-00000", "counts": counts, "seconds": 1.0})
    line = capsys.readouterr().err
    assert line == "filter: 91/100 items, 5 rows/s, kept 80.0%, about 90 s left\n"


def test_events_take_any_text(tmp_path: Path) -> None:
    progress = Progress(str(tmp_path))
    progress.item_failed("filter", Failed(Item("part-00000"), "ValueError", "\udcff \u00e9", "", 3))
    assert events(tmp_path)[0]["item"] == "part-00000"


# ---- commands


@pytest.fixture
def finished(tmp_path: Path) -> Path:
    """A run with losses of every kind, and its recipe beside it."""
    shards = {
        "0.tar": [
            *pair("good", "two words"),
            *pair("short", "one"),
            ("x.jpg", b""),
            ("x.txt", b"x"),
        ],
        "1.tar": [*pair("second", "three whole words"), *pair("\x1b[31mred", "not safe")],
    }
    recipe = recipe_for(
        write_tars(tmp_path / "in", shards),
        "webdataset",
        filter={"min_caption_words": 2},
        max_quarantine_fraction=0.5,
    )
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(recipe))
    run_here(recipe, tmp_path / "out")
    return tmp_path / "out"


def command(*words: object) -> Result:
    return CliRunner().invoke(main, [str(word) for word in words])


def answer(*words: object) -> Any:
    done = command(*words, "--json")
    assert done.exit_code == 0, done.stderr
    return json.loads(done.stdout)


def test_the_commands_answer_in_tables_and_in_json(finished: Path) -> None:
    recipe = finished.parent / "r.yaml"
    rows = answer("funnel", finished)
    assert [(r["stage"], r["rows_in"], r["kept"]) for r in rows] == [
        ("ingest", 5, 3),
        ("filter", 3, 2),
    ]
    assert rows[0]["quarantined"] == {"empty_image": 1, "unsafe_member_name": 1}
    assert [r["state"] for r in answer("status", finished)] == ["finished", "finished"]
    assert [r["state"] for r in answer("plan", recipe)] == ["new", "new"]
    assert [r["state"] for r in answer("plan", recipe, "--out", finished)] == [
        "finished",
        "finished",
    ]
    changed = answer("plan", recipe, "--out", finished, "--set", "filter.min_side=5")
    assert [r["state"] for r in changed] == ["finished", "new"]
    (story,) = answer("why", finished, "short")
    assert story["fate"] == "dropped by filter: caption_words_below"
    assert all(one["holds"] for one in answer("check", finished))
    for words in (["funnel"], ["status"], ["check"], ["why", "short"]):
        done = command(words[0], finished, *words[1:])
        assert (done.exit_code, done.stderr) == (0, "")
        assert "caption_words_below" in done.stdout or words[0] in ("status", "check")


def test_strangers_text_cannot_steer_the_terminal(finished: Path) -> None:
    rows = pq.read_table(
        next((finished).glob("ingest-*/quarantine/part-00001.parquet"))
    ).to_pylist()
    done = command("why", finished, rows[0]["key"])
    assert done.exit_code == 0
    assert "\x1b" not in done.stdout
    assert "unsafe_member_name" in done.stdout


def test_plan_makes_nothing(tmp_path: Path, finished: Path) -> None:
    before = sorted(finished.rglob("*"))
    answer("plan", tmp_path / "r.yaml", "--out", finished, "--set", "filter.min_side=5")
    answer("plan", tmp_path / "r.yaml", "--out", tmp_path / "new")
    assert sorted(finished.rglob("*")) == before
    assert not (tmp_path / "new").exists()


USER_ERRORS: list[tuple[list[str], str]] = [
    (["plan", "none.yaml"], "does not exist"),
    (["run", "none.yaml", "--out", "x"], "does not exist"),
    (["funnel", "{tmp}/nothing"], "holds no finished stage"),
    (["status", "{tmp}/nothing"], "is no run directory"),
    (["why", "{tmp}/nothing", "key"], "holds no finished stage"),
    (["why", "{tmp}/out", "key"], "No sample has the key"),
    (["check", "{tmp}/nothing"], "holds no finished stage"),
    (["plan", "{tmp}/r.yaml", "--set", "filter.min_sied=3"], "Did you mean 'min_side'?"),
    (["plan", "{tmp}/r.yaml", "--set", "source.path={tmp}/none"], "does not exist"),
    (
        ["run", "{tmp}/r.yaml", "--out", "{tmp}/o", "--to", "select", "--executor", "local"],
        "no stage",
    ),
    (["run", "{tmp}/r.yaml"], "Missing option"),
    (["run", "{tmp}/r.yaml", "--out", "{tmp}/o", "--executor", "slurm"], "Invalid value"),
]


@pytest.mark.parametrize(("words", "message"), USER_ERRORS)
def test_what_the_user_can_mend_exits_2_and_is_told_on_stderr(
    tmp_path: Path, finished: Path, words: list[str], message: str
) -> None:
    assert finished == tmp_path / "out"
    done = command(*(word.format(tmp=tmp_path) for word in words))
    assert done.exit_code == 2
    assert done.stdout == ""
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_a_broken_run_exits_1(finished: Path) -> None:
    directory = read_latest(str(finished))["filter"]
    forged = record(directory) | {"kept": 99}
    store.write_json(directory.path, "record.json", forged)
    for words in (["funnel"], ["check"]):
        done = command(words[0], finished, "--json")
        assert done.exit_code == 1
        assert json.loads(done.stdout)
        assert "error: " in done.stderr


def warren(*words: object) -> subprocess.CompletedProcess[str]:
    """Run the real command in a process of its own."""
    line = [sys.executable, "-m", "pipelines.cli", *map(str, words)]
    return subprocess.run(line, cwd=REPOSITORY, capture_output=True, text=True, timeout=60)


def test_the_real_command_keeps_results_and_progress_apart(tmp_path: Path) -> None:
    good_tars(tmp_path / "in", num_shards=2, num_pairs=2)
    recipe = recipe_for(tmp_path / "in", "webdataset", filter={"min_caption_words": 2})
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(recipe))
    local = ["--out", tmp_path / "out", "--executor", "local"]
    done = warren("run", tmp_path / "r.yaml", *local)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("funnel\n")
    assert done.stderr.splitlines()[0].startswith("ingest: 4 rows in, 4 kept")
    (tmp_path / "in" / "00002.tar").write_bytes(b"junk")
    failed = warren("run", tmp_path / "r.yaml", *local)
    assert (failed.returncode, failed.stdout) == (1, "")
    assert failed.stderr.startswith("error: ingest: 1 of 5 rows are quarantined")


def test_a_chain_is_built_without_touching_the_disk(tmp_path: Path, tars: Path) -> None:
    links = build(parse(recipe_for(tars, "webdataset", filter={})), str(tmp_path / "out"))
    assert [link.stage.name for link in links] == ["ingest", "filter"]
    assert not (tmp_path / "out").exists()
