"""Tiny random vision towers, causal language models and tokenizers, saved as the hub has them.

The fixtures are called `towers` and `llama`: import `small_towers`, `small_language_model`.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers.utils import logging

from curate.media.torchvision_ops import ensure_torchvision_importable

ensure_torchvision_importable()  # every model of Transformers imports torchvision
logging.disable_progress_bar()
logging.set_verbosity_error()

TOWERS = ["siglip_vision_model", "siglip", "clip_vision_model", "clip"]
SIDE, PATCH = 16, 4
NUM_PATCHES = (SIDE // PATCH) ** 2
NUM_ROWS = 320
EOS = "<|endoftext|>"

_VISION = {
    "hidden_size": 24,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": SIDE,
    "patch_size": PATCH,
}
_TEXT = {
    "vocab_size": NUM_ROWS,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 256,
    "bos_token_id": 256,
    "eos_token_id": 256,
    "pad_token_id": None,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama"},
    "smollm2": {"model_type": "llama", "tie_word_embeddings": True},
    "smollm3": {"model_type": "smollm3"},
    "qwen2": {"model_type": "qwen2"},
    "qwen3": {"model_type": "qwen3", "head_dim": 16},
    "qwen3_tied": {"model_type": "qwen3", "head_dim": 16, "tie_word_embeddings": True},
    "phi": {"model_type": "phi", "num_key_value_heads": 2},
    "phi3": {"model_type": "phi3"},
    "stablelm": {"model_type": "stablelm", "use_qkv_bias": True},
    "granite": {"model_type": "granite", "logits_scaling": 8.0, "embedding_multiplier": 12.0},
    "minicpm": {
        **{"model_type": "granite", "tie_word_embeddings": True, "embedding_multiplier": 12.0},
        **{"residual_multiplier": 1.4 / 2**0.5, "attention_multiplier": 16**-0.5},
        **{"logits_scaling": 4.0},
    },
    "minicpm3": {
        **{"model_type": "minicpm3", "num_key_value_heads": 2, "dim_model_base": 8},
        **{"kv_lora_rank": 8, "q_lora_rank": 8},
        **{"qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8},
    },
    "gemma3": {"model_type": "gemma3_text", "head_dim": 16, "query_pre_attn_scalar": 16},
}
REFUSED = {"gemma2": {"model_type": "gemma2", "head_dim": 16, "query_pre_attn_scalar": 16}}
_OWN_CODE = {"AutoConfig": "configuration_minicpm.MiniCPMConfig"}


def save_tower(folder: Path, kind: str = "siglip_vision_model", seed: int = 0) -> Path:
    """Save a tower: siglip, clip (dual models), or *_vision_model; all parameters random."""
    config = dict(_VISION)
    if kind in ("siglip", "clip"):
        text = {**_VISION, "vocab_size": 50, "bos_token_id": 1, "eos_token_id": 2}
        config = {"vision_config": config, "text_config": text}
    whole = transformers.AutoConfig.for_model(kind, **config)
    return _save(folder, partial(transformers.AutoModel.from_config, whole), seed)


def save_language_model(folder: Path, family: str = "llama", seed: int = 1, **more: Any) -> Path:
    """Save a causal LM with its tokenizer; all parameters, biases too, are random.

    MiniCPM, a Granite here, gets the config that is published: without model_type, with own code.
    """
    given = {**_TEXT, **(FAMILIES | REFUSED)[family], **more}
    config = transformers.AutoConfig.for_model(**given)
    tokenizer_for().save_pretrained(folder)
    _save(folder, partial(transformers.AutoModelForCausalLM.from_config, config), seed)
    if family == "minicpm":
        _publish_as_minicpm(folder / "config.json", config)
    return folder


def _publish_as_minicpm(path: Path, config: Any) -> None:
    size = {name: getattr(config, name) for name in _TEXT}
    scales = {
        "scale_emb": config.embedding_multiplier,
        "scale_depth": config.residual_multiplier * config.num_hidden_layers**0.5,
        "dim_model_base": config.hidden_size / config.logits_scaling,
    }
    own = {"architectures": ["MiniCPMForCausalLM"], "auto_map": _OWN_CODE, "rope_scaling": None}
    if not config.tie_word_embeddings:
        own["tie_word_embeddings"] = False
    path.write_text(json.dumps({**size, **scales, **own}))


def _save(folder: Path, make: Callable[[], Any], seed: int) -> Path:
    _random(make, seed).save_pretrained(folder)
    return folder


def _random(make: Callable[[], Any], seed: int) -> Any:
    """Return a model whose every parameter is random, biases and norms too, by the seed."""
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        model = make()
        for one in model.parameters():
            one.add_(torch.randn(one.shape) * 0.1)
    return model


def tokenizer_for(extra: int = 0, word: str = "<|special_{}|>") -> Any:
    """Return a tokenizer of 256 bytes, the end of text (256) and `extra` special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    fast = Tokenizer(models.BPE({letter: n for n, letter in enumerate(alphabet)}, []))
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel()
    with warnings.catch_warnings():
        tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=fast, eos_token=EOS)
    tokenizer.add_tokens([word.format(n) for n in range(extra)], special_tokens=True)
    return tokenizer


@pytest.fixture(scope="module", name="towers")
def small_towers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("towers")
    return {kind: save_tower(folder / kind, kind) for kind in TOWERS}


@pytest.fixture(scope="module", name="llama")
def small_language_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_language_model(tmp_path_factory.mktemp("lm") / "llama")


EVA_ARGS = {
    **{"img_size": SIDE, "patch_size": PATCH, "embed_dim": 24, "depth": 3, "num_heads": 2},
    "ref_feat_shape": [3, 3],  # rotations are scaled, as those of 336 pixels are to 224
}


def save_eva(folder: Path, **changes: Any) -> Path:
    """Save a tiny EVA02-CLIP in timm's format, as the hub has it; all parameters random."""
    import timm

    args = {"num_classes": 5, **EVA_ARGS, **changes}
    model = _random(partial(timm.create_model, "eva02_large_patch14_clip_336", **args), seed=2)
    timm.models.save_for_hf(model, str(folder), safe_serialization=True)
    return folder
