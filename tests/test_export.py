"""An exported model is the trained one, and plain transformers and peft load it."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from small_llava import NUM_PATCHES, SIDE
from small_runs import tiny_config, tiny_llava, tiny_mix, train_here
from transformers import AutoProcessor, AutoTokenizer, LlavaForConditionalGeneration

from manifests.errors import UserError
from train.data.index import Index
from train.learn.checkpoint import TRAINED
from train.learn.model import TrainedLlava
from train.models.checkpoint_keys import published_key
from train.models.export import Exported, export
from train.models.same_logits import check_same_logits, expected_logits
from train.models.tensor_files import read_tensors


class World(NamedTuple):
    """A base, its data, a pretraining, and the finetuning that began with its projector."""

    base: str
    data: str
    pretrain: Path
    finetune: Path
    model: TrainedLlava


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    folder = tmp_path_factory.mktemp("world")
    base, data = tiny_llava(folder), tiny_mix(folder)
    first, second = folder / "pretrain", folder / "finetune"
    train_here(tiny_config("projector"), base, data, first)
    config = tiny_config("adapter", {"max_length": 225}, image_mode="pad")
    model = train_here(config, base, data, second, projector=str(first))
    return World(base, data, first, second, model)


@pytest.fixture(scope="module")
def whole(world: World, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """The finetuned model in float32, in several files."""
    out = tmp_path_factory.mktemp("whole") / "model"
    return export(str(world.finetune), str(out), dtype="float32", shard_bytes=20_000)


def batch(image_id: int = 257) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(3)
    ids = torch.tensor([[72, *[image_id] * NUM_PATCHES, 73, 74, 75]])
    pixels = torch.randn(1, 3, SIDE, SIDE, generator=generator)
    return {"input_ids": ids, "pixel_values": pixels}


@torch.no_grad()
def logits_of(model: Any) -> torch.Tensor:
    found: torch.Tensor = model.eval()(**batch(), use_cache=False).logits.float()
    return found


def loaded(path: str, **more: Any) -> Any:
    model, info = LlavaForConditionalGeneration.from_pretrained(
        path, output_loading_info=True, **more
    )
    assert not any(info[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model


def tensors_of(path: str) -> dict[str, torch.Tensor]:
    return {one.name: one.read() for one in read_tensors(Path(path))}


def copy_of(run: Path, out: Path, changes: dict[str, torch.Tensor]) -> str:
    """Copy a run's folder with some other trained tensors."""
    shutil.copytree(run, out)
    save_file(load_file(run / TRAINED) | changes, out / TRAINED)
    return str(out)


def test_plain_transformers_loads_the_trained_model(world: World, whole: Exported) -> None:
    torch.testing.assert_close(
        logits_of(loaded(whole.path)), logits_of(world.model.llava), atol=1e-5, rtol=1e-5
    )
    assert whole.check.agreement == 1
    assert whole.check.rounding < 1e-5 * whole.check.largest
    assert whole.check.difference < 1e-5 * whole.check.largest
    assert len(list(Path(whole.path).glob("model-*.safetensors"))) > 1


def test_a_clip_and_a_phi_with_layers_of_the_same_names_too(world: World, tmp_path: Path) -> None:
    base = tiny_llava(tmp_path, "clip_vision_model", "phi")
    model = train_here(tiny_config("adapter"), base, world.data, tmp_path / "run")
    made = export(str(tmp_path / "run"), str(tmp_path / "out"), dtype="float32")
    torch.testing.assert_close(
        logits_of(loaded(made.path)), logits_of(model.llava), atol=1e-5, rtol=1e-5
    )


def test_names_are_the_published_ones_and_only_the_trained_weights_differ(
    world: World, whole: Exported
) -> None:
    before, after = tensors_of(world.base), tensors_of(whole.path)
    assert list(after) == list(before)
    assert {re.match(r"(language_model\.(model|lm_head)|[a-z_]+)\.", one)[1] for one in after} == {
        *("language_model.model", "language_model.lm_head"),
        *("vision_tower", "multi_modal_projector"),
    }
    changed = {name for name, one in after.items() if not torch.equal(one, before[name])}
    trained = (
        re.sub(r"\.lora_[AB]\.default", "", one) for one in load_file(world.finetune / TRAINED)
    )
    assert changed == {published_key(one) for one in trained}


# PEFT asks for it by its old name.
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")
def test_answers_of_adapter_and_merged_model_are_the_same(world: World, whole: Exported) -> None:
    from peft import PeftModel  # after small_llava has made torchvision importable

    assert whole.adapter is not None
    adapted = loaded(world.base, dtype=torch.float32)
    adapted.load_state_dict(load_file(Path(whole.adapter) / "projector.safetensors"), strict=False)
    adapted = PeftModel.from_pretrained(adapted, whole.adapter)
    merged = loaded(whole.path)
    asked = batch() | {"max_new_tokens": 12, "do_sample": False}
    answers = [one.eval().generate(**asked).tolist() for one in (adapted, merged)]
    assert answers[0] == answers[1]
    assert len(answers[0][0]) > len(batch()["input_ids"][0])


