"""A run on Ray's ranks ends as one process does, also when a rank dies on the way."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from ray_env import ray_cluster  # noqa: F401 - a fixture
from safetensors.torch import load_file
from small_inputs import run_here, stages
from small_llava import NUM_PATCHES, save_language_model, save_tower
from small_mixes import mix_recipe

from curate.media.torchvision_ops import ensure_torchvision_importable
from manifests.errors import UserError
from train.config import TrainConfig
from train.learn.checkpoint import TRAINED
from train.learn.launch import RayRanks, train_on_ray
from train.learn.lines import read_lines
from train.learn.log import LOG
from train.learn.run import train
from train.models.compose import compose

pytestmark = [
    pytest.mark.ray,
    pytest.mark.timeout(300),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:ray"),  # of its own, when imported
]


@pytest.fixture(scope="module", autouse=True)
def sent_by_value() -> Iterator[None]:
    """Ray's processes cannot import this file."""
    import ray.cloudpickle

    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    yield
    ray.cloudpickle.unregister_pickle_by_value(sys.modules[__name__])


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, list[str]]:
    folder = tmp_path_factory.mktemp("inputs")
    tower, lm = save_tower(folder / "tower"), save_language_model(folder / "lm", "qwen2")
    mixed = stages(run_here(mix_recipe(folder / "in", num_rows=9), folder / "run"))["mix"].path
    return compose(str(tower), str(lm), str(folder / "llava")).path, [str(mixed)]


def config_of(**changes: Any) -> TrainConfig:
    values: dict[str, Any] = {
        "stage": "adapter",
        "template": "bunny",
        "projector_lr": 1e-3,
        "adapter_lr": 1e-3,
        "lora": {"rank": 2, "alpha": 4, "dropout": 0.0},  # its draws depend on the ranks
        "plan": {
            "global_batch_size": 5,
            "tokens_per_micro_batch": 250,
            "tokens_per_image": NUM_PATCHES,
        },
        "checkpoint_every_steps": 1,
    }
    return TrainConfig.load(values | changes, where="train")


class DiesOnce:
    """Kills its process after a step, the first time."""

    def __init__(self, note: Path, step: int) -> None:
        self.note = note
        self.step = step

    def __call__(self, entry: dict[str, Any]) -> None:
        if entry["step"] == self.step and not self.note.exists():
            self.note.write_text("died")
            os.kill(os.getpid(), signal.SIGKILL)


def on_ray(
    config: TrainConfig,
    inputs: tuple[str, list[str]],
    out: Path,
    *,
    num_ranks: int = 1,
    max_failures: int = 0,
    **more: Any,
) -> None:
    ranks = RayRanks(num_ranks, max_failures=max_failures)
    before = ensure_torchvision_importable
    train_on_ray(config, *inputs, str(out), ranks, before=before, **more)


@pytest.mark.usefixtures("ray_cluster")
def test_a_run_on_ray_is_that_of_one_process(inputs: tuple[str, list[str]], tmp_path: Path) -> None:
    train(config_of(), *inputs, str(tmp_path / "alone"))
    on_ray(config_of(), inputs, tmp_path / "ray")
    expected, found = (load_file(tmp_path / name / TRAINED) for name in ("alone", "ray"))
    assert all(torch.equal(found[name], one) for name, one in expected.items())
    assert not (tmp_path / "ray" / "ray").exists()


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_what_a_person_can_mend_comes_back_and_is_not_tried_again(
    inputs: tuple[str, list[str]], tmp_path: Path
) -> None:
    short = config_of(plan={"max_length": 20, "tokens_per_image": NUM_PATCHES})
    with pytest.raises(UserError, match="no token is trained"):
        on_ray(short, inputs, tmp_path / "ray", num_ranks=2, max_failures=-1)


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_a_run_whose_rank_is_killed_goes_on_and_ends_as_one_process(
    inputs: tuple[str, list[str]], tmp_path: Path
) -> None:
    train(config_of(), *inputs, str(tmp_path / "alone"))
    dies = DiesOnce(tmp_path / "died", step=3)
    on_ray(config_of(), inputs, tmp_path / "ray", num_ranks=2, max_failures=1, on_step=dies)
    assert (tmp_path / "died").exists()
    expected, found = (load_file(tmp_path / name / TRAINED) for name in ("alone", "ray"))
    assert max(float((found[name] - expected[name]).abs().max()) for name in expected) < 1e-6
    steps = [one["step"] for one in read_lines(str(tmp_path / "ray" / LOG))]
    assert steps == [*range(len(steps))]
