"""One Ray actor, seen from both sides, and the reserve of actors that wait for the next `map`."""

from __future__ import annotations

import os
import socket
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Any

from pipelines.executors.base import Attempt, MakeWorker, Resources, attempt

if TYPE_CHECKING:
    from ray import ObjectRef

Kind = tuple[float, float, str, frozenset[tuple[str, str]]]
"""What two maps must have in common to share workers: CPUs, GPUs, the work, the environment."""


class Phase(Enum):
    """What a worker is doing."""

    PLACING = "waits for its resources and its process"
    LOADING = "calls the worker factory"
    IDLE = "waits for an item"
    WORKING = "does an item"


@dataclass(slots=True, eq=False)
class Worker:
    """One actor, as the driver sees it. `name` is "host:pid" once it is placed.

    `call` is the one call it has open, None while it is idle. `rss_bytes` is its resident memory
    after its last item. `was_kept` tells that it has not yet loaded anything since it was kept.
    """

    actor: Any
    call: ObjectRef[Any] | None
    phase: Phase = Phase.PLACING
    name: str = ""
    index: int = -1
    started_at: float = 0.0
    rss_bytes: int = 0
    was_kept: bool = False

    @property
    def is_working(self) -> bool:
        """Whether it has an item."""
        return self.phase is Phase.WORKING

    @property
    def seconds_at_work(self) -> float:
        """How long it has had its item."""
        return time.monotonic() - self.started_at

    def kill(self) -> None:
        """End its process, whatever it is doing; nothing happens if it is dead."""
        import ray

        ray.kill(self.actor)


class WorkerProcess:
    """The actor's side: a factory is called, then items are done one by one, until the next one."""

    def __init__(self) -> None:
        self._work: Any = None

    def where(self) -> str:
        """Return this process's host and id; the answer says that the actor is placed."""
        return f"{socket.gethostname()}:{os.getpid()}"

    def load(self, make_worker: MakeWorker[Any, Any]) -> None:
        """Call the factory. What the one before it made is gone by then: both may be large."""
        self.forget()
        self._work = make_worker()

    def do(self, item: object) -> Attempt:
        """Do one item."""
        return attempt(self._work, item)

    def forget(self) -> None:
        """Drop what the factory made."""
        self._work = None


class Reserve:
    """The workers of one kind that no `map` has now; where there is none, it starts one.

    They hold their CPUs and GPUs, so whoever needs those for another kind closes the reserve first.
    """

    def __init__(self, resources: Resources, *, env: Mapping[str, str]) -> None:
        """Prepare the actor's options; `env` is set before the worker's interpreter starts."""
        import ray

        self.kind = kind_of(resources, env)
        self._actor_class: Any = ray.remote(WorkerProcess).options(
            num_cpus=resources.num_cpus,
            num_gpus=resources.num_gpus,
            max_restarts=0,
            max_task_retries=0,
            runtime_env={"env_vars": dict(env)},
        )
        self._kept: deque[Worker] = deque()
        self._is_closed = False

    def take(self, *, max_rss_bytes: int | None) -> Worker:
        """Return a kept worker of at most that size, an idle one if there is any, else a new one.

        Only the caller's next call to it tells whether a kept worker is still alive.
        """
        while self._kept:
            worker = self._kept.pop()
            if max_rss_bytes is None or worker.rss_bytes <= max_rss_bytes:
                return worker
            worker.kill()
        actor = self._actor_class.remote()
        return Worker(actor, actor.where.remote())

    def keep(self, worker: Worker) -> None:
        """Take a worker that has no item back; a closed reserve kills it."""
        if self._is_closed:
            worker.kill()
            return
        if worker.phase is not Phase.PLACING:
            worker.was_kept = True
            worker.actor.forget.remote()
        if worker.phase is Phase.IDLE:
            self._kept.append(worker)
        else:
            self._kept.appendleft(worker)  # the last to be taken: it is not ready yet

    def close(self) -> None:
        """Kill the kept workers, and those that come back later."""
        import ray

        self._is_closed = True
        while self._kept:
            worker = self._kept.pop()
            if ray.is_initialized():
                worker.kill()


def kind_of(resources: Resources, env: Mapping[str, str]) -> Kind:
    """Return what workers must have in common to stand in for each other."""
    variables = frozenset(env.items())
    return resources.num_cpus, resources.num_gpus, resources.kept_for, variables
