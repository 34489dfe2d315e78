"""An average of models is numpy's, tensor by tensor, and only of models of one kind."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from small_llava import save_language_model, save_tower
from transformers import LlavaForConditionalGeneration

from manifests.errors import UserError
from train.models.averaging import average, average_of
from train.models.compose import compose
from train.models.tensor_files import read_tensors

RUN = {"directory": "/runs/a", "identity": {"plan": "1"}}


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Return composed models of one kind, whose weights differ."""
    folder = tmp_path_factory.mktemp("parts")
    tower = save_tower(folder / "tower")
    return {
        name: compose(
            str(tower),
            str(save_language_model(folder / f"lm-{name}", seed=seed)),
            str(folder / name),
            seed=seed,
        ).path
        for seed, name in enumerate("abc")
    }


def arrays(path: str) -> dict[str, np.ndarray]:
    return {one.name: one.read().float().numpy() for one in read_tensors(Path(path))}


def test_the_average_is_numpys(parts: dict[str, str], tmp_path: Path) -> None:
    out = str(tmp_path / "out")
    average(parts["a"], parts["b"], 0.7, out, shard_bytes=30_000)
    a, b, found = arrays(parts["a"]), arrays(parts["b"]), arrays(out)
    assert list(found) == list(a)
    for name, one in found.items():
        expected = 0.3 * a[name].astype(np.float64) + 0.7 * b[name].astype(np.float64)
        np.testing.assert_allclose(one, expected, atol=1e-6)
        moved = not np.array_equal(a[name], b[name])
        assert moved == (not name.startswith("vision_tower."))
    _, info = LlavaForConditionalGeneration.from_pretrained(out, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]


def test_three_models_are_averaged_and_rounded_once(parts: dict[str, str], tmp_path: Path) -> None:
    shares = {parts["a"]: 0.42, parts["b"]: 0.33, parts["c"]: 0.25}
    made = average_of(shares, str(tmp_path / "out"), dtype="bfloat16")
    assert made.shares == shares
    each = [arrays(path) for path in shares]
    for one in read_tensors(tmp_path / "out"):
        exact = sum(np.float32(w) * m[one.name] for w, m in zip(shares.values(), each, strict=True))
        rounded = torch.from_numpy(np.asarray(exact)).bfloat16()
        assert (one.read() == rounded).float().mean() > 0.99  # numpy's last bit may differ
        torch.testing.assert_close(one.read(), rounded, rtol=2**-7, atol=1e-6)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"


def test_the_ends_of_the_line_are_the_models_themselves(
    parts: dict[str, str], tmp_path: Path
) -> None:
    for share, name in ((0.0, "a"), (1.0, "b")):
        average(parts["a"], parts["b"], share, str(tmp_path / name))
        found, expected = arrays(str(tmp_path / name)), arrays(parts[name])
        assert all(np.array_equal(one, expected[key]) for key, one in found.items())


def test_an_average_tells_of_all_its_parts(parts: dict[str, str], tmp_path: Path) -> None:
    first = shutil.copytree(parts["a"], tmp_path / "first")
    (first / "training.json").write_text(json.dumps({"kind": "export", "parts": []}))
    average(str(first), parts["b"], 0.58, str(tmp_path / "out"))
    told = json.loads((tmp_path / "out" / "training.json").read_text())
    assert [one["share"] for one in told["parts"]] == pytest.approx([0.42, 0.58])
    assert [one["directory"] for one in told["parts"]] == [str(first), parts["b"]]
    assert told["parts"][0]["training"]["kind"] == "export"
    assert told["parts"][1]["training"] is None
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"- 0.58 of `{parts['b']}`" in card


def test_models_of_other_kinds_are_refused_with_what_differs(
    parts: dict[str, str], tmp_path: Path
) -> None:
    wide = save_language_model(tmp_path / "wide", intermediate_size=40)
    other = compose(str(save_tower(tmp_path / "tower")), str(wide), str(tmp_path / "other")).path
    with pytest.raises(UserError) as error:
        average(parts["a"], other, 0.5, str(tmp_path / "out"))
    assert "text_config.intermediate_size: 48, now 40" in error.value.what
    assert "language_model.model.layers.0.mlp.up_proj.weight: [48, 32], now [40, 32]" in str(
        error.value
    )
    asked = shutil.copytree(parts["b"], tmp_path / "asked")
    (asked / "chat_template.jinja").write_text("{{ 'another one' }}")
    with pytest.raises(UserError, match="of one kind: chat_template.jinja"):
        average(parts["a"], str(asked), 0.5, str(tmp_path / "out"))
    (asked / "config.json").unlink()
    with pytest.raises(UserError, match="has no config.json"):
        average(parts["a"], str(asked), 0.5, str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("shares", [[0.5, 0.6], [1.5, -0.5], [1.0], [float("nan"), 1.0]])
def test_shares_that_make_no_average_are_refused(
    shares: list[float], parts: dict[str, str], tmp_path: Path
) -> None:
    named = dict(zip(parts.values(), shares, strict=False))
    with pytest.raises(UserError, match="make no average"):
        average_of(named, str(tmp_path / "out"))


def test_a_sum_that_float16_cannot_hold_is_named(parts: dict[str, str], tmp_path: Path) -> None:
    big = shutil.copytree(parts["b"], tmp_path / "big")
    name = "multi_modal_projector.linear_1.bias"
    tensors = load_file(big / "model.safetensors")
    save_file(tensors | {name: torch.full((32,), 2e5)}, big / "model.safetensors")
    with pytest.raises(UserError, match=f"{name} does not fit torch.float16"):
        average(parts["a"], str(big), 0.5, str(tmp_path / "out"), dtype="float16")
    assert not (tmp_path / "out" / "config.json").exists()
