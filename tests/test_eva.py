"""An EVA02-CLIP tower gives what timm's own model gives, in LLaVA's forward and in training."""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from click.testing import CliRunner
from PIL import Image
from safetensors.torch import load_file, save_file
from small_llava import (
    NUM_PATCHES,
    SIDE,
    save_eva,
    save_language_model,
    small_language_model,  # noqa: F401 - a fixture
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from manifests.errors import UserError
from pipelines.cli import main
from train.config import TrainConfig
from train.learn.model import TrainedLlava
from train.models.compose import Composed, compose
from train.models.eva import eva_fields
from train.models.towers import EVA, read_tower

timm = importlib.import_module("timm")  # after small_llava has made torchvision importable
PUBLISHED = "eva02_large_patch14_clip_336"


@pytest.fixture(scope="module")
def eva(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_eva(tmp_path_factory.mktemp("tower") / "eva")


@pytest.fixture(scope="module")
def made(eva: Path, llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Composed:
    return compose(str(eva), str(llama), str(tmp_path_factory.mktemp("eva") / "llava"))


def loaded(path: str | Path, **more: Any) -> Any:
    model, info = transformers.LlavaForConditionalGeneration.from_pretrained(
        path, output_loading_info=True, **more
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    return model.eval()


def pixels(images: int = 2) -> torch.Tensor:
    return torch.randn(images, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(4))


def of_timm(eva: Path, dtype: torch.dtype, images: torch.Tensor) -> torch.Tensor:
    """Return what timm itself gives after the last block but one, without the class token."""
    model = timm.create_model(f"local-dir:{eva}", pretrained=True).eval().to(dtype)
    with torch.no_grad():
        every = model.forward_intermediates(images.to(dtype), output_fmt="NLC", norm=False)[1]
    return every[-2]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_features_are_timms_bit_for_bit(dtype: torch.dtype, eva: Path, made: Composed) -> None:
    model = loaded(made.path, dtype=dtype)
    expected = of_timm(eva, dtype, pixels())
    with torch.no_grad():
        found = model.get_image_features(pixels().to(dtype)).pooler_output
        projected = model.model.multi_modal_projector(expected)
    assert expected.shape == (2, NUM_PATCHES, 24)
    assert torch.equal(torch.stack(found), projected)


def test_hidden_states_are_the_embeddings_and_every_block(eva: Path, made: Composed) -> None:
    seen = loaded(made.path).model.vision_tower(pixels())
    model = timm.create_model(f"local-dir:{eva}", pretrained=True).eval()
    last, every = model.forward_intermediates(
        pixels(), output_fmt="NLC", norm=False, return_prefix_tokens=True
    )
    assert torch.equal(seen.last_hidden_state, last)
    assert len(seen.hidden_states) == 1 + len(every)
    for state, (patches, prefix) in zip(seen.hidden_states[1:], every, strict=True):
        assert torch.equal(state, torch.cat([prefix, patches], dim=1))


def test_cut_after_the_feature_layer_it_gives_the_same(made: Composed, tmp_path: Path) -> None:
    """As training and vLLM cut SigLIP and CLIP: by the same names of parts, and of a setting."""
    model = loaded(made.path)
    expected = model.get_image_features(pixels()).pooler_output
    tower = model.model.vision_tower
    tower.encoder.layers = tower.encoder.layers[:-1]
    tower.post_layernorm = torch.nn.Identity()
    assert torch.equal(tower(pixels()).last_hidden_state, tower(pixels()).hidden_states[-1])
    model.config.vision_feature_layer = -1
    model.config.vision_config.num_hidden_layers = 2
    found = model.get_image_features(pixels()).pooler_output
    assert all(map(torch.equal, found, expected))
    model.save_pretrained(tmp_path)
    again = transformers.LlavaForConditionalGeneration.from_pretrained(tmp_path)
    assert len(again.model.vision_tower.encoder.layers) == 2


def test_a_tower_that_trains_gets_the_same_gradients_with_blocks_computed_again(
    made: Composed,
) -> None:
    found, passes = [], []
    for again in (False, True):
        tower = loaded(made.path).model.vision_tower.train()
        if again:
            tower.activation_checkpointing_enable({"use_reentrant": False})
        calls: list[int] = []
        tower.encoder.layers[0].register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        tower(pixels()).last_hidden_state.square().mean().backward()
        found.append({name: one.grad for name, one in tower.named_parameters()})
        passes.append(len(calls))
    assert passes == [1, 2]
    assert all(torch.equal(one, found[1][name]) for name, one in found[0].items())


def test_the_published_tower_is_read_as_bunny_used_it(tmp_path: Path) -> None:
    config = {"architecture": PUBLISHED, "num_classes": 768, "global_pool": "token"}
    (tmp_path / "config.json").write_text(json.dumps({**config, "pretrained_cfg": {}}))
    tower = read_tower(tmp_path)
    assert (tower.hidden_size, tower.raw["num_hidden_layers"]) == (1024, 24)
    assert (tower.shape.side, tower.shape.patch_size, tower.shape.num_tokens) == (336, 14, 576)
    assert tower.shape.strategy == "default"


def test_the_processor_is_clips(made: Composed) -> None:
    processor = transformers.AutoProcessor.from_pretrained(made.path)
    images = processor.image_processor
    assert tuple(images.image_mean) == (0.48145466, 0.4578275, 0.40821073)
    assert tuple(images.image_std) == (0.26862954, 0.26130258, 0.27577711)
    assert (dict(images.crop_size), images.do_center_crop) == (
        {"height": SIDE, "width": SIDE},
        True,
    )
    picture = Image.new("RGB", (30, 20), (200, 10, 10))
    inputs = processor(text=f"{made.image_token}\nhi", images=picture, return_tensors="pt")
    assert int((inputs["input_ids"] == made.image_token_id).sum()) == NUM_PATCHES
    assert inputs["pixel_values"].shape == (1, 3, SIDE, SIDE)


def inputs_of(made: Composed) -> dict[str, torch.Tensor]:
    image = [made.image_token_id] * NUM_PATCHES
    ids = torch.tensor([[72, *image, 73, 74, 75], [70, *image, 76, 77, 78]])
    labels = torch.where(ids == made.image_token_id, -100, ids)
    return {"input_ids": ids, "labels": labels, "pixel_values": pixels()}


@pytest.mark.parametrize("stage", ["projector", "adapter"])
def test_a_training_step_is_hugging_faces_and_leaves_the_tower(stage: str, made: Composed) -> None:
    config = TrainConfig.bunny(stage, lora={"rank": 2, "dropout": 0.0})  # type: ignore[arg-type]
    model = TrainedLlava.load(made.path, config)
    inputs = inputs_of(made)
    losses, _ = model.losses(inputs["input_ids"], inputs["labels"], inputs["pixel_values"])
    theirs = model.llava(**inputs).loss
    torch.testing.assert_close(losses.mean(), theirs, atol=1e-6, rtol=1e-6)
    before = {name: one.detach().clone() for name, one in model.llava.named_parameters()}
    losses.mean().backward()
    torch.optim.SGD(model.trainables().values(), lr=0.1).step()
    moved = {
        name for name, one in model.llava.named_parameters() if not torch.equal(one, before[name])
    }
    assert moved == {name for name in model.trainables() if "lora_A" not in name}  # B is zero
    assert not [name for name in moved if "vision_tower" in name]


def test_saved_and_loaded_it_is_the_same_and_answers(made: Composed, tmp_path: Path) -> None:
    model = loaded(made.path)
    model.save_pretrained(tmp_path)
    again = loaded(tmp_path)
    inputs = inputs_of(made)
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, again(**inputs).logits)
    inputs.pop("labels")
    asked = {**inputs, "max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
    answers = [one.generate(**asked, pad_token_id=0) for one in (model, again)]
    assert answers[0].shape == (2, inputs["input_ids"].shape[1] + 4)
    assert torch.equal(*answers)


@pytest.fixture
def fresh() -> Iterator[None]:
    """Let Transformers know nothing of EVA, as in a new process."""
    known = CONFIG_MAPPING._extra_content.pop(EVA, None)
    yield
    if known is not None:
        CONFIG_MAPPING._extra_content[EVA] = known


def test_it_loads_where_the_class_is_registered_and_only_there(made: Composed, fresh: None) -> None:
    with pytest.raises((ValueError, KeyError), match=EVA):
        transformers.LlavaForConditionalGeneration.from_pretrained(made.path)
    model = TrainedLlava.load(made.path, TrainConfig.bunny("projector"))
    assert model.tokens_per_image == NUM_PATCHES


def test_the_command_says_that_the_model_is_not_stock(
    eva: Path, llama: Path, tmp_path: Path
) -> None:
    words = ["compose", str(eva), str(llama), "--out", str(tmp_path / "out")]
    done = CliRunner().invoke(main, words)
    assert done.exit_code == 0, done.output
    assert "warning: not stock: eva is an EVA tower" in done.stderr
    assert "vLLM" in done.stderr


def test_tensors_as_open_clip_names_them_are_the_same_tower(
    eva: Path, llama: Path, made: Composed, tmp_path: Path
) -> None:
    tensors = load_file(eva / "model.safetensors")
    named = {f"visual.trunk.{name}": one for name, one in tensors.items()}
    named |= {"text.token_embedding.weight": torch.ones(2), "logit_scale": torch.ones(1)}
    (tmp_path / "eva").mkdir()
    save_file(named, tmp_path / "eva/model.safetensors")
    (tmp_path / "eva/config.json").write_text((eva / "config.json").read_text())
    other = compose(str(tmp_path / "eva"), str(llama), str(tmp_path / "out"))
    weights = [Path(one.path) / "model.safetensors" for one in (made, other)]
    assert weights[0].read_bytes() == weights[1].read_bytes()


def test_other_models_of_timm_are_refused(llama: Path, tmp_path: Path) -> None:
    refused = {
        "resnet18": {},
        PUBLISHED: {"num_reg_tokens": 2},
        "no_such_model": {},
    }
    for name, args in refused.items():
        with pytest.raises(UserError, match=f"{name}.*(?s:.)*SigLIP"):
            eva_fields(tmp_path, {"architecture": name, "model_args": args})
    save_eva(tmp_path / "eva")
    tensors = load_file(tmp_path / "eva/model.safetensors")
    save_file({**tensors, "mask_token": torch.ones(3)}, tmp_path / "eva/model.safetensors")
    with pytest.raises(UserError, match="mask_token is no tensor of an EVA"):
        compose(str(tmp_path / "eva"), str(llama), str(tmp_path / "out"))


@pytest.mark.parametrize("named", ["folder", "file"])
def test_a_pickled_tower_is_refused_with_how_to_convert_it(
    named: str, llama: Path, tmp_path: Path
) -> None:
    file = tmp_path / "EVA02_CLIP_L_336_psz14_s6B.pt"
    file.write_bytes(b"")
    asked = {"folder": tmp_path, "file": file}[named]
    with pytest.raises(UserError, match="pickled") as found:
        compose(str(asked), str(llama), str(tmp_path / "out"))
    assert f"pretrained_cfg_overlay={{'file': {str(file)!r}}}" in found.value.fix


def test_the_conversion_that_is_told_keeps_the_tower(eva: Path, tmp_path: Path) -> None:
    """The authors' names of tensors: https://github.com/baaivision/EVA, eva_vit_model.py."""
    renamed = {"fc1_g": "w1", "fc1_x": "w2", "fc2": "w3", "mlp.norm": "mlp.ffn_ln"}
    renamed["attn.norm"] = "attn.inner_attn_ln"
    tensors = load_file(eva / "model.safetensors")
    theirs = {"text.positional_embedding": torch.ones(2), "logit_scale": torch.ones(())}
    for name, one in tensors.items():
        for ours, other in renamed.items():
            name = name.replace(ours, other)
        theirs[f"visual.{name}"] = one
    torch.save(theirs, tmp_path / "EVA02.pt")
    args = json.loads((eva / "config.json").read_text())["model_args"]
    overlay = {"file": str(tmp_path / "EVA02.pt"), "num_classes": args["num_classes"]}  # not 768
    model = timm.create_model(PUBLISHED, pretrained=True, pretrained_cfg_overlay=overlay, **args)
    timm.models.save_for_hf(model, str(tmp_path / "eva"), safe_serialization=True)
    converted = load_file(tmp_path / "eva/model.safetensors")
    assert converted.keys() == tensors.keys()
    assert all(torch.equal(converted[name], one) for name, one in tensors.items())


def test_a_language_model_keeps_its_text_logits(eva: Path, tmp_path: Path) -> None:
    base = save_language_model(tmp_path / "lm", "qwen2")
    model = loaded(compose(str(eva), str(base), str(tmp_path / "out")).path)
    ids = torch.arange(40).reshape(2, 20)
    with torch.no_grad():
        expected = transformers.AutoModelForCausalLM.from_pretrained(base).eval()(ids).logits
        assert torch.equal(model(ids).logits, expected)
