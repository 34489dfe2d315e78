"""A run killed at any moment goes on bit by bit; checkpoints are written beside training."""

from __future__ import annotations

import contextlib
import errno
import json
import multiprocessing
import os
import random
import signal
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file
from small_llava import NUM_PATCHES
from small_runs import (
    small_data,  # noqa: F401 - a fixture
    small_model,  # noqa: F401 - a fixture
)

from manifests import store
from manifests.errors import UserError
from train.config import TrainConfig
from train.data.index import Index
from train.data.plan import Cursor
from train.learn.checkpoint import CHECKPOINT, TRAINED, Checkpoint, CheckpointWriter
from train.learn.lines import read_lines
from train.learn.log import LOG, MEASURED
from train.learn.run import DONE, train


def config_of(stage: str, **changes: Any) -> TrainConfig:
    values: dict[str, Any] = {
        "stage": stage,
        "template": "bunny",
        "projector_lr": 1e-2,
        "adapter_lr": 1e-2,
        "lora": {"rank": 2, "alpha": 4, "dropout": 0.3},
        # 225 tokens are too few for some rows: dropped rows are part of what must not change
        "plan": {
            "global_batch_size": 5,
            "tokens_per_micro_batch": 600,
            "tokens_per_image": NUM_PATCHES,
            "max_length": 225,
            "lengths": "estimate",  # else they would be gone before the first step
        },
        "epochs": 2,
        "checkpoint_every_steps": 2,
    }
    return TrainConfig.load(values | changes, where="train")


