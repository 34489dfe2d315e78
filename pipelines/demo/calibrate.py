"""The last step of the demo model's training: let captions written out score too high, as in CLIP.

Gradient descent leaves pictures of letters at a lower score than pictures of things: they carry
their paper and their place too, which no caption tells. The image tower's last layer is linear, so
one least-squares fit moves them: scenes and their twins stay where they are, a picture that spells
its caption out goes to the caption's embedding. It takes seconds and has one number to choose.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from pipelines.demo.judge import in_blocks, load_model, open_model
from pipelines.demo.practice import make_practice

CALIBRATION_SEED = 7_002
NUM_PICTURES = 3_000
"""Number of scenes, and of pictures of letters."""
LETTERS_WEIGHT = 0.5
"""Weight of a picture of letters, a scene's being 1, and its twin's. At 1 cheaters score 0.025
higher, but a quarter more of the demo's distinct scenes merge at 0.86 (463 of 6,756, not 372)."""
RIDGE = 1.0
"""Added to the diagonal of the normal equations, so that they have one solution."""


def calibrate(model_dir: Path) -> Any:
    """Return the open_clip model in `model_dir` with its image projection fitted anew."""
    import torch

    _, read = load_model(model_dir)
    scenes = make_practice(CALIBRATION_SEED, range(NUM_PICTURES), text_share=0.0)
    letters = make_practice(CALIBRATION_SEED + 1, range(NUM_PICTURES), text_share=1.0)
    model = open_model(model_dir)
    projection = model.visual.proj.detach().double().numpy()
    model.visual.proj = None  # open_clip then returns the features before it
    views, twins, spelled = (
        in_blocks(model.visual, pixels).astype(np.float64)
        for pixels in (scenes.views, scenes.twins, letters.views)
    )
    unmoved = _unit(views @ projection)
    root = LETTERS_WEIGHT**0.5
    captions = read([captions[0] for captions in letters.captions]).astype(np.float64)
    fitted = _least_squares(
        np.concatenate([views, twins, root * spelled]),
        np.concatenate([unmoved, unmoved, root * captions]),
    )
    model.visual.proj = torch.nn.Parameter(torch.from_numpy(fitted).float())
    return model


def _unit(rows_ND: np.ndarray) -> np.ndarray:
    unit_ND: np.ndarray = rows_ND / np.linalg.norm(rows_ND, axis=1, keepdims=True)
    return unit_ND


def _least_squares(inputs_NW: np.ndarray, goals_ND: np.ndarray) -> np.ndarray:
    """Return the [w, d] matrix that takes inputs nearest to goals, by the normal equations."""
    gram_WW = inputs_NW.T @ inputs_NW + RIDGE * np.eye(inputs_NW.shape[1])
    return np.linalg.solve(gram_WW, inputs_NW.T @ goals_ND)
