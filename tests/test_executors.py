"""Both executors keep the same promises."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
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
    note,
    pids,
    results,
    slow_square,
    square,
)
from ray_env import ray_cluster  # noqa: F401 - a fixture

from manifests.errors import UserError
from pipelines.executors import Done, Executor, Resources, make_executor
from pipelines.executors.ray_cluster import workers_on

pytestmark = pytest.mark.timeout(120)


@pytest.fixture(params=["local", pytest.param("ray", marks=pytest.mark.ray)])
def executor(request: pytest.FixtureRequest) -> Iterator[Executor]:
    if request.param == "ray":
        request.getfixturevalue("ray_cluster")
    made = make_executor(request.param, max_workers=2)
    yield made
    made.close()


def fails_once(folder: Path, item: int) -> int:
    first = count(folder, f"try{item}") == 0
    note(folder, f"try{item}")
    if first:
        raise OSError("the disk blinked")
    return item


def fails_on_three(folder: Path, item: int) -> int:
    note(folder, f"try{item}")
    if item == 3:
        raise ValueError("three is out of range")
    return item


def asks_the_user(folder: Path, item: int) -> int:
    note(folder, f"try{item}")
    if item == 1:
        raise UserError("The model is missing.", "No file m.pt.", "Give embed.model.")
    time.sleep(0.2)
    return item


def reads_environment(_folder: Path, item: int) -> str:
    return os.environ["OMP_NUM_THREADS"] + os.environ.get("WARREN_TEST", "")


def refuses_to_start() -> Work:
    raise UserError("No such architecture.", "ViT-X is unknown.", "Use ViT-L-14.")


@dataclass(frozen=True)
class StartsAtTry:
    """A factory that raises until its n-th call."""

    folder: Path
    num_tries: int

    def __call__(self) -> Work:
        note(self.folder, "factory")
        if count(self.folder, "factory") < self.num_tries:
            raise ConnectionError("the model store is busy")
        return lambda item: item


def test_every_item_comes_back_once_with_its_result(executor: Executor, tmp_path: Path) -> None:
    answers = list(executor.map(Worker(tmp_path, square), range(20), ONE))
    assert sorted(one.item for one in answers) == list(range(20))
    assert results(answers) == {item: item * item for item in range(20)}
    assert {one.attempts for one in answers} == {1}


def test_no_items_need_no_worker(executor: Executor, tmp_path: Path) -> None:
    assert list(executor.map(Worker(tmp_path, square), [], ONE)) == []
    assert count(tmp_path, "factory") == 0


def test_the_factory_is_called_once_in_each_worker(executor: Executor, tmp_path: Path) -> None:
    answers = list(executor.map(Worker(tmp_path, slow_square), range(30), ONE))
    started = pids(tmp_path, "factory")
    assert len(started) == len(set(started)) <= 2
    names = {one.worker for one in answers if isinstance(one, Done)}
    assert {int(name.split(":")[1]) for name in names} <= set(started)


def test_an_item_that_fails_once_is_done_at_its_second_attempt(
    executor: Executor, tmp_path: Path
) -> None:
    answers = list(executor.map(Worker(tmp_path, fails_once), range(5), ONE))
    assert results(answers) == {item: item for item in range(5)}
    assert {one.attempts for one in answers} == {2}


def test_an_item_that_always_fails_is_reported_and_the_others_are_done(
    executor: Executor, tmp_path: Path
) -> None:
    answers = list(executor.map(Worker(tmp_path, fails_on_three), range(8), ONE))
    assert results(answers) == {item: item for item in range(8) if item != 3}
    failed = failures(answers)[3]
    assert (failed.error_class, failed.message) == ("ValueError", "three is out of range")
    assert "in fails_on_three" in failed.traceback
    assert failed.attempts == count(tmp_path, "try3") == 3


def test_max_attempts_of_one_means_no_retry(executor: Executor, tmp_path: Path) -> None:
    answers = list(executor.map(Worker(tmp_path, fails_once), range(3), Resources(max_attempts=1)))
    assert set(failures(answers)) == {0, 1, 2}


def test_a_user_error_ends_the_map_unchanged_and_is_not_retried(
    executor: Executor, tmp_path: Path
) -> None:
    with pytest.raises(UserError) as caught:
        list(executor.map(Worker(tmp_path, asks_the_user), range(50), ONE))
    error = caught.value
    assert type(error) is UserError
    assert (error.what, error.why) == ("The model is missing.", "No file m.pt.")
    assert error.fix == "Give embed.model."
    assert count(tmp_path, "try1") == 1
    started = count(tmp_path, "try*")
    time.sleep(0.3)
    assert count(tmp_path, "try*") == started < 10


def test_a_user_error_of_the_factory_reaches_the_caller(executor: Executor) -> None:
    with pytest.raises(UserError, match="ViT-X is unknown"):
        list(executor.map(refuses_to_start, [1, 2, 3], ONE))


def test_a_factory_is_tried_again_when_its_error_may_pass(
    executor: Executor, tmp_path: Path
) -> None:
    assert results(list(executor.map(StartsAtTry(tmp_path, 3), [7], ONE))) == {7: 7}


def test_a_factory_that_never_works_raises_its_own_error(
    executor: Executor, tmp_path: Path
) -> None:
    with pytest.raises(ConnectionError, match="the model store is busy"):
        list(executor.map(StartsAtTry(tmp_path, 99), [7], ONE))


def test_thread_counts_are_the_workers_cpus_on_both_executors(
    executor: Executor, tmp_path: Path
) -> None:
    answers = executor.map(Worker(tmp_path, reads_environment), [0], Resources(num_cpus=2))
    assert results(list(answers)) == {0: "2"}


@pytest.mark.parametrize("name", ["local", pytest.param("ray", marks=pytest.mark.ray)])
def test_the_workers_environment_can_be_given(
    name: Any, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    if name == "ray":
        request.getfixturevalue("ray_cluster")
    made = make_executor(name, worker_env={"OMP_NUM_THREADS": "3", "WARREN_TEST": "!"})
    answers = list(made.map(Worker(tmp_path, reads_environment), [0], ONE))
    made.close()
    assert results(answers) == {0: "3!"}
    assert "WARREN_TEST" not in os.environ


def test_closing_the_iterator_stops_the_work(executor: Executor, tmp_path: Path) -> None:
    answers = iter(executor.map(Worker(tmp_path, slow_square), range(100), ONE))
    next(answers)
    answers.close()  # type: ignore[attr-defined]
    time.sleep(0.5)  # a worker that is being killed may still begin the item it was given
    started = count(tmp_path, "run")
    time.sleep(0.5)
    assert count(tmp_path, "run") == started < 20


def test_workers_are_counted_node_by_node() -> None:
    assert workers_on({"CPU": 8, "GPU": 1}, Resources(num_cpus=2, num_gpus=1)) == 1
    assert workers_on({"CPU": 8}, Resources(num_cpus=3)) == 2
    assert workers_on({"CPU": 8}, Resources(num_cpus=0.5)) == 16
    assert workers_on({"CPU": 8}, Resources(num_gpus=1)) == 0
    assert workers_on({}, Resources()) == 0
