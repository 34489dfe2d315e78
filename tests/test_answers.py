"""What is told about a run: its progress, and the commands that answer in tables and JSON."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml
from click.testing import CliRunner, Result
from small_inputs import (
    embeddings,
    events,
    good_tars,
    pair,
    recipe_for,
    record,
    run_here,
    write_tars,
)

from manifests import store
from manifests.ledger import Tally
from manifests.record import read_latest
from manifests.work import Item
from pipelines import ask
from pipelines.cli import main
from pipelines.executors import Failed
from pipelines.progress import Progress
from pipelines.recipe import parse

REPOSITORY = Path(__file__).resolve().parent.parent


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


def test_plan_says_how_many_items_ingest_will_have(tmp_path: Path) -> None:
    recipe = parse(recipe_for(embeddings(tmp_path / "e", num_parts=4), "clip_retrieval"))
    (ingest,) = ask.plan(recipe, None)
    assert (ingest.stage, ingest.state, ingest.items) == ("ingest", "new", 4)
