"""A small CLIP model with random weights, and runs that embed with it.

The fixture is called `model`: import `small_model` to have it.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_inputs import recipe_for, run_here, stages

from curate.media.torchvision_ops import ensure_torchvision_importable
from manifests.work import StageDir

DIM = 16
SIDE = 32
BATCH = 4
MODEL_CONFIG = {
    "model_cfg": {
        "embed_dim": DIM,
        "vision_cfg": {
            "image_size": SIDE,
            "patch_size": 8,
            "width": 32,
            "layers": 2,
            "head_width": 16,
        },
        "text_cfg": {
            "context_length": 20,
            "vocab_size": 49408,
            "width": 32,
            "heads": 2,
            "layers": 1,
        },
    },
    "preprocess_cfg": {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.25, 0.3]},
}


def save_model(folder: Path, seed: int = 0, *, change: Callable[[Any], None] | None = None) -> Path:
    """Save a small model with random weights as open_clip's local-dir format has it."""
    ensure_torchvision_importable()
    import torch
    from open_clip.model import CLIP
    from safetensors.torch import save_file

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = CLIP(**json.loads(json.dumps(MODEL_CONFIG["model_cfg"])))
    with torch.no_grad():
        if change is not None:
            change(model)
    folder.mkdir(parents=True)
    (folder / "open_clip_config.json").write_text(json.dumps(MODEL_CONFIG))
    weights = {name: value.contiguous() for name, value in model.state_dict().items()}
    save_file(weights, folder / "open_clip_model.safetensors")
    return folder


@pytest.fixture(scope="module", name="model")
def small_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("models") / "small")


def config_of(model: Path | str, **options: Any) -> dict[str, Any]:
    return {"model": str(model), "batch_size": BATCH, **options}


def embedded(folder: Path, model: Path | str, out: str = "out", **options: Any) -> StageDir:
    """Run ingest and embed over a folder of tars, however bad."""
    values = recipe_for(
        folder, "webdataset", embed=config_of(model, **options), max_quarantine_fraction=1.0
    )
    return stages(run_here(values, folder.parent / out))["embed"]


def arrays(directory: StageDir, part: int) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    base = Path(directory.path)
    return (
        np.load(base / f"img_emb/img_emb_{part:04d}.npy"),
        np.load(base / f"text_emb/text_emb_{part:04d}.npy"),
    )
