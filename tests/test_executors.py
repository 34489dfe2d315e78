"""Both executors keep the same promises; the Ray executor survives what happens to processes."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from ray_env import ray_cluster, ray_env  # noqa: F401 - a fixture

from manifests.errors import UserError
from pipelines.executors import Done, Executor, Failed, RayExecutor, Resources, make_executor
from pipelines.executors.ray_cluster import workers_on

pytestmark = pytest.mark.timeout(120)
Work = Callable[[int], Any]
ONE = Resources()


@pytest.fixture(params=["local", pytest.param("ray", marks=pytest.mark.ray)])
def executor(request: pytest.FixtureRequest) -> Iterator[Executor]:
    if request.param == "ray":
        request.getfixturevalue("ray_cluster")
    made = make_executor(request.param, max_workers=2)
    yield made
    made.close()


@dataclass(frozen=True)
class Worker:
    """A factory that leaves a file in `folder` per call, for a work that gets the folder too."""

    folder: Path
    work: Callable[[Path, int], Any]

    def __call__(self) -> Work:
        note(self.folder, "factory")
        return lambda item: self.work(self.folder, item)


def note(folder: Path, event: str) -> None:
    (folder / f"{event}-{os.getpid()}-{uuid.uuid4().hex}").touch()


def count(folder: Path, event: str) -> int:
    return len(list(folder.glob(f"{event}-*")))


def pids(folder: Path, event: str) -> list[int]:
    return [int(path.name.split("-")[1]) for path in folder.glob(f"{event}-*")]


def until(condition: Callable[[], bool], *, seconds: float = 20) -> bool:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.02)
    return condition()


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def results(answers: Sequence[Done[int, Any] | Failed[int]]) -> dict[int, Any]:
    return {one.item: one.result for one in answers if isinstance(one, Done)}


def failures(answers: Sequence[Done[int, Any] | Failed[int]]) -> dict[int, Failed[int]]:
    return {one.item: one for one in answers if isinstance(one, Failed)}


def square(folder: Path, item: int) -> int:
    note(folder, "run")
    return item * item


def slow_square(folder: Path, item: int) -> int:
    time.sleep(0.05)
    return square(folder, item)


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
    started = count(tmp_path, "run")
    time.sleep(0.3)
    assert count(tmp_path, "run") == started < 20


def test_workers_are_counted_node_by_node() -> None:
    assert workers_on({"CPU": 8, "GPU": 1}, Resources(num_cpus=2, num_gpus=1)) == 1
    assert workers_on({"CPU": 8}, Resources(num_cpus=3)) == 2
    assert workers_on({"CPU": 8}, Resources(num_cpus=0.5)) == 16
    assert workers_on({"CPU": 8}, Resources(num_gpus=1)) == 0
    assert workers_on({}, Resources()) == 0


# Ray only: what happens to processes


@pytest.fixture
def ray_executor(ray_cluster: None) -> RayExecutor:  # noqa: F811 - the fixture imported above
    return RayExecutor(max_workers=2)


def sleeps_at_first_try(folder: Path, item: int) -> int:
    first = count(folder, f"try{item}") == 0
    note(folder, f"try{item}")
    if item == 0 and first:
        time.sleep(100)
    return item


def kills_its_process(folder: Path, item: int) -> int:
    note(folder, f"try{item}")
    if item == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return item


def never_ends(folder: Path, item: int) -> int:
    note(folder, f"try{item}")
    if item == 0:
        time.sleep(100)
    return item


def hoards_memory(folder: Path, item: int) -> int:
    HOARD.append(b"x" * (200 * 2**20))
    note(folder, "run")
    return os.getpid()


HOARD: list[bytes] = []


def returns_a_lock(_folder: Path, item: int) -> Any:
    return threading.Lock() if item == 1 else item


@pytest.mark.ray
def test_a_worker_killed_in_the_middle_of_an_item_loses_nothing(
    ray_executor: RayExecutor, tmp_path: Path
) -> None:
    def kill() -> None:
        assert until(lambda: count(tmp_path, "try0") == 1)
        os.kill(pids(tmp_path, "try0")[0], signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    answers = list(ray_executor.map(Worker(tmp_path, sleeps_at_first_try), range(12), ONE))
    killer.join()
    assert sorted(one.item for one in answers) == list(range(12))
    assert {one.item: one.attempts for one in answers}[0] == 2


@pytest.mark.ray
def test_an_item_that_kills_every_worker_is_reported_and_the_others_are_done(
    ray_executor: RayExecutor, tmp_path: Path
) -> None:
    resources = Resources(max_attempts=2)
    answers = list(ray_executor.map(Worker(tmp_path, kills_its_process), range(5), resources))
    assert results(answers) == {0: 0, 1: 1, 3: 3, 4: 4}
    assert failures(answers)[2].error_class == "WorkerDied"
    assert failures(answers)[2].attempts == count(tmp_path, "try2") == 2


@pytest.mark.ray
def test_an_item_that_runs_too_long_is_stopped_and_the_others_are_done(
    ray_executor: RayExecutor, tmp_path: Path
) -> None:
    resources = Resources(timeout_seconds=1, max_attempts=2)
    answers = list(ray_executor.map(Worker(tmp_path, never_ends), range(5), resources))
    assert results(answers) == {1: 1, 2: 2, 3: 3, 4: 4}
    assert failures(answers)[0].error_class == "ItemTimeout"
    assert failures(answers)[0].attempts == count(tmp_path, "try0") == 2
    assert until(lambda: not any(map(is_alive, pids(tmp_path, "try0"))))


@pytest.mark.ray
def test_a_caller_that_dawdles_costs_no_item_its_time_limit(
    ray_executor: RayExecutor, tmp_path: Path
) -> None:
    resources = Resources(timeout_seconds=1, max_attempts=1)
    answers = []
    for one in ray_executor.map(Worker(tmp_path, square), range(3), resources):
        time.sleep(1.1)
        answers.append(one)
    assert len(results(answers)) == 3


@pytest.mark.ray
def test_a_worker_that_holds_too_much_memory_is_replaced(
    ray_cluster: None,  # noqa: F811 - the fixture imported above
    tmp_path: Path,
) -> None:
    resources = Resources(max_rss_bytes=400 * 2**20)
    executor = RayExecutor(max_workers=1)
    answers = list(executor.map(Worker(tmp_path, hoards_memory), range(4), resources))
    assert sorted(results(answers)) == [0, 1, 2, 3]
    per_worker = [list(results(answers).values()).count(pid) for pid in results(answers).values()]
    assert max(per_worker) <= 2
    assert count(tmp_path, "factory") >= 2


@pytest.mark.ray
def test_items_are_not_submitted_ahead_of_the_workers(
    ray_executor: RayExecutor, tmp_path: Path
) -> None:
    answers = iter(ray_executor.map(Worker(tmp_path, square), range(1000), ONE))
    for num_taken in range(1, 20):
        next(answers)
        assert count(tmp_path, "run") <= num_taken + 2 * 2
    time.sleep(0.5)
    assert count(tmp_path, "run") <= 19 + 2 * 2
    answers.close()  # type: ignore[attr-defined]


@pytest.mark.ray
def test_a_straggler_is_copied_and_the_first_answer_counts(
    ray_executor: RayExecutor, tmp_path: Path
) -> None:
    started = time.monotonic()
    answers = list(ray_executor.map(Worker(tmp_path, sleeps_at_first_try), range(12), ONE))
    assert time.monotonic() - started < 40
    assert sorted(one.item for one in answers) == list(range(12))
    assert {one.attempts for one in answers} == {1}
    assert count(tmp_path, "try0") == 2
    assert until(lambda: sum(map(is_alive, pids(tmp_path, "try0"))) == 0)


@pytest.mark.ray
def test_a_result_that_cannot_travel_is_a_failure_of_its_item(
    ray_executor: RayExecutor, tmp_path: Path
) -> None:
    answers = list(ray_executor.map(Worker(tmp_path, returns_a_lock), range(3), ONE))
    assert results(answers) == {0: 0, 2: 2}
    assert failures(answers)[1].error_class == "TypeError"
    assert count(tmp_path, "factory") <= 3


@pytest.mark.ray
def test_a_worker_bigger_than_the_machine_is_refused(
    ray_executor: RayExecutor, tmp_path: Path
) -> None:
    with pytest.raises(UserError) as caught:
        list(ray_executor.map(Worker(tmp_path, square), range(3), Resources(num_cpus=64)))
    assert "64 CPUs and 0 GPUs" in caught.value.why
    assert "4 CPUs" in caught.value.why


@pytest.mark.ray
def test_a_cluster_that_stays_busy_ends_in_an_error_not_in_a_wait(
    ray_cluster: None,  # noqa: F811 - the fixture imported above
    tmp_path: Path,
) -> None:
    import ray

    holder: Any = ray.remote(threading.Event).options(num_cpus=4).remote()
    ray.get(holder.is_set.remote())
    try:
        with pytest.raises(UserError, match="None was placed within 1 s"):
            executor = RayExecutor(place_within_seconds=1)
            list(executor.map(Worker(tmp_path, square), range(3), ONE))
    finally:
        ray.kill(holder)


@pytest.mark.ray
def test_one_worker_and_four_give_the_same_results(
    ray_cluster: None,  # noqa: F811 - the fixture imported above
    tmp_path: Path,
) -> None:
    found = []
    for num_workers in (1, 4):
        folder = tmp_path / str(num_workers)
        folder.mkdir()
        executor = RayExecutor(max_workers=num_workers)
        answers = list(executor.map(Worker(folder, slow_square), range(40), ONE))
        assert len({one.worker for one in answers if isinstance(one, Done)}) == num_workers
        found.append(results(answers))
    assert found[0] == found[1] == {item: item * item for item in range(40)}


@pytest.mark.ray
def test_addresses_that_cannot_be_joined_are_explained(tmp_path: Path) -> None:
    executor = RayExecutor("http://127.0.0.1:8265")
    with pytest.raises(UserError, match="ADDRESS=http://127.0.0.1:8265"):
        list(executor.map(Worker(tmp_path, square), [1], ONE))


DRIVER = """
import sys
from pathlib import Path
from test_executors import Worker, never_ends
from pipelines.executors import RayExecutor, Resources
executor = RayExecutor(local_cpus=2)
items = [0, 0, 0]
for one in executor.map(Worker(Path(sys.argv[1]), never_ends), items, Resources()):
    pass
