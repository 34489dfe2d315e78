"""One stage of training, on one process, on several of this machine, or on a Ray cluster."""

from __future__ import annotations

import json
import logging
import os
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from threading import Thread
from typing import Any

from manifests import paths, store
from manifests.errors import StageFailed, UserError
from pipelines.executors.base import Resources
from pipelines.training.recipe import LaunchConfig

JOB = "job.json"
_GOES_ON = "The same command goes on from the last checkpoint."
STOPPED = f"Training was stopped. {_GOES_ON}"
_USER_ERROR = 2
_HERE = "127.0.0.1"
_TOLD = "user_error"
_LOOK_EVERY_S = 0.5


@dataclass(frozen=True, slots=True)
class Job:
    """The arguments of train.learn.run.train, JSON-ready."""

    config: dict[str, Any]
    model_dir: str
    data_dirs: list[str]
    out: str
    projector: str | None
    subset: str | None


def run(job: Job, config: LaunchConfig, say: Callable[[str], Any]) -> None:
    """Train, or go on with a run that was stopped. Raises: UserError, StageFailed."""
    if paths.exists(paths.join(job.out, "done.json")):
        return  # stopped between the run and its record
    if config.on == "ray":
        on_ray(job, config)
        return
    ranks = config.ranks or num_gpus()
    if ranks == 1 or "RANK" in os.environ:
        train_here(job, config, say)
    else:
        _on_processes(job, config, ranks)


def ready_for_models(*, quiet: bool = False) -> None:
    """Let transformers import torchvision beside a CPU-only torch; no bars where nobody looks."""
    from curate.media.torchvision_ops import ensure_torchvision_importable

    ensure_torchvision_importable()
    if quiet or not sys.stderr.isatty():
        from transformers.utils import logging as bars

        bars.disable_progress_bar()  # type: ignore[no-untyped-call]


def train_here(job: Job, config: LaunchConfig, say: Callable[[str], Any] | None) -> None:
    """Train in this process: alone, or as one of the ranks that the environment tells of."""
    ready_for_models(quiet=say is None)
    from train.config import TrainConfig
    from train.learn.run import train

    train(
        TrainConfig.load(job.config, where="train"),
        job.model_dir,
        job.data_dirs,
        job.out,
        projector=job.projector,
        subset=job.subset,
        num_workers=config.data_workers,
        preflight=config.preflight,
        say=say,
    )


def on_ray(job: Job, config: LaunchConfig) -> None:
    """Train on a Ray cluster, from the last checkpoint again when a rank fails.

    The cluster is the job's or RAY_ADDRESS's, or a private one of this machine. There is a rank for
    each of its GPUs, unless the config says otherwise.
    """
    ready_for_models()
    from pipelines.executors.ray_cluster import RayCluster
    from train.config import TrainConfig
    from train.learn.launch import RayRanks, train_on_ray

    cluster = RayCluster(None, local_cpus=config.ranks)
    try:
        num_gpus = cluster.num_workers(Resources(num_gpus=1)) if cluster.has_gpu() else 0
        ranks = config.ranks or max(num_gpus, 1)
        train_on_ray(
            TrainConfig.load(job.config, where="train"),
            job.model_dir,
            job.data_dirs,
            job.out,
            RayRanks(ranks, use_gpu=num_gpus > 0, max_failures=config.max_restarts),
            before=ready_for_models,
            projector=job.projector,
            subset=job.subset,
            num_workers=config.data_workers,
            preflight=config.preflight,
            say=_say,
        )
    finally:
        cluster.close()


def _say(line: str) -> None:
    sys.stderr.write(line + "\n")


def _on_processes(job: Job, config: LaunchConfig, ranks: int) -> None:
    """Train in processes of this machine, which torch's launcher starts and ends together.

    Raises: UserError, whichever rank's it is; StageFailed when a rank ends without one, or this
        process is told to stop.
    """
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig as Processes
    from torch.distributed.launcher.api import elastic_launch

    values = {"job": asdict(job), "launch": config.model_dump(mode="json")}
    store.write_json(job.out, JOB, values)
    start = elastic_launch(
        Processes(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=ranks,
            run_id=uuid.uuid4().hex,
            rdzv_backend="c10d",
            rdzv_endpoint=f"{_HERE}:0",
            local_addr=_HERE,  # a machine's own name may lead nowhere
            max_restarts=0,
        ),
        sys.executable,
    )
    try:
        with _quiet_launcher():
            start("-m", "pipelines.training.launch", paths.join(job.out, JOB))
    except ChildFailedError as error:
        raise _failure(error, ranks) from error
    except SignalException as error:
        raise StageFailed(STOPPED) from error


@contextmanager
def _quiet_launcher() -> Iterator[None]:
    """Keep the launcher's own log off the terminal: what a rank says is told instead."""
    log = logging.getLogger("torch.distributed")
    before = log.handlers, log.propagate
    log.handlers, log.propagate = [logging.NullHandler()], False
    try:
        yield
    finally:
        log.handlers, log.propagate = before


def _failure(error: Any, ranks: int) -> Exception:
    """Return what to raise for the ranks that failed. error: the launcher's ChildFailedError."""
    for one in error.failures.values():
        told = one.error_file_data.get(_TOLD)
        if told is not None:
            return UserError(*told)
    rank, first = error.get_first_failure()
    return StageFailed(
        f"rank {rank} of {ranks} ended with exit code {first.exitcode}; what it said is above. "
        f"{_GOES_ON}"
    )


def num_gpus() -> int:
    """Return how many processes this machine trains with: one for each GPU, one without any."""
    import torch

    return max(torch.cuda.device_count(), 1)


def main(path: str) -> int:
    """Train as one of several ranks, by a job file; return the exit code."""
    values = json.loads(store.read_bytes(path))
    Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    os.environ.setdefault("OMP_NUM_THREADS", str(max((os.cpu_count() or 1) // ranks_here, 1)))
    is_first = os.environ.get("RANK", "0") == "0"
    try:
        config = LaunchConfig.load(values["launch"], where="launch")
        train_here(Job(**values["job"]), config, _say if is_first else None)
    except UserError as error:
        _tell_launcher(error)
        return _USER_ERROR
    return 0


def _end_with(parent: int) -> None:
    """End this process when its parent is gone: a killed launcher ends no rank, and two runs of a
    folder would spoil each other."""
    while os.getppid() == parent:
        time.sleep(_LOOK_EVERY_S)
    os._exit(1)


def _tell_launcher(error: UserError) -> None:
    """Write the error where the launcher reads it, in its own format."""
    told = {"message": error.what, "timestamp": int(time.time())}
    told[_TOLD] = [error.what, error.why, error.fix]
    Path(os.environ["TORCHELASTIC_ERROR_FILE"]).write_text(json.dumps(told))


def _leave(code: int) -> None:
    """End this process at once: everything is written, and threads of torch's process group that
    still run may abort an interpreter that takes its time."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    _leave(main(sys.argv[1]))
