"""`warren train` from two halves and shards to a model, stage by stage, by its command line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner, Result
from safetensors.torch import load_file
from small_inputs import run_here
from small_llava import PATCH, save_language_model, save_tower
from small_mixes import mix_recipe
from transformers import AutoProcessor, LlavaForConditionalGeneration

from pipelines.cli import main

TRAINED = {
    "template": "bunny",
    "projector_lr": 1e-2,
    "plan": {"global_batch_size": 16, "tokens_per_micro_batch": 600, "max_length": 250},
}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of a tower, a language model, a finished mix and a training recipe."""
    folder = tmp_path_factory.mktemp("training")
    save_tower(folder / "tower")
    save_language_model(folder / "lm", "qwen2")
    run_here(mix_recipe(folder / "in", num_rows=9), folder / "mix")
    recipe = {
        "model": {"vision_tower": str(folder / "tower"), "language_model": str(folder / "lm")},
        "pretrain": TRAINED | {"data": [str(folder / "mix")]},
        "finetune": TRAINED
        | {"data": [str(folder / "mix")], "adapter_lr": 1e-2, "lora": {"rank": 2, "alpha": 4}},
        "export": {"dtype": "float32"},
        "launch": {"data_workers": 0, "ranks": 1},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return folder


@pytest.fixture(scope="module")
def run(world: Path) -> Path:
    """The folder of a whole training run."""
    done = warren("train", world / "recipe.yaml", "--out", world / "run")
    assert done.exit_code == 0, done.output
    return world / "run"


def warren(*words: Any) -> Result:
    return CliRunner().invoke(main, list(map(str, words)))


def directories(run: Path) -> dict[str, Path]:
    names = json.loads((run / "latest.json").read_text())["stages"]
    return {name.rpartition("-")[0]: run / name for name in names}


def test_every_stage_leaves_a_record_and_plain_transformers_loads_the_model(run: Path) -> None:
    found = directories(run)
    assert list(found) == ["compose", "pretrain", "finetune", "export"]
    for name, path in found.items():
        record = json.loads((path / "record.json").read_text())
        assert (record["stage"], path.name) == (name, f"{name}-{record['fingerprint'][:8]}")
    model = LlavaForConditionalGeneration.from_pretrained(found["export"])
    assert AutoProcessor.from_pretrained(found["export"]).patch_size == PATCH
    trained = load_file(found["finetune"] / "trained.safetensors")
    projector = model.model.multi_modal_projector.linear_1.weight
    assert bool((projector == trained["model.multi_modal_projector.linear_1.weight"]).all())


def test_finetuning_goes_on_with_the_pretrained_projector(run: Path) -> None:
    inputs = json.loads((directories(run)["finetune"] / "inputs.json").read_text())
    assert inputs["projector"] == str(directories(run)["pretrain"])
    assert inputs["model_dir"] == str(directories(run)["compose"])


def test_a_finished_run_is_used_again_and_a_change_shares_what_comes_before(
    world: Path, run: Path
) -> None:
    before = directories(run)
    again = warren("train", world / "recipe.yaml", "--out", run)
    assert again.output.count("is finished, used again") == 4
    other = ["--set", "finetune.adapter_lr=0.005", "--to", "finetune"]
    assert warren("train", world / "recipe.yaml", "--out", run, *other).exit_code == 0
    after = directories(run)
    assert (after["compose"], after["pretrain"]) == (before["compose"], before["pretrain"])
    assert after["finetune"] != before["finetune"]
    assert (before["export"] / "record.json").exists()
    back = warren("train", world / "recipe.yaml", "--out", run)
    assert back.exit_code == 0
    assert directories(run) == before


def test_an_unfinished_run_of_other_settings_is_not_left_behind_unasked(
    world: Path, run: Path, tmp_path: Path
) -> None:
    copied = tmp_path / "run"
    shutil.copytree(run, copied)
    (directories(copied)["finetune"] / "record.json").unlink()
    (directories(copied)["finetune"] / "done.json").unlink()
    change = ["--set", "finetune.adapter_lr=0.003", "--to", "finetune"]
    refused = warren("train", world / "recipe.yaml", "--out", copied, *change)
    assert refused.exit_code == 2
    assert "adapter_lr: 0.01, now 0.003" in refused.output
    change += ["--set", "launch.beside_unfinished=true"]
    assert warren("train", world / "recipe.yaml", "--out", copied, *change).exit_code == 0


def test_a_run_stopped_before_its_record_is_only_recorded(
    world: Path, run: Path, tmp_path: Path
) -> None:
    copied = tmp_path / "run"
    shutil.copytree(run, copied)
    for path in directories(copied).values():
        (path / "record.json").unlink()
    assert warren("train", world / "recipe.yaml", "--out", copied).exit_code == 0
    assert all((path / "record.json").exists() for path in directories(copied).values())


def test_status_why_and_preview_answer(world: Path, run: Path) -> None:
    rows = json.loads(warren("status", run, "--json").output)
    assert [row["state"] for row in rows] == ["finished"] * 4
    assert [row["steps_done"] is not None for row in rows] == [False, True, True, False]
    key = json.loads((directories_of_mix(world) / "mix.json").read_text())[0]["id"]
    story = warren("why", directories(run)["export"], "000000000")
    assert story.exit_code == 0, story.output
    assert "pretrain: 000000000" in story.output
    assert "finetune: 000000000" in story.output
    assert "trained on" in story.output
    assert key in story.output
    shown = warren("preview", world / "recipe.yaml", "--out", run)
    assert shown.exit_code == 0, shown.output
    assert "ASSISTANT:" in shown.output


def directories_of_mix(world: Path) -> Path:
    (name,) = [
        n for n in json.loads((world / "mix" / "latest.json").read_text())["stages"] if "mix" in n
    ]
    return world / "mix" / name


def test_an_export_of_another_dtype_and_an_average(run: Path, tmp_path: Path) -> None:
    half = warren("export", run, "--out", tmp_path / "half", "--dtype", "float16")
    assert half.exit_code == 0, half.output
    assert "rounding" in half.output
    shares = ["--shares", "0.25,0.75", "--out", tmp_path / "mean"]
    models = [directories(run)["export"], tmp_path / "half"]
    assert warren("average", *models, *shares).exit_code == 0
    wrong = warren("average", *models, "--shares", "1", "--out", tmp_path / "wrong")
    assert wrong.exit_code == 2
    assert "does not fit 2 models" in wrong.output


def test_data_that_holds_no_shards_is_refused(world: Path, tmp_path: Path) -> None:
    no_data = ["--set", f"pretrain.data=[{tmp_path}]"]
    refused = warren("train", world / "recipe.yaml", "--out", tmp_path / "run", *no_data)
    assert refused.exit_code == 2
    assert "holds no finished shards" in refused.output
