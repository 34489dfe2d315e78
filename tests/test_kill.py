"""Kill -9 at any moment, give the same command again: the bytes of an undisturbed run come out."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from disturbed_runs import HERE, ROWS_PER_BUCKET, Command, Moment, all_gone
from proof_worlds import embeddings_recipe, results, tar_recipe, temporaries
from small_inputs import run_here
from small_mixes import mix_recipe

from curate.duplicates import forest_stage
from manifests.checks import check
from pipelines import ask
from pipelines.cli import run_cli
from pipelines.executors import Done, Failed, LocalExecutor, Resources
from pipelines.executors.base import MakeWorker, R, T
from pipelines.progress import Progress
from pipelines.recipe import load
from pipelines.run import run

MIDDLE = [Moment("centroids", 2), Moment("forest")]
ALL = [
    Moment("ingest"),
    Moment("filter"),
    Moment("embed"),
    Moment("centroids", 0),
    Moment("centroids", 1),
    Moment("centroids", 2),
    Moment("centroids", 3),
    Moment("cluster", 0),
    Moment("cluster", 1),
    Moment("forest"),
    Moment("dedup"),
    Moment("select", 0),
    Moment("select", 1),
    Moment("select", 2),
    Moment("assemble", 0),
    Moment("assemble", 1),
]

Make = Callable[..., dict[str, Any]]


@pytest.fixture
def undisturbed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[Path], Any]:
    """Return what a recipe gives when nothing happens, with dedup cut as `Command` cuts it."""
    monkeypatch.setattr(forest_stage, "ROWS_PER_BUCKET", ROWS_PER_BUCKET)

    def digests(recipe: Path) -> dict[str, str]:
        run_here(yaml.safe_load(recipe.read_text()), tmp_path / "undisturbed")
        return results(tmp_path / "undisturbed")

    return digests


def write_recipe(folder: Path, make: Make, **size: int) -> Path:
    folder.mkdir()
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(make(folder / "world", **size)))
    return path


def many_tars(folder: Path) -> Path:
    return write_recipe(folder, tar_recipe, num_pairs=160, samples_per_shard=20)


def few_embeddings(folder: Path) -> Path:
    return write_recipe(folder, embeddings_recipe, num_parts=6, num_rows=60)


def assert_whole(out: Path, wanted: dict[str, str]) -> None:
    """Check the bytes, the invariants and the accounts of a run that was disturbed."""
    assert {name for name, _ in results(out).items() ^ wanted.items()} == set()
    assert temporaries(out) == []
    chain = ask.chain_of(str(out))
    assert [one for one in check(str(out), chain) if not one.holds] == []
    assert ask.adds_up(ask.funnel(chain))
    assert [run_cli([word, str(out)]) for word in ("check", "funnel")] == [0, 0]


def kill_driver_at(command: Command, moment: Moment) -> list[int]:
    with command.started() as one:
        one.wait_for(moment)
        family = one.kill_driver()
    (unfinished,) = command.out.glob(f"{moment.stage}-*")
    assert not (unfinished / "record.json").exists(), f"{moment} was over too soon"
    return family


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_a_driver_killed_in_the_middle_of_a_stage_goes_on_where_it_was(
    tmp_path: Path, undisturbed: Callable[[Path], dict[str, str]]
) -> None:
    recipe = few_embeddings(tmp_path / "given")
    command = Command(recipe, tmp_path / "out", "local")
    for moment in MIDDLE:
        kill_driver_at(command, moment)
    done_before = {path: path.stat().st_mtime_ns for path in command.out.rglob("_done/*.json")}
    assert "ingest: reused" in command.run()
    assert {path: path.stat().st_mtime_ns for path in done_before} == done_before
    assert_whole(command.out, undisturbed(recipe))


class LeavesHalfWritten(LocalExecutor):
    """Does every item after an attempt at it that was killed while it wrote."""

    def __init__(self, out: Path) -> None:
        super().__init__()
        self._out = out

    def map(
        self, make_worker: MakeWorker[T, R], items: Sequence[T], resources: Resources
    ) -> Iterator[Done[T, R] | Failed[T]]:
        """Yield the answers."""
        for answer in super().map(make_worker, items, resources):
            for stage in self._out.glob("*-*/"):
                if not (stage / "record.json").exists():
                    (stage / "_done" / f".{uuid.uuid4().hex}.json.0123456789ab.tmp").write_text("{")
            yield answer


def test_what_a_killed_attempt_left_is_gone_when_its_stage_is_finished(
    tmp_path: Path, undisturbed: Callable[[Path], dict[str, str]]
) -> None:
    recipe, out = few_embeddings(tmp_path / "given"), tmp_path / "out"
    wanted = undisturbed(recipe)
    executor = LeavesHalfWritten(out)
    run(load(str(recipe)), str(out), executor=executor, progress=Progress(str(out)))
    assert_whole(out, wanted)


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(120)
def test_a_killed_worker_is_replaced_and_leaves_nothing(
    tmp_path: Path, undisturbed: Callable[[Path], dict[str, str]]
) -> None:
    recipe = few_embeddings(tmp_path / "given")
    command = Command(recipe, tmp_path / "out", "ray")
    with command.started() as one:
        one.wait_for(Moment("cluster", 1))
        one.kill_worker()
        assert "died at an item" in one.finish()
    assert_whole(command.out, undisturbed(recipe))


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_driver_killed_in_every_stage_on_ray(
    tmp_path: Path, undisturbed: Callable[[Path], dict[str, str]]
) -> None:
    """Each run goes on from what the one killed before it left, with no pause between them."""
    recipe = many_tars(tmp_path / "given")
    command = Command(recipe, tmp_path / "out", "ray")
    orphans = [pid for moment in ALL for pid in kill_driver_at(command, moment)]
    command.run()
    assert_whole(command.out, undisturbed(recipe))
    assert all_gone(orphans)


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_worker_killed_in_every_stage_on_ray(
    tmp_path: Path, undisturbed: Callable[[Path], dict[str, str]]
) -> None:
    recipe = many_tars(tmp_path / "given")
    command = Command(recipe, tmp_path / "out", "ray")
    with command.started() as one:
        for moment in ALL:
            one.wait_for(moment)
            one.kill_worker()
        said = one.finish()
    assert said.count("died at an item") >= len(ALL) // 2, said
    assert_whole(command.out, undisturbed(recipe))


def killed_renames(recipe: Path, out: Path, how: str) -> dict[str, int]:
    """Return what tests/killed_renames.py counts; it fails unless all repeated runs agree."""
    env = os.environ | {"PYTHONPATH": f"{HERE}:{HERE.parent}"}
    command = [sys.executable, str(HERE / "killed_renames.py"), str(recipe), str(out), how]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    found: dict[str, int] = json.loads(done.stdout)
    return found


@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    ("make", "size"),
    [
        (embeddings_recipe, {"num_parts": 3, "num_rows": 40}),
        (mix_recipe, {"num_rows": 24, "samples_per_shard": 40, "bytes_per_part": 10_000}),
    ],
    ids=["embeddings", "mix"],
)
def test_a_run_killed_every_few_renames_gets_to_the_end(
    make: Make, size: dict[str, int], tmp_path: Path
) -> None:
    recipe = write_recipe(tmp_path / "given", make, **size)
    found = killed_renames(recipe, tmp_path / "out", "again")
    assert found["killed"] >= 3


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("make", "size"),
    [
        (embeddings_recipe, {"num_parts": 2, "num_rows": 40}),
        (tar_recipe, {"num_pairs": 60, "samples_per_shard": 30}),
        (mix_recipe, {"num_rows": 24, "samples_per_shard": 40, "bytes_per_part": 10_000}),
    ],
    ids=["embeddings", "tars", "mix"],
)
def test_a_run_killed_before_any_of_its_renames_ends_with_the_same_bytes(
    make: Make, size: dict[str, int], tmp_path: Path
) -> None:
    recipe = write_recipe(tmp_path / "given", make, **size)
    found = killed_renames(recipe, tmp_path / "out", "every")
    assert found["killed"] == found["renames"] > 40
