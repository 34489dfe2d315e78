"""EVA02-CLIP towers, which Transformers has no class for: timm's model behind a class of ours.

Bunny (https://arxiv.org/abs/2402.11530) trained with EVA02-CLIP-L at 336 pixels
(https://arxiv.org/abs/2303.15389). A LLaVA model of such a tower loads where `register_eva` was
called, and nowhere else: not in plain Transformers, vLLM or llama.cpp.

Transformers' own TimmWrapperModel does not serve: its hidden states are maps, channels first.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models.eva import Eva
from torch import nn
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling

from manifests.errors import UserError
from train.models.towers import EVA


class EvaClipVisionConfig(PreTrainedConfig):  # type: ignore[no-untyped-call]
    """A timm EVA model: its name, and the arguments that differ from that name's.

    hidden_size, num_hidden_layers, image_size and patch_size tell what that model has.
    """

    model_type = EVA
    base_config_key = "vision_config"

    architecture: str = "eva02_large_patch14_clip_336"
    model_args: dict[str, Any] | None = None
    hidden_size: int = 1024
    num_hidden_layers: int = 24
    image_size: int = 336
    patch_size: int = 14


class EvaClipVisionModel(PreTrainedModel):  # type: ignore[no-untyped-call]
    """timm's EVA as LLaVA asks for a tower: hidden states of the class token and all patches.

    Its parts are called as SigLIP's and CLIP's are, so what cuts or freezes a tower does it here:
    embeddings (timm's model without what follows), encoder.layers (its blocks), post_layernorm.
    """

    config_class = EvaClipVisionConfig
    base_model_prefix = "vision_tower"
    main_input_name = "pixel_values"
    input_modalities = "image"
    supports_gradient_checkpointing = True
    _supports_sdpa = True  # timm chooses it by itself

    def __init__(self, config: EvaClipVisionConfig) -> None:
        """Build the model of the config, with num_hidden_layers blocks; its weights are random."""
        super().__init__(config)
        args = {**(config.model_args or {}), "depth": config.num_hidden_layers}
        eva = _timm_model(config.architecture, args)
        self.encoder = nn.Module()
        self.encoder.layers, eva.blocks = eva.blocks, nn.ModuleList()
        self.post_layernorm, eva.norm = eva.norm, nn.Identity()
        self.embeddings = eva
        self.gradient_checkpointing = False  # Transformers sets it, and the function that does it
        self.post_init()  # type: ignore[no-untyped-call]

    def _init_weights(self, module: nn.Module) -> None:
        """Make timm's rotary tables, too: no checkpoint has them."""
        super()._init_weights(module)  # type: ignore[no-untyped-call]
        make_tables = getattr(module, "init_non_persistent_buffers", None)
        if make_tables is not None:
            make_tables()

    def forward(self, pixel_values: torch.Tensor, **kwargs: Any) -> BaseModelOutputWithPooling:
        """Return the class token and the patches, [images, 1 + patches, width], of every block.

        hidden_states[0] are the embeddings, hidden_states[n] what block n gives, counted from 1,
        not normalised. So [-2] without the class token is what Bunny trains on
        (bunny/model/multimodal_encoder/eva_clip/eva_vit.py). last_hidden_state is normalised.

        Args:
            pixel_values: float [images, 3, side, side]; cast to the model's dtype.
            kwargs: Transformers' flags; whatever they ask for, all hidden states are returned.
        """
        first = self.embeddings
        embedded, rotation = first._pos_embed(first.patch_embed(pixel_values.to(self.dtype)))
        states = [first.norm_pre(embedded)]
        blocks: Any = self.encoder.layers
        again = self.gradient_checkpointing and self.training
        for block in blocks:
            call = partial(self._gradient_checkpointing_func, block) if again else block
            states.append(call(states[-1], rope=rotation))
        last = self.post_layernorm(states[-1])
        return BaseModelOutputWithPooling(last_hidden_state=last, hidden_states=tuple(states))


def register_eva() -> None:
    """Make Transformers' AutoConfig and AutoModel know EVA towers, in this process."""
    AutoConfig.register(EVA, EvaClipVisionConfig, exist_ok=True)
    AutoModel.register(EvaClipVisionConfig, EvaClipVisionModel, exist_ok=True)


def eva_fields(path: Path, raw: dict[str, Any]) -> dict[str, Any]:
    """Return the vision_config of a directory in timm's format.

    Args:
        path: the directory, to name it.
        raw: its config.json: architecture, and model_args if they differ from that name's.

    Raises: UserError for a timm model that is no EVA, or has other tokens beside the class token.
    """
    name, args = str(raw["architecture"]), raw.get("model_args") or {}
    try:
        with torch.device("meta"):
            model = _timm_model(name, args)
    except (RuntimeError, TypeError) as error:
        raise _no_eva(path, f"timm cannot build {name!r} ({str(error).splitlines()[0]})") from error
    if not isinstance(model, Eva) or model.num_prefix_tokens != 1 or model.rope_mixed:
        raise _no_eva(path, f"{name!r} is no EVA02-CLIP")
    return {
        "model_type": EVA,
        "architecture": name,
        "model_args": args,
        "hidden_size": model.embed_dim,
        "num_hidden_layers": len(model.blocks),
        "image_size": model.patch_embed.img_size[0],
        "patch_size": model.patch_embed.patch_size[0],
    }


def _timm_model(name: str, args: dict[str, Any]) -> Any:
    return timm.create_model(name, pretrained=False, **{**args, "num_classes": 0})


def _no_eva(path: Path, what: str) -> UserError:
    return UserError(
        f"{path}: {what}.",
        "Of timm's models only EVA is taken as a tower, with one class token before the patches.",
        "Use timm/eva02_large_patch14_clip_336.merged2b, or a SigLIP or CLIP of Transformers.",
    )
