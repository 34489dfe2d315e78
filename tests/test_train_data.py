"""Rows of shards by offset, subsets of them, and what worker processes make of a plan."""

from __future__ import annotations

import gc
import io
import json
import os
import pickle
import tarfile
from concurrent.futures import ThreadPoolExecutor
from itertools import repeat
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from small_inputs import run_here, stages
from small_mixes import mix_recipe

from manifests.errors import UserError
from manifests.schemas import SELECTABLE, TRAIN_INDEX, VERDICTS, conform
from train.data.batches import batches
from train.data.index import Index, SampleFailed, TrainSample, read_index, read_sample, read_subset
from train.data.plan import PlanConfig, make_plan
from train.data.shard_files import ShardFiles

PER_SHARD = 6
Planted = list[tuple[int, dict[str, Any], list[bytes]]]


def planted(num_rows: int, *, first_uid: int = 100) -> Planted:
    """Return (uid, JSON row, images): no image, one or two of different sizes."""
    rng = np.random.default_rng(first_uid)
    return [
        (first_uid + at, {"id": at}, [rng.bytes(10 + at + k) for k in range(at % 3)])
        for at in range(num_rows)
    ]


def write_stage(folder: Path, rows: Planted) -> str:
    """Write shards of tars and their TRAIN_INDEX, and return the directory."""
    (folder / "shards").mkdir(parents=True)
    for number, at in enumerate(range(0, len(rows), PER_SHARD)):
        found = _write_shard(folder, f"shards/{number:05d}.tar", rows[at : at + PER_SHARD])
        table = conform(pa.Table.from_pylist(found, TRAIN_INDEX), TRAIN_INDEX)
        pq.write_table(table, folder / f"part-{number:05d}.parquet")
    return str(folder)


def _write_shard(folder: Path, shard: str, rows: Planted) -> list[dict[str, Any]]:
    with tarfile.open(folder / shard, "w") as tar:
        for uid, row, images in rows:
            members = [*((f"{uid}.{k}.jpg", image) for k, image in enumerate(images))]
            for name, data in [*members, (f"{uid}.json", json.dumps(row).encode())]:
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    with tarfile.open(folder / shard) as tar:
        spans = {m.name: {"offset": m.offset_data, "size": m.size} for m in tar.getmembers()}
    return [
        {
            "uid": uid,
            "key": f"k{uid}",
            "shard": shard,
            "images": [{"suffix": "jpg", **spans[f"{uid}.{k}.jpg"]} for k in range(len(images))],
            "json_offset": spans[f"{uid}.json"]["offset"],
            "json_size": spans[f"{uid}.json"]["size"],
            "source": ("chat", "photos")[bool(images)],
            "has_image": bool(images),
            "turns": 2,
            "token_estimate": 5 + uid % 7,
        }
        for uid, row, images in rows
    ]


ROWS = planted(20)


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_stage(tmp_path_factory.mktemp("stage") / "mix", ROWS)


@pytest.fixture(scope="module")
def index(stage: str) -> Index:
    return Index.load([stage])


def told(sample: TrainSample) -> tuple[int, dict[str, Any], list[bytes]]:
    return sample.uid, dict(sample.row), sample.images


def test_rows_are_read_as_they_were_written(index: Index) -> None:
    assert [told(index.sample(row)) for row in range(len(index))] == ROWS
    assert len(index) == len(ROWS)
    sent = pickle.loads(pickle.dumps(index))  # noqa: S301 (ours; workers that are no forks get it)
    assert told(sent.sample(7)) == ROWS[7]


def test_columns_are_those_of_the_table(index: Index) -> None:
    columns = index.columns()
    assert columns.num_images.tolist() == [len(images) for _, _, images in ROWS]
    assert columns.tokens.tolist() == [5 + uid % 7 for uid, _, _ in ROWS]
    names = [columns.sources[code] for code in columns.source]
    assert names == [("chat", "photos")[bool(images)] for _, _, images in ROWS]
    assert columns.identity.tolist() == [uid for uid, _, _ in ROWS]


