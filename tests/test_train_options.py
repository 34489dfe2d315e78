"""Every combination of what trains and how: what moves, what is computed, and by which mean."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_inputs import picture
from small_llava import FAMILIES, NUM_PATCHES, save_language_model, save_tower
from test_lengths import conversation
from test_train_data import write_stage
from transformers import LlavaForConditionalGeneration

from manifests.errors import UserError
from train.config import TrainConfig
from train.data.batches import MicroBatch
from train.data.samples import Batch, Row, collate
from train.learn import model as model_module
from train.learn.loading import nf4_config
from train.learn.model import TrainedLlava
from train.learn.ranks import Ranks
from train.learn.run import train
from train.learn.step import Learner
from train.models.compose import compose

PLAN = {"global_batch_size": 8, "tokens_per_image": NUM_PATCHES, "max_length": 400}
Load = Callable[..., TrainedLlava]


def config_of(stage: str = "adapter", plan: dict[str, Any] | None = None, **more: Any) -> Any:
    values: dict[str, Any] = {
        "stage": stage,
        "template": "bunny",
        "projector_lr": 1e-2,
        "adapter_lr": 1e-2,
        "language_model_lr": 1e-2,
        "lora": {"rank": 2, "alpha": 4, "dropout": 0.0},
        "plan": PLAN | (plan or {}),
    }
    return TrainConfig.load(values | more, where="train")


def composed(folder: Path, family: str, tower: str = "siglip_vision_model") -> str:
    seen, lm = save_tower(folder / "tower", tower), save_language_model(folder / "lm", family)
    return compose(str(seen), str(lm), str(folder / "llava")).path


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> str:
    return composed(tmp_path_factory.mktemp("qwen"), "qwen2")


@pytest.fixture(scope="module")
def tied_clip(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model whose head is its embedding, and whose tower has a class token."""
    return composed(tmp_path_factory.mktemp("tied"), "smollm2", "clip_vision_model")


def micro_of(image_id: int, *, images: tuple[int, ...] = (1, 0, 2), seed: int = 0) -> MicroBatch:
    """Return random rows, with so many images each, of different lengths."""
    rng = np.random.default_rng(seed)
    rows = []
    for at, count in enumerate(images):
        text = rng.integers(0, 250, 9 + 4 * at)
        ids = np.concatenate([np.full(NUM_PATCHES * count, image_id, int), text])
        labels = np.where((ids == image_id) | (rng.random(len(ids)) < 0.4), -100, ids)
        pixels = rng.standard_normal((count, 3, 16, 16), np.float32)
        rows.append(Row(ids, labels, pixels))
    return MicroBatch(0, True, np.arange(len(rows)), rows)


def batch_of(model: TrainedLlava, **options: Any) -> Batch:
    made = collate(micro_of(model.llava.config.image_token_id), padding_id=0, **options)
    assert isinstance(made, Batch)
    return made


def learner_of(model_dir: str, config: TrainConfig) -> Learner:
    model = TrainedLlava.load(model_dir, config)
    return Learner(model, config, Ranks(0, 1, torch.device("cpu")))


def learn(learner: Learner, micros: list[MicroBatch], num_sources: int = 1) -> Any:
    return learner.step(micros, np.arange(9) % num_sources, num_sources)


def gradients(model: TrainedLlava) -> dict[str, torch.Tensor]:
    named = model.trainables().items()
    return {name: one.grad.clone() for name, one in named if one.grad is not None}


TOWER = "model.vision_tower."
PARTS = {
    "projector": ("model.multi_modal_projector.",),
    "adapter": ("model.multi_modal_projector.", "model.language_model."),
    "full": ("model.multi_modal_projector.", "model.language_model.", "lm_head."),
}


OFTEN = [
    ("qwen", "projector", 1e-2, "bfloat16"),
    ("qwen", "full", None, "float32"),
    ("tied_clip", "adapter", None, "bfloat16"),
    ("tied_clip", "full", 1e-2, "bfloat16"),
]
ALL = product(
    ("qwen", "tied_clip"),
    ("projector", "adapter", "full"),
    (None, 1e-2),
    ("float32", "bfloat16"),
)
SELDOM = [pytest.param(*one, marks=pytest.mark.slow) for one in ALL if one not in OFTEN]


