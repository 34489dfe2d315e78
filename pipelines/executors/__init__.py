"""Executors run one stage's items: in this process, or on a Ray cluster. One method, `map`.

    executor = make_executor("ray")
    for answer in executor.map(make_worker, items, Resources(num_cpus=1)):
        ...                         # Done or Failed, in order of completion
    executor.close()

Work must be idempotent: an attempt may be killed at any point and run again elsewhere.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from pipelines.executors.base import FATAL, Done, Executor, Failed, Resources
from pipelines.executors.local import LocalExecutor
from pipelines.executors.ray_pool import RayExecutor

__all__ = [
    "FATAL",
    "Done",
    "Executor",
    "Failed",
    "LocalExecutor",
    "RayExecutor",
    "Resources",
    "make_executor",
]


def make_executor(
    name: Literal["local", "ray"],
    *,
    address: str | None = None,
    max_workers: int | None = None,
    worker_env: Mapping[str, str] | None = None,
) -> Executor:
    """Return the executor of that name.

    Args:
        address: "host:port" of a running Ray cluster; None starts one in this process, or joins
            the cluster whose submitted job this is.
        max_workers: upper bound on Ray workers; None takes all that the cluster has room for.
        worker_env: environment variables for the workers, over `base.thread_env`.
    """
    if name == "local":
        return LocalExecutor(worker_env=worker_env)
    return RayExecutor(address, max_workers=max_workers, worker_env=worker_env)
