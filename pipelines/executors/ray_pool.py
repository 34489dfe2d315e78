"""The Ray executor: a pool of Ray Core actors, one item at a time on each, and `ray.wait`.

No item is queued behind another on a worker: items take seconds to minutes and a round trip about
1 ms, so a queue would buy nothing, while without one the time limit of an item starts when it does
and the last items never wait behind a long one.

A worker takes 1 to 2 s to start, so those that are idle when a `map` ends wait for the next one.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Generic

from manifests.errors import UserError
from pipelines.executors.base import (
    Backlog,
    Done,
    Failed,
    MakeWorker,
    R,
    Resources,
    T,
    Trouble,
    thread_env,
)
from pipelines.executors.ray_cluster import RayCluster, import_path_env
from pipelines.executors.ray_team import Team
from pipelines.executors.ray_worker import Reserve, Worker, kind_of

if TYPE_CHECKING:
    from ray import ObjectRef

COPY_AFTER_SECONDS = 5.0
COPY_ABOVE_MEDIANS = 3.0
"""A running item is copied to an idle worker when it has run longer than both."""

PLACE_WITHIN_SECONDS = 120.0
"""How long a cluster may take to give the first worker its resources."""

TICK_SECONDS = 1.0
RECOUNT_SECONDS = 10.0


class RayExecutor:
    """Runs items on a pool of Ray actors; see the package's docstring for what `map` promises."""

    name = "ray"

    def __init__(
        self,
        address: str | None = None,
        *,
        max_workers: int | None = None,
        worker_env: Mapping[str, str] | None = None,
        local_cpus: int | None = None,
        place_within_seconds: float = PLACE_WITHIN_SECONDS,
    ) -> None:
        """Connect lazily, at the first `map`; `local_cpus` sizes a cluster started here."""
        self._address = address
        self._max_workers = max_workers
        self._worker_env = dict(worker_env or {})
        self._local_cpus = local_cpus
        self._place_within_seconds = place_within_seconds
        self._cluster: RayCluster | None = None
        self._reserve: Reserve | None = None

    def map(
        self, make_worker: MakeWorker[T, R], items: Sequence[T], resources: Resources
    ) -> Iterator[Done[T, R] | Failed[T]]:
        """Yield one Done or Failed per item; see `Executor.map`.

        Raises: UserError, too, when no worker can be placed or workers die as they start.
        """
        if not items:
            return
        cluster = self._connected()
        team = Team(make_worker, resources, reserve=self._reserve_for(resources))
        room = Room(
            cluster,
            resources,
            max_workers=self._max_workers,
            place_within_seconds=self._place_within_seconds,
        )
        pool = Pool(items, team, room=room, resources=resources)
        try:
            yield from pool.run()
        finally:
            team.stop(is_finished=pool.is_finished)

    def _reserve_for(self, resources: Resources) -> Reserve:
        """Return the reserve of this kind; one of another kind is closed, to free what it holds."""
        env = thread_env(resources) | import_path_env() | self._worker_env
        if self._reserve is not None and self._reserve.kind != kind_of(resources, env):
            self._close_reserve()
        if self._reserve is None:
            self._reserve = Reserve(resources, env=env)
        return self._reserve

    def _close_reserve(self) -> None:
        if self._reserve is not None:
            self._reserve.close()
            self._reserve = None

    def gpus_per_worker(self) -> float:
        """Return 1 when the cluster has any GPU, so that workers are placed where they are."""
        return 1 if self._connected().has_gpu() else 0

    def _connected(self) -> RayCluster:
        if self._cluster is None:
            self._cluster = RayCluster(self._address, local_cpus=self._local_cpus)
        return self._cluster

    def close(self) -> None:
        """Kill the kept workers and leave the cluster; end it if this executor started it."""
        self._close_reserve()
        if self._cluster is not None:
            self._cluster.close()
            self._cluster = None


