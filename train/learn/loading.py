"""A composed directory as a model in memory: its dtype, its attention, its quantized layers."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import torch

from manifests import paths, store
from manifests.errors import UserError
from train.config import TrainConfig
from train.models.towers import register_tower


def load_llava(model_dir: str, config: TrainConfig) -> Any:
    """Return the LlavaForConditionalGeneration of a composed directory, as a config asks for it.

    Raises: UserError for a model of another kind, and for what this machine lacks.
    """
    from transformers import LlavaForConditionalGeneration

    _check_kind(model_dir)
    _check_attention(config.attention)
    options: dict[str, Any] = {
        "dtype": "auto" if config.dtype == "keep" else getattr(torch, config.dtype),
        "attn_implementation": config.attention,
    }
    if config.quantize == "nf4":
        _check_can_quantize()
        here = {"": torch.cuda.current_device()}
        options |= {"quantization_config": nf4_config(), "device_map": here}
    try:
        return LlavaForConditionalGeneration.from_pretrained(model_dir, **options)
    except ValueError as error:
        if "attention" not in str(error):
            raise
        raise UserError(
            f"The model knows no attention {config.attention!r}.",
            str(error).splitlines()[0],
            "Set attention: eager.",
        ) from error


def nf4_config() -> Any:
    """Return how a language model is kept in 4 bits; tower, projector and head are not.

    NormalFloat of doubly quantized scales: QLoRA (Dettmers et al. 2023,
    https://arxiv.org/abs/2305.14314).
    """
    from transformers import BitsAndBytesConfig

    made: Any = BitsAndBytesConfig  # it has no types
    return made(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
        llm_int8_skip_modules=["vision_tower", "multi_modal_projector", "lm_head"],
    )


def compile_layers(decoder: Any) -> None:
    """Compile the language model's layers in place; the first step is slow.

    Layer by layer: all share one compiled code, and parameters keep their names.
    """
    for layer in decoder.layers:
        layer.compile(dynamic=True)


def compute_layers_again(module: Any) -> None:
    """Let a model's layers keep no activations.

    Not by peft, and without gradients of embeddings, which transformers asks for here: both are for
    reentrant checkpoints, and on the whole model they would give the frozen tower a graph.
    """
    enable = getattr(module, "activation_checkpointing_enable", None)  # from transformers 5.23
    (enable or module.gradient_checkpointing_enable)({"use_reentrant": False})
    module.disable_input_require_grads()


def _check_kind(model_dir: str) -> None:
    found = store.read_json(paths.join(model_dir, "config.json"))
    if found is None or found.get("model_type") != "llava":
        raise UserError(
            f"{model_dir} holds no LLaVA model.",
            "Its config.json is missing or of another model_type.",
            "Compose a tower and a language model first, and train that directory.",
        )
    register_tower(found)


def _check_attention(name: str) -> None:
    if name == "flash_attention_2" and not (find_spec("flash_attn") and torch.cuda.is_available()):
        raise UserError(
            "attention flash_attention_2 is not there.",
            "It needs a CUDA GPU and the package flash-attn.",
            "Install flash-attn, or set attention: sdpa.",
        )


def _check_can_quantize() -> None:
    if not (find_spec("bitsandbytes") and torch.cuda.is_available()):
        raise UserError(
            "quantize nf4 is not possible here.",
            "It needs a CUDA GPU and the package bitsandbytes.",
            "Run `pip install bitsandbytes` on a machine with a GPU, or set quantize: none.",
        )
