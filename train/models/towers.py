"""Reads the configs of the two halves, and refuses those that LLaVA cannot hold, by name."""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from manifests.errors import UserError
from train.models.minicpm import granite_fields, is_minicpm
from train.models.processor_files import ImageShape

_VISION = {
    "siglip": "siglip_vision_model",
    "siglip_vision_model": "siglip_vision_model",
    "clip": "clip_vision_model",
    "clip_vision_model": "clip_vision_model",
}
EVA = "eva_clip_vision"
"""model_type of EVA towers, which train.models.eva registers."""
# Fields about the file or the code that made it; the composed config has its own.
_ABOUT_THE_FILE = ("_name_or_path", "auto_map", "dtype", "torch_dtype", "transformers_version")


@dataclass(frozen=True, slots=True)
class Tower:
    """A vision tower: its directory, its vision_config, and the images it takes."""

    path: Path
    raw: dict[str, Any]
    hidden_size: int
    shape: ImageShape

    @property
    def is_eva(self) -> bool:
        """Whether only our class loads it."""
        return bool(self.raw["model_type"] == EVA)


@dataclass(frozen=True, slots=True)
class LanguageModel:
    """A causal LM: its directory, its config as published, and as Transformers reads it.

    is_as_published: not for a MiniCPM, for which both configs are Granite's.
    """

    path: Path
    raw: dict[str, Any]
    config: Any
    is_as_published: bool = True


def read_tower(path: Path) -> Tower:
    """Read a SigLIP or CLIP directory, a whole dual model or its vision half, or timm's EVA.

    Raises: UserError for another kind of tower, naming one to use instead.
    """
    _refuse_pickled_eva(path)
    raw = _read_config(path)
    kind = raw.get("model_type")
    if kind is None and "architecture" in raw:  # timm's format
        return _read_eva(path, raw)
    if kind not in _VISION:
        raise _refused_tower(path, str(kind))
    vision = raw.get("vision_config", {}) if kind in ("siglip", "clip") else raw
    vision = {**_cleaned(vision), "model_type": _VISION[kind]}
    config = _vision_config(vision)
    shape = ImageShape(config.image_size, config.patch_size, _VISION[kind].startswith("clip"))
    return Tower(path, vision, config.hidden_size, shape)


def register_tower(llava: dict[str, Any]) -> None:
    """Make Transformers know the tower of a LLaVA model, before it is loaded.

    Args:
        llava: config.json of the model; nothing happens if its tower is Transformers' own.
    """
    if llava.get("vision_config", {}).get("model_type") == EVA:
        from train.models.eva import register_eva

        register_eva()


def _read_eva(path: Path, raw: dict[str, Any]) -> Tower:
    from train.models.eva import eva_fields, register_eva

    register_eva()
    vision = eva_fields(path, raw)
    shape = ImageShape(vision["image_size"], vision["patch_size"], has_class_token=True)
    return Tower(path, vision, vision["hidden_size"], shape)


def _refuse_pickled_eva(path: Path) -> None:
    is_lone = path.is_file() or (path.is_dir() and not (path / "config.json").exists())
    found = [path] if path.is_file() else sorted(path.glob("*.pt"))
    if is_lone and found and "eva" in found[0].name.lower():
        raise UserError(
            f"{path} is EVA-CLIP as its authors publish it: a pickled file ({found[0].name}).",
            "A pickled file can run code, and says nothing of the model's shape.",
            "Download timm/eva02_large_patch14_clip_336.merged2b, the same weights as safetensors. "
            "Or convert the file with timm: model = timm.create_model("
            "'eva02_large_patch14_clip_336', pretrained=True, num_classes=768, "
            f"pretrained_cfg_overlay={{'file': {str(found[0])!r}}}); "
            "timm.models.save_for_hf(model, 'eva', safe_serialization=True).",
        )


def _vision_config(vision: dict[str, Any]) -> Any:
    from transformers import CLIPVisionConfig, SiglipVisionConfig

    kinds = {one.model_type: one for one in (CLIPVisionConfig, SiglipVisionConfig)}
    return kinds[vision["model_type"]].from_dict(dict(vision))


def _refused_tower(path: Path, kind: str) -> UserError:
    if kind.startswith("siglip2"):
        return UserError(
            f"{path} is a SigLIP 2 NaFlex tower ({kind}).",
            "It needs a mask and a shape for each image, which LLaVA never passes on.",
            "Use a fixed-resolution SigLIP 2, such as siglip2-so400m-patch14-384.",
        )
    return UserError(
        f"{path} is a {kind} model, not a vision tower that a LLaVA checkpoint can hold.",
        "Servers of the stock format know CLIP and SigLIP towers only.",
        "Use SigLIP, SigLIP 2 (fixed resolution) or CLIP.",
    )


def read_language_model(path: Path) -> LanguageModel:
    """Read a causal LM's config.

    Raises: UserError for a multimodal, quantised or unknown model, naming what to use instead.
    """
    raw = _read_config(path)
    kind = raw.get("model_type")
    if "vision_config" in raw or "text_config" in raw:
        raise UserError(
            f"{path} is a {kind} model with a vision tower or other halves of its own.",
            "Its language model is nested under other names.",
            "Use the text-only release, or save_pretrained its language model alone.",
        )
    if "quantization_config" in raw:
        raise UserError(
            f"{path} has quantised weights.",
            "They can be neither trained nor rewritten exactly.",
            "Use the model's unquantised weights.",
        )
    is_other = is_minicpm(raw)
    if is_other:
        raw = granite_fields(path, raw)
    config, architecture = _known_config(path, raw)
    raw = {**_cleaned(raw), "architectures": [architecture]}
    return LanguageModel(path, raw, config, is_as_published=not is_other)


def _known_config(path: Path, raw: dict[str, Any]) -> tuple[Any, str]:
    from transformers import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    kind = str(raw.get("model_type"))
    architecture = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(kind)
    if not isinstance(architecture, str):
        raise UserError(
            f"{path} is a {kind} model, which Transformers does not have as a causal LM.",
            "A stock LLaVA directory may hold no code of its own.",
            "Use Qwen, Llama, SmolLM, StableLM, Phi, Granite, MiniCPM or Gemma 3 text.",
        )
    return CONFIG_MAPPING[kind].from_dict(copy.deepcopy(_cleaned(raw))), architecture


def _read_config(path: Path) -> dict[str, Any]:
    if not (path / "config.json").exists():
        raise UserError(
            f"{path} has no config.json.",
            "A vision tower and a language model are directories as save_pretrained writes them.",
            "Name such a directory; a hub name must be downloaded first.",
        )
    config: dict[str, Any] = json.loads((path / "config.json").read_text())
    return config


def _cleaned(raw: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in raw.items() if name not in _ABOUT_THE_FILE}
