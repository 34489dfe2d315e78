"""What LLaVA cannot express is refused by name, and nothing finished is overwritten."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from small_llava import (
    EOS,
    save_language_model,
    save_tower,
    small_language_model,  # noqa: F401 - a fixture
    small_towers,  # noqa: F401 - a fixture
)

from manifests.errors import UserError
from train.models.compose import Composed, compose
from train.models.same_text import check_same_text
from train.models.tensor_files import LazyTensor, read_tensors, write_tensors


def test_a_finished_directory_stays_and_an_unfinished_one_is_written_anew(
    towers: dict[str, Path], llama: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    compose(str(towers["siglip"]), str(llama), str(out), shard_bytes=20_000)
    with pytest.raises(UserError, match="there already"):
        compose(str(towers["siglip"]), str(llama), str(out))
    (out / "config.json").unlink()
    compose(str(towers["siglip"]), str(llama), str(out))
    assert [path.name for path in out.glob("model*")] == ["model.safetensors"]
    transformers.LlavaForConditionalGeneration.from_pretrained(out)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"model_type": "siglip2_vision_model"}, "NaFlex.*siglip2-so400m"),
        ({"model_type": "siglip2"}, "NaFlex"),
        ({"model_type": "timm_wrapper"}, "timm_wrapper.*Use SigLIP"),
    ],
)
def test_towers_that_llava_cannot_hold_are_refused(
    config: dict[str, str], words: str, llama: Path, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=f"(?s){words}"):
        compose(str(tmp_path), str(llama), str(tmp_path / "out"))


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"model_type": "gemma2"}, "final_logit_softcapping.*Gemma 3"),
        ({"model_type": "cohere"}, "logit_scale"),
        ({"model_type": "minicpm", "num_experts": 8}, "num_experts=8.*MiniCPM-2B"),
        ({"model_type": "no_such", "auto_map": {}}, "no_such model.*code of its own"),
        ({"model_type": "gemma3", "text_config": {}}, "text-only release"),
        ({"model_type": "llama", "quantization_config": {}}, "unquantised"),
    ],
)
def test_language_models_that_llava_cannot_hold_are_refused(
    config: dict[str, Any], words: str, towers: dict[str, Path], tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=f"(?s){words}"):
        compose(str(towers["siglip"]), str(tmp_path), str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_other_text_logits_are_refused(
    towers: dict[str, Path], llama: Path, tmp_path: Path
) -> None:
    made = compose(str(towers["clip"]), str(llama), str(tmp_path / "out"))
    other = save_language_model(tmp_path / "lm", seed=5)
    config = transformers.AutoConfig.from_pretrained(made.path)
    with pytest.raises(UserError, match="Text logits .* differ"):
        check_same_text(Path(made.path), config, other, torch.float32, relative=1e-3)


def test_a_tower_that_lacks_a_tensor_leaves_no_finished_directory(
    llama: Path, tmp_path: Path
) -> None:
    tower = save_tower(tmp_path / "tower")
    tensors = read_tensors(tower)
    whole = [LazyTensor(one.name, one.shape, one.dtype, one.read().clone) for one in tensors]
    write_tensors(tower, whole[1:], shard_bytes=10**9)
    with pytest.raises(UserError, match=f"(?s)do not fit.*{whole[0].name}"):
        compose(str(tower), str(llama), str(tmp_path / "out"))
    assert not (tmp_path / "out/config.json").exists()


def composed_with(towers: dict[str, Path], llama: Path, folder: Path, token: str) -> Composed:
    return compose(str(towers["siglip"]), str(llama), str(folder / "out"), image_token=token)


@pytest.mark.parametrize("token", [EOS, "a"])
def test_a_token_of_text_cannot_stand_for_images(
    token: str, towers: dict[str, Path], llama: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="cannot stand for images"):
        composed_with(towers, llama, tmp_path, token)


def test_weights_must_be_whole_and_safe(
    towers: dict[str, Path], llama: Path, tmp_path: Path
) -> None:
    base = save_language_model(tmp_path / "lm")
    (base / "model.safetensors").rename(base / "pytorch_model.bin")
    with pytest.raises(UserError, match="damaged, or holds more than tensors"):
        compose(str(towers["siglip"]), str(base), str(tmp_path / "out"))
    (base / "pytorch_model.bin").unlink()
    with pytest.raises(UserError, match=r"has no model\.safetensors"):
        compose(str(towers["siglip"]), str(base), str(tmp_path / "out"))
    with pytest.raises(UserError, match="dtype 'int8' is unknown"):
        compose(str(towers["siglip"]), str(llama), str(tmp_path / "out"), dtype="int8")
    with pytest.raises(UserError, match=r"no config\.json"):
        compose(str(tmp_path), str(llama), str(tmp_path / "out"))
