"""A stock LLaVA in training: which of its tensors move, and the sum of losses of a micro-batch.

The modules are those of `LlavaForConditionalGeneration`, the forward pass is ours:

- a frozen tower runs without a graph, and the projector in float32 beside a bfloat16 model;
- rows are padded on the right, or packed, and no mask is given, so attention is plainly causal;
- the head is applied to the positions that are trained, not to all;
- without images the projector still takes part, with no row: its gradients are zero, not None;
- what is trained and shown is found where ids and labels are: if on the CPU, no GPU waits for it.
"""

from __future__ import annotations

import re
import warnings
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from train.config import LoraConfig, TrainConfig
from train.learn.loading import compile_layers, compute_layers_again, load_llava
from train.learn.packing import check_packing
from train.learn.tower import cut_tower, tower_features
from train.text.template import IGNORED

MOST_LOGITS_BYTES = 2**29
"""Logits of more bytes, in float32, are computed in pieces, and again in the backward pass."""

_GROUPS = {"multi_modal_projector": "projector", "vision_tower": "tower"}


@dataclass(frozen=True, eq=False)
class TrainedLlava:
    """A LLaVA of which some tensors train. whole: with adapters, as peft wraps it, or else `llava`.

    llava: a LlavaForConditionalGeneration, its tower cut after the feature layer. dtype: in which
    the language model computes; mixed: also float32 weights in it.
    """

    llava: Any
    whole: Any
    dtype: torch.dtype
    mixed: bool

    @classmethod
    def load(cls, model_dir: str, config: TrainConfig) -> TrainedLlava:
        """Return a model of a composed directory, ready for a stage.

        Adapters are drawn from the config's seed. Raises: UserError for a model of another kind,
        and for what this machine lacks.
        """
        llava = load_llava(model_dir, config)
        cut_tower(llava)
        llava.requires_grad_(False)
        dtype = llava.get_input_embeddings().weight.dtype
        whole = llava
        if config.stage == "adapter":
            whole = _with_adapters(llava, config.lora, config.seed)
        whole.train()
        llava.model.vision_tower.eval()
        for module in _trained_modules(llava, config):
            module.float().requires_grad_(True).train()
        _settle_layers(llava, config)
        is_short = dtype in (torch.bfloat16, torch.float16)
        mixed = is_short and (config.stage != "projector" or config.tower_lr is not None)
        return cls(llava, whole, dtype, mixed)

    @property
    def tokens_per_image(self) -> int:
        """Features that stand for one image: its patches; the class token is none."""
        vision = self.llava.config.vision_config
        return int(vision.image_size // vision.patch_size) ** 2

    @property
    def device(self) -> torch.device:
        """Where the embedding is."""
        found: torch.device = self.llava.get_input_embeddings().weight.device
        return found

    def trainables(self) -> dict[str, nn.Parameter]:
        """Return what trains, by its name in `llava`, in the model's order.

        A head that is tied to the embedding is the embedding, once.
        """
        named = self.llava.named_parameters()
        return {name: one for name, one in named if one.requires_grad}

    def groups(self) -> dict[str, list[nn.Parameter]]:
        """Return what trains by its learning rate: projector, tower, adapter or language_model."""
        found: dict[str, list[nn.Parameter]] = {}
        for name, one in self.trainables().items():
            rest = "adapter" if ".lora_" in name else "language_model"
            part = name.removeprefix("model.").partition(".")[0]
            found.setdefault(_GROUPS.get(part, rest), []).append(one)
        return found

    def check_packing(self) -> None:
        """Check that packed samples do not see each other. Raises: UserError."""
        ids = torch.arange(17, device=self.device)
        embedded = self.llava.get_input_embeddings()(ids).to(self.dtype)
        with self._computing():
            check_packing(self.llava.model.language_model, embedded)

    def losses(
        self, ids: Tensor, labels: Tensor, pixels: Tensor, positions: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return the loss of each trained token, and its sample: float32 [k] and int64 [k].

        ids, labels: int64 [rows, length], padded on the right (labels with IGNORED). pixels: float
        [images, 3, side, side], in the order of the rows; there may be no image, and those without
        a token in `ids` count for nothing. positions: int64 [1, length] of packed samples, 0 where
        one begins. All may be on the CPU, and samples are returned where labels are.
        """
        llava = self.llava
        trained, sample = _trained_tokens(labels, positions)
        is_image = ids == llava.config.image_token_id
        device = self.device
        at, wanted, shown = (
            moved(one, device)
            for one in (
                trained.flatten().nonzero()[:, 0] - 1,
                labels[trained],
                is_image.flatten().nonzero()[:, 0],
            )
        )
        features = self._features(moved(pixels, device))
        with self._computing():
            embedded = llava.get_input_embeddings()(moved(ids, device)).to(self.dtype)
            seen = features.flatten(0, 1)[: len(shown)].to(self.dtype)
            inputs = embedded.flatten(0, 1).index_copy(0, shown, seen).view_as(embedded)
            hidden = llava.model.language_model(
                inputs_embeds=inputs,
                position_ids=None if positions is None else moved(positions, device),
                use_cache=False,
            ).last_hidden_state.flatten(0, 1)
            losses = _token_losses(llava.lm_head, hidden.index_select(0, at), wanted)
        return losses, sample

    def _features(self, pixels: Tensor) -> Tensor:
        """Return what stands for each image: float32 [images, tokens, width]."""
        tower_trains = self.llava.model.vision_tower.training
        with self._computing() if tower_trains else nullcontext():  # frozen, it is all of one dtype
            seen = tower_features(self.llava, pixels)
        found: Tensor = self.llava.model.multi_modal_projector(seen.float())
        return found

    def _computing(self) -> torch.autocast:
        """Let float32 weights that train compute in the dtype of the frozen ones beside them."""
        dtype = self.dtype if self.mixed else torch.bfloat16
        return torch.autocast(self.device.type, dtype, enabled=self.mixed)


def moved(tensor: Tensor, device: torch.device) -> Tensor:
    """Return a tensor on a device; from a CPU to a GPU without waiting for the copy."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def _trained_tokens(labels: Tensor, positions: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return which tokens are predicted and trained, and their samples: bool [r, n], int64 [k].

    A first token is predicted by nothing, least of all by the sample before it.
    """
    trained = labels != IGNORED
    if positions is None:
        trained[:, 0] = False
        return trained, trained.nonzero()[:, 0]
    begins = positions == 0
    trained &= ~begins
    return trained, (begins.flatten().cumsum(0) - 1)[trained.flatten()]


def _token_losses(head: Any, hidden: Tensor, wanted: Tensor) -> Tensor:
    """Return each token's loss: float32 [k]. hidden: [k, width]; wanted: int64 [k]."""
    at_once = max(MOST_LOGITS_BYTES // (4 * head.out_features), 1)
    if len(hidden) <= at_once:
        return _cross_entropy(head, hidden, wanted)
    pieces = zip(torch.split(hidden, at_once), torch.split(wanted, at_once), strict=True)
    options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}
    return torch.cat([checkpoint(_cross_entropy, head, *one, **options) for one in pieces])


def _cross_entropy(head: Any, hidden: Tensor, wanted: Tensor) -> Tensor:
    return functional.cross_entropy(head(hidden).float(), wanted, reduction="none")


def _trained_modules(llava: Any, config: TrainConfig) -> list[nn.Module]:
    """Return the modules that train as a whole."""
    found = [llava.model.multi_modal_projector]
    if config.stage == "full":
        found += [llava.model.language_model, llava.lm_head]
    if config.tower_lr is not None:
        found.append(llava.model.vision_tower)
    return found


def _settle_layers(llava: Any, config: TrainConfig) -> None:
    """Compute layers as the config asks: again in the backward pass, compiled."""
    if config.gradient_checkpointing:
        compute_layers_again(llava.model.language_model)
        if config.tower_lr is not None:
            compute_layers_again(llava.model.vision_tower)
    if config.compile:
        compile_layers(llava.model.language_model)


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
    from peft.tuners.lora import LoraLayer

    with torch.random.fork_rng(), warnings.catch_warnings():
        # peft asks by a name that transformers is about to drop
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated")
        torch.manual_seed(seed)
        whole = peft.get_peft_model(llava, adapter_config(llava, lora))
    for module in whole.modules():
        if isinstance(module, LoraLayer):  # autocast casts behind the dropout: fewer bytes
            module.cast_input_dtype_enabled = False
    return whole
