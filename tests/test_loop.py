"""Training steps are those of Hugging Face's own forward, and a stopped run goes on bit by bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from small_llava import NUM_PATCHES
from small_runs import (
    small_clip_phi,  # noqa: F401 - a fixture
    small_data,  # noqa: F401 - a fixture
    small_model,  # noqa: F401 - a fixture
)
from transformers import get_cosine_schedule_with_warmup

from manifests.errors import UserError
from train.config import TrainConfig
from train.data.batches import MicroBatch
from train.data.index import Index
from train.data.samples import Batch, Row, collate
from train.learn.checkpoint import TRAINED
from train.learn.log import LOG, MEASURED
from train.learn.model import TrainedLlava
from train.learn.run import DONE, train
from train.learn.step import learning_rate_share

EXACT: dict[str, Any] = {  # no dropout, as its draws depend on the cut; rates as people use them
    "lora": {"rank": 2, "alpha": 4, "dropout": 0.0},
    "projector_lr": 1e-3,
    "adapter_lr": 1e-3,
}
PLAN = {"global_batch_size": 9, "tokens_per_micro_batch": 100, "tokens_per_image": NUM_PATCHES}


def config_of(stage: str, plan: dict[str, Any] | None = None, **changes: Any) -> TrainConfig:
    values: dict[str, Any] = {
        "stage": stage,
        "template": "bunny",
        "projector_lr": 1e-2,
        "adapter_lr": 1e-2,
        "lora": {"rank": 2, "alpha": 4, "dropout": 0.3},
        "plan": PLAN | {"max_length": 250} | (plan or {}),
        "checkpoint_every_steps": 2,
    }
    return TrainConfig.load(values | changes, where="train")


def batch_of(model: TrainedLlava, *, images: tuple[int, ...] = (1, 0, 2), seed: int = 0) -> Batch:
    """Return random rows, with so many images each, of different lengths."""
    rng = np.random.default_rng(seed)
    image = model.llava.config.image_token_id
    rows = []
    for at, count in enumerate(images):
        text = rng.integers(0, 255, 9 + 4 * at)
        ids = np.concatenate([np.full(NUM_PATCHES * count, image, int), text])
        labels = np.where((ids == image) | (rng.random(len(ids)) < 0.5), -100, ids)
        pixels = rng.standard_normal((count, 3, 16, 16), np.float32)
        rows.append(Row(ids, labels, pixels))
    made = collate(MicroBatch(0, True, np.arange(len(rows)), rows), padding_id=0)
    assert isinstance(made, Batch)
    return made


def gradients(model: TrainedLlava) -> dict[str, torch.Tensor]:
    return {name: one.grad for name, one in model.trainables().items() if one.grad is not None}


@pytest.mark.parametrize("stage", ["projector", "adapter"])
@pytest.mark.parametrize("composed", ["model_dir", "clip_phi"])
def test_loss_and_gradients_are_hugging_faces(
    composed: str, stage: str, request: pytest.FixtureRequest
) -> None:
    config = config_of(stage, lora={"rank": 2, "dropout": 0.0})
    model = TrainedLlava.load(request.getfixturevalue(composed), config)
    with torch.no_grad():
        for name, one in model.trainables().items():
            one.add_(0.05 if "lora_B" in name else 0)  # else the gradient of the A is zero
    batch = batch_of(model)
    losses, rows = model.losses(batch.ids, batch.labels, batch.pixels)
    losses.mean().backward()
    ours = {name: one.clone() for name, one in gradients(model).items()}
    model.llava.zero_grad()
    lengths = torch.tensor([9 + NUM_PATCHES, 13, 17 + 2 * NUM_PATCHES])
    theirs = model.llava(
        input_ids=batch.ids,
        labels=batch.labels,
        pixel_values=batch.pixels,
        attention_mask=(torch.arange(batch.ids.shape[1]) < lengths[:, None]).long(),
    )
    theirs.loss.backward()
    torch.testing.assert_close(losses.mean(), theirs.loss, atol=1e-6, rtol=1e-6)
    assert set(ours) == set(gradients(model)) == set(model.trainables())
    for name, one in gradients(model).items():
        torch.testing.assert_close(ours[name], one, atol=2e-6, rtol=1e-4)
    trained = batch.labels[:, 1:] != -100
    assert torch.equal(rows.bincount(minlength=3), trained.sum(1))


def test_a_micro_batch_of_text_leaves_the_projector_gradients_of_zero(model_dir: str) -> None:
    model = TrainedLlava.load(model_dir, config_of("projector"))
    batch = batch_of(model, images=(0, 0))
    model.losses(batch.ids, batch.labels, batch.pixels)[0].sum().backward()
    assert set(gradients(model)) == set(model.trainables())
    assert all((one == 0).all() for one in gradients(model).values())


@pytest.mark.parametrize("stage", ["projector", "adapter"])
def test_layers_computed_again_give_the_same_gradients(model_dir: str, stage: str) -> None:
    found = []
    for again in (False, True):
        model = TrainedLlava.load(model_dir, config_of(stage, gradient_checkpointing=again))
        batch = batch_of(model)
        torch.manual_seed(0)
        model.losses(batch.ids, batch.labels, batch.pixels)[0].sum().backward()
        found.append(gradients(model))
        decoder, tower = model.llava.model.language_model, model.llava.model.vision_tower
        assert decoder.gradient_checkpointing == again
        assert not any(getattr(one, "gradient_checkpointing", False) for one in tower.modules())
        assert not model.llava.get_input_embeddings()(batch.ids).requires_grad
    assert all(torch.equal(one, found[1][name]) for name, one in found[0].items())


@pytest.mark.parametrize("stage", ["projector", "adapter"])
def test_beside_a_model_in_bfloat16_what_trains_is_in_float32(model_dir: str, stage: str) -> None:
    model = TrainedLlava.load(model_dir, config_of(stage, dtype="bfloat16"))
    batch = batch_of(model)
    losses, _ = model.losses(batch.ids, batch.labels, batch.pixels)
    losses.sum().backward()
    assert losses.dtype == torch.float32
    assert {one.dtype for one in gradients(model).values()} == {torch.float32}
    frozen = [one for one in model.llava.parameters() if not one.requires_grad]
    assert {one.dtype for one in frozen} == {torch.bfloat16}


def test_adapters_are_on_all_linear_layers_of_the_language_model_alone(model_dir: str) -> None:
    model = TrainedLlava.load(model_dir, config_of("adapter"))
    adapted = {name.split(".lora_")[0] for name in model.trainables() if ".lora_" in name}
    layers = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    assert len(adapted) == 2 * len(layers)
    assert {name.rsplit(".", 1)[1] for name in adapted} == set(layers)
    assert all(name.startswith("model.language_model.layers.") for name in adapted)


def test_layers_that_the_tower_calls_the_same_are_not_adapted(clip_phi: str) -> None:
    model = TrainedLlava.load(clip_phi, config_of("adapter"))
    adapted = [name for name in model.trainables() if ".lora_" in name]
    assert len(adapted) == 2 * 2 * 6
    assert all(name.startswith("model.language_model.layers.") for name in adapted)


def run_to_end(out: Path, config: TrainConfig, model_dir: str, data: str, **more: Any) -> list[Any]:
    """Train and return the log, without what the clock says."""
    train(config, model_dir, [data], str(out), **more)
    return log_of(out)


def log_of(out: Path) -> list[Any]:
    lines = [json.loads(line) for line in (out / LOG).read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in MEASURED} for line in lines]


class Killed(Exception):
    """Stands for the end of the process, after a step's line was written."""


