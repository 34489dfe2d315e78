"""MiniCPM-1B and 2B under the name of Granite, which computes the same.

MiniCPM (https://arxiv.org/abs/2404.06395) is Llama with three scales, and is published with code of
its own. Granite has the same scales by other names, and is a model of Transformers. Source of the
scales: modeling_minicpm.py of https://huggingface.co/openbmb/MiniCPM-2B-sft-bf16.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from manifests.errors import UserError

_ARCHITECTURE = "MiniCPMForCausalLM"
_OF_LLAMA = (
    *("attention_bias", "attention_dropout", "bos_token_id", "eos_token_id", "pad_token_id"),
    *("hidden_act", "hidden_size", "initializer_range", "intermediate_size", "rms_norm_eps"),
    *("max_position_embeddings", "num_attention_heads", "num_hidden_layers", "rope_theta"),
    *("num_key_value_heads", "use_cache", "vocab_size"),
)
_PLAIN = {"hidden_act": "silu", "rope_scaling": None, "num_experts": 0, "sparse_config": None}
_PLAIN_ALSO = {"attention_type": "vanilla", "ffn_type": "vanilla", "is_causal": True}


def is_minicpm(raw: dict[str, Any]) -> bool:
    """Whether a config.json is MiniCPM's; the published ones often have no model_type."""
    return raw.get("model_type") == "minicpm" or raw.get("architectures") == [_ARCHITECTURE]


def granite_fields(path: Path, raw: dict[str, Any]) -> dict[str, Any]:
    """Return MiniCPM's config.json as Granite's, with the defaults of MiniCPM's class.

    Args:
        path: the model's directory, to name it.
        raw: its config.json.

    Raises: UserError for a MiniCPM that is more than scaled Llama: mixtures of experts, sparse
        attention (MiniCPM 4), other activations, scaled rotations (MiniCPM-2B-128k).
    """
    others = [
        name for name, plain in (_PLAIN | _PLAIN_ALSO).items() if raw.get(name, plain) != plain
    ]
    if others:
        raise UserError(
            f"{path} is a MiniCPM with {', '.join(f'{name}={raw[name]!r}' for name in others)}.",
            "Only MiniCPM-1B and 2B have a stock model that computes the same: Granite.",
            "Use MiniCPM-2B-sft-bf16, MiniCPM-1B-sft-bf16, or MiniCPM 3.",
        )
    return {
        **{name: raw[name] for name in _OF_LLAMA if name in raw},
        **granite_scales(raw),
        "model_type": "granite",
        "tie_word_embeddings": raw.get("tie_word_embeddings", True),
    }


def granite_scales(raw: dict[str, Any]) -> dict[str, float]:
    """Return MiniCPM's scales under Granite's names; attention is scaled by head_dim ** -0.5."""
    width, num_heads = raw.get("hidden_size", 4096), raw.get("num_attention_heads", 32)
    num_layers = raw.get("num_hidden_layers", 32)
    return {
        "embedding_multiplier": raw.get("scale_emb", 1),
        "residual_multiplier": raw.get("scale_depth", 1) / math.sqrt(num_layers),
        "logits_scaling": width / raw.get("dim_model_base", 1),
        "attention_multiplier": (width // num_heads) ** -0.5,
    }
