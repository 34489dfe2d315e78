"""Which Ray cluster to use, and how many workers fit on it.

Ray is joined only when asked: by an address, or from inside a submitted job. A cluster that happens
to run on this machine is never joined. Otherwise a private one is started for this process; it
listens on loopback only and dies with the process (the kernel ends it if the process is killed).
"""

from __future__ import annotations

import logging
import os
import sys
import sysconfig
from collections.abc import Mapping
from pathlib import Path

from manifests.errors import UserError
from pipelines.executors.base import Resources, environment

NAMESPACE = "warren"
OBJECT_STORE_BYTES = 128 * 2**20
"""Only small records travel through Ray, never images."""

PRIVATE_CLUSTER_ENV = {
    "RAY_USAGE_STATS_ENABLED": "0",  # no call home
    # Despite its name this makes Ray bind to loopback on every system when it is 0.
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
}


class RayCluster:
    """A connection to a Ray cluster, which is ended by `close` if it was made here."""

    def __init__(self, address: str | None, *, local_cpus: int | None) -> None:
        """Connect, or start a private cluster. Raises: UserError when the address is no good."""
        joined = address or os.environ.get("RAY_ADDRESS")
        self.is_private = not joined
        self._is_ours = _join(joined) if joined else _start_private(local_cpus)

    def has_gpu(self) -> bool:
        """Tell whether any node has a GPU."""
        return any(node.get("GPU", 0) >= 1 for node in _alive_nodes())

    def num_workers(self, resources: Resources) -> int:
        """Return how many workers the cluster's nodes have room for, one node at a time."""
        return sum(workers_on(node, resources) for node in _alive_nodes())

    def describe(self) -> str:
        """Return what the five largest nodes have. Example: "8 CPUs + 1 GPUs, 2 CPUs + 0 GPUs"."""
        sizes = sorted(((n.get("CPU", 0), n.get("GPU", 0)) for n in _alive_nodes()), reverse=True)
        return ", ".join(f"{cpus:g} CPUs + {gpus:g} GPUs" for cpus, gpus in sizes[:5])

    def close(self) -> None:
        """Leave the cluster; end it if it is private."""
        import ray

        if self._is_ours:
            ray.shutdown()


def workers_on(node: Mapping[str, float], resources: Resources) -> int:
    """Return how many workers fit on a node with these resources.

    Example: {"CPU": 8, "GPU": 1} holds one worker of 2 CPUs and 1 GPU.
    """
    asked = {"CPU": resources.num_cpus, "GPU": resources.num_gpus}
    fits = [int(node.get(kind, 0) / amount) for kind, amount in asked.items() if amount > 0]
    return min(fits) if fits else int(node.get("CPU", 0))


def _alive_nodes() -> list[dict[str, float]]:
    import ray

    nodes = ray.nodes()  # type: ignore[no-untyped-call]
    return [node["Resources"] for node in nodes if node["Alive"]]


def import_path_env() -> dict[str, str]:
    """Return the PYTHONPATH that lets workers import what this process can.

    In a submitted job the packaged working directory does that, and its path differs per node.
    """
    if "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ:
        return {}
    stdlib = sysconfig.get_path("stdlib")
    own = [path or str(Path.cwd()) for path in sys.path if not path.startswith(stdlib)]
    return {"PYTHONPATH": os.pathsep.join(own)}


def _start_private(num_cpus: int | None) -> bool:
    """Start a cluster for this process, unless it has one; return whether one was started."""
    with environment(PRIVATE_CLUSTER_ENV):
        import ray

        if ray.is_initialized():
            return False
        ray.init(
            address="local",
            num_cpus=num_cpus,
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
            namespace=NAMESPACE,
            object_store_memory=OBJECT_STORE_BYTES,
        )
    _keep_stdout_clean()
    return True


def _join(address: str) -> bool:
    """Connect to a running cluster, unless connected; return whether a connection was made."""
    import ray

    if "://" in address:
        raise UserError(
            f"{address} is not an address that a run can join.",
            "A run joins a cluster by its host:port; an http:// address takes submitted jobs.",
            f"Submit instead: make submit RECIPE=... ADDRESS={address}",
        )
    if ray.is_initialized():
        return False
    try:
        ray.init(
            address=address,
            log_to_driver=False,
            logging_level=logging.ERROR,
            namespace=NAMESPACE,
        )
    except (ConnectionError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        raise UserError(
            f"The Ray cluster at {address} cannot be joined.",
            str(error).strip().splitlines()[0],
            "Check that it runs, that the address is right, and that RAY_AUTH_TOKEN or "
            "~/.ray/auth_token here holds the token it was started with.",
        ) from error
    _keep_stdout_clean()
    return True


def _keep_stdout_clean() -> None:
    """Stop Ray's printing of every worker death to stdout, which `log_to_driver` does not stop.

    Stdout is for results; the pool reports deaths itself.
    """
    from ray._private import worker

    worker._worker_logs_enabled = False
