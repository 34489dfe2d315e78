"""Packed samples are read as if each were alone: no loss, no gradient crosses between them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from small_llava import FAMILIES
from test_plan import columns, plan_of
from test_train_options import Batch, composed, config_of, micro_of

from manifests.errors import UserError
from train.data.batches import MicroBatch
from train.data.samples import Row, collate
from train.learn.model import TrainedLlava
from train.learn.packing import check_packing


def packed(micro: MicroBatch) -> Batch:
    made = collate(micro, padding_id=0, packing=True)
    assert isinstance(made, Batch)
    return made


def changed(micro: MicroBatch, sample: int) -> MicroBatch:
    """Return the same with other text in one sample."""
    row = micro.items[sample]
    ids = np.where(row.ids < 250, (row.ids + 17) % 250, row.ids)
    items = [*micro.items]
    items[sample] = Row(ids, row.labels, row.pixels)
    return MicroBatch(0, True, micro.rows, items)


OFTEN = ("gemma3", "minicpm3", "phi", "qwen2")  # of each kind one; all others are slow
SELDOM = [pytest.param(one, marks=pytest.mark.slow) for one in FAMILIES if one not in OFTEN]


@pytest.mark.parametrize("family", [*OFTEN, *SELDOM])
def test_packed_samples_do_not_see_each_other(family: str, tmp_path: Path) -> None:
    config = config_of("full", {"packing": True}, language_model_lr=1e-3)
    model = TrainedLlava.load(composed(tmp_path, family), config)
    micro = micro_of(model.llava.config.image_token_id, images=(1, 0, 2, 0))
    for row in micro.items:
        row.labels[0] = 5  # a first token is not predicted by the sample before it
    side_by_side = collate(micro, padding_id=0)
    assert isinstance(side_by_side, Batch)
    expected, rows = model.losses(*side_by_side[:4])
    losses, samples = model.losses(*packed(micro)[:4])
    assert torch.equal(rows, samples)
    torch.testing.assert_close(losses, expected, atol=1e-5, rtol=1e-5)
    for sample in range(4):
        others, _ = model.losses(*packed(changed(micro, sample))[:4])
        same = losses == others
        assert same[samples != sample].all()
        assert not same[samples == sample].all()
    model.check_packing()


def test_a_sample_has_no_gradient_of_anothers_loss(tmp_path: Path) -> None:
    config = config_of("projector", {"packing": True})
    model = TrainedLlava.load(composed(tmp_path, "qwen2"), config)
    batch = packed(micro_of(model.llava.config.image_token_id, images=(1, 0, 2, 0)))
    pixels = batch.pixels.requires_grad_()
    embedding: Any = model.llava.get_input_embeddings()
    inputs: list[torch.Tensor] = []

    def keep(_module: Any, _given: Any, out: torch.Tensor) -> torch.Tensor:
        inputs.append(out.requires_grad_())
        return out

    embedding.register_forward_hook(keep)
    losses, samples = model.losses(batch.ids, batch.labels, pixels, batch.positions)
    assert batch.positions is not None
    sample_of = (batch.positions[0] == 0).cumsum(0) - 1
    for sample in range(4):
        total = losses[samples == sample].sum()
        (grad,) = torch.autograd.grad(total, inputs[0], retain_graph=True)
        touched = grad[0].abs().sum(-1) > 0
        assert touched[sample_of == sample].any()
        assert not touched[sample_of != sample].any()


def test_a_model_that_mixes_samples_is_refused() -> None:
    config = transformers.Lfm2Config(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        layer_types=["conv", "full_attention"],
        pad_token_id=0,
    )
    torch.manual_seed(0)
    decoder = transformers.AutoModel.from_config(config)
    with pytest.raises(UserError, match="Lfm2Model cannot read packed samples"):
        check_packing(decoder, torch.randn(17, 16))


@pytest.mark.parametrize("seed", range(3))
def test_packed_micro_batches_hold_as_much_as_fits(seed: int) -> None:
    budget = 1500
    data = columns(90, seed=seed)
    plan = plan_of(data, global_batch_size=40, tokens_per_micro_batch=budget, packing=True)
    for step in range(plan.num_steps):
        lengths = plan.lengths[plan.step_starts[step] : plan.step_starts[step + 1]].tolist()
        expected, at = [], 0
        while at < len(lengths):  # one after another, as long as the sum allows
            stop = at + 1
            while stop < len(lengths) and sum(lengths[at : stop + 1]) <= budget:
                stop += 1
            expected.append(lengths[at:stop])
            at = stop
        first, last = plan.firsts[step : step + 2]
        spans = zip(plan.starts[first:last], plan.stops[first:last], strict=True)
        found = [plan.lengths[start:end].tolist() for start, end in spans]
        assert sorted(found) == sorted(expected)
        assert plan.padded[first:last].tolist() == [sum(one) for one in found]


def test_fixed_rows_are_cut_in_the_order_of_the_draws() -> None:
    data = columns(50)
    plan = plan_of(data, global_batch_size=20, rows_per_micro_batch=8, seed=4)
    sorted_plan = plan_of(data, global_batch_size=20, seed=4)
    for step, sizes in enumerate([[8, 8, 4], [8, 8, 4], [8, 2]]):
        micros = plan.micro_batches(step, 0)
        assert sorted(map(len, micros)) == sorted(sizes)
        draws = plan.batch(step).tolist()
        assert sorted(draws) == sorted(sorted_plan.batch(step).tolist())
        cut = [draws[at : at + 8] for at in range(0, len(draws), 8)]
        assert sorted(micro.tolist() for micro in micros) == sorted(cut)
        first, last = plan.firsts[step : step + 2]
        longest = [
            plan.lengths[start:end].max() * (end - start)
            for start, end in zip(plan.starts[first:last], plan.stops[first:last], strict=True)
        ]
        assert plan.padded[first:last].tolist() == longest