"""


@pytest.mark.ray
@pytest.mark.slow
def test_nothing_outlives_its_driver(tmp_path: Path) -> None:
    """One driver is killed, one is interrupted; each had a cluster of its own."""
    ends = [(signal.SIGKILL, tmp_path / "killed"), (signal.SIGINT, tmp_path / "interrupted")]
    drivers = [start_driver(folder) for _, folder in ends]
    for driver, (how, folder) in zip(drivers, ends, strict=True):
        assert until(lambda: count(folder, "try0") == 2, seconds=60)  # noqa: B023
        assert num_processes_of(driver.pid) >= 2
        driver.send_signal(how)
        assert until(lambda: not any(map(is_alive, pids(folder, "try0"))))  # noqa: B023
    errors = [driver.communicate(timeout=30)[1] for driver in drivers]
    assert errors[1].rstrip().endswith("KeyboardInterrupt")
    assert until(lambda: not any(num_processes_of(driver.pid) for driver in drivers))


def start_driver(folder: Path) -> subprocess.Popen[str]:
    folder.mkdir()
    here = Path(__file__).parent
    env = os.environ | ray_env() | {"PYTHONPATH": f"{here}:{here.parent}"}
    command = [sys.executable, "-c", DRIVER, str(folder)]
    return subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True)


def num_processes_of(driver_pid: int) -> int:
    """Return how many processes name the Ray session of that driver, whose name ends in its pid."""
    commands = [read_bytes(path) for path in Path("/proc").glob("[0-9]*/cmdline")]
    session = re.compile(rb"session_[-_0-9]+_%d\b" % driver_pid)
    return sum(bool(session.search(command)) for command in commands)


def read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return b""
