"""One stage of training, on one process, on several of this machine, or on a Ray cluster."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from manifests import paths, store
from manifests.errors import StageFailed, UserError
from pipelines.training.recipe import LaunchConfig

JOB = "job.json"
_USER_ERROR = 2


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
    ranks = config.ranks or num_gpus()
    if config.on == "ray":
        on_ray(job, config, ranks)
    elif ranks == 1 or "RANK" in os.environ:
        train_here(job, config, say)
    else:
        _on_processes(job, config, ranks)


def train_here(job: Job, config: LaunchConfig, say: Callable[[str], Any] | None) -> None:
    """Train in this process: alone, or as one of the ranks that the environment tells of."""
    from curate.media.torchvision_ops import ensure_torchvision_importable

    ensure_torchvision_importable()
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


def on_ray(job: Job, config: LaunchConfig, ranks: int) -> None:
    """Train on a Ray cluster, from the last checkpoint again when a rank fails."""
    from curate.media.torchvision_ops import ensure_torchvision_importable

    ensure_torchvision_importable()
    import torch

    from train.config import TrainConfig
    from train.learn.launch import RayRanks, train_on_ray

    train_on_ray(
        TrainConfig.load(job.config, where="train"),
        job.model_dir,
        job.data_dirs,
        job.out,
        RayRanks(ranks, use_gpu=torch.cuda.is_available(), max_failures=config.max_restarts),
        before=ensure_torchvision_importable,
        projector=job.projector,
        subset=job.subset,
        num_workers=config.data_workers,
        preflight=config.preflight,
        say=_say,
    )


def _say(line: str) -> None:
    sys.stderr.write(line + "\n")


def _on_processes(job: Job, config: LaunchConfig, ranks: int) -> None:
    """Train in processes of this machine, which torchrun starts and ends together."""
    values = {"job": asdict(job), "launch": config.model_dump(mode="json")}
    store.write_json(job.out, JOB, values)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(ranks), "--module", "pipelines.training.launch"]
    done = subprocess.run([*command, paths.join(job.out, JOB)], check=False)
    if done.returncode:
        raise StageFailed(
            f"training on {ranks} processes ended with exit code {done.returncode}; the reason is "
            "above. The same command goes on from the last checkpoint."
        )


def num_gpus() -> int:
    """Return how many processes this machine trains with: one for each GPU, one without any."""
    import torch

    return max(torch.cuda.device_count(), 1)


def main(path: str) -> int:
    """Train as one of several ranks, by a job file; return the exit code."""
    values = json.loads(store.read_bytes(path))
    is_first = os.environ.get("RANK", "0") == "0"
    try:
        config = LaunchConfig.load(values["launch"], where="launch")
        train_here(Job(**values["job"]), config, _say if is_first else None)
    except UserError as error:
        sys.stderr.write(f"error: {error}\n" if is_first else "")
        return _USER_ERROR
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
