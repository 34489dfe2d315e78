"""The proof that a written model is the trained one: equal logits on text and an image.

The trained model is put together in memory by peft from the adapter directory, not by our merge,
and run in float32 twice: as it is, and with its tensors rounded to the dtypes that were written.
The written one, loaded by plain transformers, must equal the second; the first tells what the
rounding costs. The two models are in memory one after the other.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from manifests.errors import UserError
from train.models.checkpoint_keys import plain_key
from train.models.same_text import load_complete
from train.models.tensor_files import file_tensors
from train.models.trained_tensors import is_lora

RELATIVE = 1e-4
"""Allowed difference in float32, as a part of the largest logit: sums in another order."""
_OF_ROUNDING = 0.1
"""Allowed more, as a part of what rounding does: a sum's last bit may turn a rounding around."""
_LENGTH = 24


@dataclass(frozen=True, slots=True)
class LogitsCheck:
    """Logits of the written model against the trained one's in float32, on text and an image.

    largest: the largest trained logit. difference: the largest from it, in logits; rounding: what
    merging and rounding to the dtype do to them in memory. agreement: share of positions
    with the same likeliest next token, from 0 to 1.
    """

    largest: float
    difference: float
    rounding: float
    agreement: float


@dataclass(frozen=True, slots=True)
class Expected:
    """Logits [2, n, vocabulary] of the trained model; rounded: in the dtypes that were written."""

    exact: torch.Tensor
    rounded: torch.Tensor


@torch.no_grad()
def expected_logits(
    base: str,
    trained: Path,
    adapter: Path | None,
    dtypes: Mapping[str, torch.dtype],
) -> Expected:
    """Return the logits of a base model with what was trained.

    Args:
        base: directory of a LLaVA model.
        trained: safetensors file of what was trained, by its names in the model; the factors in it
            are not read.
        adapter: a peft directory of them, or None.
        dtypes: of all written tensors, by any of their names.
    """
    from transformers import LlavaForConditionalGeneration

    model: Any = LlavaForConditionalGeneration.from_pretrained(base, dtype=torch.float32)
    named = dict(model.named_parameters())
    for one in file_tensors(trained):
        if not is_lora(one.name):
            named[one.name].copy_(one.read())  # one at a time in memory
    if adapter is not None:
        model = _adapted(model, adapter)
    exact = _logits(model)
    if adapter is not None:
        model = model.merge_and_unload()
    written = {plain_key(name): dtype for name, dtype in dtypes.items()}
    for name, one in model.named_parameters():
        one.copy_(one.to(written[plain_key(name)]))
    return Expected(exact, _logits(model))


def check_same_logits(path: Path, config: Any, expected: Expected) -> LogitsCheck:
    """Compare a written directory's logits, computed in float32, with those expected.

    Args:
        path: with weights; its config.json need not be there yet.
        config: LlavaConfig of it.

    Raises: UserError when they differ by more than RELATIVE of the largest logit, or a tensor is
        missing, unexpected or of another shape.
    """
    found = _logits(load_complete(path, config, torch.float32))
    exact = expected.exact
    largest = float(exact.abs().max())
    rounding = float((expected.rounded - exact).abs().max())
    wrong = float((found - expected.rounded).abs().max())
    if not wrong <= RELATIVE * largest + _OF_ROUNDING * rounding:  # NaN is a difference, too
        raise UserError(
            f"Logits of {path} differ from the trained model's by {wrong:.3g}.",
            f"The largest is {largest:.3g}, and rounding explains only {rounding:.3g}.",
            "The directory is left unfinished; please report this with both configs.",
        )
    same = float((found.argmax(-1) == exact.argmax(-1)).float().mean())
    return LogitsCheck(largest, float((found - exact).abs().max()), rounding, same)


def _adapted(model: Any, adapter: Path) -> Any:
    from peft import PeftModel

    with warnings.catch_warnings():
        # peft asks by a name that transformers is about to drop
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated")
        return PeftModel.from_pretrained(model, str(adapter))


@torch.no_grad()
def _logits(model: Any) -> torch.Tensor:
    ids, pixels = _batch(model.config)
    found = model.eval()(input_ids=ids, pixel_values=pixels, use_cache=False)
    logits: torch.Tensor = found.logits.float()
    return logits


def _batch(config: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ids, int64 [2, n], of text around an image and of text; pixels [1, 3, side, side]."""
    vision, image = config.vision_config, config.image_token_id
    num_tokens = (vision.image_size // vision.patch_size) ** 2
    generator = torch.Generator().manual_seed(0)
    size = (2, num_tokens + _LENGTH)
    ids = torch.randint(config.text_config.vocab_size, size, generator=generator)
    ids[ids == image] = 0 if image else 1
    ids[0, _LENGTH // 2 : _LENGTH // 2 + num_tokens] = image
    side = vision.image_size
    return ids, torch.randn(1, 3, side, side, generator=generator)