def test_a_real_mix_with_copies(tmp_path: Path) -> None:
    directory = stages(run_here(mix_recipe(tmp_path, num_rows=24), tmp_path / "out"))["mix"].path
    index, rows = Index.load([directory]), read_index(directory)
    assert [told(index.sample(at)) for at in range(len(index))] == [
        told(read_sample(directory, row)) for row in rows
    ]
    columns = index.columns()
    assert len(set(index.uid.tolist())) < len(rows) == len(set(columns.identity.tolist()))
    plan = make_plan(columns, seed=0, epoch=0, config=PlanConfig(), world_size=1)
    assert sorted(plan.batch(0).tolist()) == list(range(len(rows)))


def test_several_directories_are_one_index(stage: str, tmp_path: Path) -> None:
    others = planted(8, first_uid=110)  # uids of both mean different samples
    second = write_stage(tmp_path / "second", others)
    both = Index.load([stage, second])
    assert [told(both.sample(row)) for row in range(len(both))] == ROWS + others
    assert len(np.unique(both.columns().identity)) == 28
    with pytest.raises(UserError, match="8 uids of the subset are in several"):
        both.subset(np.arange(105, 120, dtype=np.uint64))
    kept = both.subset(np.arange(100, 105, dtype=np.uint64))
    assert [told(kept.sample(row)) for row in range(5)] == ROWS[:5]
    with pytest.raises(UserError, match="twice"):
        Index.load([stage, stage])
    with pytest.raises(UserError, match=r"no part-\*"):
        Index.load([stage, str(tmp_path / "none")])


def test_a_subset_keeps_order_identity_and_images(index: Index) -> None:
    chosen = [19, 3, 4, 11, 3]
    kept = index.subset(np.array([100 + at for at in chosen], np.uint64))
    expected = sorted(set(chosen))
    assert [told(kept.sample(row)) for row in range(len(kept))] == [ROWS[at] for at in expected]
    assert kept.columns().num_images.tolist() == [at % 3 for at in expected]
    again = kept.subset(np.array([111], np.uint64))
    assert told(again.sample(0)) == ROWS[11]


def test_unknown_uids_are_counted(index: Index) -> None:
    with pytest.raises(UserError, match="2 of the subset's 3 uids are not in the index"):
        index.subset(np.array([100, 7, 8], np.uint64))
    with pytest.raises(UserError, match="keeps no sample"):
        index.subset(np.array([], np.uint64))


def test_subsets_are_read_from_verdicts_and_coresets(tmp_path: Path) -> None:
    verdicts = [
        {"uid": uid, "stage": "select", "keep": uid % 2 == 0, "reason": ""} for uid in range(10)
    ]
    for number, rows in enumerate((verdicts[:5], verdicts[5:])):
        table = conform(pa.Table.from_pylist(rows, VERDICTS), VERDICTS)
        pq.write_table(table, tmp_path / f"part-{number:05d}.parquet")
    assert read_subset(str(tmp_path)).tolist() == [0, 2, 4, 6, 8]
    assert read_subset(str(tmp_path / "part-00001.parquet")).tolist() == [6, 8]
    coreset = pa.table({"uid": pa.array([3, 1], pa.uint64())})
    pq.write_table(conform(coreset, SELECTABLE), tmp_path / "coreset.parquet")
    assert read_subset(str(tmp_path / "coreset.parquet")).tolist() == [3, 1]
    with pytest.raises(UserError, match="no parquet file"):
        read_subset(str(tmp_path / "none"))
    pq.write_table(pa.table({"id": [1]}), tmp_path / "other.parquet")
    with pytest.raises(UserError, match="no column `uid`"):
        read_subset(str(tmp_path / "other.parquet"))


def test_remote_shards_are_read_the_same(stage: str) -> None:
    memory = fsspec.filesystem("memory")
    memory.put(stage, "/plan-test", recursive=True)
    try:
        remote = Index.load(["memory://plan-test"])
        assert [told(remote.sample(row)) for row in range(len(remote))] == ROWS
    finally:
        memory.rm("/plan-test", recursive=True)


def num_open_below(folder: Path) -> int:
    """Count this process's open files in a folder: other tests' threads may open others."""
    gc.collect()
    return sum(one.resolve().is_relative_to(folder) for one in Path("/proc/self/fd").iterdir())


def test_few_shards_stay_open_and_none_after(tmp_path: Path) -> None:
    contents = {str(tmp_path / f"{n}"): bytes([n]) * 40 for n in range(9)}
    for name, data in contents.items():
        Path(name).write_bytes(data)
    files = ShardFiles(most_open=3)
    asked = [*contents] * 60
    with ThreadPoolExecutor(4) as pool:
        found = [*pool.map(files.read, asked, repeat(1), repeat(30))]
    assert found == [contents[name][:30] for name in asked]
    assert num_open_below(tmp_path) == 3
    assert pickle.loads(pickle.dumps(files)).read(asked[1], 0, 1) == b"\1"  # noqa: S301 (ours)
    del files
    assert num_open_below(tmp_path) == 0