def train_and_die(
    config: TrainConfig, model_dir: str, data: str, out: str, last: int, delay: float
) -> None:
    """Train, and get SIGKILL a moment after a step's line was written."""
    killed = False

    def at_step(entry: dict[str, Any]) -> None:
        nonlocal killed
        if entry["step"] >= last and not killed:
            killed = True
            if not delay:
                os.kill(os.getpid(), signal.SIGKILL)
            signal.setitimer(signal.ITIMER_REAL, delay)

    signal.signal(signal.SIGALRM, lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    train(config, model_dir, [data], out, on_step=at_step)


class Results(NamedTuple):
    """What a finished run wrote."""

    log: list[Any]
    trained: dict[str, torch.Tensor]
    dropped: list[Any]
    done: dict[str, Any]

    def is_equal(self, other: Results) -> bool:
        """Whether both are the same, bit by bit."""
        same = self.trained.keys() == other.trained.keys() and all(
            torch.equal(one, other.trained[name]) for name, one in self.trained.items()
        )
        return same and self._replace(trained={}) == other._replace(trained={})


def results(out: Path) -> Results:
    lines = read_lines(str(out / LOG))
    log = [{k: v for k, v in line.items() if k not in MEASURED} for line in lines]
    dropped = store.read_table(str(out / "dropped.parquet")).to_pylist()
    assert not [*out.glob("dropped-*.jsonl")]
    done = json.loads((out / DONE).read_text())
    return Results(log, load_file(out / TRAINED), dropped, done)


@pytest.fixture(scope="module")
def processes() -> Iterator[Any]:
    """What starts processes that have imported everything: forks of one that has done nothing else.

    This one has threads of torch and pyarrow, and its own forks would crash.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    before = os.environ.get("PYTHONPATH", "")
    os.environ["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    yield context
    os.environ["PYTHONPATH"] = before


def killed_and_undisturbed(
    processes: Any, stage: str, seed: int, kills: int, model_dir: str, data: str, folder: Path
) -> tuple[Results, Results]:
    """Return what two runs of the same settings wrote: one killed at random steps, one not."""
    config = config_of(stage)
    train(config, model_dir, [data], str(folder / "whole"))
    whole = results(folder / "whole")
    chance, ends = random.Random(seed), []
    for last in sorted(chance.sample(range(1, len(whole.log) - 1), kills)):
        arguments = (config, model_dir, data, str(folder / "cut"), last)
        child = processes.Process(target=train_and_die, args=(*arguments, chance.choice([0, 0.02])))
        child.start()
        child.join(60)
        ends.append(child.exitcode)
    assert ends == [-signal.SIGKILL] * kills
    train(config, model_dir, [data], str(folder / "cut"))
    return results(folder / "cut"), whole


def test_a_run_killed_at_random_steps_ends_as_one_that_was_not(
    processes: Any, model_dir: str, data: str, tmp_path: Path
) -> None:
    cut, whole = killed_and_undisturbed(processes, "adapter", 0, 2, model_dir, data, tmp_path)
    assert cut.is_equal(whole)
    assert len(whole.dropped) == whole.done["dropped"] > 0


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("stage", ["projector", "adapter"])
def test_a_run_killed_many_times_ends_as_one_that_was_not(
    processes: Any, stage: str, seed: int, model_dir: str, data: str, tmp_path: Path
) -> None:
    cut, whole = killed_and_undisturbed(processes, stage, seed, 6, model_dir, data, tmp_path)
    assert cut.is_equal(whole)


def test_a_packed_subset_goes_on_bit_by_bit_without_its_measured_lengths(
    model_dir: str, data: str, tmp_path: Path
) -> None:
    plan = config_of("adapter").plan.model_dump() | {"lengths": "exact", "packing": True}
    config = config_of("adapter", plan=plan)
    subset = str(tmp_path / "subset.parquet")
    pq.write_table(pa.table({"uid": np.unique(Index.load([data]).uid)[::2]}), subset)
    train(config, model_dir, [data], str(tmp_path / "whole"), subset=subset)

    def stop(entry: dict[str, Any]) -> None:
        if entry["step"] == 2:
            raise InterruptedError

    cut = str(tmp_path / "cut")
    with pytest.raises(InterruptedError):
        train(config, model_dir, [data], cut, subset=subset, on_step=stop)
    (lengths,) = (tmp_path / "cut").glob("lengths-*.parquet")
    lengths.unlink()
    train(config, model_dir, [data], cut, subset=subset)
    whole = results(tmp_path / "whole")
    assert results(tmp_path / "cut").is_equal(whole)
    assert len(whole.log) > 3


def be_a_rank(
    rank: int, port: int, config: TrainConfig, model_dir: str, data: str, out: str
) -> None:
    """Train as one of two ranks, of which the first dies after two steps."""

    def die(entry: dict[str, Any]) -> None:
        if entry["step"] == 1:
            os.kill(os.getpid(), signal.SIGKILL)

    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "GLOO_SOCKET_IFNAME": "lo"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    with Path(os.devnull).open("w") as nowhere, contextlib.redirect_stderr(nowhere):
        train(config, model_dir, [data], out, on_step=die)


def test_a_rank_that_dies_leaves_none_waiting_and_one_process_goes_on(
    processes: Any, model_dir: str, data: str, tmp_path: Path
) -> None:
    config = config_of("projector", epochs=1, checkpoint_every_steps=1)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    arguments = (port, config, model_dir, data, str(tmp_path / "ranks"))
    ranks = [processes.Process(target=be_a_rank, args=(rank, *arguments)) for rank in (0, 1)]
    for one in ranks:
        one.start()
    for one in ranks:
        one.join(50)
    assert [one.exitcode for one in ranks] == [-signal.SIGKILL, 1]
    train(config, model_dir, [data], str(tmp_path / "ranks"))
    train(config, model_dir, [data], str(tmp_path / "alone"))
    log, found, dropped, done = results(tmp_path / "ranks")
    _, expected, dropped_alone, done_alone = results(tmp_path / "alone")
    assert [one["step"] for one in log] == [*range(done["steps"])]
    assert (dropped, done) == (dropped_alone, done_alone)
    assert max(float((found[name] - expected[name]).abs().max()) for name in expected) < 1e-6


def checkpoint_of(value: float, size: int = 3) -> Checkpoint:
    weight = torch.full((size,), value, requires_grad=True)
    optimizer = torch.optim.AdamW([weight])
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    state = optimizer.state_dict()
    return Checkpoint({"seed": 0}, Cursor(1, 2), 7, {"weight": weight}, state, {"rows": 9})


def test_a_checkpoint_is_of_the_moment_it_was_put(tmp_path: Path) -> None:
    given = checkpoint_of(1.0, size=1 << 20)
    expected = given.trained["weight"].detach().clone()
    state = given.optimizer["state"][0]["exp_avg"].clone()
    with CheckpointWriter(str(tmp_path)) as writer:
        writer.put(given)
        with torch.no_grad():
            given.trained["weight"].zero_()
            given.optimizer["state"][0]["exp_avg"].zero_()
    found = Checkpoint.load(str(tmp_path))
    assert found is not None
    assert torch.equal(found.trained["weight"], expected)
    assert torch.equal(found.optimizer["state"][0]["exp_avg"], state)
    assert (found.cursor, found.steps_done, found.totals) == (Cursor(1, 2), 7, {"rows": 9})
    assert found.optimizer["param_groups"] == given.optimizer["param_groups"]


def test_the_newest_of_many_checkpoints_is_there_at_the_end(tmp_path: Path) -> None:
    with CheckpointWriter(str(tmp_path)) as writer:
        for value in range(5):
            writer.put(checkpoint_of(float(value)))
    found = Checkpoint.load(str(tmp_path))
    assert found is not None
    assert torch.equal(found.trained["weight"], checkpoint_of(4.0).trained["weight"])
    assert [path.name for path in tmp_path.iterdir()] == [CHECKPOINT]


def test_an_error_of_the_writing_thread_comes_to_the_training_one(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    below = str(tmp_path / "file" / "run")  # no folder can be made below a file
    with pytest.raises(UserError) as error, CheckpointWriter(below) as writer:
        writer.put(checkpoint_of(1.0))
        for _ in range(600):
            writer.check()
            time.sleep(0.01)
    assert isinstance(error.value.__cause__, OSError)
    assert error.value.__cause__.errno in (errno.ENOTDIR, errno.EEXIST)
    with pytest.raises(KeyError) as first, CheckpointWriter(below) as writer:
        writer.put(checkpoint_of(1.0))
        raise KeyError("the one that ended the run")
    assert "checkpoint was not written" in first.value.__notes__[0]


def test_a_checkpoint_of_another_version_is_refused(tmp_path: Path) -> None:
    store.write(str(tmp_path), CHECKPOINT, lambda file: torch.save({"version": 1}, file))
    with pytest.raises(UserError, match="another version"):
        Checkpoint.load(str(tmp_path))


def test_seconds_also_bring_checkpoints_and_change_no_result(
    model_dir: str, data: str, tmp_path: Path
) -> None:
    def is_there(_: Any) -> None:
        seen.append((tmp_path / "often" / CHECKPOINT).exists())

    seen: list[bool] = []
    rare = {"checkpoint_every_steps": 1000, "epochs": 1}
    train(config_of("projector", **rare), model_dir, [data], str(tmp_path / "never"))
    often = config_of("projector", **rare, checkpoint_every_seconds=1e-9)
    train(often, model_dir, [data], str(tmp_path / "often"), on_step=is_there)
    assert any(seen)
    assert not (tmp_path / "never" / CHECKPOINT).exists()
    never, also = results(tmp_path / "never"), results(tmp_path / "often")
    assert never[3] == also[3]
    assert all(torch.equal(also[1][name], one) for name, one in never[1].items())


def test_a_run_stops_before_a_number_that_is_none_is_kept(
    model_dir: str, data: str, tmp_path: Path
) -> None:
    wild = config_of("projector", projector_lr=1e30, warmup_share=0, checkpoint_every_steps=1)
    with pytest.raises(UserError, match="Step 1 gave numbers that are none"):
        train(wild, model_dir, [data], str(tmp_path))
    found = Checkpoint.load(str(tmp_path))
    assert found is not None
    assert found.steps_done == 1
    assert all(one.isfinite().all() for one in found.trained.values())
