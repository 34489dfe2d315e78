"""The workers of one `map`: placed, loaded, given items, replaced if they die or grow too big."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
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
)
from pipelines.executors.ray_worker import Phase, Reserve, Worker

if TYPE_CHECKING:
    from ray import ObjectRef

log = logging.getLogger(__name__)

STOP_SECONDS = 10.0
"""How long to wait for killed workers to be gone."""


class Team(Generic[T, R]):
    """The workers of one `map`, and the one call that each of them has open."""

    def __init__(
        self, make_worker: MakeWorker[T, R], resources: Resources, *, reserve: Reserve
    ) -> None:
        """Workers come from the reserve and go back to it."""
        import ray

        self._reserve = reserve
        self._factory = ray.put(make_worker)
        self._max_rss_bytes = resources.max_rss_bytes
        self._max_failed_starts = resources.max_attempts
        self._num_failed_starts = 0
        self._workers: set[Worker] = set()

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
        """Take workers until there are that many; kept ones get the factory at once."""
        while len(self._workers) < num_workers:
            worker = self._reserve.take(max_rss_bytes=self._max_rss_bytes)
            self._workers.add(worker)
            if worker.phase is not Phase.PLACING:
                self._load(worker)

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
            if worker.was_kept:  # it may have died long ago; a new one will tell what is wrong
                log.info("worker %s died after it was kept and is replaced", worker.name)
                self.dismiss(worker)
                return
            self._start_failed(worker, _died_at_start(error))
        else:
            self._step(worker, value)

    def _step(self, worker: Worker, value: str | None) -> None:
        if worker.phase is Phase.PLACING:
            worker.name = value or ""
            self._load(worker)
        else:
            worker.phase = Phase.IDLE
            worker.was_kept = False
            self._num_failed_starts = 0

    def _load(self, worker: Worker) -> None:
        worker.phase = Phase.LOADING
        worker.call = worker.actor.load.remote(self._factory)

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
        worker.call = worker.actor.do.remote(item)

    def wait(self, seconds: float) -> Iterator[tuple[Worker, ObjectRef[Any]]]:
        """Wait for an answer; yield every worker that has one, unless dismissed meanwhile."""
        import ray

        owners = {worker.call: worker for worker in self._workers if worker.call is not None}
        if not owners:
            time.sleep(seconds)
            return
        refs = list(owners)
        ray.wait(refs, num_returns=1, timeout=seconds)
        ready, _ = ray.wait(refs, num_returns=len(refs), timeout=0)
        for ref in ready:
            worker = owners[ref]
            if worker in self._workers:
                worker.call = None
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
        worker.rss_bytes = tried.rss_bytes
        if self._max_rss_bytes is not None and tried.rss_bytes > self._max_rss_bytes:
            log.info("worker %s holds %d bytes and is replaced", worker.name, tried.rss_bytes)
            self.dismiss(worker)
        return tried.trouble or tried

    def dismiss(self, worker: Worker) -> None:
        """Kill a worker, whatever it is doing."""
        self._workers.discard(worker)
        worker.kill()

    def stop(self, *, is_finished: bool) -> None:
        """Give workers back to the reserve, kill the others, wait until their calls have ended.

        Where work was cut short a running factory counts as work. After the last item it may end:
        killed each time, a worker that loads slowly would never be ready in a row of short maps.
        """
        import ray

        if not ray.is_initialized():
            return
        kept = {Phase.IDLE, Phase.PLACING} | ({Phase.LOADING} if is_finished else set())
        calls = [worker.call for worker in self._workers if worker.phase not in kept]
        for worker in list(self._workers):
            if worker.phase in kept:
                self._workers.discard(worker)
                self._reserve.keep(worker)
            else:
                self.dismiss(worker)
        refs = [call for call in calls if call is not None]
        if refs:
            ray.wait(refs, num_returns=len(refs), timeout=STOP_SECONDS)


def _died_at_start(error: Exception) -> UserError:
    return UserError(
        "A Ray worker died while it started.",
        str(error).strip(),
        "If it ran out of memory, ask for more CPUs per worker so that fewer share a node; if a "
        "package is missing there, install Warren on the nodes or use `make submit`.",
    )
