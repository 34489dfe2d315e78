"""A few rows are learnt by heart: text, and answers that only the picture tells."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from small_inputs import picture
from small_llava import NUM_PATCHES, save_language_model, save_tower
from small_mixes import image_row, text_row
from small_runs import tiny_config
from test_train_data import write_stage

from train.learn.model import TrainedLlava
from train.learn.run import train
from train.models.compose import compose


def clear_llava(folder: Path) -> str:
    """Compose a tiny model whose frozen head can be sure of a token: by a large last norm."""
    halves = save_tower(folder / "tower"), save_language_model(folder / "lm", "qwen2")
    weights = folder / "lm" / "model.safetensors"
    tensors = load_file(weights)
    tensors["model.norm.weight"] *= 10
    save_file(tensors, weights, {"format": "pt"})
    return compose(*map(str, halves), str(folder / "llava")).path


def test_eight_rows_are_learnt_by_heart(tmp_path: Path) -> None:
    shades = {"black": 0, "grey": 90, "pale": 170, "white": 255, "dark": 45}
    rows: list[tuple[int, Any, list[bytes]]] = [
        (at, image_row(word, "a.jpg", "Shade?", word), [picture(shade=shade)])
        for at, (word, shade) in enumerate(shades.items())
    ]
    rows += [(9 + at, text_row(str(at), f"Say {word}.", word), []) for at, word in enumerate("abc")]
    data = write_stage(tmp_path / "data", rows)
    plan = {"global_batch_size": len(rows), "tokens_per_image": NUM_PATCHES}
    lora = {"rank": 8, "alpha": 16, "dropout": 0.0}
    config = tiny_config(
        "adapter", plan, lora=lora, epochs=110, projector_lr=3e-3, max_grad_norm=1.0
    )
    model_dir, log = clear_llava(tmp_path / "model"), []
    model = train(config, model_dir, [data], str(tmp_path / "out"), on_step=log.append)
    losses = [entry["loss"] for entry in log]
    assert losses[0] > 2
    assert losses[-1] < 0.05
    before = TrainedLlava.load(model_dir, config).llava.state_dict()
    after = model.llava.state_dict()
    assert {n for n, one in after.items() if not torch.equal(one, before[n])} == set(
        model.trainables()
    )
