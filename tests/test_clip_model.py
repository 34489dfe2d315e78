"""Models: every way in which one can be no good, its fingerprint, and how it is loaded and run."""

from __future__ import annotations

import pickle
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_inputs import pair, recipe_for, run_here, write_tars
from small_models import (
    arrays,
    config_of,
    embedded,
    save_model,
    small_model,  # noqa: F401 - a fixture
)

from curate.vectors import clip_model
from manifests.errors import UserError
from pipelines.chain import build
from pipelines.recipe import parse


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"model": "ViT-L_14", "pretrained": "openai"}, "Did you mean 'ViT-L-14'"),
        ({"model": "ViT-L-14", "pretrained": "opanai"}, "Did you mean 'openai'"),
        ({"model": "ViT-L-14"}, "no such folder"),
        ({"model": "local-dir:nowhere"}, "no such folder"),
        ({"model": "warren:nowhere"}, "no such folder"),
        ({"model": "hf-hub:a/b", "pretrained": "openai"}, "brings its own weights"),
        ({"model": "EMPTY"}, "no open_clip_config.json"),
        ({"model": "NO_WEIGHTS"}, "no weights"),
        ({"model": "hf-hub:nobody/nothing"}, "cannot be loaded"),
    ],
)
def test_a_model_that_is_not_there_is_a_clear_error(
    tmp_path: Path, config: dict[str, Any], says: str
) -> None:
    (tmp_path / "EMPTY").mkdir()
    (tmp_path / "NO_WEIGHTS").mkdir()
    (tmp_path / "NO_WEIGHTS" / "open_clip_config.json").write_text("{}")
    if config["model"].isupper():
        config = {"model": str(tmp_path / config["model"])}
    folder = write_tars(tmp_path / "in", {"0.tar": pair("a")})
    with pytest.raises(UserError, match=says):
        run_here(recipe_for(folder, "webdataset", embed=config), tmp_path / "out")


@pytest.mark.parametrize("damage", ["cut", "other_shape", "bad_config", "not_json", "pickle"])
def test_files_that_do_not_fit_are_a_clear_error(tmp_path: Path, model: Path, damage: str) -> None:
    folder = Path(shutil.copytree(model, tmp_path / "model"))
    weights, config = folder / "open_clip_model.safetensors", folder / "open_clip_config.json"
    if damage == "cut":
        weights.write_bytes(weights.read_bytes()[:5000])
    elif damage == "other_shape":
        config.write_text(config.read_text().replace('"width": 32', '"width": 48'))
    elif damage == "bad_config":
        config.write_text(config.read_text().replace("patch_size", "patches"))
    elif damage == "not_json":
        config.write_text("{")
    else:
        weights.unlink()
        (folder / "open_clip_pytorch_model.bin").write_bytes(
            pickle.dumps({"weights": Path("/")}, protocol=2)
        )
    shards = write_tars(tmp_path / "in", {"0.tar": pair("a")})
    with pytest.raises(UserError, match="cannot be loaded"):
        embedded(shards, folder)


def test_the_fingerprint_follows_the_files_and_not_their_place(tmp_path: Path, model: Path) -> None:
    shards = write_tars(tmp_path / "in", {"0.tar": pair("a")})

    def mark(folder: Path | str) -> str:
        values = recipe_for(shards, "webdataset", embed=config_of(folder))
        return build(parse(values), str(tmp_path / "out"))[-1].mark

    moved = Path(shutil.copytree(model, tmp_path / "elsewhere" / "small"))
    (moved / "README.md").write_text("About this model.")
    assert mark(moved) == mark(model) == mark(f"local-dir:{model}")
    weights = moved / "open_clip_model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert mark(moved) != mark(model)


def test_a_model_changed_in_place_is_loaded_anew(tmp_path: Path) -> None:
    shards = write_tars(tmp_path / "in", {"0.tar": pair("a")})
    first = embedded(shards, save_model(tmp_path / "model", seed=1))
    shutil.rmtree(tmp_path / "model")
    second = embedded(shards, save_model(tmp_path / "model", seed=2))
    assert not np.array_equal(arrays(first, 0)[0], arrays(second, 0)[0])


def test_openai_weights_get_the_activation_they_were_trained_with() -> None:
    wanted = [("ViT-L-14", "openai"), ("ViT-B/32", "openai")]
    plain = [("ViT-L-14", "laion2b_s32b_b82k"), ("ViT-B-32", "laion2b_s34b_b79k")]
    answers = [clip_model.wants_quick_gelu(clip_model.find(*one)) for one in wanted + plain]
    assert answers == [True, True, False, False]


def test_thread_counts_are_restored() -> None:
    import torch

    before = torch.get_num_threads()
    with pytest.raises(KeyError), clip_model.pinned_threads(before + 1):
        assert torch.get_num_threads() == before + 1
        raise KeyError
    assert torch.get_num_threads() == before
