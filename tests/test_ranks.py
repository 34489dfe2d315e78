"""Several ranks learn what one process learns, by either mean, also where a rank has only text."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file
from small_runs import tiny_llava, tiny_mix
from test_loop import EXACT, config_of, log_of

from train.config import TrainConfig
from train.data.planning import PlannedRows
from train.data.samples import RowMaker
from train.learn.checkpoint import TRAINED
from train.learn.run import train

ROOT = Path(__file__).parent.parent
RULES = {"global_tokens": 500, "micro_batch_mean": 100}
"""With budgets in tokens: micro-batches of several rows, and of a row each."""
RANK = """
import json, sys
import small_llava
from torch import distributed
from train.config import TrainConfig
from train.learn.run import train
distributed.init_process_group("gloo")
for values, out in json.loads(sys.argv[1]):
    train(TrainConfig.load(values, where="train"), sys.argv[2], [sys.argv[3]], out)
distributed.destroy_process_group()
"""


def assert_unequal(configs: list[TrainConfig], model_dir: str, data: str, folder: Path) -> None:
    """Check that ranks differ in micro-batches, that one has none, and one has text alone."""
    seen = set()
    for config in configs:
        make_row = RowMaker.load(model_dir, config, image_token_id=257)
        rows = PlannedRows.read([data], None, make_row, config, str(folder))
        plan, images = rows.plan(config, epoch=0, world_size=2), np.diff(rows.index.image_starts)
        for step in range(plan.num_steps):
            first, second = (plan.micro_batches(step, rank) for rank in (0, 1))
            shown = [sum(images[rows].sum() for rows in micros) for micros in (first, second)]
            seen |= {"unequal"} if 0 < len(second) != len(first) else set()
            seen |= {"text"} if len(second) and min(shown) == 0 < max(shown) else set()
            seen |= set() if len(second) else {"none"}
    assert seen == {"unequal", "text", "none"}


def train_on_two_ranks(given: list[tuple[object, str]], model_dir: str, data: str) -> None:
    """Train one run after another, by configs and folders, on the same two ranks."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    shared |= {"GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    command = [sys.executable, "-c", RANK, json.dumps(given), model_dir, data]
    ranks = [
        subprocess.Popen(command, env={**os.environ, **shared, "RANK": str(rank)})
        for rank in range(2)
    ]
    assert [one.wait(timeout=90) for one in ranks] == [0, 0]


def test_two_ranks_with_unequal_shares_do_as_one(tmp_path: Path) -> None:
    model_dir, data = tiny_llava(tmp_path / "model"), tiny_mix(tmp_path / "data")
    configs = {
        rule: config_of(
            "adapter", {"tokens_per_micro_batch": budget}, loss_normalisation=rule, **EXACT
        )
        for rule, budget in RULES.items()
    }
    assert_unequal([*configs.values()], model_dir, data, tmp_path)
    given = [
        (config.model_dump(mode="json"), str(tmp_path / "two" / name))
        for name, config in configs.items()
    ]
    train_on_two_ranks(given, model_dir, data)
    for name, config in configs.items():
        train(config, model_dir, [data], str(tmp_path / "one" / name), preflight=False)
        assert_same(tmp_path / "one" / name, tmp_path / "two" / name)


def assert_same(one: Path, two: Path) -> None:
    """Check that two runs learnt the same but for rounding."""
    counted = ("rows", "labels", "images", "tokens", "micro_batches", "padding_share")
    for alone, shared in zip(log_of(one), log_of(two), strict=True):
        assert alone["loss"] == pytest.approx(shared["loss"], abs=1e-6)
        # Adam hides a scale
        assert alone["grad_norm"] == pytest.approx(shared["grad_norm"], rel=1e-5)
        assert [alone[name] for name in counted] == [shared[name] for name in counted]
    expected, found = load_file(one / TRAINED), load_file(two / TRAINED)
    assert max(float((found[name] - expected[name]).abs().max()) for name in expected) < 1e-6
