"""MiniCPM, published with code of its own, composes as the Granite that computes the same."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from small_llava import save_language_model, save_tower

from manifests.errors import UserError
from train.models.compose import compose
from train.models.minicpm import granite_fields, is_minicpm

PUBLISHED = {  # https://huggingface.co/openbmb/MiniCPM-2B-sft-fp32, config.json
    **{"architectures": ["MiniCPMForCausalLM"], "bos_token_id": 1, "eos_token_id": 2},
    **{"auto_map": {"AutoConfig": "configuration_minicpm.MiniCPMConfig"}},
    **{"hidden_act": "silu", "hidden_size": 2304, "initializer_range": 0.1},
    **{"intermediate_size": 5760, "max_position_embeddings": 2048, "num_attention_heads": 36},
    **{"num_hidden_layers": 40, "num_key_value_heads": 36, "rms_norm_eps": 1e-05},
    **{"rope_scaling": None, "torch_dtype": "bfloat16", "transformers_version": "4.36.0"},
    **{"use_cache": True, "vocab_size": 122753},
    **{"scale_emb": 12, "dim_model_base": 256, "scale_depth": 1.4},
}


def test_the_published_config_becomes_granites() -> None:
    assert is_minicpm(PUBLISHED)
    fields = granite_fields(Path("MiniCPM-2B-sft-fp32"), PUBLISHED)
    config = transformers.GraniteConfig.from_dict(dict(fields))
    assert config.embedding_multiplier == 12
    assert config.residual_multiplier == pytest.approx(1.4 / math.sqrt(40))
    assert config.logits_scaling == 9.0
    assert config.attention_multiplier == 0.125
    assert (config.hidden_size, config.num_hidden_layers, config.vocab_size) == (2304, 40, 122753)
    assert config.tie_word_embeddings is True  # the default of MiniCPM's class
    assert not is_minicpm({"model_type": "minicpm3", "architectures": ["MiniCPM3ForCausalLM"]})


@torch.no_grad()
def scaled_llama(
    weights: dict[str, torch.Tensor], config: dict[str, Any], ids: torch.Tensor
) -> Any:
    """Return MiniCPM's logits by its formula, with Llama's layers.

    MiniCPM is Llama whose embeddings are multiplied by scale_emb, what each half of a layer adds by
    scale_depth / sqrt(layers), and whose last hidden state is divided by hidden_size /
    dim_model_base. A factor of what a half adds is one of its last matrix.
    """
    own = ("architectures", "auto_map", "rope_scaling")
    size = {name: value for name, value in config.items() if name not in own}
    llama = transformers.LlamaForCausalLM(transformers.LlamaConfig(**size)).eval()
    share = config["scale_depth"] / math.sqrt(config["num_hidden_layers"])
    scaled = {
        name: one * (share if name.endswith(("o_proj.weight", "down_proj.weight")) else 1.0)
        for name, one in weights.items()
    }
    scaled.setdefault("lm_head.weight", weights["model.embed_tokens.weight"])
    llama.load_state_dict(scaled)
    embedded = llama.get_input_embeddings()(ids) * config["scale_emb"]
    hidden = llama.model(inputs_embeds=embedded).last_hidden_state
    return (hidden / (config["hidden_size"] / config["dim_model_base"])) @ scaled[
        "lm_head.weight"
    ].T


@pytest.mark.parametrize("logits_scaling", [4.0, 32 / 3])  # free of rounding, and not
@pytest.mark.parametrize("tied", [True, False])
def test_composed_it_has_the_logits_of_minicpms_formula(
    tied: bool, logits_scaling: float, tmp_path: Path
) -> None:
    given = {"tie_word_embeddings": tied, "logits_scaling": logits_scaling}
    base = save_language_model(tmp_path / "lm", "minicpm", **given)
    config = json.loads((base / "config.json").read_text())
    assert "model_type" not in config, "as it is published"
    assert "attention_multiplier" not in config
    made = compose(str(save_tower(tmp_path / "tower")), str(base), str(tmp_path / "out"))
    model = transformers.LlavaForConditionalGeneration.from_pretrained(made.path).eval()
    ids = torch.arange(40).reshape(2, 20) * 7 % 320
    expected = scaled_llama(load_file(base / "model.safetensors"), config, ids)
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, expected, atol=1e-5, rtol=1e-5)
    written = json.loads((tmp_path / "out/config.json").read_text())["text_config"]
    assert (written["model_type"], written["architectures"]) == ("granite", ["GraniteForCausalLM"])
    assert not {"auto_map", "scale_emb", "scale_depth", "dim_model_base"} & set(written)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_experts", 8),  # MiniCPM-MoE
        ("rope_scaling", {"type": "dynamic", "factor": 4.0}),  # MiniCPM-2B-128k
        ("sparse_config", {"kernel_size": 32}),  # MiniCPM 4
        ("hidden_act", "relu"),  # MiniCPM-S
        ("is_causal", False),  # MiniCPM-Embedding
        ("attention_type", "mla"),
    ],
)
def test_a_minicpm_that_is_more_than_scaled_llama_is_refused(field: str, value: Any) -> None:
    with pytest.raises(UserError, match=f"MiniCPM with {field}=(?s:.)*MiniCPM-2B-sft"):
        granite_fields(Path("lm"), {**PUBLISHED, field: value})
