"""The Ray executor survives what happens to processes: its own, the driver's and the cluster's."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from executor_works import (
    ONE,
    Worker,
    count,
    failures,
    is_alive,
    note,
    pids,
    results,
    slow_square,
    square,
    until,
)
from ray_env import ray_cluster, ray_env  # noqa: F401 - a fixture

from manifests.errors import UserError
from pipelines.executors import Done, RayExecutor, Resources

pytestmark = pytest.mark.timeout(120)


@pytest.fixture
def ray_executor(ray_cluster: None) -> Iterator[RayExecutor]:  # noqa: F811 - imported above
    with closing(RayExecutor(max_workers=2)) as executor:
        yield executor


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
    with closing(RayExecutor(max_workers=1)) as executor:
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
    [copied] = [one.worker for one in answers if isinstance(one, Done) and one.item == 0]
    [slow] = set(pids(tmp_path, "try0")) - {int(copied.split(":")[1])}
    assert until(lambda: not is_alive(slow))


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
        with (
            pytest.raises(UserError, match="None was placed within 1 s"),
            closing(RayExecutor(place_within_seconds=1)) as executor,
        ):
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
        with closing(RayExecutor(max_workers=num_workers)) as executor:
            answers = list(executor.map(Worker(folder, slow_square), range(40), ONE))
        used = {one.worker for one in answers if isinstance(one, Done)}
        # on a busy machine the last worker may come when nothing is left to do
        assert len(used) == 1 if num_workers == 1 else 1 < len(used) <= num_workers
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
from executor_works import Worker
from test_ray_pool import never_ends
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