def test_the_adapter_has_nothing_that_vllm_refuses(world: World, whole: Exported) -> None:
    folder = Path(str(whole.adapter))
    config = json.loads((folder / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (2, 6)
    assert config["base_model_name_or_path"] == world.base
    assert (config["modules_to_save"], config["use_dora"], config["bias"]) == (None, False, "none")
    told = json.loads((folder / "base.json").read_text())
    done = json.loads((world.finetune / "done.json").read_text())
    assert told["hash"] == done["identity"]["base"]
    layer = r"base_model\.model\.model\.language_model\.layers\.\d+\.[a-z_.]+\.lora_[AB]\.weight"
    assert all(
        re.fullmatch(layer, name) for name in load_file(folder / "adapter_model.safetensors")
    )


def test_noise_is_what_rounding_did_by_what_training_did(world: World, tmp_path: Path) -> None:
    found = {}
    for dtype in ("float16", "bfloat16"):
        made = export(str(world.finetune), str(tmp_path / dtype), dtype=dtype)
        tensors = tensors_of(made.path)
        assert {one.dtype for one in tensors.values()} == {getattr(torch, dtype)}
        assert json.loads((tmp_path / dtype / "config.json").read_text())["dtype"] == dtype
        assert made.check.rounding > 0
        assert made.check.difference == pytest.approx(made.check.rounding, rel=0.1)
        found[dtype] = json.loads((tmp_path / dtype / "noise.json").read_text())
        noise = found[dtype]["rounding_by_change"]
        assert list(made.noise.values()) == sorted(noise.values(), reverse=True)[:5]
    name = "language_model.model.layers.1.mlp.up_proj"
    run = load_file(world.finetune / TRAINED)
    stem = "model.language_model.layers.1.mlp.up_proj"
    a, b = (run[f"{stem}.lora_{one}.default.weight"].double() for one in "AB")
    change = 3 * b @ a  # alpha 6, rank 2
    written = tensors_of(str(tmp_path / "bfloat16"))[f"{name}.weight"].double()
    rounding = written - (tensors_of(world.base)[f"{name}.weight"].double() + change)
    expected = float(rounding.norm() / change.norm())
    noise = found["bfloat16"]["rounding_by_change"]
    assert noise[f"{name}.weight"] == pytest.approx(expected, rel=1e-4)
    assert noise[f"{name}.weight"] > 4 * found["float16"]["rounding_by_change"][f"{name}.weight"]
    assert "multi_modal_projector.linear_1.weight" in noise


def test_a_pretrained_projector_is_exported_without_an_adapter(
    world: World, tmp_path: Path
) -> None:
    names = ["google/siglip", "Qwen/Qwen2"]
    made = export(str(world.pretrain), str(tmp_path / "out"), dtype="keep", base_models=names)
    front = Path(made.path, "README.md").read_text().split("---")[1]
    assert front.endswith("base_model:\n- google/siglip\n- Qwen/Qwen2\n")
    assert made.adapter is None
    assert not (tmp_path / "out" / "adapter").exists()
    before, after = tensors_of(world.base), tensors_of(made.path)
    trained = {published_key(n): one for n, one in load_file(world.pretrain / TRAINED).items()}
    assert len(trained) == 4
    expected = before | trained
    assert all(torch.equal(one, expected[name]) for name, one in after.items())
    processor = AutoProcessor.from_pretrained(made.path)
    assert processor.image_processor.do_pad is False  # as it was trained


def test_whole_tensors_that_trained_replace_the_bases(world: World, tmp_path: Path) -> None:
    names = {
        "model.vision_tower.encoder.layers.0.mlp.fc1.weight": "vision_tower.vision_model.encoder"
        ".layers.0.mlp.fc1.weight",
        "model.language_model.norm.weight": "language_model.model.norm.weight",
        "lm_head.weight": "language_model.lm_head.weight",
    }
    in_model = dict(world.model.llava.named_parameters())
    changes = {name: in_model[name].detach() + 0.25 for name in names}
    run = copy_of(world.finetune, tmp_path / "run", changes)
    made = export(run, str(tmp_path / "out"), dtype="float32")
    after = tensors_of(made.path)
    assert all(torch.equal(after[names[name]], one) for name, one in changes.items())
    beside = load_file(Path(str(made.adapter)) / "whole.safetensors")
    assert set(beside) == set(names)
    foreign = copy_of(world.finetune, tmp_path / "foreign", {"model.other.weight": torch.ones(2)})
    with pytest.raises(UserError, match=r"lacks tensors that were trained.*other\.weight"):
        export(foreign, str(tmp_path / "no"))


def test_another_base_of_the_same_shape_is_refused_and_a_moved_one_is_not(
    world: World, tmp_path: Path
) -> None:
    other = tiny_llava(tmp_path, seed=5)
    with pytest.raises(UserError, match="is not the model that"):
        export(str(world.finetune), str(tmp_path / "out"), base=other)
    with pytest.raises(UserError, match="holds no model"):
        export(str(world.finetune), str(tmp_path / "out"), base=str(tmp_path / "gone"))
    assert not (tmp_path / "out").exists()
    moved = shutil.copytree(world.base, tmp_path / "moved")
    made = export(str(world.pretrain), str(tmp_path / "out"), base=str(moved))
    assert made.dtype == "float16"


def test_unfinished_runs_and_finished_directories_are_refused(
    world: World, whole: Exported, tmp_path: Path
) -> None:
    run = shutil.copytree(world.finetune, tmp_path / "run")
    (run / "done.json").unlink()
    with pytest.raises(UserError, match="has no done.json"):
        export(str(run), str(tmp_path / "out"))
    with pytest.raises(UserError, match="is there already"):
        export(str(world.finetune), whole.path)


def test_what_float16_cannot_hold_is_named_and_nothing_is_finished(
    world: World, tmp_path: Path
) -> None:
    bias = "multi_modal_projector.linear_2.bias"
    run = copy_of(world.finetune, tmp_path / "run", {f"model.{bias}": torch.full((32,), 1e5)})
    with pytest.raises(UserError, match=f"{bias} does not fit torch.float16"):
        export(run, str(tmp_path / "out"))
    assert not (tmp_path / "out" / "config.json").exists()
    made = export(run, str(tmp_path / "out"), dtype="bfloat16")  # into the unfinished one
    assert tensors_of(made.path)[bias][0] == 1e5 // 512 * 512


def test_the_check_meets_wrong_and_missing_weights(
    world: World, whole: Exported, tmp_path: Path
) -> None:
    tensors = tensors_of(whole.path)
    dtypes = {name: one.dtype for name, one in tensors.items()}
    expected = expected_logits(
        world.base, world.finetune / TRAINED, Path(str(whole.adapter)), dtypes
    )
    config = loaded(whole.path).config
    name = "language_model.model.layers.0.mlp.down_proj.weight"
    tensors[name] = tensors_of(world.base)[name]  # its adapter was forgotten
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    shutil.copy(Path(whole.path, "generation_config.json"), tmp_path)
    with pytest.raises(UserError, match="differ from the trained model's"):
        check_same_logits(tmp_path, config, expected)
    del tensors[name]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"do not fit.*down_proj"):
        check_same_logits(tmp_path, config, expected)


def test_templates_end_and_pictures_are_padded_as_in_training(
    world: World, whole: Exported, tmp_path: Path
) -> None:
    assert AutoProcessor.from_pretrained(whole.path).image_processor.do_pad is True
    base = shutil.copytree(world.base, tmp_path / "base")
    (base / "chat_template.jinja").write_text("{{ 'another one' }}")
    made = export(str(world.pretrain), str(tmp_path / "out"), base=str(base))
    turns = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]
    text = AutoTokenizer.from_pretrained(made.path).apply_chat_template(turns, tokenize=False)
    assert text.endswith("USER: Q ASSISTANT: A<|endoftext|>")