@pytest.mark.parametrize(("made", "stage", "tower_lr", "dtype"), [*OFTEN, *SELDOM])
def test_each_trained_tensor_moves_and_no_frozen_one(
    made: str, stage: str, tower_lr: float | None, dtype: str, request: pytest.FixtureRequest
) -> None:
    config = config_of(stage, tower_lr=tower_lr, dtype=dtype)
    learner = learner_of(request.getfixturevalue(made), config)
    model = learner.model
    before = {name: one.clone() for name, one in model.llava.named_parameters()}
    for seed in range(2):  # in the first, an adapter's A has no gradient, as its B is zero
        learn(learner, [micro_of(model.llava.config.image_token_id, seed=seed)])
        learner.update(1.0)
    after = dict(model.llava.named_parameters())
    moved = {name for name, one in after.items() if not torch.equal(one, before[name])}
    parts = (*PARTS[stage], *([TOWER] if tower_lr else []))
    in_parts = {name for name in after if name.startswith(parts)}
    if stage == "adapter":
        inside = "model.language_model."
        in_parts = {n for n in in_parts if not n.startswith(inside) or ".lora_" in n}
    assert moved == set(model.trainables()) == in_parts
    assert {after[name].dtype for name in moved} == {torch.float32}
    frozen = {one.dtype for name, one in after.items() if name not in moved}
    assert frozen <= {getattr(torch, dtype)}
    names = {group["name"] for group in learner.optimizer.param_groups}
    language = {"adapter": {"adapter"}, "full": {"language_model"}, "projector": set()}[stage]
    assert names == {"projector", *language, *(["tower"] if tower_lr else [])}
    assert model.llava.model.vision_tower.training == (tower_lr is not None)
    tied = model.llava.lm_head.weight is model.llava.get_input_embeddings().weight
    assert tied == (made == "tied_clip")


@pytest.mark.parametrize("made", ["qwen", "tied_clip"])
def test_a_cut_tower_gives_the_same_features(made: str, request: pytest.FixtureRequest) -> None:
    model_dir = request.getfixturevalue(made)
    whole = LlavaForConditionalGeneration.from_pretrained(model_dir).eval()
    pixels = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = whole.model.vision_tower(pixels, output_hidden_states=True).hidden_states[-2]
    expected = expected[:, 1:] if made == "tied_clip" else expected
    for tower_lr in (None, 1e-3):
        model = TrainedLlava.load(model_dir, config_of("projector", tower_lr=tower_lr))
        found = model_module.tower_features(model.llava, pixels)
        assert torch.equal(found, expected)
        assert found.requires_grad == (tower_lr is not None)
        names = [name for name, _ in model.llava.named_parameters() if name.startswith(TOWER)]
        assert not any("post_layernorm" in one or ".head." in one for one in names)
        assert not any(".layers.1." in one for one in names)  # of two
        theirs = model.llava.get_image_features(pixel_values=pixels, vision_feature_layer=-1)
        ours = model.llava.model.multi_modal_projector(found)
        if made == "qwen":
            assert torch.equal(torch.stack(theirs.pooler_output), ours)


@pytest.mark.parametrize("stage", ["projector", "full"])
def test_layers_computed_again_give_the_same_gradients_also_in_the_tower(
    qwen: str, stage: str
) -> None:
    found = []
    for again in (False, True):
        config = config_of(stage, tower_lr=1e-3, gradient_checkpointing=again)
        model = TrainedLlava.load(qwen, config)
        model.losses(*batch_of(model)[:4])[0].sum().backward()
        found.append(gradients(model))
        tower = model.llava.model.vision_tower
        assert (
            any(getattr(one, "gradient_checkpointing", False) for one in tower.modules()) == again
        )
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(one, found[1][name]) for name, one in found[0].items())


