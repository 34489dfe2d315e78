"""The vision tower in training: cut off after the layer whose features are used.

What comes behind that layer (for LLaVA's and Bunny's -2: the last layer, the norm, the pooling
head) reaches nothing, so it takes no memory here and never trains. Serving in vLLM cuts likewise.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from manifests.errors import UserError


def cut_tower(llava: Any) -> None:
    """Drop what is behind the feature layer of a LlavaForConditionalGeneration, and say so in it.

    Features stay the same, bit by bit; `llava`'s own forward too, as its config follows. Raises:
    UserError when features are taken of several layers.
    """
    config, tower = llava.config, llava.model.vision_tower
    layer, layers = config.vision_feature_layer, tower.encoder.layers
    if not isinstance(layer, int):
        raise UserError(
            f"The model takes features of the layers {layer}.",
            "Only one layer's are trained on here.",
            "Compose a model, whose vision_feature_layer is one number.",
        )
    num_kept = layer if layer >= 0 else len(layers) + 1 + layer
    tower.encoder.layers = layers[:num_kept]
    tower.post_layernorm = nn.Identity()
    if hasattr(tower, "head"):
        del tower.head
    tower.use_head = False
    config.vision_feature_layer = -1
    config.vision_config.num_hidden_layers = num_kept
    config.vision_config.vision_use_head = False


def tower_features(llava: Any, pixels: Tensor) -> Tensor:
    """Return the features of each image by a tower that is cut: [images, tokens, width].

    pixels: float [images, 3, side, side]. Without a graph where the tower is frozen.
    """
    config, tower = llava.config, llava.model.vision_tower
    vision = config.vision_config
    if not len(pixels):
        num_tokens = (vision.image_size // vision.patch_size) ** 2
        return pixels.new_zeros(0, num_tokens, vision.hidden_size)
    trains = torch.is_grad_enabled() and tower.training
    with torch.set_grad_enabled(trains):
        features: Tensor = tower(pixels.to(tower.dtype)).last_hidden_state
    return features[:, 1:] if config.vision_feature_select_strategy == "default" else features
