"""What a training run is told: the stage, its hyper-parameters, and how rows become tokens."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import Field, model_validator

from manifests.strict import Strict
from train.data.images import Mode
from train.data.plan import PlanConfig

Stage = Literal["projector", "adapter", "full"]

_CHANGES_NO_RESULT = ("checkpoint_every_steps", "checkpoint_every_seconds")


class LoraConfig(Strict):
    """LoRA (Hu et al. 2021, https://arxiv.org/abs/2106.09685); the defaults are Bunny's."""

    rank: int = Field(default=128, ge=1)
    alpha: float = Field(default=256, gt=0)
    """An adapter adds alpha / rank times its product."""
    dropout: float = Field(default=0.05, ge=0, lt=1)


class TrainConfig(Strict):
    """One stage of training; defaults are Bunny's (https://arxiv.org/abs/2402.11530).

    projector  trains the projector alone, on captions
    adapter    trains adapters on the language model's linear layers, and the projector on
    full       trains the whole language model, its head too, and the projector on
    """

    stage: Stage
    template: str
    """plain, bunny, phi3, minicpm, llama or chat: see train.text.template."""
    end_token: bool = False
    """Whether a caption of `plain` ends with the end token; Bunny's do not."""
    image_mode: Mode = "square"
    projector_lr: float = Field(gt=0)
    adapter_lr: float = Field(default=2e-4, gt=0)
    language_model_lr: float = Field(default=2e-5, gt=0)
    """Of stage full."""
    tower_lr: float | None = Field(default=None, gt=0)
    """In any stage, of the vision tower's layers up to that whose features are used; None: it is
    frozen. In Bunny's own code it was, whatever it was told, until November 2024."""
    lora: LoraConfig = LoraConfig()
    betas: tuple[float, float] = Field(default=(0.9, 0.999), strict=False)
    eps: float = Field(default=1e-8, gt=0)
    weight_decay: float = Field(default=0.0, ge=0)
    """Of matrices alone, as in Hugging Face's trainer: biases and norms do not decay."""
    warmup_share: float = Field(default=0.03, ge=0, le=1)
    """Of all steps, those whose learning rate rises from 0; from there it falls as a cosine."""
    max_grad_norm: float | None = Field(default=None, gt=0)
    """Longest gradient, over all that trains; None as in Bunny, which clips nothing."""
    loss_normalisation: Literal["global_tokens", "micro_batch_mean"] = "global_tokens"
    """global_tokens: the sum of all losses of a step by the number of its labels, over all ranks.
    micro_batch_mean: the mean of each micro-batch's mean, whatever its labels, as in Bunny, LLaVA
    and Hugging Face; it depends on the cut."""
    dummy_images: bool = False
    """Whether a sample without image takes an empty one through tower and projector, which counts
    for nothing: as in Bunny and LLaVA, to measure what that costs."""
    epochs: int = Field(default=1, ge=1)
    seed: int = 0
    plan: PlanConfig = PlanConfig()
    """Its max_length, 2048 by default, also cuts conversations: to whole rounds."""
    dtype: Literal["keep", "float32", "bfloat16"] = "keep"
    """Of the frozen weights; what trains is in float32, and computes in a 16-bit model's dtype."""
    quantize: Literal["none", "nf4"] = "none"
    """nf4: the frozen language model in 4 bits (QLoRA); needs a GPU and bitsandbytes."""
    attention: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"
    """sdpa is torch's own, with its causal kernel, as rows are padded on the right: no mask."""
    compile: bool = False
    """Compiles the language model's layers: a slow first step, faster ones after it."""
    gradient_checkpointing: bool = False
    """Computes the layers of what trains again in the backward pass: less memory, more time."""
    checkpoint_every_steps: int = Field(default=500, ge=1)
    checkpoint_every_seconds: float | None = Field(default=None, gt=0)
    """Also when so long ago was the last one; None for steps alone."""

    @model_validator(mode="after")
    def _trains_no_quantized_weight(self) -> Self:
        if self.stage == "full" and self.quantize != "none":
            raise ValueError("quantized weights do not train: stage full needs quantize: none")
        return self

    @classmethod
    def bunny(cls, stage: Stage, **changes: Any) -> Self:
        """Return Bunny's recipe of a stage, for Phi-2, with changes.

        Source: https://github.com/BAAI-DCAI/Bunny, script/train. Raises: UserError.
        """
        recipe: dict[str, Any] = {
            "projector": {"template": "plain", "projector_lr": 5e-4, "image_mode": "square"},
            "adapter": {"template": "bunny", "projector_lr": 2e-5, "image_mode": "pad"},
            "full": {"template": "bunny", "projector_lr": 2e-5, "image_mode": "pad"},
        }[stage]
        size = 256 if stage == "projector" else 128
        recipe |= {"stage": stage, "plan": PlanConfig(global_batch_size=size)}
        return cls.load(recipe | changes, where="train")

    def deciding(self) -> dict[str, Any]:
        """Return the JSON-ready values that decide the trained weights."""
        values = self.canonical()
        return {name: values[name] for name in values if name not in _CHANGES_NO_RESULT}
