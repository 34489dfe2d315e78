"""How much of a device's arithmetic goes into the model: FLOPs of a step, and a device's peak.

A multiply and an add are two FLOPs. Counted are matrix products, as PaLM's model FLOPs utilisation
does (Chowdhery et al. 2022, https://arxiv.org/abs/2204.02311, appendix B), but of causal attention
only the half that is not masked, and of a backward pass only what this stage needs: gradients of
activations where weights are frozen, none in a tower that is.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from train.config import TrainConfig
from train.data.samples import Row
from train.learn.model import TrainedLlava
from train.text.template import IGNORED

Counts = NDArray[np.float64]
"""float64 [4]: tokens, attended pairs of tokens, trained tokens, images."""

PEAK_TFLOPS = (  # dense bfloat16 with float32 sums, without sparsity; NVIDIA's data sheets
    ("B200", 2250.0),  # HGX B200
    ("H200", 989.4),
    ("GH200", 989.4),
    ("H100 PCIe", 756.0),
    ("H100 NVL", 835.5),
    ("H100", 989.4),  # SXM
    ("H800", 989.4),
    ("H20", 148.0),
    ("A100", 312.0),
    ("A800", 312.0),
    ("A40", 149.7),
    ("A30", 165.0),
    ("A10G", 70.0),
    ("A10", 125.0),
    ("L40S", 362.0),
    ("L40", 181.0),
    ("L4", 121.0),
    ("RTX 6000 Ada", 364.2),
    ("RTX A6000", 154.8),
    ("RTX 4090", 165.2),
    ("RTX 3090", 71.0),
)
_GEMM_SIDE = 1024


@dataclass(frozen=True, eq=False)
class ModelFlops:
    """FLOPs that a model takes for one of each of `Counts`, in a stage of training.

    forward, backward: float64 [4]. again: what gradient checkpointing computes a second time.
    """

    forward: Counts
    backward: Counts
    again: Counts

    @classmethod
    def of(cls, model: TrainedLlava, config: TrainConfig) -> ModelFlops:
        """Return those of a model in training, by which of its weights move.

        Of its tower, the layers up to the one that features are taken from. Attention counts as if
        every layer saw the whole text: of one with a sliding window that is too much.
        """
        llava = model.llava
        decoder, text = llava.model.language_model, llava.config.text_config
        token = _linear(decoder.layers, has_input_gradient=True)
        label = _linear([llava.lm_head], has_input_gradient=True)
        width = _attention_width(text)
        pair = np.array([1.0, 2.0]) * 2 * len(decoder.layers) * width
        image = _tower(llava) + _projector(llava, model.tokens_per_image)
        forward, backward = np.stack([token, pair, label, image]).T
        layers = np.array([1.0, 1.0, 0.0, 0.0])
        return cls(forward, backward, forward * layers * config.gradient_checkpointing)

    def needed(self, counts: Counts) -> float:
        """Return the FLOPs of a forward and a backward pass of so much."""
        return float((self.forward + self.backward) @ counts)

    def computed(self, counts: Counts) -> float:
        """Return them with what is computed a second time; give counts that include padding."""
        return float((self.forward + self.backward + self.again) @ counts)


def counts_of(
    rows: Iterable[Row], *, packing: bool = False, dummy_images: bool = False
) -> tuple[Counts, Counts]:
    """Return the counts of a micro-batch, without and with its padding and empty images."""
    rows = list(rows)
    lengths = np.array([len(one.ids) for one in rows], np.float64)
    padded = lengths if packing else np.full_like(lengths, lengths.max(initial=0))
    rest = [
        sum(int((one.labels[1:] != IGNORED).sum()) for one in rows),
        sum(len(one.pixels) for one in rows),
    ]
    causal = ([float(one.sum()), float((one * (one + 1) / 2).sum())] for one in (lengths, padded))
    own, whole = (np.array([*one, *rest], np.float64) for one in causal)
    whole[3] += dummy_images * sum(not len(one.pixels) for one in rows)
    return own, whole


def peak_flops(device: torch.device) -> float:
    """Return FLOPs a second that a device can do at most.

    Of a GPU in PEAK_TFLOPS its bfloat16 peak; of any other device what a product of two matrices
    reaches, in bfloat16 on a GPU and in float32 on a CPU.
    """
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        known = [peak for part, peak in PEAK_TFLOPS if part in name]
        if known:
            return known[0] * 1e12
    return _measured(device.type)


@cache
def _measured(kind: str) -> float:
    dtype = torch.bfloat16 if kind == "cuda" else torch.float32
    side = _GEMM_SIDE * (8 if kind == "cuda" else 1)
    one = torch.ones(side, side, dtype=dtype, device=kind)
    best = float("inf")
    for _ in range(5):
        started = time.perf_counter()
        float((one @ one)[0, 0])  # waits for it
        best = min(best, time.perf_counter() - started)
    return 2 * side**3 / best


def _linear(modules: Iterable[Any], *, has_input_gradient: bool) -> Counts:
    """Return FLOPs of one position in all linear layers: float64 [forward, backward]."""
    found = np.zeros(2)
    for one in (inner for module in modules for inner in module.modules()):
        if isinstance(one, nn.Linear):
            products = one.weight.requires_grad + has_input_gradient
            found += 2 * one.weight.numel() * np.array([1, products])
    return found


def _attention_width(config: Any) -> float:
    """Return twice the numbers that a pair of tokens multiplies: once for scores, once for values.

    That is queries' and values' width of all heads; multi-head latent attention has two widths.
    """
    heads = config.num_attention_heads
    whole = getattr(config, "head_dim", None) or config.hidden_size // heads
    queries = getattr(config, "qk_head_dim", None) or whole
    values = getattr(config, "v_head_dim", None) or whole
    return float(heads * (queries + values))


def _tower(llava: Any) -> Counts:
    """Return FLOPs of one image in the tower: float64 [forward, backward]."""
    tower, config = llava.model.vision_tower, llava.config.vision_config
    (layers,) = [one for name, one in tower.named_modules() if name.endswith("encoder.layers")]
    at = llava.config.vision_feature_layer
    used = layers[: at if at >= 0 else len(layers) + 1 + at]
    (cut,) = [one for one in tower.modules() if isinstance(one, nn.Conv2d)]
    patches = (config.image_size // config.patch_size) ** 2
    tokens = patches + any(name.endswith("class_embedding") for name, _ in tower.named_parameters())
    trains = any(one.requires_grad for one in tower.parameters())
    attention = 4 * len(used) * config.hidden_size * tokens**2 * np.array([1, 2 * trains])
    embedding = 2 * cut.weight.numel() * patches * np.array([1, cut.weight.requires_grad])
    linear: Counts = _linear(used, has_input_gradient=trains) * tokens + attention + embedding
    return linear


def _projector(llava: Any, tokens: int) -> Counts:
    """Return FLOPs of one image in the projector; a frozen tower needs no gradient from it."""
    projector = llava.model.multi_modal_projector
    trains = any(one.requires_grad for one in llava.model.vision_tower.parameters())
    first = _linear([projector.linear_1], has_input_gradient=trains)
    return (first + _linear([projector.linear_2], has_input_gradient=True)) * tokens
