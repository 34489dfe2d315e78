"""The Ray actors of a pool: placed, loaded, given items, replaced when they die or grow too big."""

from __future__ import annotations

import logging
import os
import socket
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Any, Generic

from manifests.errors import UserError
from pipelines.executors.base import (
    FATAL,
    Attempt,
    MakeWorker,
    R,
    Resources,
    T,
    Trouble,
    Work,
    attempt,
)

if TYPE_CHECKING:
    from ray import ObjectRef

log = logging.getLogger(__name__)

STOP_SECONDS = 10.0
"""How long to wait for killed workers to be gone."""


class Phase(Enum):
    """What a worker is doing."""

    PLACING = "waits for its resources and its process"
    LOADING = "calls the worker factory"
    IDLE = "waits for an item"
    WORKING = "does an item"


@dataclass(slots=True, eq=False)
class Worker:
    """One actor, as the driver sees it. `name` is "host:pid" once it is placed."""

    actor: Any
    phase: Phase = Phase.PLACING
    name: str = ""
    index: int = -1
    started_at: float = 0.0

    @property
    def is_working(self) -> bool:
        """Whether it has an item."""
        return self.phase is Phase.WORKING

    @property
    def seconds_at_work(self) -> float:
        """How long it has had its item."""
        return time.monotonic() - self.started_at


class WorkerProcess:
    """The actor's side: the factory is called once, then items are done one by one."""

    def where(self) -> str:
        """Return this process's host and id; the answer says that the actor is placed."""
        return f"{socket.gethostname()}:{os.getpid()}"

    def load(self, make_worker: MakeWorker[Any, Any]) -> None:
        """Call the factory."""
        self._work: Work[Any, Any] = make_worker()

    def do(self, item: object) -> Attempt:
        """Do one item."""
        return attempt(self._work, item)


class Team(Generic[T, R]):
    """The workers of one `map`, and the one call that each of them has open."""

    def __init__(
        self, make_worker: MakeWorker[T, R], resources: Resources, *, env: Mapping[str, str]
    ) -> None:
        """Prepare the actor's options; `env` is set before the worker's interpreter starts."""
        import ray

        self._actor_class: Any = ray.remote(WorkerProcess).options(
            num_cpus=resources.num_cpus,
            num_gpus=resources.num_gpus,
            max_restarts=0,
            max_task_retries=0,
            runtime_env={"env_vars": dict(env)},
        )
        self._factory = ray.put(make_worker)
        self._max_rss_bytes = resources.max_rss_bytes
        self._max_failed_starts = resources.max_attempts
        self._num_failed_starts = 0
        self._workers: set[Worker] = set()
        self._calls: dict[ObjectRef[Any], Worker] = {}

    @property
    def is_placed(self) -> bool:
        """Whether any worker has its resources."""
        return any(worker.phase is not Phase.PLACING for worker in self._workers)

    def idle(self) -> list[Worker]:
        """Return the workers that are ready for an item."""
        return [worker for worker in self._workers if worker.phase is Phase.IDLE]

    def working(self) -> list[Worker]:
        """Return the workers that have an item."""
        return [worker for worker in self._workers if worker.is_working]

    def grow_to(self, num_workers: int) -> None:
        """Ask for new workers until there are that many."""
        while len(self._workers) < num_workers:
            worker = Worker(self._actor_class.remote())
            self._workers.add(worker)
            self._calls[worker.actor.where.remote()] = worker

    def advance(self, worker: Worker, ref: ObjectRef[Any]) -> None:
        """Take a starting worker one phase on. Raises: when starting fails again and again."""
        import ray

        try:
            value = ray.get(ref)
        except ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, FATAL):
                raise error.cause from None
            self._start_failed(worker, error.cause)
        except ray.exceptions.RayError as error:
            self._start_failed(worker, _died_at_start(error))
        else:
            self._step(worker, value)

    def _step(self, worker: Worker, value: str | None) -> None:
        if worker.phase is Phase.PLACING:
            worker.name = value or ""
            worker.phase = Phase.LOADING
            self._calls[worker.actor.load.remote(self._factory)] = worker
        else:
            worker.phase = Phase.IDLE
            self._num_failed_starts = 0

    def _start_failed(self, worker: Worker, error: Exception) -> None:
        """Drop the worker; give up if this was one failure too many and no other works."""
        log.warning("worker %s did not start: %s", worker.name, error)
        self.dismiss(worker)
        self._num_failed_starts += 1
        if self._num_failed_starts >= self._max_failed_starts and not self.working():
            raise error

    def give(self, worker: Worker, index: int, item: T) -> None:
        """Start an item on an idle worker."""
        worker.phase = Phase.WORKING
        worker.index = index
        worker.started_at = time.monotonic()
        self._calls[worker.actor.do.remote(item)] = worker

    def wait(self, seconds: float) -> Iterator[tuple[Worker, ObjectRef[Any]]]:
        """Wait for an answer; yield every worker that has one, unless dismissed meanwhile."""
        import ray

        if not self._calls:
            time.sleep(seconds)
            return
        refs = list(self._calls)
        ray.wait(refs, num_returns=1, timeout=seconds)
        ready, _ = ray.wait(refs, num_returns=len(refs), timeout=0)
        for ref in ready:
            worker = self._calls.pop(ref, None)
            if worker is not None:
                yield worker, ref

    def answer(self, worker: Worker, ref: ObjectRef[Any]) -> Attempt | Trouble:
        """Return what the worker's item came to; a worker that died or is too big is dropped."""
        import ray

        try:
            tried: Attempt = ray.get(ref)
        except ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, FATAL):
                raise error.cause from None
            worker.phase = Phase.IDLE
            return Trouble(type(error.cause).__name__, str(error.cause), str(error))
        except ray.exceptions.RayError as error:
            self.dismiss(worker)
            log.warning("worker %s died at an item", worker.name)
            return Trouble("WorkerDied", f"{worker.name}: {error}")
        worker.phase = Phase.IDLE
        if self._max_rss_bytes is not None and tried.rss_bytes > self._max_rss_bytes:
            log.info("worker %s holds %d bytes and is replaced", worker.name, tried.rss_bytes)
            self.dismiss(worker)
        return tried.trouble or tried

    def dismiss(self, worker: Worker) -> None:
        """Kill a worker, whatever it is doing."""
        import ray

        self._workers.discard(worker)
        self._calls = {ref: owner for ref, owner in self._calls.items() if owner is not worker}
        ray.kill(worker.actor)

    def stop(self) -> None:
        """Kill all workers and wait until their open calls have ended."""
        import ray

        if not ray.is_initialized():
            return
        refs = list(self._calls)
        for worker in list(self._workers):
            self.dismiss(worker)
        if refs:
            ray.wait(refs, num_returns=len(refs), timeout=STOP_SECONDS)


def _died_at_start(error: Exception) -> UserError:
    return UserError(
        "A Ray worker died while it started.",
        str(error).strip(),
        "If it ran out of memory, ask for more CPUs per worker so that fewer share a node; if a "
        "package is missing there, install Warren on the nodes or use `make submit`.",
    )
