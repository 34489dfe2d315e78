"""The proof that a composed model's language model is the base one: equal logits on text.

Many things could differ without an error: a head's bias, a scale or cap of logits, tied weights,
attention that lost its causal mask. So both models are run, one after the other in memory.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from manifests.errors import UserError
from train.models.towers import read_language_model

_BATCH, _LENGTH = 2, 24


def check_same_text(
    composed: Path, config: Any, base: Path, dtype: torch.dtype, *, relative: float
) -> None:
    """Compare text-only logits of the composed model and the base causal LM, on the CPU.

    Args:
        composed: directory with weights; its config.json need not be there yet.
        config: LlavaConfig of it.
        dtype: both are loaded in it.
        relative: allowed difference as a part of the largest logit; 0: every bit is the same.

    Raises: UserError when logits differ, or when the composed weights lack a tensor.
    """
    base_config = read_language_model(base).config
    num_rows = int(base_config.vocab_size)
    ids = _text(num_rows)
    expected = _base_logits(base, base_config, ids, dtype)
    found = _composed_logits(composed, config, ids, dtype)[..., :num_rows]
    difference = float((found - expected).abs().max())
    if not difference <= relative * float(expected.abs().max()):  # NaN is a difference, too
        raise UserError(
            f"Text logits of the composed model differ from {base.name}'s by {difference:.3g}.",
            "The language model does something after, or inside, its head that LLaVA does not.",
            "Use a Qwen, Llama, SmolLM, StableLM, Phi, Granite or Gemma 3 language model.",
        )


def _text(num_rows: int) -> torch.Tensor:
    """Return ids [2, 24] spread over the vocabulary."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(num_rows, (_BATCH, _LENGTH), generator=generator)


def _base_logits(base: Path, config: Any, ids: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(base, config=config, dtype=dtype)
    head = model.get_output_embeddings()
    if getattr(head, "bias", None) is not None:
        head.bias = None  # its loss is told in a warning; everything else must be equal
    return _logits(model.eval(), ids)


def _composed_logits(
    path: Path, config: Any, ids: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    return _logits(load_complete(path, config, dtype).eval(), ids)


def load_complete(path: Path, config: Any, dtype: torch.dtype) -> Any:
    """Return a LlavaForConditionalGeneration of a directory whose weights are all there.

    Args:
        path: with weights; its config.json need not be there yet.
        config: LlavaConfig of it.

    Raises: UserError with the names of missing, unexpected and misshapen tensors.
    """
    from transformers import LlavaForConditionalGeneration

    both: Any = LlavaForConditionalGeneration.from_pretrained(
        path, config=config, dtype=dtype, output_loading_info=True
    )
    model, loaded = both
    kinds = ("missing_keys", "unexpected_keys", "mismatched_keys")
    wrong = {name: sorted(map(str, loaded[name])) for name in kinds if loaded[name]}
    if wrong:
        raise UserError(
            f"The written weights do not fit: {wrong}.",
            "What they were made from lacks tensors, or has others.",
            "Take whole directories as save_pretrained or the hub has them.",
        )
    return model


def _logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = model(input_ids=ids, use_cache=False).logits.float()
    return logits  # the model is freed as its last name goes: Transformers' modules hold no cycle
