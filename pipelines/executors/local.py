"""The local executor: one item after the other, in this process. For tests and debugging."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence

from pipelines.executors.base import (
    ENGINE_THREADS,
    FATAL,
    Backlog,
    Done,
    Failed,
    MakeWorker,
    R,
    Resources,
    T,
    attempt,
    environment,
    thread_env,
)


class LocalExecutor:
    """Runs items in this process, in order, with the same retries as the Ray executor.

    It can neither stop an item that runs too long nor give memory back, so `timeout_seconds` and
    `max_rss_bytes` are not enforced, and an item that kills its process kills the run.
    """

    name = "local"

    def __init__(self, *, worker_env: Mapping[str, str] | None = None) -> None:
        self._worker_env = dict(worker_env or {})

    def map(
        self, make_worker: MakeWorker[T, R], items: Sequence[T], resources: Resources
    ) -> Iterator[Done[T, R] | Failed[T]]:
        """Yield one Done or Failed per item; see `Executor.map`.

        Thread counts are set in the environment around the work: libraries that this process has
        loaded already keep theirs.
        """
        if not items:
            return
        every_core = str(len(os.sched_getaffinity(0)))  # nothing runs beside this process's item
        env = thread_env(resources) | {ENGINE_THREADS: every_core} | self._worker_env
        backlog = Backlog(items, max_attempts=resources.max_attempts)
        with environment(env):
            work = _start(make_worker, max_attempts=resources.max_attempts)
        while backlog.waiting:
            index = backlog.waiting.popleft()
            with environment(env):
                tried = attempt(work, items[index])
            if tried.trouble is None:
                yield backlog.done(index, tried, worker=f"local:{os.getpid()}")
            else:
                yield from backlog.fail(index, tried.trouble)

    def gpus_per_worker(self) -> float:
        """Return 0: this process sees what it sees, nothing is reserved."""
        return 0

    def close(self) -> None:
        """Do nothing: there is nothing to release."""


def _start(make_worker: MakeWorker[T, R], *, max_attempts: int) -> Callable[[T], R]:
    """Call the factory, again after an error that may pass. Raises: its last error."""
    for tries_left in reversed(range(max_attempts)):
        try:
            return make_worker()
        except Exception as error:
            if isinstance(error, FATAL) or not tries_left:
                raise
    raise AssertionError("max_attempts is at least 1")