@pytest.mark.parametrize("family", sorted(FAMILIES))
@pytest.mark.slow
def test_every_family_trains_in_full_beside_bfloat16(family: str, tmp_path: Path) -> None:
    learner = learner_of(composed(tmp_path, family), config_of("full", dtype="bfloat16"))
    micro = micro_of(learner.model.llava.config.image_token_id)
    first = learn(learner, [micro]).measured(("a",), 1.0)["loss"]
    learner.update(1.0)
    assert learn(learner, [micro]).measured(("a",), 1.0)["loss"] < first
    assert all(one.isfinite().all() for one in gradients(learner.model).values())


def test_logits_in_pieces_give_the_same_losses(qwen: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for most in (model_module.MOST_LOGITS_BYTES, 4 * 320 * 5):  # five tokens at once
        monkeypatch.setattr(model_module, "MOST_LOGITS_BYTES", most)
        model = TrainedLlava.load(qwen, config_of("full"))
        losses, _ = model.losses(*batch_of(model)[:4])
        losses.sum().backward()
        found.append((losses, gradients(model)))
    (whole, grads), (pieces, others) = found
    torch.testing.assert_close(whole, pieces, atol=1e-6, rtol=1e-6)
    for name, one in grads.items():
        torch.testing.assert_close(others[name], one, atol=1e-5, rtol=1e-5)


def micros_for_means(image_id: int) -> list[MicroBatch]:
    """Return micro-batches of unequal numbers of labels; one has none."""
    silent = micro_of(image_id, images=(0,), seed=7)
    silent.items[0].labels[:] = -100
    return [
        micro_of(image_id, images=(1, 0, 2)),
        silent,
        micro_of(image_id, images=(0,), seed=3),
    ]


@pytest.mark.parametrize("rule", ["global_tokens", "micro_batch_mean"])
def test_gradients_are_of_the_mean_that_is_asked_for(qwen: str, rule: str) -> None:
    learner = learner_of(qwen, config_of("full", loss_normalisation=rule))
    model = learner.model
    micros = micros_for_means(model.llava.config.image_token_id)
    tally = learn(learner, micros)
    found = gradients(model)
    model.llava.zero_grad()
    losses = []
    for micro in micros:
        batch = collate(micro, padding_id=0)
        assert isinstance(batch, Batch)
        losses.append(model.losses(*batch[:4])[0])
    with_labels = [one for one in losses if len(one)]
    assert [len(one) > 0 for one in losses] == [True, False, True]
    if rule == "global_tokens":
        expected = torch.cat(losses).mean()
    else:
        expected = torch.stack([one.mean() for one in with_labels]).mean()
    expected.backward()
    for name, one in gradients(model).items():
        torch.testing.assert_close(found[name], one, atol=1e-6, rtol=1e-4)
    assert tally.measured(("a",), 1.0)["loss"] == pytest.approx(expected.item(), rel=1e-6)
    assert tally.counts["micro_batches"] == 2


def test_losses_are_told_by_source(qwen: str) -> None:
    learner = learner_of(qwen, config_of("projector"))
    micros = micros_for_means(learner.model.llava.config.image_token_id)
    tally = learn(learner, micros, num_sources=2)
    expected = np.zeros((2, 2))
    for micro in micros:
        for at, row in enumerate(micro.items):
            alone = collate(MicroBatch(0, True, micro.rows[at : at + 1], [row]), padding_id=0)
            assert isinstance(alone, Batch)
            losses = learner.model.losses(*alone[:4])[0].detach().double()
            expected[int(micro.rows[at]) % 2] += (losses.sum(), len(losses))
    np.testing.assert_allclose(tally.by_source, expected, rtol=1e-6)


def test_empty_images_cost_a_pass_and_change_nothing(qwen: str) -> None:
    model = TrainedLlava.load(qwen, config_of("projector", tower_lr=1e-3))
    passed: list[int] = []
    tower = model.llava.model.vision_tower
    tower.register_forward_pre_hook(lambda _module, given: passed.append(len(given[0])))
    found = []
    for dummy_images in (False, True):
        batch = batch_of(model, dummy_images=dummy_images)
        model.llava.zero_grad()
        losses, _ = model.losses(*batch[:4])
        losses.sum().backward()
        found.append((losses, gradients(model)))
        assert batch.num_images == 3
    assert passed == [3, 4]
    torch.testing.assert_close(found[0][0], found[1][0], atol=1e-6, rtol=1e-6)
    for name, one in found[0][1].items():
        torch.testing.assert_close(found[1][1][name], one, atol=1e-5, rtol=1e-4)
    text = micro_of(model.llava.config.image_token_id, images=(0, 0))
    batch = collate(text, padding_id=0, dummy_images=True)
    assert isinstance(batch, Batch)
    model.llava.zero_grad()
    model.losses(*batch[:4])[0].sum().backward()
    assert passed[-1] == 2
    assert all((one == 0).all() for one in gradients(model).values())


def test_what_this_machine_lacks_is_said(qwen: str) -> None:
    with pytest.raises(UserError, match="pip install bitsandbytes"):
        TrainedLlava.load(qwen, config_of(quantize="nf4"))
    with pytest.raises(UserError, match="flash-attn"):
        TrainedLlava.load(qwen, config_of(attention="flash_attention_2"))
    with pytest.raises(UserError, match="quantized weights do not train"):
        config_of("full", quantize="nf4")
    with pytest.raises(UserError, match="not by rows"):
        config_of(plan={"rows_per_micro_batch": 2, "micro_batches_multiple_of": 2})


def test_four_bits_are_those_of_qlora() -> None:
    made = nf4_config()
    assert (made.load_in_4bit, made.bnb_4bit_quant_type) == (True, "nf4")
    assert made.bnb_4bit_use_double_quant
    assert made.bnb_4bit_compute_dtype == torch.bfloat16
    assert made.llm_int8_skip_modules == ["vision_tower", "multi_modal_projector", "lm_head"]


def test_both_attentions_give_the_same_losses(qwen: str) -> None:
    found = []
    for attention in ("sdpa", "eager"):
        model = TrainedLlava.load(qwen, config_of("projector", attention=attention))
        assert model.llava.model.language_model.config._attn_implementation == attention
        found.append(model.losses(*batch_of(model)[:4])[0])
    torch.testing.assert_close(*found, atol=1e-5, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*is deprecated:DeprecationWarning")  # both of torch's
@pytest.mark.timeout(300)
@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")  # own compiler
@pytest.mark.parametrize("again", [False, True])
def test_compiled_layers_give_the_same_losses_and_names(qwen: str, again: bool) -> None:
    found = []
    for is_compiled in (False, True):
        config = config_of(compile=is_compiled, gradient_checkpointing=again)
        model = TrainedLlava.load(qwen, config)
        losses, _ = model.losses(*batch_of(model)[:4])
        losses.sum().backward()
        found.append((losses, gradients(model), set(model.llava.state_dict())))
    torch.testing.assert_close(found[0][0], found[1][0], atol=1e-4, rtol=1e-4)
    for name, one in found[0][1].items():
        torch.testing.assert_close(found[1][1][name], one, atol=1e-3, rtol=1e-3)
    assert found[0][2] == found[1][2]


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    jpg = picture()
    rows = [
        (at, row, [jpg] * len(row.get("images", [])))
        for at, row in enumerate(map(conversation, range(20)))
    ]
    yield write_stage(tmp_path_factory.mktemp("stage") / "mix", rows)


@pytest.mark.parametrize(
    "more",
    [
        {"stage": "full", "tower_lr": 1e-3},
        {"plan": {"packing": True, "tokens_per_micro_batch": 500}},
        {
            "plan": {"rows_per_micro_batch": 3},
            "loss_normalisation": "micro_batch_mean",
            "dummy_images": True,
        },
    ],
    ids=["full", "packed", "bunny"],
)
def test_a_run_with_options_ends(
    more: dict[str, Any], qwen: str, stage: str, tmp_path: Path
) -> None:
    entries: list[dict[str, Any]] = []
    train(config_of(**more), qwen, [stage], str(tmp_path), on_step=entries.append)
    assert sum(one["rows"] for one in entries) == 20
    assert all(np.isfinite(one["loss"]) for one in entries)
    if "packing" in more.get("plan", {}):
        assert all(one["padding_share"] == 0 for one in entries)
    if "dummy_images" in more:
        assert [one["micro_batches"] for one in entries] == [3, 3, 2]
