"""A Bunny checkpoint of each family, imported, has the logits of Bunny's own forward."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from click.testing import CliRunner, Result
from small_bunny import MADE_OF, Bunny, adapted
from small_llava import NUM_PATCHES, SIDE, save_language_model, save_tower, tokenizer_for

from manifests.errors import UserError
from pipelines.cli import main
from train.models.import_bunny import Imported, import_bunny
from train.models.tensor_files import read_tensors

# PEFT asks for it by its old name.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")


def loaded(path: str | Path, **more: Any) -> Any:
    model, info = transformers.LlavaForConditionalGeneration.from_pretrained(
        path, output_loading_info=True, **more
    )
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        assert not info[kind]
    return model.eval()


BEFORE, AFTER = [72, 9], [73, 74, 75]


def pixels() -> torch.Tensor:
    return torch.randn(1, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(4))


def stock_logits(made: Imported, **more: Any) -> torch.Tensor:
    return logits_of(made.path, **more)


@torch.no_grad()
def logits_of(path: str | Path, **more: Any) -> torch.Tensor:
    model = loaded(path, **more)
    ids = torch.tensor([[*BEFORE, *[model.config.image_token_id] * NUM_PATCHES, *AFTER]])
    return model(input_ids=ids, pixel_values=pixels(), use_cache=False).logits


def command(checkpoint: Path, out: Path, *words: str) -> Result:
    """Run `warren import-bunny`."""
    return CliRunner().invoke(main, ["import-bunny", str(checkpoint), "--out", str(out), *words])


@pytest.mark.parametrize("family", MADE_OF)
def test_every_familys_whole_repository_keeps_its_logits(family: str, tmp_path: Path) -> None:
    bunny = Bunny(tmp_path, family)
    folder, out = bunny.save(tmp_path / "bunny"), tmp_path / "out"
    done = command(folder, out, "--vision-tower", str(bunny.tower_path))
    assert (done.exit_code, done.stdout) == (0, f"{out}\n"), done.output
    assert done.stderr == ""
    assert str(tmp_path) not in (out / "tokenizer_config.json").read_text()
    # a fold by a power of two is free of rounding
    assert torch.equal(logits_of(out), bunny.logits(BEFORE, pixels(), AFTER))


@pytest.mark.parametrize("family", [name for name in MADE_OF if name != "bunny-qwen2"])
def test_every_familys_lora_repository_has_the_logits_of_peft(family: str, tmp_path: Path) -> None:
    bunny = Bunny(tmp_path, family)
    bare = bunny.logits(BEFORE, pixels(), AFTER)
    folder, model = adapted(bunny, tmp_path / "lora")
    out, given = tmp_path / "out", ["--vision-tower", str(bunny.tower_path)]
    done = command(folder, out, *given)
    assert done.exit_code == 2
    assert "fix: Name the language model that it was trained on: base=..." in done.stderr
    done = command(folder, out, "--base", str(bunny.base), *given, "--dtype", "float32")
    assert (done.exit_code, done.stdout) == (0, f"{out}\n"), done.output
    assert "rounding adds at most 0.0% of an adapter's change" in done.stderr
    bunny.lm = model.merge_and_unload()
    expected = bunny.logits(BEFORE, pixels(), AFTER)
    torch.testing.assert_close(logits_of(out), expected, atol=1e-5, rtol=1e-5)
    assert float((expected - bare).abs().max()) > 1e-3, "the adapter changes something"


def test_the_command_names_a_tensor_without_a_place_and_exits_with_2(
    qwen: Bunny, tmp_path: Path
) -> None:
    folder = qwen.save(tmp_path / "bunny", extra="model.image_newline")
    done = command(folder, tmp_path / "out", "--vision-tower", str(qwen.tower_path))
    assert (done.exit_code, done.stdout) == (2, "")
    assert "error: " in done.stderr
    assert "LLaVA has no place for: model.image_newline." in done.stderr
    assert not (tmp_path / "out").exists()


@torch.no_grad()
def test_minicpm_is_llama_with_scaled_embeddings_residuals_and_logits(tmp_path: Path) -> None:
    bunny = Bunny(tmp_path, "bunny-minicpm", logits_scaling=32 / 3)
    folder = bunny.save(tmp_path / "bunny")
    bunny.save_config(folder, dim_model_base=3)  # a fold that rounds
    made = import_bunny(
        str(folder), str(tmp_path / "out"), vision_tower=str(bunny.tower_path), dtype="float32"
    )
    config = json.loads((bunny.base / "config.json").read_text())
    llama = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**{**config, "model_type": "llama", "architectures": None})
    ).eval()
    scaled = {
        name: value * (1.4 / 2**0.5 if "o_proj" in name or "down_proj" in name else 1.0)
        for name, value in bunny.lm.state_dict().items()
    }
    llama.load_state_dict(scaled)
    embed = llama.get_input_embeddings()
    features = bunny.projector(bunny.tower(pixels(), output_hidden_states=True).hidden_states[-2])
    parts = [embed(torch.tensor([BEFORE])), features, embed(torch.tensor([AFTER]))]
    expected = llama(inputs_embeds=torch.cat(parts, dim=1) * 12).logits / (32 / 3)
    torch.testing.assert_close(stock_logits(made), expected, atol=2e-6, rtol=1e-5)


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Bunny:
    return Bunny(tmp_path_factory.mktemp("qwen"), "bunny-qwen")


def ask(bunny: Bunny, checkpoint: Path, out: Path, **more: Any) -> Imported:
    asked = {"base": str(bunny.base), "vision_tower": str(bunny.tower_path), **more}
    return import_bunny(str(checkpoint), str(out), **asked)


def language_weights(made: Imported) -> dict[str, torch.Tensor]:
    tensors = read_tensors(Path(made.path))
    return {one.name.removeprefix("language_model."): one.read() for one in tensors}


@pytest.mark.parametrize("use_rslora", [False, True])
def test_an_adapter_is_merged_as_peft_merges_it(use_rslora: bool, tmp_path: Path) -> None:
    bunny = Bunny(tmp_path, "bunny-qwen")
    folder, model = adapted(bunny, tmp_path / "lora", use_rslora=use_rslora)
    bunny.lm = model.merge_and_unload()
    exact = ask(bunny, folder, tmp_path / "exact", dtype="float32")
    found = language_weights(exact)
    for name, value in bunny.lm.state_dict().items():
        torch.testing.assert_close(found[name], value, atol=1e-7, rtol=1e-6)
    expected = bunny.logits(BEFORE, pixels(), AFTER)
    torch.testing.assert_close(stock_logits(exact), expected, atol=1e-5, rtol=1e-5)
    assert set(exact.merge_noise.values()) == {0.0}

    served = ask(bunny, folder, tmp_path / "f16")
    assert {one.dtype for one in language_weights(served).values()} == {torch.float16}
    short = ask(bunny, folder, tmp_path / "bf16", dtype="bfloat16")
    given = {f"language_model.{one.name}": one.read() for one in read_tensors(bunny.base)}
    assert len(served.merge_noise) == len(short.merge_noise) == 2 * 7
    for made, dtype in ((served, torch.float16), (short, torch.bfloat16)):
        for name, noise in made.merge_noise.items():
            sums = found[name.removeprefix("language_model.")]
            rounding, change = sums.to(dtype).float() - sums, sums - given[name]
            assert noise == pytest.approx(float(rounding.norm() / change.norm()), rel=1e-3)


def test_the_projector_of_stage_one_stands_on_its_base(qwen: Bunny, tmp_path: Path) -> None:
    folder = qwen.save_config(tmp_path / "stage1")
    torch.save(qwen.projector_tensors(), folder / "mm_projector.bin")
    made = ask(qwen, folder, tmp_path / "out")
    assert torch.equal(stock_logits(made), qwen.logits(BEFORE, pixels(), AFTER))
    with pytest.raises(UserError, match="base="):
        ask(qwen, folder, tmp_path / "no", base=None)
    with pytest.raises(UserError, match="vision_tower="):
        ask(qwen, folder, tmp_path / "no", vision_tower=None)


def test_the_checkpoint_s_own_tower_is_taken(qwen: Bunny, tmp_path: Path) -> None:
    folder = qwen.save(tmp_path / "bunny")
    other = save_tower(tmp_path / "other", seed=9)
    made = import_bunny(str(folder), str(tmp_path / "out"), vision_tower=str(other))
    assert torch.equal(stock_logits(made), qwen.logits(BEFORE, pixels(), AFTER))


def test_pickled_shards_are_read_too(qwen: Bunny, tmp_path: Path) -> None:
    folder = qwen.save(tmp_path / "bunny")
    (folder / "model.safetensors").unlink()
    parts = {
        "pytorch_model-00001-of-00002.bin": qwen.language_tensors(),
        "pytorch_model-00002-of-00002.bin": {**qwen.projector_tensors(), **qwen.tower_tensors()},
    }
    for name, tensors in parts.items():
        torch.save(tensors, folder / name)
    places = {"weight_map": {one: name for name, tensors in parts.items() for one in tensors}}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(places))
    made = ask(qwen, folder, tmp_path / "out")
    assert torch.equal(stock_logits(made), qwen.logits(BEFORE, pixels(), AFTER))


def test_the_shape_of_a_known_tower_is_told_by_its_weights(tmp_path: Path) -> None:
    bunny = Bunny(tmp_path, "bunny-qwen")
    folder = bunny.save(tmp_path / "bunny")
    with pytest.raises(UserError, match="width 24"):
        import_bunny(str(folder), str(tmp_path / "out"))
    wide = {"hidden_size": 768, "num_attention_heads": 12, "intermediate_size": 8}
    wide |= {"num_hidden_layers": 2, "image_size": SIDE, "patch_size": 4}
    config = transformers.SiglipVisionConfig(**wide, vision_use_head=False)
    bunny.tower = transformers.SiglipVisionModel(config).eval()
    bunny.projector[0] = torch.nn.Linear(768, 32)
    folder = bunny.save(tmp_path / "bunny")
    made = import_bunny(str(folder), str(tmp_path / "out"))
    assert torch.equal(stock_logits(made), bunny.logits(BEFORE, pixels(), AFTER))


def test_a_clip_tower_gives_its_patches_only(tmp_path: Path) -> None:
    bunny = Bunny(tmp_path, "bunny-qwen")
    bunny.tower_path = save_tower(tmp_path / "clip", "clip_vision_model")
    bunny.tower = transformers.CLIPVisionModel.from_pretrained(bunny.tower_path).eval()
    made = ask(bunny, bunny.save(tmp_path / "bunny"), tmp_path / "out")
    assert torch.equal(stock_logits(made), bunny.logits(BEFORE, pixels(), AFTER))


def test_a_repository_without_a_tokenizer_is_named(qwen: Bunny, tmp_path: Path) -> None:
    folder = qwen.save(tmp_path / "bunny")
    for one in folder.glob("token*"):
        one.unlink()
    with pytest.raises(UserError, match=f"^{folder} has no tokenizer"):
        ask(qwen, folder, tmp_path / "out", base=None)


@pytest.mark.parametrize("ratio", ["pad", "square"])
def test_images_are_padded_and_answers_ended_as_in_bunny(ratio: str, tmp_path: Path) -> None:
    bunny = Bunny(tmp_path, "bunny-llama")
    folder = bunny.save(tmp_path / "bunny")
    bunny.save_config(folder, image_aspect_ratio=ratio)
    tokenizer_for(1, "<|end_of_text|>").save_pretrained(folder)
    made = ask(bunny, folder, tmp_path / "out")
    processor = transformers.AutoProcessor.from_pretrained(made.path)
    assert processor.image_processor.do_pad is (ratio == "pad")
    turns = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]
    text = processor.tokenizer.apply_chat_template(turns, tokenize=False)
    assert text.endswith("USER: Q ASSISTANT: A<|end_of_text|>")
    assert loaded(made.path).generation_config.eos_token_id == [256, 257]


@pytest.mark.parametrize("tied", [False, True])
def test_a_vocabulary_cut_to_the_tokenizer_gets_a_row_for_images(
    tied: bool, tmp_path: Path
) -> None:
    bunny = Bunny(tmp_path, "bunny-qwen", vocab_size=257, tie_word_embeddings=tied)
    folder = bunny.save(tmp_path / "bunny")
    made = ask(bunny, folder, tmp_path / "out")
    assert (made.added_rows, made.image_token_id) == (64, 257)
    found = stock_logits(made)
    assert found.shape[-1] == 257 + 64
    expected = bunny.logits(BEFORE, pixels(), AFTER)
    torch.testing.assert_close(found[..., :257], expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("use_s2", True, "v1.0 checkpoint"),
        ("mm_vision_tower", "/weights/EVA02-CLIP-L-14-336", "SigLIP variant"),
        ("mm_projector_type", "linear", "mlp2x_gelu"),
        ("model_type", "llava", "bunny-phi, bunny-phi3"),
    ],
)
def test_what_llava_cannot_say_is_refused_with_what_to_use(
    field: str, value: Any, words: str, qwen: Bunny, tmp_path: Path
) -> None:
    folder = qwen.save_config(tmp_path / "bunny", **{field: value})
    with pytest.raises(UserError, match=words):
        ask(qwen, folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_foreign_and_missing_tensors_are_named(qwen: Bunny, tmp_path: Path) -> None:
    folder = qwen.save(tmp_path / "bunny", extra="model.image_newline")
    with pytest.raises(UserError, match=r"no place for: model\.image_newline\."):
        ask(qwen, folder, tmp_path / "out")
    folder = qwen.save(tmp_path / "bunny")
    qwen.save_config(folder, num_hidden_layers=3)
    with pytest.raises(UserError, match=r"layers\.2\.mlp"):
        ask(qwen, folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


class Surprise:
    """Anything that is no tensor."""


def test_pickles_of_more_than_tensors_are_not_loaded(qwen: Bunny, tmp_path: Path) -> None:
    folder = qwen.save_config(tmp_path / "stage1")
    torch.save({"model.mm_projector.0.weight": Surprise()}, folder / "mm_projector.bin")
    with pytest.raises(UserError, match="more than tensors"):
        ask(qwen, folder, tmp_path / "out")


def test_other_kinds_of_adapters_are_refused(tmp_path: Path) -> None:
    bunny = Bunny(tmp_path, "bunny-qwen")
    folder, _ = adapted(bunny, tmp_path / "lora", use_dora=True)
    with pytest.raises(UserError, match="use_dora"):
        ask(bunny, folder, tmp_path / "out")


def test_an_adapter_of_another_model_is_refused(tmp_path: Path) -> None:
    bunny = Bunny(tmp_path, "bunny-qwen")
    folder, _ = adapted(bunny, tmp_path / "lora")
    other = save_language_model(tmp_path / "other", "qwen2", intermediate_size=40)
    with pytest.raises(UserError, match=r"layers\.1\.mlp\.up_proj\.weight"):
        ask(bunny, folder, tmp_path / "out", base=str(other))
