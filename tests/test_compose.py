"""A composed directory is stock LLaVA, and its language model is the base one, bit for bit."""

from __future__ import annotations

import json
import shutil
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from click.testing import CliRunner
from PIL import Image
from safetensors.torch import load_file
from small_llava import (
    EOS,
    NUM_PATCHES,
    NUM_ROWS,
    SIDE,
    TOWERS,
    save_language_model,
    save_tower,
    small_language_model,  # noqa: F401 - a fixture
    small_towers,  # noqa: F401 - a fixture
    tokenizer_for,
)
from tokenizers.processors import TemplateProcessing

from manifests.errors import UserError
from pipelines.cli import main
from train.models.compose import Composed, compose
from train.models.processor_files import SYSTEM
from train.models.tensor_files import LazyTensor, read_tensors, write_tensors


@pytest.fixture(scope="module")
def stock(
    towers: dict[str, Path], llama: Path, tmp_path_factory: pytest.TempPathFactory
) -> Composed:
    out = tmp_path_factory.mktemp("stock") / "llava"
    return compose(str(towers["siglip"]), str(llama), str(out))


def loaded(path: str | Path) -> Any:
    model, info = transformers.LlavaForConditionalGeneration.from_pretrained(
        path, output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    return model.eval()


def text_ids() -> torch.Tensor:
    return torch.arange(40).reshape(2, 20) * 7 % NUM_ROWS


@torch.no_grad()
def logits(model: Any, ids: torch.Tensor, **inputs: Any) -> torch.Tensor:
    return model(input_ids=ids, **inputs).logits


def image_inputs(token_id: int, seed: int) -> dict[str, torch.Tensor]:
    pixels = torch.randn(1, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(seed))
    ids = torch.tensor([[72, *[token_id] * NUM_PATCHES, 73, 74]])
    return {"ids": ids, "pixel_values": pixels}


@pytest.mark.parametrize("kind", TOWERS)
def test_every_tower_gives_the_features_of_the_layer_before_the_last(
    kind: str, towers: dict[str, Path], llama: Path, tmp_path: Path
) -> None:
    made = compose(str(towers[kind]), str(llama), str(tmp_path / "out"))
    model, pixels = loaded(made.path), image_inputs(0, 3)["pixel_values"]
    reference = tower_of(towers[kind])
    with torch.no_grad():
        states = reference(pixels, output_hidden_states=True).hidden_states[-2]
        expected = states[:, 1:] if kind.startswith("clip") else states
        found = model.model.get_image_features(pixels).pooler_output[0]
        assert torch.equal(model.model.multi_modal_projector(expected)[0], found)
    assert made.num_image_tokens == NUM_PATCHES == expected.shape[1]


def tower_of(path: Path) -> Any:
    model = transformers.AutoModel.from_pretrained(path).eval()
    return getattr(model, "vision_model", model)


def test_files_have_the_published_names(stock: Composed) -> None:
    names = {one.name for one in read_tensors(Path(stock.path))}
    heads = {name.partition(".layers.")[0] for name in names}
    assert "vision_tower.vision_model.encoder" in heads
    assert {"language_model.model", "language_model.lm_head.weight"} <= heads
    assert {f"multi_modal_projector.linear_{n}.weight" for n in (1, 2)} <= heads
    assert not [name for name in names if "text_model" in name or "logit" in name]


def test_shards_hold_the_same_tensors(
    towers: dict[str, Path], llama: Path, stock: Composed, tmp_path: Path
) -> None:
    made = compose(str(towers["siglip"]), str(llama), str(tmp_path / "out"), shard_bytes=20_000)
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    files = sorted((tmp_path / "out").glob("model-*-of-*.safetensors"))
    assert {path.name for path in files} == set(index["weight_map"].values())
    assert len(files) > 3
    one, other = loaded(made.path).state_dict(), loaded(stock.path).state_dict()
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_pickled_weights_are_the_same_model(
    towers: dict[str, Path], llama: Path, stock: Composed, tmp_path: Path
) -> None:
    """CLIP-L at 336 pixels and MiniCPM-2B are published so."""
    halves = {"tower": towers["siglip"], "lm": llama}
    for name, half in halves.items():
        shutil.copytree(half, tmp_path / name)
        weights = tmp_path / name / "model.safetensors"
        torch.save(load_file(weights), weights.with_name("pytorch_model.bin"))
        weights.unlink()
    made = compose(str(tmp_path / "tower"), str(tmp_path / "lm"), str(tmp_path / "out"))
    files = [Path(one.path) / "model.safetensors" for one in (made, stock)]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_one_tensor_is_in_memory_at_a_time(tmp_path: Path) -> None:
    made: list[weakref.ref[torch.Tensor]] = []

    def read() -> torch.Tensor:
        assert [one for one in made if one() is not None] == []
        values = torch.full((3, 5), len(made), dtype=torch.bfloat16)
        made.append(weakref.ref(values))
        return values

    names = [f"w{n}" for n in range(5)]
    lazy = [LazyTensor(name, (3, 5), torch.bfloat16, read) for name in names]
    write_tensors(tmp_path, lazy, shard_bytes=90)
    found = read_tensors(tmp_path)
    assert [one.name for one in found] == names
    assert [float(one.read()[2, 4]) for one in found] == [0, 1, 2, 3, 4]


def test_the_projector_is_drawn_as_torch_draws_linear_layers(stock: Composed) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layers = torch.nn.Linear(24, 32), torch.nn.Linear(32, 32)
    projector = loaded(stock.path).model.multi_modal_projector
    for found, expected in zip((projector.linear_1, projector.linear_2), layers, strict=True):
        torch.testing.assert_close(found.weight, expected.weight)
        torch.testing.assert_close(found.bias, expected.bias)


def test_a_seed_is_the_same_bytes_and_another_another_projector(
    towers: dict[str, Path], llama: Path, stock: Composed, tmp_path: Path
) -> None:
    for name, seed in (("again", 0), ("other", 1)):
        compose(str(towers["siglip"]), str(llama), str(tmp_path / name), seed=seed)
    files = sorted(path.name for path in Path(stock.path).iterdir())
    assert files == sorted(path.name for path in (tmp_path / "again").iterdir())
    for name in files:
        assert (tmp_path / "again" / name).read_bytes() == (Path(stock.path) / name).read_bytes()
    other = {path.name: path.read_bytes() for path in (tmp_path / "other").iterdir()}
    changed = [name for name in files if other[name] != (Path(stock.path) / name).read_bytes()]
    assert changed == ["model.safetensors"]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_dtype_is_of_all_weights(
    dtype: str, towers: dict[str, Path], llama: Path, tmp_path: Path
) -> None:
    made = compose(str(towers["clip"]), str(llama), str(tmp_path / "out"), dtype=dtype)
    wanted = getattr(torch, dtype)
    assert {one.dtype for one in read_tensors(Path(made.path))} == {wanted}
    assert loaded(made.path).dtype == wanted


@pytest.mark.parametrize("kind", ["siglip", "clip"])
def test_the_processor_makes_what_the_model_takes(
    kind: str, towers: dict[str, Path], llama: Path, tmp_path: Path
) -> None:
    made = compose(str(towers[kind]), str(llama), str(tmp_path / "out"))
    processor = transformers.AutoProcessor.from_pretrained(made.path)
    assert isinstance(processor, transformers.LlavaProcessor)
    picture = Image.fromarray(np.arange(30 * 20 * 3, dtype=np.uint8).reshape(20, 30, 3))
    inputs = processor(text=f"{made.image_token}\nhi", images=picture, return_tensors="pt")
    assert int((inputs["input_ids"] == made.image_token_id).sum()) == NUM_PATCHES
    assert inputs["pixel_values"].shape == (1, 3, SIDE, SIDE)
    counted = processor._get_num_multimodal_tokens(image_sizes=[(20, 30)])
    assert counted["num_image_tokens"] == [NUM_PATCHES]
    assert torch.isfinite(logits(loaded(made.path), inputs.pop("input_ids"), **inputs)).all()

    processor.save_pretrained(tmp_path / "again")
    again = transformers.AutoProcessor.from_pretrained(tmp_path / "again")
    same = again(text=f"{made.image_token}\nhi", images=picture, return_tensors="pt")
    assert torch.equal(same["pixel_values"], inputs["pixel_values"])


def test_images_are_padded_to_a_square_and_normalised_as_the_tower_says(
    llama: Path, tmp_path: Path
) -> None:
    tower = save_tower(tmp_path / "tower")
    given = {"image_mean": [0.2] * 3, "image_std": [0.4] * 3, "resample": 2}
    (tower / "preprocessor_config.json").write_text(json.dumps(given))
    made = compose(str(tower), str(llama), str(tmp_path / "out"))
    processor = transformers.AutoProcessor.from_pretrained(made.path).image_processor
    wide = Image.new("RGB", (SIDE, SIDE // 2), (255, 255, 255))
    pixels = processor(wide, return_tensors="pt")["pixel_values"][0]
    torch.testing.assert_close(pixels[:, SIDE // 2], torch.full((3, SIDE), (1 - 0.2) / 0.4))
    assert float(pixels[:, 0].abs().max()) < 1e-5, "padding is the mean colour: zero"
    assert processor.resample == 2


def test_the_template_is_bunny_s_and_marks_what_is_trained(stock: Composed) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(stock.path)
    question = [{"type": "text", "text": "What?"}, {"type": "image"}]
    turns = [
        {"role": "user", "content": question},
        {"role": "assistant", "content": [{"type": "text", "text": "A cat"}]},
        {"role": "user", "content": "More?"},
        {"role": "assistant", "content": "No"},
    ]
    text = tokenizer.apply_chat_template(turns, tokenize=False)
    first = f"{SYSTEM} USER: <image>\nWhat? ASSISTANT:"
    assert text == f"{first} A cat{EOS}USER: More? ASSISTANT: No{EOS}"
    assert tokenizer.apply_chat_template(turns[:1], tokenize=False) == first
    masked = tokenizer.apply_chat_template(
        turns, return_dict=True, return_assistant_tokens_mask=True
    )
    pairs = zip(masked["input_ids"], masked["assistant_masks"], strict=True)
    assert tokenizer.decode([one for one, kept in pairs if kept]) == f" A cat{EOS} No{EOS}"


def test_the_image_token_is_a_row_that_text_never_uses(stock: Composed, llama: Path) -> None:
    base = transformers.AutoTokenizer.from_pretrained(llama)
    assert (stock.image_token, stock.image_token_id) == ("<image>", 257)
    assert stock.image_token_id not in base.get_vocab().values()
    assert stock.image_token_id < NUM_ROWS
    assert transformers.AutoTokenizer.from_pretrained(stock.path).encode("<image>") == [
        stock.image_token_id
    ]
    assert loaded(stock.path).config.image_token_id == stock.image_token_id


def test_without_a_free_row_a_reserved_token_is_taken(
    towers: dict[str, Path], tmp_path: Path
) -> None:
    base = full_vocabulary(tmp_path / "lm", "<|reserved_special_token_{}|>")
    made = compose(str(towers["siglip"]), str(base), str(tmp_path / "out"))
    row = (made.image_token, made.image_token_id)
    assert row == ("<|reserved_special_token_62|>", NUM_ROWS - 1)
    template = transformers.AutoTokenizer.from_pretrained(made.path).chat_template
    assert made.image_token in template
    assert "<image>" not in template


def full_vocabulary(folder: Path, word: str, family: str = "llama") -> Path:
    save_language_model(folder, family)
    tokenizer_for(NUM_ROWS - 257, word).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("family", ["llama", "smollm2"])
def test_without_any_row_more_must_be_asked_for(
    family: str, towers: dict[str, Path], tmp_path: Path
) -> None:
    base = full_vocabulary(tmp_path / "lm", "<|word_{}|>", family)
    with pytest.raises(UserError, match="resize: 64"):
        compose(str(towers["siglip"]), str(base), str(tmp_path / "out"))
    made = compose(str(towers["siglip"]), str(base), str(tmp_path / "out"), resize_vocabulary=64)
    model = loaded(made.path)
    assert made.image_token_id == NUM_ROWS
    assert model.lm_head.weight.shape[0] == NUM_ROWS + 64
    reference = transformers.AutoModelForCausalLM.from_pretrained(base).eval()
    found = logits(model, text_ids())[..., :NUM_ROWS]
    torch.testing.assert_close(found, logits(reference, text_ids()), atol=1e-5, rtol=0)
    assert torch.isfinite(logits(model, **image_inputs(made.image_token_id, 0))).all()


def test_generation_stops_where_the_template_ends_an_answer(
    towers: dict[str, Path], tmp_path: Path
) -> None:
    base = save_language_model(tmp_path / "lm")
    (base / "generation_config.json").write_text(json.dumps({"eos_token_id": 7}))
    made = compose(str(towers["siglip"]), str(base), str(tmp_path / "out"))
    assert loaded(made.path).generation_config.eos_token_id == [7, 256]


def test_a_scale_that_is_no_power_of_two_is_folded_up_to_rounding(
    towers: dict[str, Path], tmp_path: Path
) -> None:
    base = save_language_model(tmp_path / "lm", "granite", logits_scaling=9.0)
    model = loaded(compose(str(towers["siglip"]), str(base), str(tmp_path / "out")).path)
    expected = logits(transformers.AutoModelForCausalLM.from_pretrained(base).eval(), text_ids())
    assert model.config.text_config.logits_scaling == 1.0
    torch.testing.assert_close(logits(model, text_ids()), expected, atol=1e-5, rtol=1e-5)


def edited(config: Path, gone: str = "", **values: Any) -> None:
    given = json.loads(config.read_text())
    given.pop(gone, None)
    config.write_text(json.dumps({**given, **values}))


def test_configs_of_transformers_4_are_kept_as_published(
    towers: dict[str, Path], tmp_path: Path
) -> None:
    base = save_language_model(tmp_path / "lm")
    old = {"rope_theta": 50.0, "torch_dtype": "float32", "auto_map": {"AutoConfig": "no.Such"}}
    edited(base / "config.json", gone="rope_parameters", **old)
    edited(base / "tokenizer_config.json", gone="eos_token")
    with pytest.raises(UserError, match="without an end-of-text token"):
        compose(str(towers["siglip"]), str(base), str(tmp_path / "out"))
    edited(base / "tokenizer_config.json", eos_token=EOS)
    made = compose(str(towers["siglip"]), str(base), str(tmp_path / "out"))
    text = json.loads((tmp_path / "out/config.json").read_text())["text_config"]
    assert text["rope_theta"] == 50.0
    assert not {"torch_dtype", "auto_map"} & set(text)
    assert loaded(made.path).config.text_config.rope_parameters["rope_theta"] == 50.0


def test_a_text_that_begins_with_a_token_does_so_in_the_template_once(
    towers: dict[str, Path], tmp_path: Path
) -> None:
    base = save_language_model(tmp_path / "lm")
    tokenizer = tokenizer_for()
    begin = ("<s>", 257)
    tokenizer.add_special_tokens({"bos_token": begin[0]})
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[begin]
    )
    tokenizer.save_pretrained(base)
    made = compose(str(towers["siglip"]), str(base), str(tmp_path / "out"))
    turns = [{"role": "user", "content": "hi"}]
    processor = transformers.AutoProcessor.from_pretrained(made.path)
    ids = processor.tokenizer.apply_chat_template(turns, return_dict=True)["input_ids"]
    (by_processor,) = processor.apply_chat_template(turns, tokenize=True, return_dict=True)[
        "input_ids"
    ]
    assert ids == by_processor
    assert ids.count(257) == 1
    assert ids[0] == 257


def test_an_asked_for_token_is_added(towers: dict[str, Path], llama: Path, tmp_path: Path) -> None:
    made = compose(
        str(towers["siglip"]),
        str(llama),
        str(tmp_path / "out"),
        image_token="<picture>",  # noqa: S106 - a token of a vocabulary
    )
    assert (made.image_token, made.image_token_id) == ("<picture>", 257)


def test_compose_from_the_command_line(
    towers: dict[str, Path], llama: Path, tmp_path: Path
) -> None:
    words = ["compose", str(towers["siglip"]), str(llama), "--out", str(tmp_path / "out")]
    done = CliRunner().invoke(main, words)
    assert done.exit_code == 0, done.output
    assert f"{NUM_PATCHES} tokens an image" in done.stdout
    loaded(tmp_path / "out")
    again = CliRunner().invoke(main, words)
    assert (again.exit_code, "error: " in again.stderr) == (2, True)


def test_the_command_tells_that_phi_loses_the_bias_of_its_head(
    towers: dict[str, Path], tmp_path: Path
) -> None:
    base = save_language_model(tmp_path / "phi-2", "phi")
    largest = float(load_file(base / "model.safetensors")["lm_head.bias"].abs().max())
    words = ["compose", str(towers["siglip"]), str(base), "--out", str(tmp_path / "out")]
    done = CliRunner().invoke(main, words)
    assert done.exit_code == 0, done.output
    told = f"warning: lost head bias: phi-2 adds a bias (up to {largest:.3g}) to its logits"
    assert told in done.stderr
    assert "warning" not in done.stdout
