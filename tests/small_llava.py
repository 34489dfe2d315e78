"""Tiny random vision towers, causal language models and tokenizers, saved as the hub has them.

The fixtures are called `towers` and `llama`: import `small_towers`, `small_language_model`.
"""

from __future__ import annotations

import warnings
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
    "qwen3": {"model_type": "qwen3", "head_dim": 16, "tie_word_embeddings": True},
    "phi": {"model_type": "phi", "num_key_value_heads": 2},
    "phi3": {"model_type": "phi3"},
    "stablelm": {"model_type": "stablelm", "use_qkv_bias": True},
    "granite": {"model_type": "granite", "logits_scaling": 8.0, "embedding_multiplier": 12.0},
    "minicpm3": {
        **{"model_type": "minicpm3", "num_key_value_heads": 2, "dim_model_base": 8},
        **{"kv_lora_rank": 8, "q_lora_rank": 8},
        **{"qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8},
    },
    "gemma3": {"model_type": "gemma3_text", "head_dim": 16, "query_pre_attn_scalar": 16},
}


def save_tower(folder: Path, kind: str = "siglip_vision_model", seed: int = 0) -> Path:
    """Save a tower: siglip, clip (dual models), or *_vision_model; all parameters random."""
    config = dict(_VISION)
    if kind in ("siglip", "clip"):
        text = {**_VISION, "vocab_size": 50, "bos_token_id": 1, "eos_token_id": 2}
        config = {"vision_config": config, "text_config": text}
    return _save(
        folder,
        transformers.AutoModel.from_config(transformers.AutoConfig.for_model(kind, **config)),
        seed,
    )


def save_language_model(folder: Path, family: str = "llama", seed: int = 1, **more: Any) -> Path:
    """Save a causal LM of FAMILIES with its tokenizer; all parameters, biases too, are random."""
    config = transformers.AutoConfig.for_model(**{**_TEXT, **FAMILIES[family], **more})
    tokenizer_for().save_pretrained(folder)
    return _save(folder, transformers.AutoModelForCausalLM.from_config(config), seed)


def _save(folder: Path, model: Any, seed: int) -> Path:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for one in model.parameters():
            one.add_(torch.randn(one.shape, generator=generator) * 0.1)
    model.save_pretrained(folder)
    return folder


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