class Room:
    """How many workers there is room for, and for how long there has been room for none."""

    def __init__(
        self,
        cluster: RayCluster,
        resources: Resources,
        *,
        max_workers: int | None,
        place_within_seconds: float,
    ) -> None:
        self._cluster = cluster
        self._resources = resources
        self._max_workers = max_workers
        self._place_within_seconds = place_within_seconds
        self._num_workers = 0
        self._counted_at = float("-inf")
        self._unplaced_since: float | None = None

    def num_workers(self) -> int:
        """Return how many workers the pool may have now; nodes may come and go."""
        if time.monotonic() - self._counted_at > RECOUNT_SECONDS:
            self._num_workers = self._cluster.num_workers(self._resources)
            self._counted_at = time.monotonic()
        if not self._num_workers and self._cluster.is_private:
            raise self._too_small("This machine is the whole cluster.")
        if self._max_workers is None:
            return self._num_workers
        return min(self._num_workers, self._max_workers)

    def check(self, *, is_placed: bool) -> None:
        """Note whether a worker is placed. Raises: UserError when none has been for too long."""
        now = time.monotonic()
        if is_placed:
            self._unplaced_since = None
            return
        if self._unplaced_since is None:
            self._unplaced_since = now
        if now - self._unplaced_since > self._place_within_seconds:
            raise self._too_small(f"None was placed within {self._place_within_seconds:g} s.")

    def _too_small(self, why: str) -> UserError:
        asked = f"{self._resources.num_cpus:g} CPUs and {self._resources.num_gpus:g} GPUs"
        return UserError(
            "No Ray worker can be placed.",
            f"A worker asks for {asked}; the nodes have {self._cluster.describe()}. {why}",
            "Ask for less per worker, add a node, or wait until other jobs on the cluster end.",
        )


class Pool(Generic[T, R]):
    """Hands the items to the team's workers and takes back their answers."""

    def __init__(
        self, items: Sequence[T], team: Team[T, R], *, room: Room, resources: Resources
    ) -> None:
        self._items = items
        self._team = team
        self._room = room
        self._timeout_seconds = resources.timeout_seconds
        self._backlog = Backlog(items, max_attempts=resources.max_attempts)
        self._running: dict[int, list[Worker]] = {}
        self._durations: list[float] = []

    @property
    def is_finished(self) -> bool:
        """Whether every item is done or has failed for good."""
        return not self._backlog.num_unsettled

    def run(self) -> Iterator[Done[T, R] | Failed[T]]:
        """Yield one Done or Failed per item. Workers get their next items before each yield."""
        while not self.is_finished:
            self._staff()
            answered = self._team.wait(self._tick_seconds())
            settled = [one for worker, ref in answered for one in self._take(worker, ref)]
            settled += self._stop_late()
            self._room.check(is_placed=self._team.is_placed)
            self._staff()
            yield from settled

    def _staff(self) -> None:
        """Replace lost workers and give idle ones their next item."""
        self._team.grow_to(min(self._room.num_workers(), self._backlog.num_unsettled))
        for worker in self._team.idle():
            index = self._next_item()
            if index is None:
                return
            self._team.give(worker, index, self._items[index])
            self._running.setdefault(index, []).append(worker)

    def _next_item(self) -> int | None:
        """Return the next item, else the slowest running one that deserves a copy."""
        if self._backlog.waiting:
            return self._backlog.waiting.popleft()
        if not self._durations:
            return None
        limit = max(COPY_AFTER_SECONDS, COPY_ABOVE_MEDIANS * statistics.median(self._durations))
        alone = [workers[0] for workers in self._running.values() if len(workers) == 1]
        slow = [worker for worker in alone if worker.seconds_at_work > limit]
        return max(slow, key=lambda worker: worker.seconds_at_work).index if slow else None

    def _take(self, worker: Worker, ref: ObjectRef[Any]) -> list[Done[T, R] | Failed[T]]:
        """Take one answer from a worker; an item that has a result ends its other copy."""
        if not worker.is_working:
            self._team.advance(worker, ref)
            return []
        index = worker.index
        self._running[index].remove(worker)
        answer = self._team.answer(worker, ref)
        if isinstance(answer, Trouble):
            return self._fail(index, answer)
        for other in self._running.pop(index):
            self._team.dismiss(other)
        self._durations.append(answer.seconds)
        return [self._backlog.done(index, answer, worker=worker.name)]

    def _stop_late(self) -> list[Done[T, R] | Failed[T]]:
        """Stop the workers whose item has run for too long."""
        limit = self._timeout_seconds
        if limit is None:
            return []
        settled: list[Done[T, R] | Failed[T]] = []
        for worker in [w for w in self._team.working() if w.seconds_at_work > limit]:
            self._running[worker.index].remove(worker)
            self._team.dismiss(worker)
            text = f"stopped after {limit:g} s on {worker.name}"
            settled += self._fail(worker.index, Trouble("ItemTimeout", text))
        return settled

    def _fail(self, index: int, trouble: Trouble) -> list[Done[T, R] | Failed[T]]:
        has_copy = bool(self._running[index])
        if not has_copy:
            del self._running[index]
        return list(self._backlog.fail(index, trouble, has_copy=has_copy))

    def _tick_seconds(self) -> float:
        """Return how long to wait for an answer: until the next time limit, at most a tick."""
        limit = self._timeout_seconds
        if limit is None:
            return TICK_SECONDS
        left = [limit - worker.seconds_at_work for worker in self._team.working()]
        return max(0.0, min([TICK_SECONDS, *left]))
