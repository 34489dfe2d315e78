"""A tiny LLaVA directory whose answers differ and have words, and noisy pictures to ask about."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from small_llava import save_language_model, save_tower, tokenizer_for

from train.models.compose import compose

LETTERS = "abcdefghijklmnopqrstuvwxyz  \né"  # words, lines, and a character of two bytes

# Attention that looks at few tokens, and what it sees there counts: else all answers are the same.
_LOUDER = {"q_proj": 6, "k_proj": 6, "o_proj": 6, "down_proj": 6, "embed_tokens": 4}


def save_talkative_llava(folder: Path) -> str:
    """Compose a model of random weights that writes LETTERS only, and hardly repeats itself."""
    tower = save_tower(folder / "tower")
    lm = save_language_model(folder / "lm", max_position_embeddings=1024)
    weights = load_file(lm / "model.safetensors")
    for name, one in weights.items():
        weights[name] = one * next((by for part, by in _LOUDER.items() if part in name), 1)
    tokenizer = tokenizer_for()
    spoken = sorted({id_ for letter in LETTERS for id_ in tokenizer(letter).input_ids})
    head = weights["lm_head.weight"]
    silent = torch.ones(len(head), dtype=torch.bool)
    silent[spoken] = False
    head[silent] = 0  # logits of 0: the likeliest of the others is above
    save_file(weights, lm / "model.safetensors", metadata={"format": "pt"})
    return compose(str(tower), str(lm), str(folder / "llava")).path


def save_pictures(folder: Path) -> list[str]:
    """Save a wide, a tall and a square picture as PNG; return their paths."""
    rng = np.random.default_rng(0)
    paths = []
    for number, (width, height) in enumerate([(30, 20), (17, 40), (16, 16)]):
        noise: Any = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        paths.append(str(folder / f"{number}.png"))
        Image.fromarray(noise).save(paths[-1])
    return paths
