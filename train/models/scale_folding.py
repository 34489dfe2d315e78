"""What a causal LM does to its logits after the head, expressed in weights where that is exact.

LLaVA's head is a bare matrix: it applies no scale, soft cap or bias, and says nothing about it.
A division by `logits_scaling` (Granite, MiniCPM 3, and MiniCPM converted to Granite) moves into the
last norm's weight, since RMSNorm and the head are linear in it. A soft cap is no linear map and is
refused.
"""

from __future__ import annotations

import math
from typing import Any

from manifests.errors import UserError
from train.models.tensor_files import LazyTensor

FINAL_NORM = "language_model.model.norm.weight"


def logits_divisor(text_config: Any) -> float:
    """Return what the LM divides its logits by; 1 for most.

    Raises: UserError for a soft cap, or a multiplier, of the logits.
    """
    for name in ("final_logit_softcapping", "logit_scale"):
        if getattr(text_config, name, None) is not None:
            raise UserError(
                f"{text_config.model_type} changes its logits by {name}.",
                "LLaVA's language head is a plain matrix and would leave that out.",
                "Use a language model without it: Gemma 3 instead of Gemma 2, Qwen, Llama, SmolLM.",
            )
    return float(getattr(text_config, "logits_scaling", None) or 1.0)


def undivided(text_config: Any) -> dict[str, float]:
    """Return the fields of the config that say that the logits are not divided, after fold."""
    if logits_divisor(text_config) == 1.0:
        return {}
    if text_config.model_type == "minicpm3":  # divides by hidden_size / dim_model_base
        return {"dim_model_base": text_config.hidden_size}
    return {"logits_scaling": 1.0}


def is_exact(divisor: float) -> bool:
    """Whether the folded weights are free of rounding: division by a power of two is."""
    return math.frexp(divisor)[0] == 0.5


def fold(tensors: list[LazyTensor], divisor: float) -> list[LazyTensor]:
    """Return the tensors with the last norm's weight divided, rounded once to its dtype."""
    if divisor == 1.0:
        return tensors
    return [_divided(one, divisor) if one.name == FINAL_NORM else one for one in tensors]


def _divided(norm: LazyTensor, divisor: float) -> LazyTensor:
    return LazyTensor(
        norm.name,
        norm.shape,
        norm.dtype,
        lambda: (norm.read().double() / divisor).to(norm.dtype),
    )
