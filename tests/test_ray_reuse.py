"""Idle Ray workers serve the next map, and only those that may."""

from __future__ import annotations

import os
import signal
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from executor_works import (
    ONE,
    Work,
    Worker,
    count,
    failures,
    is_alive,
    note,
    pids,
    results,
    square,
    until,
)
from ray_env import ray_cluster  # noqa: F401 - a fixture

from pipelines.executors import RayExecutor, Resources

pytestmark = [pytest.mark.ray, pytest.mark.timeout(120)]

ONE_TRY = Resources(max_attempts=1)


@pytest.fixture
def executor(ray_cluster: None) -> Iterator[RayExecutor]:  # noqa: F811 - imported above
    with closing(RayExecutor(max_workers=1)) as made:
        yield made


def its_pid(folder: Path, item: int) -> int:
    return os.getpid()


def sleeps_at_zero(folder: Path, item: int) -> int:
    note(folder, f"try{item}")
    if item == 0:
        time.sleep(100)
    return os.getpid()


@dataclass(frozen=True)
class Loads:
    """A factory whose work holds an object that leaves a file when it goes."""

    folder: Path

    def __call__(self) -> Work:
        model: Callable[[int], int] = lambda item: item + 1  # noqa: E731 - to have its own finalizer
        weakref.finalize(model, note, self.folder, "dropped")
        return model


def pid_of(executor: RayExecutor, folder: Path, resources: Resources = ONE) -> int:
    """Return the process that does the one item of one more map."""
    [answer] = executor.map(Worker(folder, its_pid), [7], resources)
    return int(results([answer])[7])


def test_one_worker_serves_map_after_map_each_with_its_own_factory(
    executor: RayExecutor, tmp_path: Path
) -> None:
    pid = pid_of(executor, tmp_path)
    answers = list(executor.map(Worker(tmp_path, square), range(3), ONE))
    assert results(answers) == {0: 0, 1: 1, 2: 4}
    assert pid_of(executor, tmp_path) == pid
    assert pids(tmp_path, "factory") == [pid] * 3
    assert set(pids(tmp_path, "run")) == {pid}


def test_what_a_factory_made_is_dropped_when_its_map_ends(
    executor: RayExecutor, tmp_path: Path
) -> None:
    assert results(list(executor.map(Loads(tmp_path), [1], ONE))) == {1: 2}
    assert until(lambda: count(tmp_path, "dropped") == 1)
    assert pid_of(executor, tmp_path) == pids(tmp_path, "dropped")[0]


def test_workers_that_are_still_starting_when_a_map_ends_are_kept_too(
    ray_cluster: None,  # noqa: F811 - the fixture imported above
    tmp_path: Path,
) -> None:
    with closing(RayExecutor(max_workers=2)) as executor:
        deadline = time.monotonic() + 20
        while len(set(pids(tmp_path, "factory"))) < 2 and time.monotonic() < deadline:
            assert len(list(executor.map(Worker(tmp_path, square), range(2), ONE))) == 2
        for _ in range(5):
            assert len(list(executor.map(Worker(tmp_path, square), range(2), ONE))) == 2
    assert len(set(pids(tmp_path, "factory"))) == 2


@pytest.mark.parametrize("other", [Resources(num_cpus=4), Resources(kept_for="another stage")])
def test_other_resources_or_work_get_new_workers_and_the_old_ones_free_theirs(
    other: Resources, executor: RayExecutor, tmp_path: Path
) -> None:
    """Four CPUs are the whole cluster."""
    old = pid_of(executor, tmp_path)
    assert pid_of(executor, tmp_path, other) != old
    assert until(lambda: not is_alive(old))


def test_a_worker_killed_between_two_maps_is_replaced_and_costs_no_attempt(
    executor: RayExecutor, tmp_path: Path
) -> None:
    for seconds_until_the_next_map in (0, 0.5):
        old = pid_of(executor, tmp_path, ONE_TRY)
        os.kill(old, signal.SIGKILL)
        time.sleep(seconds_until_the_next_map)
        [answer] = executor.map(Worker(tmp_path, its_pid), [7], ONE_TRY)
        assert results([answer])[7] != old
        assert answer.attempts == 1


def test_a_worker_whose_item_ran_too_long_is_not_used_again(
    executor: RayExecutor, tmp_path: Path
) -> None:
    resources = Resources(max_attempts=1, timeout_seconds=1)
    answers = list(executor.map(Worker(tmp_path, sleeps_at_zero), [0], resources))
    assert failures(answers)[0].error_class == "ItemTimeout"
    [late] = pids(tmp_path, "try0")
    assert pid_of(executor, tmp_path) != late
    assert until(lambda: not is_alive(late))


def test_a_worker_too_big_for_the_next_map_is_not_used_again(
    executor: RayExecutor, tmp_path: Path
) -> None:
    old = pid_of(executor, tmp_path)
    assert pid_of(executor, tmp_path, Resources(max_rss_bytes=2**20)) != old
    assert until(lambda: not is_alive(old))


def test_closing_a_map_kills_the_worker_that_has_an_item(
    executor: RayExecutor, tmp_path: Path
) -> None:
    answers: Any = executor.map(Worker(tmp_path, sleeps_at_zero), [1, 0], ONE)
    busy = next(answers).result
    assert until(lambda: count(tmp_path, "try0") == 1)
    answers.close()
    assert until(lambda: not is_alive(busy))
    assert pid_of(executor, tmp_path) != busy


def test_a_map_that_ends_after_one_of_another_kind_began_gives_its_worker_up(
    executor: RayExecutor, tmp_path: Path
) -> None:
    first: Any = executor.map(Worker(tmp_path, its_pid), [1, 2], ONE)
    old = next(first).result
    other = pid_of(executor, tmp_path, Resources(num_cpus=2))
    assert [one.result for one in first] == [old]
    assert until(lambda: not is_alive(old))
    assert pid_of(executor, tmp_path, Resources(num_cpus=2)) == other


def test_closing_the_executor_leaves_no_worker(
    ray_cluster: None,  # noqa: F811 - the fixture imported above
    tmp_path: Path,
) -> None:
    executor = RayExecutor(max_workers=1)
    pid = pid_of(executor, tmp_path)
    assert is_alive(pid)
    executor.close()
    assert until(lambda: not is_alive(pid))
