"""A small training run's parts: a tower, a language model, a finished mix and a recipe of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml
from click.testing import CliRunner, Result
from small_inputs import run_here
from small_llava import save_language_model, save_tower
from small_mixes import mix_recipe

from pipelines.cli import main

TRAINED = {
    "template": "bunny",
    "projector_lr": 1e-2,
    "plan": {"global_batch_size": 16, "tokens_per_micro_batch": 600, "max_length": 250},
}


def make_world(folder: Path) -> Path:
    """Make the folders tower, lm and mix, and recipe.yaml, and return their folder."""
    save_tower(folder / "tower")
    save_language_model(folder / "lm", "qwen2")
    run_here(mix_recipe(folder / "in", num_rows=12), folder / "mix")
    recipe = {
        "model": {"vision_tower": str(folder / "tower"), "language_model": str(folder / "lm")},
        "pretrain": TRAINED | {"data": [str(folder / "mix")]},
        "finetune": TRAINED
        | {"data": [str(folder / "mix")], "adapter_lr": 1e-2, "lora": {"rank": 2, "alpha": 4}},
        "export": {"dtype": "float32"},
        "launch": {"data_workers": 0, "ranks": 1},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return folder


def warren(*words: Any, typed: str | None = None) -> Result:
    """Return what a command line does in this process. typed: what it reads."""
    return CliRunner().invoke(main, list(map(str, words)), input=typed)


def directories(run: Path) -> dict[str, Path]:
    """Return the newest finished directory of each stage."""
    names = json.loads((run / "latest.json").read_text())["stages"]
    return {name.rpartition("-")[0]: run / name for name in names}
