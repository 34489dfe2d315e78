"""A Bunny checkpoint of each family, imported, has the logits of Bunny's own forward."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import save_file
from small_llava import (
    EOS,
    NUM_PATCHES,
    NUM_ROWS,
    SIDE,
    save_language_model,
    save_tower,
    tokenizer_for,
)

from manifests.errors import UserError
from train.import_bunny import Imported, import_bunny
from train.tensor_files import read_tensors

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
        given["rope_theta"] = rope.get("rope_theta", 10000.0)
        if "partial_rotary_factor" in rope:
            given["partial_rotary_factor"] = rope["partial_rotary_factor"]
        if self.family == "bunny-stablelm":
            given["norm_eps"] = given.pop("layer_norm_eps")
            given["rope_pct"] = given.pop("partial_rotary_factor")
        if self.family == "bunny-minicpm":
            given = {name: value for name, value in given.items() if name not in GRANITE} | SCALES
        return {
            **given,
            "model_type": self.family,
            "architectures": ["BunnyForCausalLM"],
            "auto_map": {"AutoConfig": "configuration_bunny.BunnyConfig"},
            "mm_vision_tower": "google/siglip-so400m-patch14-384",
            "mm_projector_type": "mlp2x_gelu",
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


def loaded(path: str | Path, **more: Any) -> Any:
    model, info = transformers.LlavaForConditionalGeneration.from_pretrained(
        path, output_loading_info=True, **more
    )
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        assert not info[kind]
    return model.eval()


BEFORE, AFTER = [72, 9], [73, 74, 75]


def pixels() -> torch.Tensor:
    return torch.randn(1, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(4))


@torch.no_grad()
def stock_logits(made: Imported, **more: Any) -> torch.Tensor:
    ids = torch.tensor([[*BEFORE, *[made.image_token_id] * NUM_PATCHES, *AFTER]])
    model = loaded(made.path, **more)
    return model(input_ids=ids, pixel_values=pixels(), use_cache=False).logits


@pytest.mark.parametrize("family", MADE_OF)
def test_every_family_keeps_its_logits(family: str, tmp_path: Path) -> None:
    bunny = Bunny(tmp_path, family)
    folder, tower = bunny.save(tmp_path / "bunny"), bunny.tower_path
    made = import_bunny(str(folder), str(tmp_path / "out"), vision_tower=str(tower))
    assert made.num_image_tokens == NUM_PATCHES
    assert (made.family, made.added_rows, made.merge_noise) == (family, 0, {})
    # a fold by a power of two is free of rounding
    assert torch.equal(stock_logits(made), bunny.logits(BEFORE, pixels(), AFTER))
