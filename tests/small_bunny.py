"""Tiny Bunny checkpoints of every published family, whole and LoRA, with Bunny's own forward."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import save_file
from small_llava import save_language_model, save_tower, tokenizer_for

SCALES = {"scale_emb": 12, "scale_depth": 1.4, "dim_model_base": 4}
GRANITE = {
    "embedding_multiplier": 12.0,
    "residual_multiplier": 1.4 / 2**0.5,
    "logits_scaling": 32 / 4,
    "attention_multiplier": 16**-0.5,
}
MADE_OF: dict[str, tuple[str, dict[str, Any]]] = {
    "bunny-phi": ("phi", {}),
    "bunny-phi3": ("phi3", {}),
    "bunny-qwen": ("qwen2", {}),
    "bunny-qwen2": ("qwen2", {"tie_word_embeddings": True}),
    "bunny-llama": ("llama", {}),
    "bunny-stablelm": ("stablelm", {"partial_rotary_factor": 0.5, "layer_norm_eps": 1e-3}),
    "bunny-minicpm": ("granite", GRANITE),
}


class Bunny:
    """A tiny model in parts, with Bunny's forward: features in place of the placeholder."""

    def __init__(self, folder: Path, family: str, **more: Any) -> None:
        self.family = family
        kind, fields = MADE_OF[family]
        self.base = save_language_model(folder / "lm", kind, **{**fields, **more})
        self.tower_path = save_tower(folder / "tower")
        self.lm: Any = transformers.AutoModelForCausalLM.from_pretrained(self.base).eval()
        if family == "bunny-phi":
            self.lm.lm_head.bias = None  # Bunny's class has none
        self.tower = transformers.SiglipVisionModel.from_pretrained(self.tower_path).eval()
        with torch.random.fork_rng():
            torch.manual_seed(5)
            layers = [torch.nn.Linear(24, 32), torch.nn.GELU(), torch.nn.Linear(32, 32)]
        self.projector = torch.nn.Sequential(*layers)

    @torch.no_grad()
    def logits(self, before: list[int], pixels: torch.Tensor, after: list[int]) -> torch.Tensor:
        states = self.tower(pixels, output_hidden_states=True).hidden_states[-2]
        if self.tower.config.model_type == "clip_vision_model":
            states = states[:, 1:]
        embed = self.lm.get_input_embeddings()
        parts = [embed(torch.tensor([before])), self.projector(states)]
        joined = torch.cat([*parts, embed(torch.tensor([after]))], dim=1)
        return self.lm(inputs_embeds=joined, use_cache=False).logits

    def projector_tensors(self) -> dict[str, torch.Tensor]:
        return {f"model.mm_projector.{n}": v for n, v in self.projector.state_dict().items()}

    def tower_tensors(self) -> dict[str, torch.Tensor]:
        prefix = "model.vision_tower.vision_tower.vision_model."
        return {
            prefix + name.removeprefix("vision_model."): value
            for name, value in self.tower.state_dict().items()
        }

    def language_tensors(self) -> dict[str, torch.Tensor]:
        tensors = dict(self.lm.state_dict())
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
        if self.lm.config.tie_word_embeddings:
            tensors.pop("lm_head.weight")
        return tensors

    def config(self) -> dict[str, Any]:
        given = json.loads((self.base / "config.json").read_text())
        rope = given.pop("rope_parameters", {})
        given.pop("layer_types", None)  # of Transformers 5; Bunny saved with 4
        given["rope_theta"] = rope.get("rope_theta", 10000.0)
        if "partial_rotary_factor" in rope:
            given["partial_rotary_factor"] = rope["partial_rotary_factor"]
        if self.family == "bunny-stablelm":
            given["norm_eps"] = given["layer_norm_eps"]
            given["rope_pct"] = given["partial_rotary_factor"]
            given |= {"layer_norm_eps": 0.5, "partial_rotary_factor": 1.0}  # Bunny reads neither
        if self.family == "bunny-minicpm":
            given = {name: value for name, value in given.items() if name not in GRANITE} | SCALES
        return {
            **given,
            "model_type": self.family,
            "architectures": ["BunnyForCausalLM"],
            "auto_map": {"AutoConfig": "configuration_bunny.BunnyConfig"},
            "mm_vision_tower": "google/siglip-so400m-patch14-384",
            "mm_projector_type": "mlp2x_gelu",
            "rope_scaling": None,
            "continuous_training": False,
            "mm_hidden_size": 24,
            "image_aspect_ratio": "pad",
            "use_s2": False,
        }

    def save_config(self, folder: Path, **more: Any) -> Path:
        folder.mkdir(exist_ok=True)
        (folder / "config.json").write_text(json.dumps({**self.config(), **more}))
        return folder

    def save(self, folder: Path, extra: str = "") -> Path:
        """Save a whole repository."""
        self.save_config(folder)
        tokenizer_for().save_pretrained(folder)
        tensors = {**self.language_tensors(), **self.projector_tensors(), **self.tower_tensors()}
        if extra:
            tensors[extra] = torch.ones(2)
        tensors = {name: value.clone().contiguous() for name, value in tensors.items()}
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder


def adapted(bunny: Bunny, folder: Path, **more: Any) -> tuple[Path, Any]:
    """Save a LoRA repository as Bunny's training does; return it and PEFT's merged model."""
    peft = pytest.importorskip("peft")
    linear = {  # Bunny adapts every linear layer but the head: find_all_linear_names
        name.rpartition(".")[2]
        for name, one in bunny.lm.named_modules()
        if isinstance(one, torch.nn.Linear) and name != "lm_head"
    }
    modules = sorted(linear)
    settings = {"r": 4, "lora_alpha": 8, "target_modules": modules, "task_type": "CAUSAL_LM"}
    model = peft.get_peft_model(bunny.lm, peft.LoraConfig(**{**settings, **more}))
    generator = torch.Generator().manual_seed(6)
    with torch.no_grad():
        for name, one in model.named_parameters():
            if "lora_" in name:
                one.copy_(torch.randn(one.shape, generator=generator) * 0.02)
    model.save_pretrained(folder)
    bunny.save_config(folder)
    others = {**bunny.projector_tensors(), **bunny.tower_tensors()}
    others = {f"base_model.model.{name}": value for name, value in others.items()}
    torch.save(others, folder / "non_lora_trainables.bin")
    return folder, model
