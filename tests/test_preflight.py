"""Before the first step: labels are there, memory is enough, and nothing of the look remains."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from small_llava import NUM_PATCHES
from small_runs import (
    small_data,  # noqa: F401 - a fixture
    small_model,  # noqa: F401 - a fixture
)

from manifests.errors import UserError
from train.config import TrainConfig
from train.data.index import Index
from train.data.lengths import exact_columns
from train.data.plan import Plan, make_plan
from train.data.samples import RowMaker
from train.learn.checkpoint import TRAINED
from train.learn.lines import read_lines
from train.learn.log import LOG, MEASURED
from train.learn.model import TrainedLlava
from train.learn.preflight import (
    Preflight,
    look_ahead,
    look_at_rows,
    memory_errors_told,
    try_largest,
)
from train.learn.preflight_text import lines_of
from train.learn.ranks import Ranks
from train.learn.run import train
from train.learn.step import Learner

PLAN = {"global_batch_size": 5, "tokens_per_micro_batch": 600, "tokens_per_image": NUM_PATCHES}


def config_of(**changes: Any) -> TrainConfig:
    values: dict[str, Any] = {
        "stage": "adapter",
        "template": "bunny",
        "projector_lr": 1e-2,
        "lora": {"rank": 2, "alpha": 4, "dropout": 0.3},
        "plan": PLAN,
    }
    return TrainConfig.load(values | changes, where="train")


@pytest.fixture(scope="module")
def learner(model_dir: str) -> Learner:
    model = TrainedLlava.load(model_dir, config_of())
    return Learner(model, config_of(), Ranks(0, 1, torch.device("cpu")))


@pytest.fixture(scope="module")
def make_row(model_dir: str, learner: Learner) -> RowMaker:
    image_id = learner.model.llava.config.image_token_id
    return RowMaker.load(model_dir, config_of(), image_token_id=image_id)


@pytest.fixture(scope="module")
def index(data: str) -> Index:
    return Index.load([data])


def plan_of(index: Index, seed: int = 0, world_size: int = 1) -> Plan:
    plan = config_of().plan
    return make_plan(index.columns(), seed=seed, epoch=0, config=plan, world_size=world_size)


@pytest.fixture(scope="module")
def seen(index: Index, make_row: RowMaker, learner: Learner) -> Preflight:
    return look_ahead(plan_of(index), index, make_row, learner)


def test_a_look_ahead_changes_no_weight_and_no_line(
    model_dir: str, data: str, tmp_path: Path
) -> None:
    found = []
    for preflight in (False, True):
        out = tmp_path / str(preflight)
        train(config_of(), model_dir, [data], str(out), preflight=preflight)
        log = [
            {k: v for k, v in one.items() if k not in MEASURED}
            for one in read_lines(f"{out}/{LOG}")
        ]
        found.append((log, load_file(out / TRAINED)))
    (log, trained), (log_after, trained_after) = found
    assert log == log_after
    assert all(torch.equal(trained[name], trained_after[name]) for name in trained)


def test_sources_are_counted_as_they_will_be_trained(
    seen: Preflight, index: Index, make_row: RowMaker
) -> None:
    for at, one in enumerate(seen.sources):
        rows = [make_row(index.sample(int(row))) for row in np.flatnonzero(index.source == at)]
        assert (one.name, one.rows, one.dropped) == (index.sources[at], len(rows), {})
        labels = [row.labels for row in rows if not isinstance(row, str)]
        assert one.trained == sum((label != -100).sum() for label in labels)
        assert one.tokens == sum(map(len, labels))
        assert 0 < one.trained_share < 1


def test_a_source_of_which_nothing_is_trained_is_refused(
    model_dir: str, data: str, tmp_path: Path
) -> None:
    short = config_of(plan=PLAN | {"max_length": 215})  # all questions of an image are longer
    with pytest.raises(UserError, match="no token is trained") as error:
        train(short, model_dir, [data], str(tmp_path))
    assert "first_round_too_long" in error.value.why
    assert "plan.weights." in error.value.fix


def test_the_largest_micro_batch_is_the_one_that_is_tried(
    index: Index, make_row: RowMaker, learner: Learner
) -> None:
    for num_ranks in (1, 3):
        plan = plan_of(index, seed=1, world_size=num_ranks)
        places = product(range(plan.num_steps), range(num_ranks))
        micros = [micro for place in places for micro in plan.micro_batches(*place)]
        lengths = index.columns().lengths(config_of().plan)
        images = np.diff(index.image_starts)
        sizes = [(len(one) * lengths[one].max(), images[one].sum()) for one in micros]
        most = max(sizes)
        seen = try_largest(plan, index, make_row, learner)
        assert (seen.rows, seen.images) in {
            (len(one), images[one].sum())
            for one, size in zip(micros, sizes, strict=True)
            if size == most
        }
        assert seen.memory > 0
        assert all(one.grad is None for one in learner.trained.values())


@pytest.mark.parametrize("dummy_images", [False, True])
def test_a_packed_micro_batch_is_tried_packed(
    model_dir: str, index: Index, make_row: RowMaker, dummy_images: bool
) -> None:
    packed = {**PLAN, "packing": True}
    config = config_of(plan=packed, dummy_images=dummy_images)
    model = TrainedLlava.load(model_dir, config)
    learner = Learner(model, config, Ranks(0, 1, torch.device("cpu")))
    columns = exact_columns(
        index, make_row.measure, str(Path(model_dir)), key=make_row.measures_by
    ).columns
    plan = make_plan(columns, seed=0, epoch=0, config=config.plan, world_size=1)
    seen = try_largest(plan, index, make_row, learner)
    assert seen.padded_tokens == plan.padded.max()
    at = int(plan.padded.argmax())
    rows = plan.rows[plan.starts[at] : plan.stops[at]]
    images = np.diff(index.image_starts)[rows]
    assert (seen.rows, seen.images) == (
        len(rows),
        images.sum() + dummy_images * (images == 0).sum(),
    )


def test_too_little_memory_says_what_to_lower() -> None:
    with pytest.raises(UserError, match="9000 tokens padded") as error, memory_errors_told(9000):
        torch.empty(1 << 50)
    assert "plan.tokens_per_micro_batch" in error.value.fix
    assert "gradient_checkpointing" in error.value.fix
    with pytest.raises(RuntimeError, match="shape"), memory_errors_told(9000):
        torch.zeros(2) @ torch.zeros(3, 3)


def test_previews_show_what_is_trained(seen: Preflight, index: Index, make_row: RowMaker) -> None:
    rows = np.arange(len(index))
    shown = look_at_rows(index, rows, make_row, previews_per_source=2)
    assert [len(one.previews) for one in shown] == [2] * len(index.sources)
    text = "\n".join(lines_of(replace(seen, sources=shown), width=2000))
    assert f"<image x {NUM_PATCHES}>" in text
    assert "ASSISTANT:⟦ It is" in text
    coloured = look_at_rows(index, rows, make_row, previews_per_source=1, colour=True)
    assert "\x1b[32m It is" in "".join(one.previews[0] for one in coloured)


def test_plan_facts_are_those_of_the_plan(seen: Preflight, index: Index) -> None:
    plan, facts = plan_of(index), seen.plan
    assert (facts.steps, facts.samples) == (plan.num_steps, len(index))
    assert facts.micro_batches == len(plan.starts)
    assert facts.idle == 0
    assert facts.padding == 1 - plan.lengths.sum() / plan.padded.sum()
    assert f"{plan.num_steps} steps of {len(index)} samples" in "\n".join(lines_of(seen))
