"""How much the demo's vision tower sees: linear probes of the features that LLaVA takes.

A probe is a ridge regression on the answers as one-hot vectors (least squares, no iteration), so
its accuracy is a lower bound of what a linear layer can read.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from pipelines.demo.patches import ASKED, GRID, OF_PATCH, PATCH, Pictures, make_pictures
from pipelines.demo.practice import to_model_input

HELD_OUT_SEED = 9_002
FEATURE_LAYER = -2
_RIDGE = 1e-3
Figures = dict[str, float]


def features_of(tower: Any, pixels: np.ndarray) -> np.ndarray:
    """Return a SiglipVisionModel's features of each patch: float32 [n, 64, width].

    pixels: uint8 [n, 64, 64, 3].
    """
    import torch

    parts = []
    with torch.inference_mode():
        for start in range(0, len(pixels), 128):
            block = to_model_input(pixels[start : start + 128])
            parts.append(tower(block, output_hidden_states=True).hidden_states[FEATURE_LAYER])
    found: np.ndarray = torch.cat(parts).float().numpy()
    return found


def raw_features(pixels: np.ndarray) -> np.ndarray:
    """Return the pixels of each patch themselves, to compare with: float32 [n, 64, 192]."""
    cut = pixels.reshape(-1, GRID, PATCH, GRID, PATCH, 3).transpose(0, 1, 3, 2, 4, 5)
    found: np.ndarray = (cut.reshape(len(pixels), GRID * GRID, -1) / 127.5 - 1).astype(np.float32)
    return found


def judge(tower_dir: Path, *, num_train: int = 1_500, num_test: int = 500) -> Figures:
    """Return the probes' accuracies on held-out pictures, by question of patches.ASKED."""
    from curate.media.torchvision_ops import ensure_torchvision_importable

    ensure_torchvision_importable()
    import torch
    from transformers import SiglipVisionModel

    tower: Any = SiglipVisionModel.from_pretrained(tower_dir, dtype=torch.float32)
    tower.eval()
    pictures = make_pictures(HELD_OUT_SEED, range(num_train + num_test))
    seen = accuracies(features_of(tower, pictures.pixels), pictures, num_train)
    raw = accuracies(raw_features(pictures.pixels), pictures, num_train)
    return seen | {f"{name}, of raw pixels": value for name, value in raw.items()}


def accuracies(features: np.ndarray, pictures: Pictures, num_train: int) -> Figures:
    """Return each probe's accuracy on all pictures but the first `num_train`, its training data.

    Questions of a patch are asked of those that show a thing, those of the picture of the mean
    over patches.
    """
    found = {}
    for at, name in enumerate(ASKED):
        answers = pictures.answers[:, :, at]
        if name in OF_PATCH:
            wanted = pictures.answers[:, :, 0] > 0
            if name in ("size", "place"):
                wanted &= answers > 0
            is_test = np.nonzero(wanted)[0] >= num_train
            rows, truth = features[wanted], answers[wanted]
        else:
            rows, truth = features.mean(axis=1), answers[:, 0]
            is_test = np.arange(len(rows)) >= num_train
        found[name] = _probe(rows, truth, is_test)
    return found


def _probe(rows: np.ndarray, truth: np.ndarray, is_test: np.ndarray) -> float:
    train, test = rows[~is_test].astype(np.float64), rows[is_test].astype(np.float64)
    mean, spread = train.mean(axis=0), train.std(axis=0) + 1e-6
    train, test = (np.c_[(one - mean) / spread, np.ones(len(one))] for one in (train, test))
    one_hot = np.eye(int(truth.max()) + 1)[truth[~is_test]]
    gram = train.T @ train + _RIDGE * len(train) * np.eye(train.shape[1])
    said = (test @ np.linalg.solve(gram, train.T @ one_hot)).argmax(axis=1)
    return float((said == truth[is_test]).mean())


def write_card(tower_dir: Path, figures: Figures) -> None:
    """Write MODEL_CARD.md: what the tower is, how it was trained, what it reached."""
    rows = "\n".join(
        f"| {name} | {figures[name]:.3f} | {figures[f'{name}, of raw pixels']:.3f} |"
        for name in ASKED
    )
    text = _CARD.format(seed=HELD_OUT_SEED, rows=rows)
    (tower_dir / "MODEL_CARD.md").write_text(text, encoding="utf-8")


_CARD = """# The demo's vision tower

A `SiglipVisionModel` that sees the demo world and knows nothing else: 5 layers x 128, 8-pixel
patches of 64-pixel pictures, so 64 tokens a picture; plain `transformers` loads it.

Trained on pictures and captions made for it (other seeds than the demo's) in two phases, by

    python -m pipelines.demo.train_tower --out pipelines/demo/tower

with SigLIP's sigmoid loss, and beside it a loss over patches: from each one's features a linear
head, thrown away, tells what the patch shows. A large tower learns that from millions of captions.

Linear probes (ridge regression) of the features that LLaVA takes, on held-out pictures of the world
with seed {seed}; of the patches with a thing, or of the mean over patches for whole pictures:

| what is asked | features | raw pixels |
|---|---|---|
{rows}
"""
