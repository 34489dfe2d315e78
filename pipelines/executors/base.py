"""What both executors share: the contract, one attempt at one item, and the count of attempts."""

from __future__ import annotations

import os
import resource
import sys
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

from manifests.errors import UserError

T = TypeVar("T")
R = TypeVar("R")
Work = Callable[[T], R]
MakeWorker = Callable[[], Callable[[T], R]]

FATAL: tuple[type[Exception], ...] = (UserError,)
"""Errors that no retry can help: `map` stops its work and raises them unchanged."""

THREAD_VARIABLES = (
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "NUMEXPR_NUM_THREADS",
    "VECLIB_MAXIMUM_THREADS",
)

ENGINE_THREADS = "WARREN_THREADS"
"""How many threads the exact engine may use, whose results do not depend on it."""


@dataclass(frozen=True, slots=True)
class Resources:
    """What one worker needs and how far one item may go.

    `num_cpus` and `num_gpus` are reserved per worker. A worker whose resident memory is above
    `max_rss_bytes` after an item is replaced. An item that runs longer than `timeout_seconds` is
    stopped. `max_attempts` counts first tries, so 1 means no retry. `kept_for` names the work for
    which idle workers are kept: what its modules have cached (a model) would only burden others.
    """

    num_cpus: float = 1
    num_gpus: float = 0
    max_rss_bytes: int | None = None
    timeout_seconds: float | None = None
    max_attempts: int = 3
    kept_for: str = ""

    def __post_init__(self) -> None:
        """Check our own call."""
        assert self.max_attempts >= 1, "an item is tried at least once"


@dataclass(frozen=True, slots=True)
class Done(Generic[T, R]):
    """An item's result. `seconds` is the last attempt's, on the worker."""

    item: T
    result: R
    attempts: int
    seconds: float
    worker: str


@dataclass(frozen=True, slots=True)
class Failed(Generic[T]):
    """An item that failed `attempts` times, with the last failure."""

    item: T
    error_class: str
    message: str
    traceback: str
    attempts: int


class Executor(Protocol):
    """Runs items on workers."""

    name: str

    def map(
        self, make_worker: MakeWorker[T, R], items: Sequence[T], resources: Resources
    ) -> Iterator[Done[T, R] | Failed[T]]:
        """Yield one Done or Failed per item, in order of completion.

        `make_worker` is called once in each worker, where it may load a model and choose a device;
        what it returns does one item and is dropped when the map ends. The process may go on to
        the next map of the same `kept_for`. Items start in the given order: longest first is best.
        Closing the iterator stops the work. Raises: the errors of FATAL, unchanged; the error of a
        `make_worker` that fails `max_attempts` times running.
        """

    def gpus_per_worker(self) -> float:
        """Return how many GPUs to reserve per worker of a stage that can use one."""

    def close(self) -> None:
        """Release workers, and the cluster if this executor started it."""


@dataclass(frozen=True, slots=True)
class Trouble:
    """Why an attempt failed."""

    error_class: str
    message: str
    traceback: str = ""

    @classmethod
    def of(cls, error: BaseException) -> Trouble:
        """Return the error's class, text and traceback as plain text, which always pickles."""
        lines = traceback.format_exception(type(error), error, error.__traceback__)
        return cls(type(error).__name__, str(error), "".join(lines))


@dataclass(frozen=True, slots=True)
class Attempt:
    """What one attempt at one item came to, as the worker saw it."""

    result: Any
    trouble: Trouble | None
    seconds: float
    rss_bytes: int


def attempt(work: Work[T, R], item: T) -> Attempt:
    """Do one item and return its result or its trouble. Raises: the errors of FATAL."""
    started = time.perf_counter()
    result, trouble = None, None
    try:
        result = work(item)
    except FATAL:
        raise
    except Exception as error:  # noqa: BLE001 - whatever a stage raises, the other items go on
        trouble = Trouble.of(error)
    return Attempt(result, trouble, time.perf_counter() - started, rss_bytes())


def rss_bytes() -> int:
    """Return this process's resident memory; where /proc is missing, its peak so far."""
    statm = Path("/proc/self/statm")
    if statm.exists():
        return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def thread_env(resources: Resources) -> dict[str, str]:
    """Return the thread counts of a worker: its whole CPUs, at least one, on every machine.

    Ray sets OMP_NUM_THREADS itself and a plain process uses every core, so without this the same
    item could be summed in another order, to other low bits, on another executor.
    """
    granted = str(max(1, int(resources.num_cpus)))
    return dict.fromkeys((*THREAD_VARIABLES, ENGINE_THREADS), granted)


@contextmanager
def environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Set environment variables for the block and put back what was there."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


class Backlog(Generic[T]):
    """The items still to be started, by position, and how often each has failed."""

    def __init__(self, items: Sequence[T], *, max_attempts: int) -> None:
        self.items = items
        self.max_attempts = max_attempts
        self.waiting = deque(range(len(items)))
        self.num_unsettled = len(items)
        self._failures = [0] * len(items)

    def done(self, index: int, tried: Attempt, *, worker: str) -> Done[T, Any]:
        """Settle an item that has a result."""
        self.num_unsettled -= 1
        attempts = self._failures[index] + 1
        return Done(self.items[index], tried.result, attempts, tried.seconds, worker)

    def fail(self, index: int, trouble: Trouble, *, has_copy: bool = False) -> Iterator[Failed[T]]:
        """Count a failed attempt; yield Failed if it was the last one.

        The item goes to the back of the queue, so that what made it fail has time to pass. With
        `has_copy` another attempt at it is still running and decides.
        """
        self._failures[index] += 1
        attempts = self._failures[index]
        if has_copy:
            return
        if attempts < self.max_attempts:
            self.waiting.append(index)
            return
        self.num_unsettled -= 1
        item = self.items[index]
        yield Failed(item, trouble.error_class, trouble.message, trouble.traceback, attempts)
