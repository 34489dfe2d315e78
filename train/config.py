"""What a training run is told: the stage, its hyper-parameters, and how rows become tokens."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import Field

from manifests.strict import Strict
from train.data.images import Mode
from train.data.plan import PlanConfig

Stage = Literal["projector", "adapter"]

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
    """

    stage: Stage
    template: str
    """plain, bunny, phi3, minicpm, llama or chat: see train.text.template."""
    end_token: bool = False
    """Whether a caption of `plain` ends with the end token; Bunny's do not."""
    image_mode: Mode = "square"
    projector_lr: float = Field(gt=0)
    adapter_lr: float = Field(default=2e-4, gt=0)
    lora: LoraConfig = LoraConfig()
    betas: tuple[float, float] = Field(default=(0.9, 0.999), strict=False)
    eps: float = Field(default=1e-8, gt=0)
    weight_decay: float = Field(default=0.0, ge=0)
    warmup_share: float = Field(default=0.03, ge=0, le=1)
    """Of all steps, those whose learning rate rises from 0; from there it falls as a cosine."""
    max_grad_norm: float | None = Field(default=None, gt=0)
    """Longest gradient, over all that trains; None as in Bunny, which clips nothing."""
    loss_normalisation: Literal["global_tokens"] = "global_tokens"
    """The sum of all losses of a step by the number of its labels, over all ranks."""
    epochs: int = Field(default=1, ge=1)
    seed: int = 0
    plan: PlanConfig = PlanConfig()
    """Its max_length, 2048 by default, also cuts conversations: to whole rounds."""
    dtype: Literal["keep", "float32", "bfloat16"] = "keep"
    """Of the frozen weights; what trains is in float32."""
    gradient_checkpointing: bool = False
    """Computes the language model's layers again in the backward pass: less memory, more time."""
    checkpoint_every_steps: int = Field(default=500, ge=1)
    checkpoint_every_seconds: float | None = Field(default=None, gt=0)
    """Also when so long ago was the last one; None for steps alone."""

    @classmethod
    def bunny(cls, stage: Stage, **changes: Any) -> Self:
        """Return Bunny's recipe of a stage, for Phi-2, with changes.

        Source: https://github.com/BAAI-DCAI/Bunny, script/train. Raises: UserError.
        """
        recipe: dict[str, Any] = {
            "projector": {"template": "plain", "projector_lr": 5e-4, "image_mode": "square"},
            "adapter": {"template": "bunny", "projector_lr": 2e-5, "image_mode": "pad"},
        }[stage]
        size = {"projector": 256, "adapter": 128}[stage]
        recipe |= {"stage": stage, "plan": PlanConfig(global_batch_size=size)}
        return cls.load(recipe | changes, where="train")

    def deciding(self) -> dict[str, Any]:
        """Return the JSON-ready values that decide the trained weights."""
        values = self.canonical()
        return {name: values[name] for name in values if name not in _CHANGES_NO_RESULT}