def kill_at(step: int) -> Any:
    def stop(entry: dict[str, Any]) -> None:
        if entry["step"] == step:
            raise Killed

    return stop


@pytest.mark.parametrize("stage", ["projector", "adapter"])
def test_a_killed_run_goes_on_bit_by_bit(
    stage: str, model_dir: str, data: str, tmp_path: Path
) -> None:
    config = config_of(stage, epochs=2)
    whole = run_to_end(tmp_path / "whole", config, model_dir, data)
    per_epoch = len(whole) // 2
    for step in (2, per_epoch + 1):  # within the first epoch, and early in the second
        with pytest.raises(Killed):
            train(config, model_dir, [data], str(tmp_path / "cut"), on_step=kill_at(step))
    again = run_to_end(tmp_path / "cut", config, model_dir, data, num_workers=1)
    assert again == whole
    assert [line["step"] for line in whole] == list(range(2 * per_epoch))
    expected = load_file(tmp_path / "whole" / TRAINED)
    found = load_file(tmp_path / "cut" / TRAINED)
    assert set(found) == set(expected)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("stage", ["projector", "adapter"])
def test_what_trains_moves_and_nothing_else(
    stage: str, model_dir: str, data: str, tmp_path: Path
) -> None:
    config = config_of(stage)
    after = train(config, model_dir, [data], str(tmp_path))
    before = TrainedLlava.load(model_dir, config).llava.state_dict()
    moved = {n for n, one in after.llava.state_dict().items() if not torch.equal(one, before[n])}
    trained = set(after.trainables())
    assert moved == trained
    assert sum("multi_modal_projector" in name for name in trained) == 4
    assert set(load_file(tmp_path / TRAINED)) == trained


def test_the_cut_into_micro_batches_changes_only_rounding(
    model_dir: str, data: str, tmp_path: Path
) -> None:
    found = []
    for budget in (40, 2000):
        config = config_of("adapter", {"tokens_per_micro_batch": budget}, **EXACT)
        out = tmp_path / str(budget)
        found.append((run_to_end(out, config, model_dir, data), load_file(out / TRAINED)))
    (few, small), (many, large) = found
    for one, other in zip(few, many, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], abs=1e-6)
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-5)  # Adam hides a scale
        assert one["labels"] == other["labels"]
    assert max(float((small[name] - large[name]).abs().max()) for name in small) < 1e-6


