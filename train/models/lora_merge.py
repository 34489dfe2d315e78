"""A LoRA adapter merged into the weights that it was trained on, tensor by tensor.

LoRA: W + (alpha / r) B A, https://arxiv.org/abs/2106.09685. The sum is taken in float32 and rounded
once to the output's dtype. That rounding is noise on top of the adapter's change dW: in bfloat16 it
can be as large as a small dW itself, so its size is reported for each layer.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from manifests.errors import UserError
from train.models.tensor_files import LazyTensor

ADAPTER_CONFIG = "adapter_config.json"
_PREFIX = "base_model.model."
_EXPECTED = {
    "peft_type": "LORA",
    "use_dora": False,
    "fan_in_fan_out": False,
    "bias": "none",
    "rank_pattern": {},
    "alpha_pattern": {},
    "modules_to_save": None,
}


@dataclass(frozen=True, slots=True)
class Adapter:
    """A LoRA adapter: for each weight's name the factors A [r, in] and B [out, r].

    `noise` is filled as merged tensors are read: |rounding| / |dW|, Frobenius norms, by weight.
    """

    scale: float
    factors: dict[str, tuple[LazyTensor, LazyTensor]]
    noise: dict[str, float] = field(default_factory=dict)

    def merged(self, weight: LazyTensor, dtype: torch.dtype) -> LazyTensor:
        """Return the weight plus its change in `dtype`; a weight without factors is only cast.

        Raises (when read): UserError for values that `dtype` cannot hold.
        """
        if weight.name not in self.factors:
            return cast_once(weight, dtype)
        return LazyTensor(weight.name, weight.shape, dtype, lambda: self._merge(weight, dtype))

    def _merge(self, weight: LazyTensor, dtype: torch.dtype) -> torch.Tensor:
        a, b = (one.read().float() for one in self.factors[weight.name])
        change = self.scale * (b @ a)
        exact = weight.read().float() + change
        return rounded_once(weight.name, exact, dtype, change, self.noise)


def rounded_once(
    name: str,
    exact: torch.Tensor,
    dtype: torch.dtype,
    change: torch.Tensor,
    noise: dict[str, float],
) -> torch.Tensor:
    """Return a float32 weight in `dtype`, and note |rounding| / |change| under its name.

    Raises: UserError for values that `dtype` cannot hold.
    """
    rounded = held_in(name, exact, dtype)
    size = float(change.norm())
    noise[name] = float((rounded.float() - exact).norm()) / size if size else 0.0
    return rounded


def cast_once(weight: LazyTensor, dtype: torch.dtype) -> LazyTensor:
    """Return the weight in `dtype`; integers stay what they are.

    Raises (when read): UserError for values that `dtype` cannot hold.
    """
    if dtype == weight.dtype or not weight.dtype.is_floating_point:
        return weight
    read = weight.read
    return LazyTensor(weight.name, weight.shape, dtype, lambda: held_in(weight.name, read(), dtype))


def held_in(name: str, exact: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return values in a dtype. Raises: UserError when it cannot hold them."""
    rounded = exact.to(dtype)
    if not torch.isfinite(rounded).all():
        raise UserError(
            f"{name} does not fit {dtype}.",
            f"Its largest value is {float(exact.float().abs().max()):.3g}.",
            "Use dtype bfloat16 or float32.",
        )
    return rounded


def read_adapter(directory: Path, tensors: list[LazyTensor]) -> Adapter:
    """Read the settings of an adapter as PEFT writes them, and pair its tensors.

    Args:
        directory: with adapter_config.json.
        tensors: of adapter_model.safetensors or .bin.

    Raises: UserError for DoRA, ranks by layer and other settings that are not plain LoRA, and for
        tensors that are no factors.
    """
    config: dict[str, Any] = json.loads((directory / ADAPTER_CONFIG).read_text())
    other = [
        name for name, plain in _EXPECTED.items() if config.get(name) and config[name] != plain
    ]
    if other:
        raise UserError(
            f"{directory / ADAPTER_CONFIG} sets {', '.join(other)}.",
            "Only plain LoRA, W + alpha/r B A, is merged.",
            "Merge it with PEFT (merge_and_unload) and import the merged checkpoint.",
        )
    rank = config["r"]
    scale = config["lora_alpha"] / (math.sqrt(rank) if config.get("use_rslora") else rank)
    return Adapter(scale, _pairs(directory, {one.name: one for one in tensors}))


def _pairs(
    directory: Path, tensors: dict[str, LazyTensor]
) -> dict[str, tuple[LazyTensor, LazyTensor]]:
    pairs = {}
    for name in [name for name in tensors if name.endswith(".lora_A.weight")]:
        stem = name.removesuffix(".lora_A.weight")
        if f"{stem}.lora_B.weight" in tensors:
            both = (tensors.pop(name), tensors.pop(f"{stem}.lora_B.weight"))
            pairs[f"{stem.removeprefix(_PREFIX)}.weight"] = both
    if tensors:
        raise UserError(
            f"{directory}: the adapter has tensors that are not pairs of LoRA factors: "
            f"{', '.join(sorted(tensors))}.",
            "Leaving them out would change the model.",
            "Merge it with PEFT (merge_and_unload) and import the merged checkpoint.",
        )
    return pairs
