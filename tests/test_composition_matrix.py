"""Every language model with every tower: Hugging Face's own forward, and training on it.

A cell of the matrix is a pair. Towers differ only before the projector, so CLIP is run with two
language models in every run, and with all of them among the long proofs.
"""

from __future__ import annotations

import importlib
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from small_llava import (
    FAMILIES,
    NUM_PATCHES,
    NUM_ROWS,
    REFUSED,
    SIDE,
    save_language_model,
    small_towers,  # noqa: F401 - a fixture
)
from torch import nn

from manifests.errors import UserError
from train.config import TrainConfig
from train.learn.model import TrainedLlava
from train.models.compose import Composed, compose
from train.models.towers import read_language_model

peft = importlib.import_module("peft")  # after small_llava has made torchvision importable
# peft asks for it by its old name
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")

IN_EVERY_RUN = {"phi", "qwen2"}  # of those with CLIP: phi calls layers as CLIP does
CELLS = [("siglip_vision_model", family) for family in FAMILIES] + [
    pytest.param(
        ("clip_vision_model", family), marks=[] if family in IN_EVERY_RUN else pytest.mark.slow
    )
    for family in FAMILIES
]
ADAPTER = {"rank": 2, "alpha": 4, "dropout": 0.0}
LINEAR = {  # every linear layer of a decoder's layer, as the families' own papers have them
    "phi": "q_proj k_proj v_proj dense fc1 fc2",
    "phi3": "qkv_proj o_proj gate_up_proj down_proj",
    "minicpm3": "q_a_proj q_b_proj kv_a_proj_with_mqa kv_b_proj o_proj gate_proj up_proj down_proj",
}
USUAL = "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj"


@dataclass(frozen=True)
class Cell:
    """A composed model, and the inputs that it is tried with."""

    family: str
    base: Path
    made: Composed
    folder: Path

    @cached_property
    def inputs(self) -> dict[str, torch.Tensor]:
        """Two rows of 4 and 7 words after an image, padded on the right; a third without one."""
        image = [self.made.image_token_id] * NUM_PATCHES
        rows = [[72, *image, 73, 74, 75, 76], [70, *image, *range(80, 87)], [*range(90, 99)]]
        return {**padded(rows, left=False), "pixel_values": pixels(2, seed=4)}

    @cached_property
    def labels(self) -> torch.Tensor:
        """The words, but for the first of each row."""
        ids, mask = self.inputs["input_ids"], self.inputs["attention_mask"]
        unwanted = (ids == self.made.image_token_id) | (mask == 0)
        return torch.where(unwanted, -100, ids)

    def model(self, path: Path | None = None) -> Any:
        """Return a directory's model, by default the composed one, as Transformers loads it."""
        return loaded(path or self.made.path)

    def trained(self, **changes: Any) -> TrainedLlava:
        """Return the model in stage 2, its adapters moved away from zero."""
        config = TrainConfig.bunny("adapter", lora=ADAPTER, **changes)
        model = TrainedLlava.load(self.made.path, config)
        generator = torch.Generator().manual_seed(6)
        with torch.no_grad():
            for name, one in model.trainables().items():
                if "lora_B" in name:
                    one.copy_(torch.randn(one.shape, generator=generator) * 0.05)
        model.whole.eval()
        return model

    @torch.no_grad()
    def logits(self, model: Any) -> torch.Tensor:
        """Return what the model says to all inputs."""
        return model(**self.inputs).logits


def loaded(path: str | Path) -> Any:
    model, info = transformers.LlavaForConditionalGeneration.from_pretrained(
        path, output_loading_info=True
    )
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        assert not info[kind]
    return model.eval()


def pixels(images: int, seed: int) -> torch.Tensor:
    return torch.randn(images, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(seed))


def padded(rows: list[list[int]], *, left: bool) -> dict[str, torch.Tensor]:
    length = max(map(len, rows))
    gaps = [[0] * (length - len(row)) for row in rows]
    ids = [gap + row if left else row + gap for row, gap in zip(rows, gaps, strict=True)]
    ones = [[1] * len(row) for row in rows]
    mask = [gap + one if left else one + gap for one, gap in zip(ones, gaps, strict=True)]
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}