def test_the_log_says_what_was_trained(model_dir: str, data: str, tmp_path: Path) -> None:
    log = run_to_end(tmp_path, config_of("projector"), model_dir, data)
    index = Index.load([data])
    assert sum(line["rows"] + line["dropped"] for line in log) == len(index)
    assert sum(line["images"] for line in log) == len(index.image_size)
    assert {name for line in log for name in line["loss_by_source"]} == set(index.sources)
    assert log[0]["lr"] == {"projector": 0}
    assert log[1]["lr"] == {"projector": 1e-2}
    assert all(0 <= line["padding_share"] < 1 for line in log)
    assert all(line["grad_norm"]["projector"] > 0 for line in log)


def test_a_finished_run_is_not_overwritten(model_dir: str, data: str, tmp_path: Path) -> None:
    (tmp_path / DONE).write_text("{}")
    with pytest.raises(UserError, match="finished run"):
        train(config_of("projector"), model_dir, [data], str(tmp_path))


def test_what_does_not_go_together_is_refused(model_dir: str, data: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no LLaVA model"):
        train(config_of("projector"), data, [data], str(tmp_path / "a"))
    with pytest.raises(UserError, match="tokens_per_image is 729"):
        train(config_of("projector", {"tokens_per_image": 729}), model_dir, [data], str(tmp_path))
    short = config_of("projector", {"max_length": 20})  # no first round is so short
    with pytest.raises(UserError, match=r"(?s)None of .* refused: {'first_round_too_long'"):
        train(short, model_dir, [data], str(tmp_path))
    short = config_of("projector", {"max_length": 20, "lengths": "estimate"})
    with pytest.raises(UserError, match="no token is trained"):
        train(short, model_dir, [data], str(tmp_path))
    with pytest.raises(UserError, match="no label to learn") as error:
        train(short, model_dir, [data], str(tmp_path), preflight=False)
    assert "9 of its rows were dropped: {'first_round_too_long': 9}" in error.value.why


def test_bunnys_recipes_are_those_published() -> None:
    one, two = TrainConfig.bunny("projector"), TrainConfig.bunny("adapter", projector_lr=1e-5)
    assert (one.template, one.image_mode, one.projector_lr) == ("plain", "square", 5e-4)
    assert (two.template, two.image_mode, two.projector_lr) == ("bunny", "pad", 1e-5)
    assert (one.plan.global_batch_size, two.plan.global_batch_size) == (256, 128)
    assert (two.lora.rank, two.lora.alpha, two.lora.dropout, two.adapter_lr) == (
        128,
        256,
        0.05,
        2e-4,
    )


def test_learning_rates_are_those_of_transformers() -> None:
    share = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    theirs = get_cosine_schedule_with_warmup(share, 3, 70)
    for step in range(70):
        expected = pytest.approx(theirs.get_last_lr()[0], abs=1e-12)
        assert learning_rate_share(step, 70, 0.03) == expected
        share.step()
        theirs.step()


def test_gradients_are_cut_to_their_largest_norm(model_dir: str, data: str, tmp_path: Path) -> None:
    found = []
    for most in (None, 1e-12):  # far below Adam's eps: a cut gradient moves nothing
        config = config_of("projector", max_grad_norm=most)
        model = train(config, model_dir, [data], str(tmp_path / str(most)))
        found.append(torch.cat([one.flatten() for one in model.trainables().values()]))
    still = TrainedLlava.load(model_dir, config_of("projector")).trainables().values()
    start = torch.cat([one.flatten() for one in still])
    moved = [float((one - start).detach().abs().max()) for one in found]
    assert moved[1] < 1e-3 * moved[0]


def test_a_changed_run_does_not_go_on_and_says_what_changed(
    model_dir: str, data: str, tmp_path: Path
) -> None:
    with pytest.raises(Killed):
        train(config_of("projector"), model_dir, [data], str(tmp_path), on_step=kill_at(2))
    other = config_of("projector", {"global_batch_size": 8}, projector_lr=1e-3)
    with pytest.raises(UserError) as error:
        train(other, model_dir, [data], str(tmp_path))
    assert "config.projector_lr: 0.01, now 0.001" in error.value.what
    assert "config.plan.global_batch_size: 9, now 8" in error.value.what
    assert "plan: " in error.value.what
    train(config_of("projector", checkpoint_every_steps=1), model_dir, [data], str(tmp_path))


def test_adapters_begin_with_the_projector_of_a_finished_run(
    model_dir: str, data: str, tmp_path: Path
) -> None:
    train(config_of("projector"), model_dir, [data], str(tmp_path / "one"))
    still = config_of("adapter", projector_lr=1e-30)
    first = str(tmp_path / "one")
    train(still, model_dir, [data], str(tmp_path / "two"), projector=first)
    before, after = (load_file(tmp_path / name / TRAINED) for name in ("one", "two"))
    assert before
    assert all(torch.equal(one, after[name]) for name, one in before.items())
