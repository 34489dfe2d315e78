"""What a Bunny checkpoint's config.json says, in the terms of stock Transformers configs.

Bunny (https://arxiv.org/abs/2402.11530) writes one flat config: the language model's fields and,
among them, `mm_*` fields about the image side. Its language models are Transformers' own under
other names, but for MiniCPM, which is Granite with three scales named differently.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from manifests.errors import UserError
from train.models.minicpm import granite_scales
from train.models.tensor_files import LazyTensor

_TOWER = "vision_tower.vision_model."
_TOWER_HEADS = {768: 12, 1024: 16, 1152: 16}  # SigLIP B, L, so400m; CLIP B, L: by hidden size
_ENDOFTEXT = "<|endoftext|>"


@dataclass(frozen=True, slots=True)
class Family:
    """A family of Bunny's language models: the stock classes, and the token that ends an answer."""

    config: str
    architecture: str
    end: str


FAMILIES = {
    "bunny-phi": Family("PhiConfig", "PhiForCausalLM", _ENDOFTEXT),
    "bunny-phi3": Family("Phi3Config", "Phi3ForCausalLM", _ENDOFTEXT),
    "bunny-qwen": Family("Qwen2Config", "Qwen2ForCausalLM", _ENDOFTEXT),
    "bunny-qwen2": Family("Qwen2Config", "Qwen2ForCausalLM", _ENDOFTEXT),  # its later name
    "bunny-llama": Family("LlamaConfig", "LlamaForCausalLM", "<|end_of_text|>"),
    "bunny-stablelm": Family("StableLmConfig", "StableLmForCausalLM", _ENDOFTEXT),
    "bunny-minicpm": Family("GraniteConfig", "GraniteForCausalLM", "</s>"),
}


def read_bunny_config(checkpoint: Path) -> dict[str, Any]:
    """Return config.json of a Bunny checkpoint that LLaVA can express.

    Raises: UserError for no config, another model, S2, an EVA tower, or another projector.
    """
    path = checkpoint / "config.json"
    if not path.exists():
        raise UserError(
            f"{checkpoint} has no config.json.",
            "It says which language model and which projector the weights are of.",
            "Download the whole repository.",
        )
    raw: dict[str, Any] = json.loads(path.read_text())
    _refuse_others(checkpoint, raw)
    _refuse_image_side(checkpoint, raw)
    return raw


def _refuse_others(checkpoint: Path, raw: dict[str, Any]) -> None:
    if raw.get("model_type") not in FAMILIES:
        raise UserError(
            f"{checkpoint} is a {raw.get('model_type')!r} model.",
            "Only Bunny's own language models can be imported.",
            f"Use a checkpoint of one of: {', '.join(FAMILIES)}.",
        )


def _refuse_image_side(checkpoint: Path, raw: dict[str, Any]) -> None:
    if raw.get("use_s2"):
        raise UserError(
            f"{checkpoint} was trained with use_s2: images at three scales, side by side.",
            "A LLaVA checkpoint holds one tower at one scale.",
            "Use a v1.0 checkpoint, such as Bunny-v1_0-4B or Bunny-Llama-3-8B-V, or SigLIP 2 at "
            "512 pixels in a model of your own.",
        )
    tower = str(raw.get("mm_vision_tower") or raw.get("vision_tower") or "").lower()
    if "eva" in tower and "sig" not in tower:
        raise UserError(
            f"{checkpoint} has an EVA vision tower ({tower}).",
            "Transformers has no class for it, and servers of LLaVA know CLIP and SigLIP only.",
            "Use the SigLIP variant of the checkpoint.",
        )
    projector = raw.get("mm_projector_type", "mlp2x_gelu")
    if projector != "mlp2x_gelu":
        raise UserError(
            f"{checkpoint} has a projector of type {projector}.",
            "LLaVA's projector is two linear layers with GELU between: mlp2x_gelu.",
            "Use a checkpoint with mm_projector_type mlp2x_gelu, as all released ones have.",
        )


def text_fields(raw: dict[str, Any], num_rows: int, tied: bool) -> dict[str, Any]:
    """Return a stock text_config.

    Args:
        raw: Bunny's config.
        num_rows: of the embedding as stored; Bunny cuts it to its tokenizer without saying so.
        tied: whether the head is the embedding.

    Source of MiniCPM's scales: modeling_minicpm.py of https://github.com/BAAI-DCAI/Bunny.
    """
    import transformers

    family = FAMILIES[raw["model_type"]]
    config_class = getattr(transformers, family.config)
    given = dict(raw)
    if family.config == "StableLmConfig":
        given |= _stablelm_fields(raw)
    if family.config == "GraniteConfig":
        given |= granite_scales(raw)
    about_file = {"_name_or_path", "dtype", "transformers_version"}
    known = {*config_class().to_dict(), "rope_theta", "rope_scaling", "partial_rotary_factor"}
    return {
        **{name: value for name, value in given.items() if name in known - about_file},
        "architectures": [family.architecture],
        "model_type": config_class.model_type,
        "vocab_size": num_rows,
        "tie_word_embeddings": tied,
    }


def _stablelm_fields(raw: dict[str, Any]) -> dict[str, Any]:
    """Return StableLM-Epoch's fields by StableLM's names, with the defaults of Bunny's class.

    A config that came from a newer base has both names; Bunny's class reads only the old ones.
    """
    return {
        "layer_norm_eps": raw.get("norm_eps", 1e-5),
        "partial_rotary_factor": raw.get("rope_pct", 0.25),
        "use_qkv_bias": raw.get("use_qkv_bias", True),
    }


def vision_fields(tensors: dict[str, LazyTensor]) -> dict[str, Any]:
    """Return the vision_config that a SigLIP or CLIP tower's shapes tell.

    Args:
        tensors: by their names in a LLaVA checkpoint.

    Raises: UserError when the number of attention heads cannot be told from the width.
    """
    hidden, _, patch, _ = tensors[f"{_TOWER}embeddings.patch_embedding.weight"].shape
    if hidden not in _TOWER_HEADS:
        raise UserError(
            f"A vision tower of width {hidden} is none of those that are known.",
            "Its shapes do not tell the number of its attention heads.",
            "Name the directory of the original tower: vision_tower=...",
        )
    is_clip = f"{_TOWER}embeddings.class_embedding" in tensors
    num_positions = tensors[f"{_TOWER}embeddings.position_embedding.weight"].shape[0]
    layers = {name.split(".")[4] for name in tensors if name.startswith(f"{_TOWER}encoder.layers.")}
    kind = {"model_type": "clip_vision_model"} if is_clip else {"model_type": "siglip_vision_model"}
    return {
        **kind,
        "hidden_size": hidden,
        "intermediate_size": tensors[f"{_TOWER}encoder.layers.0.mlp.fc1.weight"].shape[0],
        "num_hidden_layers": len(layers),
        "num_attention_heads": _TOWER_HEADS[hidden],
        "patch_size": patch,
        "image_size": patch * math.isqrt(num_positions - is_clip),
    }
