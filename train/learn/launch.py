"""A run on several ranks, started by Ray: on one machine or a cluster, restarted when one dies.

Each rank calls `train` as torchrun's would. Ray starts the ranks and joins them in a process group.
When one of them dies, it starts all of them again, and `train` goes on from its own checkpoint.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from manifests import paths
from manifests.errors import UserError
from train.config import TrainConfig
from train.learn.ranks import LONGEST_WAIT_S
from train.learn.run import train


@dataclass(frozen=True)
class RayRanks:
    """How Ray runs a stage. Each rank takes cpus_per_rank CPUs and, with use_gpu, a GPU.

    max_failures: how often the ranks are started again, -1 for always. A node that is taken away
    does not count.
    """

    num_ranks: int
    use_gpu: bool = False
    cpus_per_rank: float = 1
    max_failures: int = 3


def train_on_ray(
    config: TrainConfig,
    model_dir: str,
    data_dirs: list[str],
    out: str,
    ranks: RayRanks,
    *,
    before: Callable[[], None] | None = None,
    **more: Any,
) -> None:
    """Train one stage on Ray's cluster: the running one, or else one that is started here.

    Args:
        model_dir, data_dirs, out: as of `train`; every node must reach them under the same path.
        before: is called in each rank's process before it trains, to get it ready.
        more: further arguments of `train`. What is called there, such as say, is called in rank 0's
            process and must be picklable.
    Raises: UserError as `train`; ray.train.TrainingFailedError when ranks died too often.
    """
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    arguments: dict[str, Any] = {
        "model_dir": paths.absolute(model_dir),
        "data_dirs": [paths.absolute(one) for one in data_dirs],
        "out": paths.absolute(out),
        **more,
    }
    notes = paths.join(arguments["out"], "ray")
    trainer: Any = TorchTrainer  # its types are those of an older interface
    run = trainer(
        _Rank(config.model_dump(mode="json"), arguments, before),
        torch_config=TorchConfig(timeout_s=LONGEST_WAIT_S),
        scaling_config=ScalingConfig(
            num_workers=ranks.num_ranks,
            use_gpu=ranks.use_gpu,
            resources_per_worker={"CPU": ranks.cpus_per_rank, "GPU": int(ranks.use_gpu)},
        ),
        run_config=RunConfig(
            name=f"train-{uuid.uuid4().hex[:8]}",  # Ray would go on with a run of the same name
            storage_path=notes,
            failure_config=FailureConfig(max_failures=ranks.max_failures),
        ),
    )
    try:
        result = run.fit()
    finally:
        fs, local = paths.filesystem(notes)
        if fs.exists(local):
            fs.rm(local, recursive=True)
    if result.return_value is not None:
        raise UserError(*result.return_value)


@dataclass(frozen=True)
class _Rank:
    """What each rank's process does."""

    config: Mapping[str, Any]
    arguments: dict[str, Any] = field(default_factory=dict)
    before: Callable[[], None] | None = None

    def __call__(self) -> tuple[str, str, str] | None:
        """Train. A UserError is returned, as Ray would start again after one that is raised."""
        from ray.train.torch import get_device

        if self.before is not None:
            self.before()
        device = get_device()
        if isinstance(device, torch.device) and device.type == "cuda":
            torch.cuda.set_device(device)
        try:
            train(TrainConfig.load(self.config, where="train"), **self.arguments)
        except UserError as error:
            return error.what, error.why, error.fix
        return None
