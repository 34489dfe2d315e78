"""One recipe, one result: whoever does the work, in whatever order and packing, the bytes agree."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from proof_worlds import embeddings_recipe, results, tar_recipe, temporaries
from ray_env import ray_cluster  # noqa: F401
from small_inputs import rows_of, run_here, stages
from small_mixes import mix_recipe

from curate.duplicates import forest_stage
from curate.vectors import cluster
from manifests.checks import check
from manifests.schemas import TABLES
from pipelines import ask
from pipelines.executors import Done, Executor, Failed, LocalExecutor, RayExecutor, Resources
from pipelines.executors.base import MakeWorker, R, T
from pipelines.progress import Progress
from pipelines.recipe import parse
from pipelines.run import run

DECIDING = ("filter", "cluster", "dedup", "select")


class Reversed(LocalExecutor):
    """Does the items last first, so that parts and markers appear in the other order."""

    def map(
        self, make_worker: MakeWorker[T, R], items: Sequence[T], resources: Resources
    ) -> Iterator[Done[T, R] | Failed[T]]:
        """Yield the answers of the reversed items."""
        return super().map(make_worker, items[::-1], resources)


class Interleaved(LocalExecutor):
    """Does the odd items, then the even ones."""

    def map(
        self, make_worker: MakeWorker[T, R], items: Sequence[T], resources: Resources
    ) -> Iterator[Done[T, R] | Failed[T]]:
        """Yield the answers of the items in that order."""
        return super().map(make_worker, [*items[1::2], *items[::2]], resources)


@pytest.fixture(scope="module")
def worlds(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Return a recipe of image tars, up to shards, one of published embeddings, and a mix."""
    folder = tmp_path_factory.mktemp("worlds")
    return {
        "tars": tar_recipe(folder / "tars", num_pairs=300, samples_per_shard=60),
        "embeddings": embeddings_recipe(folder / "embeddings"),
        "mix": mix_recipe(folder / "mix"),
    }


@pytest.fixture(scope="module")
def wanted(
    worlds: Mapping[str, dict[str, Any]], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, dict[str, str]]:
    """Return what the local executor makes of each world, checked."""
    found = {}
    for name, recipe in worlds.items():
        out = tmp_path_factory.mktemp(name)
        run_here(recipe, out)
        assert all(one.holds for one in check(str(out), ask.chain_of(str(out))))
        found[name] = results(out)
    return found


def made_by(executor: Executor, recipe: Mapping[str, Any], out: Path) -> dict[str, str]:
    run(parse(recipe), str(out), executor=executor, progress=Progress(str(out)))
    assert temporaries(out) == []
    return results(out)


def test_the_worlds_have_parts_near_duplicates_and_a_coreset_to_differ_in(
    worlds: Mapping[str, dict[str, Any]], tmp_path: Path
) -> None:
    for name, recipe in worlds.items():
        found = stages(run_here(recipe, tmp_path / name))
        assert len(found["ingest"].files()) >= 5
        if name == "mix":
            continue
        assert {row["keep"] for row in rows_of(found["dedup"])} == {True, False}
        coreset = pq.read_table(tmp_path / name / "coreset.parquet")
        assert coreset.schema.equals(TABLES["CORESET"])
        assert coreset.num_rows == recipe["select"]["num_samples"]
    assert len(list((tmp_path / "tars").glob("assemble-*/shards/*.tar"))) >= 5
    assert len(list((tmp_path / "mix").glob("mix-*/shards/*.tar"))) >= 5


@pytest.mark.parametrize("executor", [Reversed(), Interleaved()], ids=["reversed", "interleaved"])
@pytest.mark.parametrize("name", ["tars", "embeddings", "mix"])
def test_the_order_in_which_parts_are_done_changes_no_byte(
    name: str,
    executor: Executor,
    worlds: Mapping[str, dict[str, Any]],
    wanted: Mapping[str, dict[str, str]],
    tmp_path: Path,
) -> None:
    assert made_by(executor, worlds[name], tmp_path) == wanted[name]


@pytest.mark.ray
@pytest.mark.timeout(240)
@pytest.mark.parametrize(
    ("name", "max_workers"),
    [
        (name, workers) if workers == 2 else pytest.param(name, workers, marks=pytest.mark.slow)
        for name in ("embeddings", "tars", "mix")
        for workers in (1, 2, 4)
    ],
)
def test_any_number_of_ray_workers_makes_the_bytes_of_the_local_executor(
    name: str,
    max_workers: int,
    worlds: Mapping[str, dict[str, Any]],
    wanted: Mapping[str, dict[str, str]],
    ray_cluster: None,  # noqa: F811
    tmp_path: Path,
) -> None:
    with closing(RayExecutor(max_workers=max_workers)) as executor:
        assert made_by(executor, worlds[name], tmp_path) == wanted[name]


@pytest.mark.parametrize("rows", [1, 37])
def test_items_and_blocks_of_another_size_decide_the_same(
    rows: int, worlds: Mapping[str, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = worlds["embeddings"]
    usual = stages(run_here(recipe, tmp_path / "usual"))
    monkeypatch.setattr(forest_stage, "ROWS_PER_BUCKET", rows)
    monkeypatch.setattr(cluster, "ROWS_PER_STEP", rows)
    packed = stages(run_here(recipe, tmp_path / "packed"))
    assert len(packed["dedup"].files()) > len(usual["dedup"].files())
    assert_same_decisions(usual, packed)
    assert (tmp_path / "usual" / "coreset.parquet").read_bytes() == (
        tmp_path / "packed" / "coreset.parquet"
    ).read_bytes()


def test_several_shards_to_a_part_decide_the_same(
    worlds: Mapping[str, dict[str, Any]], tmp_path: Path
) -> None:
    recipe = worlds["embeddings"]
    usual = stages(run_here(recipe, tmp_path / "usual"))
    source = recipe["source"] | {"shards_per_part": 3}
    packed = stages(run_here(recipe | {"source": source}, tmp_path / "packed"))
    assert len(packed["ingest"].files()) < len(usual["ingest"].files())
    assert_same_decisions(usual, packed)
    assert (tmp_path / "usual" / "coreset.parquet").read_bytes() == (
        tmp_path / "packed" / "coreset.parquet"
    ).read_bytes()


def assert_same_decisions(left: Mapping[str, Any], right: Mapping[str, Any]) -> None:
    """Compare verdicts and assignments as sets of rows: they may lie in other files."""
    for name in DECIDING:
        for folder in ("", "verdicts"):
            assert as_set(left[name], folder) == as_set(right[name], folder)


def as_set(directory: Any, folder: str) -> list[str]:
    """Return all rows as text, sorted; repr gives a float64 exactly."""
    return sorted(repr(sorted(row.items())) for row in rows_of(directory, folder))
