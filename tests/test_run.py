"""Runs: what is reused and in what order; who may run where; which chain is the latest."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import chdir
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

from manifests.errors import UserError
from manifests.record import read_latest
from pipelines import ask
from pipelines.chain import build
from pipelines.executors import LocalExecutor, Resources
from pipelines.progress import Progress
from pipelines.recipe import parse
from pipelines.run import run


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
    recipe = recipe_for(
        folder, "clip_retrieval", filter={}, cluster={"num_clusters": 4, "min_rows_per_centroid": 1}
    )
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


def test_items_run_costliest_first(tmp_path: Path) -> None:
    sizes = [2, 9, 1, 5]
    shards = {
        f"{n}.tar": [m for row in range(size) for m in pair(f"{n}-{row}")]
        for n, size in enumerate(sizes)
    }
    run_here(recipe_for(write_tars(tmp_path / "in", shards), "webdataset"), tmp_path / "out")
    done = [event["item"] for event in events(tmp_path / "out") if event["event"] == "item_done"]
    assert done == ["part-00001", "part-00003", "part-00000", "part-00002"]


def test_a_chain_is_built_without_touching_the_disk(tmp_path: Path, tars: Path) -> None:
    links = build(parse(recipe_for(tars, "webdataset", filter={})), str(tmp_path / "out"))
    assert [link.stage.name for link in links] == ["ingest", "filter"]
    assert not (tmp_path / "out").exists()


# ---- lock, latest


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
    old = recipe_for(
        folder, "clip_retrieval", filter={}, cluster={"num_clusters": 4, "min_rows_per_centroid": 1}
    )
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
    unclustered = recipe_for(
        folder, "clip_retrieval", cluster={"num_clusters": 4, "min_rows_per_centroid": 1}
    )
    third = stages(run_here(unclustered, out))
    assert list(third) == ["ingest", "centroids", "cluster"]
    assert read_latest(str(out)) == third


def test_a_stage_about_to_be_made_anew_is_not_told_as_finished(tmp_path: Path) -> None:
    folder = embeddings(tmp_path / "in")
    old = recipe_for(
        folder, "clip_retrieval", filter={}, cluster={"num_clusters": 4, "min_rows_per_centroid": 1}
    )
    out = tmp_path / "out"
    run_here(old, out)
    with pytest.raises(UserError, match="999 clusters"):
        run_here(old | {"cluster": {"num_clusters": 999, "min_rows_per_centroid": 1}}, out)
    assert [(one.stage, one.state) for one in ask.status(str(out))] == [
        ("ingest", "finished"),
        ("filter", "finished"),
        ("centroids", "new"),
        ("cluster", "new"),
    ]
    assert list(ask.chain_of(str(out))) == ["ingest", "filter"]
