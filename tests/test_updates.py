"""One update: each group by its own rate, what decays, what is cut; and what is in bfloat16."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from test_train_options import composed, config_of, gradients, learn, learner_of, micro_of

from train.learn.model import TrainedLlava
from train.learn.ranks import Ranks
from train.learn.step import Learner

RATES = {"projector": 1e-3, "adapter": 2e-3, "language_model": 3e-3, "tower": 4e-3}


@pytest.fixture(scope="module")
def phi(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model with biases and norms everywhere."""
    return composed(tmp_path_factory.mktemp("phi"), "phi")


def learnt(model_dir: str, stage: str, **more: Any) -> Learner:
    """Return a learner with the gradients of one micro-batch."""
    rates = {f"{name}_lr": rate for name, rate in RATES.items()}
    learner = learner_of(model_dir, config_of(stage, eps=1e-30, **{**rates, **more}))
    learn(learner, [micro_of(learner.model.llava.config.image_token_id)])
    return learner


def values(learner: Learner) -> dict[str, torch.Tensor]:
    return {name: one.detach().clone() for name, one in learner.trained.items()}


@pytest.mark.parametrize("stage", ["adapter", "full"])
def test_each_group_moves_by_its_own_rate(phi: str, stage: str) -> None:
    learner = learnt(phi, stage)
    before = {
        name: [one.detach().clone() for one in group] for name, group in learner.groups.items()
    }
    learner.update(0.5)
    for (
        name,
        group,
    ) in learner.groups.items():  # Adam's first step is the rate, whatever the gradient
        pairs = zip(group, before[name], strict=True)
        furthest = max(float((one.detach() - old).abs().max()) for one, old in pairs)
        assert furthest == pytest.approx(0.5 * RATES[name], rel=1e-3)
    assert learner.rates() == {name: 0.5 * RATES[name] for name, _ in learner.groups.items()}


def test_matrices_decay_and_biases_and_norms_do_not(phi: str) -> None:
    learner = learnt(phi, "full", weight_decay=0.1)
    for one in learner.trained.values():
        one.grad = torch.zeros_like(one)
    before = values(learner)
    learner.update(1.0)
    vectors = {name for name, one in before.items() if one.ndim == 1}
    assert any("layernorm" in name for name in vectors)
    assert any(name.endswith(".bias") for name in vectors)
    for name, group in learner.groups.items():
        shrunk = {id(one): 1 - 0.1 * RATES[name] * (one.ndim > 1) for one in group}
        for full, one in learner.trained.items():
            if id(one) in shrunk:
                torch.testing.assert_close(one.detach(), before[full] * shrunk[id(one)])


def test_gradients_are_cut_over_all_groups_together(phi: str) -> None:
    learner = learnt(phi, "adapter", max_grad_norm=1e-2)
    before = gradients(learner.model)
    whole = torch.cat([one.flatten() for one in before.values()]).norm()
    norms = learner.update(1.0)
    assert torch.tensor([*norms.values()]).norm() == pytest.approx(float(whole), rel=1e-5)
    assert float(whole) > 1e-2
    for name, one in gradients(learner.model).items():
        torch.testing.assert_close(one, before[name] * (1e-2 / whole), rtol=1e-3, atol=0)
    uncut = learnt(phi, "adapter", max_grad_norm=float(whole) * 2)
    uncut.update(1.0)
    assert all(torch.equal(one, before[name]) for name, one in gradients(uncut.model).items())


def seen_inside(model: TrainedLlava) -> tuple[torch.Tensor, set[torch.dtype]]:
    """Return the tower's features, and the dtypes that adapters' dropouts are given."""
    features: list[torch.Tensor] = []
    dtypes: set[torch.dtype] = set()
    model.llava.model.vision_tower.register_forward_hook(
        lambda _module, _given, out: features.append(out.last_hidden_state)
    )
    for name, module in model.llava.named_modules():
        if name.endswith("down_proj.lora_dropout.default"):
            module.register_forward_hook(lambda _module, given, _out: dtypes.add(given[0].dtype))
    micro = micro_of(model.llava.config.image_token_id)
    learn(Learner(model, config_of("adapter"), Ranks(0, 1, torch.device("cpu"))), [micro])
    return features[0], dtypes


def test_beside_bfloat16_a_frozen_tower_and_the_adapters_read_bfloat16(tmp_path: Path) -> None:
    model_dir = composed(tmp_path, "qwen2")
    lora = {"rank": 2, "alpha": 4, "dropout": 0.1}
    first, second = (
        seen_inside(TrainedLlava.load(model_dir, config_of(stage, dtype="bfloat16", lora=lora)))
        for stage in ("projector", "adapter")
    )
    assert first[0].dtype == torch.bfloat16
    assert torch.equal(first[0], second[0])  # as it was in stage 1, and will be when served
    assert second[1] == {torch.bfloat16}