def test_a_forked_process_opens_its_own(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    files = ShardFiles()
    files.read(str(tmp_path / "a"), 0, 1)
    with files._lock:  # as another thread may hold it while this one forks
        child = os.fork()
        if child == 0:
            os._exit(0 if files.read(str(tmp_path / "a"), 1, 2) == b"bc" else 1)
        assert os.waitpid(child, 0)[1] == 0
    assert files.read(str(tmp_path / "a"), 2, 1) == b"c"


def test_a_cut_shard_names_the_sample(tmp_path: Path) -> None:
    index = Index.load([write_stage(tmp_path / "mix", ROWS)])
    shard = tmp_path / "mix/shards/00001.tar"
    shard.write_bytes(shard.read_bytes()[:512])
    with pytest.raises(SampleFailed, match=r"^Sample k108 of .*00001.tar cannot be read: EOFError"):
        index.sample(8)
    (tmp_path / "mix/shards/00002.tar").unlink()
    with pytest.raises(SampleFailed, match="Sample k112 .*FileNotFoundError"):
        index.sample(12)
    assert told(index.sample(0)) == ROWS[0]


def prepared(sample: TrainSample) -> tuple[int, int]:
    return sample.uid, sum(map(len, sample.images))


def fails_at_113(sample: TrainSample) -> int:
    if sample.uid == 113:
        raise ValueError("no answer")
    return sample.uid


CONFIG = PlanConfig(global_batch_size=6, tokens_per_micro_batch=60, tokens_per_image=10)


@pytest.mark.parametrize("num_workers", [0, 1, 2])
def test_batches_are_the_plan_for_any_number_of_workers(index: Index, num_workers: int) -> None:
    plan = make_plan(index.columns(), seed=0, epoch=0, config=CONFIG, world_size=2)
    state = torch.get_rng_state()
    found = [*batches(plan, 1, index, prepared, num_workers)]
    assert torch.equal(torch.get_rng_state(), state)
    micros = {step: plan.micro_batches(step, 1) for step in range(plan.num_steps)}
    expected = [(step, rows.tolist()) for step, dealt in micros.items() for rows in dealt]
    assert [(one.step, one.rows.tolist()) for one in found] == expected
    for one in found:
        assert one.items == [(ROWS[at][0], sum(map(len, ROWS[at][2]))) for at in one.rows]
    assert [one.step for one in found if one.is_last] == list(range(plan.num_steps))
    rest = [*batches(plan, 1, index, prepared, 0, start=2)]
    assert [one.rows.tolist() for one in rest] == [rows for step, rows in expected if step >= 2]


def test_a_rank_without_work_still_ends_each_step(index: Index) -> None:
    config = PlanConfig(global_batch_size=1)
    plan = make_plan(index.columns(), seed=0, epoch=0, config=config, world_size=2)
    idle = [*batches(plan, 1, index, prepared, 0)]
    assert [(one.step, one.is_last, one.items) for one in idle] == [
        (step, True, []) for step in range(20)
    ]
    every = [one.items[0][0] for one in batches(plan, 0, index, prepared, 0)]
    assert sorted(every) == [uid for uid, _, _ in ROWS]


@pytest.mark.parametrize("num_workers", [0, 1])
def test_errors_of_workers_name_the_sample(index: Index, num_workers: int) -> None:
    plan = make_plan(index.columns(), seed=0, epoch=0, config=CONFIG, world_size=1)
    with pytest.raises(SampleFailed, match=r"k113 of .*00002.tar cannot be prepared: ValueError"):
        list(batches(plan, 0, index, fails_at_113, num_workers))


def test_all_ranks_together_read_every_sample_once(index: Index) -> None:
    plan = make_plan(index.columns(), seed=3, epoch=1, config=CONFIG, world_size=3)
    read = [
        item
        for rank in range(3)
        for one in batches(plan, rank, index, prepared, 0)
        for item in one.items
    ]
    assert sorted(uid for uid, _ in read) == [uid for uid, _, _ in ROWS]