@pytest.fixture(scope="module", params=CELLS, ids="-".join)
def cell(
    request: pytest.FixtureRequest,
    towers: dict[str, Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Cell:
    tower, family = request.param
    folder = tmp_path_factory.mktemp(family)
    base = save_language_model(folder / "lm", family)
    return Cell(family, base, compose(str(towers[tower]), str(base), str(folder / "llava")), folder)


@torch.no_grad()
def test_text_alone_is_answered_as_by_the_base_model(cell: Cell) -> None:
    model = cell.model()
    config = read_language_model(cell.base).config
    reference = transformers.AutoModelForCausalLM.from_pretrained(cell.base, config=config).eval()
    ids = torch.arange(40).reshape(2, 20) * 7 % NUM_ROWS
    expected = reference(ids).logits
    if cell.family == "phi":
        (warning,) = cell.made.warnings
        assert warning.startswith("lost head bias: lm ")
        assert float((expected - model(ids).logits).abs().max()) > 0.1
        reference.lm_head.bias = None
        expected = reference(ids).logits
    else:
        assert cell.made.warnings == []
    assert torch.equal(model(ids).logits, expected)
    architectures = [type(reference).__name__]
    assert model.config.text_config.architectures == architectures


@torch.no_grad()
def test_images_are_seen_by_their_own_row_alone(cell: Cell) -> None:
    model = cell.model()
    seen = model(**cell.inputs, labels=cell.labels)
    assert torch.isfinite(seen.loss)
    other = model(**{**cell.inputs, "pixel_values": pixels(2, seed=5)}).logits
    difference = (seen.logits - other).abs().amax((1, 2))
    assert (difference[:2] > 1e-4).all(), "the image does not reach the answer"
    assert difference[2] < 1e-6, "nor does it reach a row without one"


@torch.no_grad()
def test_padding_on_the_left_changes_no_answer(cell: Cell) -> None:
    model = cell.model()
    ids, mask = cell.inputs["input_ids"], cell.inputs["attention_mask"].bool()
    rows = [row[kept].tolist() for row, kept in zip(ids, mask, strict=True)]
    asked = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    images = cell.inputs["pixel_values"]
    together = model.generate(**padded(rows, left=True), pixel_values=images, **asked)[:, -4:]
    for at, row in enumerate(rows):
        own = {"pixel_values": images[at : at + 1]} if at < len(images) else {}
        alone = model.generate(**padded([row], left=True), **own, **asked)
        assert torch.equal(alone[0, -4:], together[at])


def test_saved_and_loaded_it_is_the_same(cell: Cell, tmp_path: Path) -> None:
    model, folder = cell.model(), tmp_path / "saved"
    model.save_pretrained(folder)
    assert torch.equal(cell.logits(cell.model(folder)), cell.logits(model))


def test_every_linear_layer_of_the_language_model_is_adapted_and_no_other(cell: Cell) -> None:
    trained = cell.trained()
    adapted = [
        name
        for name, one in trained.llava.named_modules()
        if isinstance(one, peft.tuners.tuners_utils.BaseTunerLayer)
    ]
    found = {re.fullmatch(r"model\.language_model\.layers\.\d+\.(.+\.)?(\w+)", n) for n in adapted}
    assert None not in found, "a layer outside the language model is adapted"
    expected = LINEAR.get(cell.family, USUAL).split()
    assert {match[2] for match in found if match} == set(expected)
    assert len(adapted) == 2 * len(expected)
    inside = trained.llava.model.language_model.layers.named_modules()
    bare = [n for n, one in inside if isinstance(one, nn.Linear) and "lora" not in n]
    assert all(name.endswith(".base_layer") for name in bare), "a linear layer is not adapted"


def test_losses_are_hugging_faces_and_layers_computed_again_change_no_gradient(cell: Cell) -> None:
    trained = cell.trained()
    batch = (cell.inputs["input_ids"], cell.labels, cell.inputs["pixel_values"])
    losses, _ = trained.losses(*batch)
    theirs = trained.llava(**cell.inputs, labels=cell.labels).loss
    torch.testing.assert_close(losses.mean(), theirs, atol=1e-6, rtol=1e-6)
    losses.mean().backward()
    again = cell.trained(gradient_checkpointing=True)
    again.llava.model.language_model.train()  # layers are computed again in training only
    again.losses(*batch)[0].mean().backward()
    assert again.llava.model.language_model.gradient_checkpointing
    for name, one in trained.trainables().items():
        other = again.trainables()[name]
        assert one.grad is not None
        assert float(one.grad.abs().max()) > 0, name
        assert other.grad is not None
        assert torch.equal(one.grad, other.grad), name


def test_an_adapter_is_saved_loaded_and_merged_without_loss(cell: Cell) -> None:
    trained = cell.trained()
    with_adapter = cell.logits(trained.llava)
    trained.whole.save_pretrained(cell.folder / "adapter")
    again = peft.PeftModel.from_pretrained(cell.model(), cell.folder / "adapter").eval()
    assert torch.equal(cell.logits(again), with_adapter)
    assert float((with_adapter - cell.logits(cell.model())).abs().max()) > 1e-3
    exact = cell.logits(again.double())
    merged = again.merge_and_unload()
    assert float((cell.logits(merged) - exact).abs().max()) < 1e-12, "more than rounding"
    merged.float()
    assert float((cell.logits(merged) - with_adapter).abs().max()) < 5e-6
    merged.save_pretrained(cell.folder / "merged")
    assert torch.equal(cell.logits(cell.model(cell.folder / "merged")), cell.logits(merged))


@pytest.mark.parametrize("family", REFUSED)
def test_a_model_that_llava_would_change_is_refused(
    family: str, towers: dict[str, Path], tmp_path: Path
) -> None:
    base = save_language_model(tmp_path / "lm", family)
    with pytest.raises(UserError, match=r"final_logit_softcapping(?s:.)*Gemma 3"):
        compose(str(towers["siglip"]), str(base), str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()