def test_the_model_tells_what_it_was_made_of(world: World, whole: Exported) -> None:
    told = json.loads(Path(whole.path, "training.json").read_text())
    assert [one["role"] for one in told["runs"]] == ["pretrain", "finetune"]
    done = json.loads((world.finetune / "done.json").read_text())
    finetune = told["runs"][1]
    assert finetune["identity"] == done["identity"]
    assert finetune["inputs"]["data_dirs"] == [world.data]
    assert finetune["inputs"]["projector"] == str(world.pretrain)
    assert finetune["config"]["lora"]["alpha"] == 6
    log = [json.loads(one) for one in (world.finetune / "log.jsonl").read_text().splitlines()]
    assert (finetune["steps"], finetune["final_loss"]) == (len(log), log[-1]["loss"])
    assert finetune["doubts"] == []
    counted = finetune["sources"].values()
    drawn, dropped, refused = (
        sum(one[name] for one in counted) for name in ("drawn", "dropped", "refused")
    )
    assert drawn + refused == len(Index.load([world.data]))
    assert dropped == finetune["dropped"] == sum(finetune["dropped_reasons"].values())
    assert dropped + refused == 1  # one is too long
    assert finetune["rows"] == drawn - dropped
    assert {"warren", "torch", "transformers", "peft"} <= told["versions"].keys()
    assert told["base"]["hash"] == done["identity"]["base"]


def test_the_card_names_the_data_and_its_code_runs(
    world: World, whole: Exported, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = Path(whole.path, "README.md").read_text()
    record = json.loads(Path(world.data, "record.json").read_text())
    assert text.count(record["fingerprint"]) == 2  # of both runs
    assert "library_name: transformers\npipeline_tag: image-text-to-text\n" in text
    found = re.search(r"```python\n(.*?)```", text, re.DOTALL)
    assert found is not None
    monkeypatch.chdir(Path(whole.path).parent)
    picture = Image.new("RGB", (9, 6), "red")
    said: list[str] = []
    exec(found[1], {"image": picture, "print": said.append})  # noqa: S102 - it is our own
    assert "What is this? ASSISTANT:" in said[0]
