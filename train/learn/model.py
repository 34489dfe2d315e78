"""A stock LLaVA in training: which of its tensors move, and the sum of losses of a micro-batch.

The modules are those of `LlavaForConditionalGeneration`, the forward pass is ours:

- the frozen tower runs without a graph, and the projector in float32 beside a bfloat16 model;
- rows are padded on the right and no mask is given, so attention is plainly causal;
- the head is applied to the positions that are trained, not to all;
- without images the projector still takes part, with no row: its gradients are zero, not None.
"""

from __future__ import annotations

import re
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from manifests import paths, store
from manifests.errors import UserError
from train.config import LoraConfig, TrainConfig
from train.models.towers import register_tower
from train.text.template import IGNORED


@dataclass(frozen=True, eq=False)
class TrainedLlava:
    """A LLaVA of which some tensors train. whole: with adapters, as peft wraps it, or else `llava`.

    llava: a LlavaForConditionalGeneration.
    """

    llava: Any
    whole: Any

    @classmethod
    def load(cls, model_dir: str, config: TrainConfig) -> TrainedLlava:
        """Return a model of a composed directory, ready for a stage.

        Adapters are drawn from the config's seed. Raises: UserError for a model of another kind.
        """
        from transformers import LlavaForConditionalGeneration

        _check_kind(model_dir)
        dtype = "auto" if config.dtype == "keep" else getattr(torch, config.dtype)
        llava = LlavaForConditionalGeneration.from_pretrained(model_dir, dtype=dtype)
        _check_feature_layer(llava.config)
        llava.requires_grad_(False)
        whole = llava
        if config.stage == "adapter":
            whole = _with_adapters(llava, config.lora, config.seed)
        llava.model.multi_modal_projector.float().requires_grad_(True)
        whole.train()
        llava.model.vision_tower.eval()
        if config.gradient_checkpointing:
            _compute_layers_again(llava.model.language_model)
        return cls(llava, whole)

    @property
    def tokens_per_image(self) -> int:
        """Features that stand for one image: its patches; the class token is none."""
        vision = self.llava.config.vision_config
        return int(vision.image_size // vision.patch_size) ** 2

    @property
    def _drops_class_token(self) -> bool:
        return bool(self.llava.config.vision_feature_select_strategy == "default")

    def trainables(self) -> dict[str, nn.Parameter]:
        """Return what trains, by its name in `llava`, in the model's order."""
        named = self.llava.named_parameters()
        return {name: one for name, one in named if one.requires_grad}

    def groups(self) -> dict[str, list[nn.Parameter]]:
        """Return what trains by its learning rate: projector, and adapter in that stage."""
        found: dict[str, list[nn.Parameter]] = {}
        for name, one in self.trainables().items():
            is_projector = ".multi_modal_projector." in f".{name}"
            found.setdefault("projector" if is_projector else "adapter", []).append(one)
        return found

    def losses(self, ids: Tensor, labels: Tensor, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Return the loss of each trained token, and its row: float32 [k] and int64 [k].

        ids, labels: int64 [rows, length], padded on the right (labels with IGNORED). pixels:
        float [images, 3, side, side], in the order of the rows; there may be no image.
        """
        llava = self.llava
        embedded = llava.get_input_embeddings()(ids)
        features = llava.model.multi_modal_projector(self._features(pixels).float())
        is_image = (ids == llava.config.image_token_id)[..., None]
        embedded = embedded.masked_scatter(is_image, features.to(embedded.dtype))
        decoder = llava.model.language_model
        hidden = decoder(inputs_embeds=embedded, use_cache=False).last_hidden_state[:, :-1]
        wanted = labels[:, 1:]
        trained = wanted != IGNORED
        logits = llava.lm_head(hidden[trained]).float()
        losses = functional.cross_entropy(logits, wanted[trained], reduction="none")
        return losses, trained.nonzero()[:, 0]

    @torch.no_grad()
    def _features(self, pixels: Tensor) -> Tensor:
        """Return the tower's features of each image: [images, tokens, width]."""
        config, tower = self.llava.config, self.llava.model.vision_tower
        if not len(pixels):
            return pixels.new_zeros(0, self.tokens_per_image, config.vision_config.hidden_size)
        seen = tower(pixels.to(tower.dtype), output_hidden_states=True)
        features: Tensor = seen.hidden_states[config.vision_feature_layer]
        return features[:, 1:] if self._drops_class_token else features


def adapted_layers(llava: nn.Module) -> str:
    """Return a regular expression that fully matches the names of all layers to adapt.

    They are the language model's linear layers, between embedding and head. A list of suffixes
    would not do: towers call some of theirs the same (q_proj, fc1).
    """
    inside = re.compile(r"(?:.*\.)?language_model\.layers\.\d+\..*?([^.]+)")
    linear = (name for name, one in llava.named_modules() if isinstance(one, nn.Linear))
    found = {match[1] for match in map(inside.fullmatch, linear) if match}
    return rf"(?:.*\.)?language_model\.layers\.\d+\.(?:.*\.)?(?:{'|'.join(sorted(found))})"


def adapter_config(llava: nn.Module, lora: LoraConfig) -> Any:
    """Return peft's config of the adapters; without modules_to_save, which vLLM refuses."""
    import peft

    return peft.LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]  # peft divides it: any number will do
        lora_dropout=lora.dropout,
        bias="none",
        target_modules=adapted_layers(llava),
    )


def _with_adapters(llava: nn.Module, lora: LoraConfig, seed: int) -> Any:
    import peft

    with torch.random.fork_rng(), warnings.catch_warnings():
        # peft asks by a name that transformers is about to drop
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated")
        torch.manual_seed(seed)
        return peft.get_peft_model(llava, adapter_config(llava, lora))


def _compute_layers_again(decoder: Any) -> None:
    """Let the language model's layers keep no activations.

    Not by peft, and without gradients of embeddings, which transformers asks for here: both are for
    reentrant checkpoints, and on the whole model they would give the frozen tower a graph.
    """
    enable = getattr(decoder, "activation_checkpointing_enable", None)  # from transformers 5.23
    (enable or decoder.gradient_checkpointing_enable)({"use_reentrant": False})
    decoder.disable_input_require_grads()


def _check_kind(model_dir: str) -> None:
    found = store.read_json(paths.join(model_dir, "config.json"))
    if found is None or found.get("model_type") != "llava":
        raise UserError(
            f"{model_dir} holds no LLaVA model.",
            "Its config.json is missing or of another model_type.",
            "Compose a tower and a language model first, and train that directory.",
        )
    register_tower(found)


def _check_feature_layer(config: Any) -> None:
    if not isinstance(config.vision_feature_layer, int):
        raise UserError(
            f"The model takes features of the layers {config.vision_feature_layer}.",
            "Only one layer's are trained on here.",
            "Compose a model, whose vision_feature_layer is one number.",
        )
