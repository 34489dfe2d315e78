"""Files that turn messages and images into a LLaVA model's inputs: processor, tokenizer, template.

The image processor's part is written as JSON: only that keeps torchvision, which Transformers'
image processors import, out of the composing process. It is LlavaImageProcessor for every tower:
SiglipImageProcessor has no crop_size, from which LlavaProcessor counts the tokens of an image.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from manifests import store
from train.models.image_token import IMAGE, ImageToken

_CLIP_MEAN = [0.48145466, 0.4578275, 0.40821073]
_CLIP_STD = [0.26862954, 0.26130258, 0.27577711]
_BICUBIC = 3  # PIL.Image.Resampling

SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives "
    "helpful, detailed, and polite answers to the user's questions."
)
BUNNY_TEMPLATE = (
    "{%- if messages[0]['role'] == 'system' -%}"
    "{%- set system = messages[0]['content'] -%}{%- set turns = messages[1:] -%}"
    "{%- else -%}{%- set system = '" + SYSTEM.replace("'", "\\'") + "' -%}"
    "{%- set turns = messages -%}{%- endif -%}"
    "{%- macro text_of(content) -%}"
    "{%- if content is string -%}{{- content -}}{%- else -%}"
    "{%- for item in content if item['type'] == 'text' -%}{{- item['text'] -}}{%- endfor -%}"
    "{%- endif -%}{%- endmacro -%}"
    "{{- text_of(system) + ' ' -}}"
    "{%- for turn in turns -%}"
    "{%- if turn['role'] == 'user' -%}{{- 'USER: ' -}}"
    "{%- if turn['content'] is not string -%}"
    "{%- for item in turn['content'] if item['type'] == 'image' -%}"
    "{{- '<image>\\n' -}}{%- endfor -%}{%- endif -%}"
    "{{- text_of(turn['content']) + ' ASSISTANT:' -}}"
    "{%- else -%}{%- generation -%}{{- ' ' + text_of(turn['content']) + eos_token -}}"
    "{%- endgeneration -%}{%- endif -%}{%- endfor -%}"
)
"""Bunny's conversation (bunny/conversation.py): `SYS USER: <image>\\nq ASSISTANT: a<eos>USER: ...`.

Images stand before their turn's text. `{% generation %}` spans the tokens that are trained:
" a<eos>". A prompt ends with "ASSISTANT:", so add_generation_prompt changes nothing.
"""


@dataclass(frozen=True, slots=True)
class ImageShape:
    """What a vision tower takes and gives: squares of `side` pixels, and features of patches."""

    side: int
    patch_size: int
    has_class_token: bool

    @property
    def num_tokens(self) -> int:
        """Features of an image; the class token is no feature."""
        return (self.side // self.patch_size) ** 2

    @property
    def strategy(self) -> str:
        """LLaVA's vision_feature_select_strategy: "default" leaves out the class token."""
        return "default" if self.has_class_token else "full"


def write_processor(directory: Path, tower: Path, shape: ImageShape, image: ImageToken) -> None:
    """Write processor_config.json for LlavaProcessor.

    Args:
        directory: where the composed model is written.
        tower: directory of the vision tower, whose mean, std and resample are taken if it has them.
    """
    config = {
        "processor_class": "LlavaProcessor",
        "image_token": image.text,
        "patch_size": shape.patch_size,
        "num_additional_image_tokens": int(shape.has_class_token),
        "vision_feature_select_strategy": shape.strategy,
        "image_processor": _image_processor(tower, shape),
    }
    store.write_json(str(directory), "processor_config.json", config)


def _image_processor(tower: Path, shape: ImageShape) -> dict[str, Any]:
    """Return LlavaImageProcessor's fields; non-square images are padded with the mean colour."""
    square = {"height": shape.side, "width": shape.side}
    is_clip = shape.has_class_token
    given = _given_image_processor(tower)
    return {
        "image_processor_type": "LlavaImageProcessor",
        "do_convert_rgb": True,
        "do_pad": True,
        "do_resize": True,
        "size": {"shortest_edge": shape.side} if is_clip else square,
        "resample": given.get("resample", _BICUBIC),
        "do_center_crop": is_clip,
        "crop_size": square,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": given.get("image_mean", _CLIP_MEAN if is_clip else [0.5] * 3),
        "image_std": given.get("image_std", _CLIP_STD if is_clip else [0.5] * 3),
    }


def _given_image_processor(tower: Path) -> dict[str, Any]:
    for name in ("preprocessor_config.json", "processor_config.json"):
        if (tower / name).exists():
            config: dict[str, Any] = json.loads((tower / name).read_text())
            return dict(config.get("image_processor", config))
    return {}


def write_tokenizer(directory: Path, tokenizer: Any, image: ImageToken, template: str) -> None:
    """Write the tokenizer with its image token, a padding token and the chat template.

    Args:
        template: jinja, with `<image>` where an image stands and `{% generation %}` marks. If the
            tokenizer begins texts with bos_token, so does the written template: whoever renders it
            (vLLM, apply_chat_template) tokenizes without special tokens.
    """
    if "bos_token" not in template and _begins_texts(tokenizer):
        template = "{{- bos_token -}}" + template
    tokenizer.chat_template = template.replace(IMAGE, image.text)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token  # padding is masked: any token will do
    tokenizer.save_pretrained(directory)


def _begins_texts(tokenizer: Any) -> bool:
    return tokenizer.bos_token_id is not None and tokenizer("a").input_ids[0] == (
        tokenizer.bos_token_id
    )


def write_generation_config(directory: Path, language_model: Path, tokenizer: Any) -> None:
    """Write generation_config.json: the LM's own, stopping at the template's end of an answer."""
    path = language_model / "generation_config.json"
    config: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    given = config.get("eos_token_id")
    stops = given if isinstance(given, list) else [] if given is None else [given]
    if tokenizer.eos_token_id not in stops:
        stops = [*stops, tokenizer.eos_token_id]
    config |= {"eos_token_id": stops, "pad_token_id": tokenizer.pad_token_id}
    store.write_json(str(directory), "generation_config.json", config)
