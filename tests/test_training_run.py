"""`warren train` from two halves and shards to a model, stage by stage, by its command line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file
from small_llava import PATCH, save_eva, save_tower
from small_training import directories, make_world, warren
from transformers import AutoProcessor, LlavaForConditionalGeneration

from train.models.origin import files_hash


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_world(tmp_path_factory.mktemp("training"))


@pytest.fixture(scope="module")
def run(world: Path) -> Path:
    """The folder of a whole training run."""
    done = warren("train", world / "recipe.yaml", "--out", world / "run")
    assert done.exit_code == 0, done.output
    return world / "run"


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
    for stage in ("pretrain", "finetune"):
        assert f"  {directories(run)[stage].name}: trained on in epoch 0, step" in story.output
    assert story.output.count(f"{key} (uid") == 1
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


def test_plan_tells_what_a_training_run_would_use_again(world: Path, run: Path) -> None:
    def states(*words: object) -> list[tuple[str, str]]:
        found = warren("plan", *words, "--json")
        assert found.exit_code == 0, found.output
        return [(row["state"], row["directory"]) for row in json.loads(found.output)]

    recipe = world / "recipe.yaml"
    names = [path.name for path in directories(run).values()]
    assert states(recipe, "--out", run) == [("finished", name) for name in names]
    changed = states(recipe, "--out", run, "--set", "finetune.seed=9")
    assert changed[:2] == [("finished", name) for name in names[:2]]
    assert [state for state, _ in changed[2:]] == ["new", "new"]
    assert changed[2][1] != names[2]
    assert states(recipe) == [("new", "")] * 4
    assert states(recipe, "--set", "model.vision_tower=no/such", "--out", run) == [("new", "")] * 4


def test_what_a_later_stage_lacks_is_told_before_an_earlier_one_trains(
    world: Path, tmp_path: Path
) -> None:
    told = {
        f"finetune.data=[{tmp_path}]": "holds no finished shards",
        f"finetune.subset={tmp_path}/none.parquet": "none.parquet is not there",
        "finetune.template=phi9": "finetune.template is 'phi9'",
    }
    for change, what in told.items():
        refused = warren("train", world / "recipe.yaml", "--out", tmp_path / "run", "--set", change)
        assert (refused.exit_code, what in refused.output) == (2, True), refused.output
    assert "compose" not in {path.name.partition("-")[0] for path in tmp_path.glob("run/*")}


def test_a_recipe_of_the_other_kind_names_its_command(world: Path, tmp_path: Path) -> None:
    curation = tmp_path / "curation.yaml"
    curation.write_text("source: {kind: tars}")
    swapped = {"train": curation, "run": world / "recipe.yaml"}
    other = {"train": "warren run", "run": "warren train"}
    for command, recipe in swapped.items():
        refused = warren(command, recipe, "--out", tmp_path / "out")
        assert refused.exit_code == 2
        assert f"`{other[command]}`" in refused.output


def test_an_earlier_stage_is_not_exported_in_place_of_an_unfinished_one(
    run: Path, tmp_path: Path
) -> None:
    copied = tmp_path / "run"
    shutil.copytree(run, copied)
    for name in ("record.json", "done.json"):
        (directories(copied)["finetune"] / name).unlink()
    planned = json.loads((copied / "latest.json").read_text())["stages"]
    latest = {"stages": planned[:2], "planned": planned[:3]}
    (copied / "latest.json").write_text(json.dumps(latest))
    refused = warren("export", copied, "--out", tmp_path / "out")
    assert refused.exit_code == 2
    assert "finetune of" in refused.output
    rows = json.loads(warren("status", copied, "--json").output)
    assert [row["state"] for row in rows] == ["finished", "finished", "unfinished", "new"]
    named = warren("export", directories(copied)["pretrain"], "--out", tmp_path / "out")
    assert named.exit_code == 0, named.output


def test_the_status_of_a_model_is_none(run: Path) -> None:
    refused = warren("status", directories(run)["export"])
    assert refused.exit_code == 2
    assert "is a finished model" in refused.output


def test_an_exported_model_is_finetuned_further(world: Path, run: Path, tmp_path: Path) -> None:
    values = yaml.safe_load((world / "recipe.yaml").read_text())
    values.pop("pretrain")
    values["model"] = {"llava": str(directories(run)["export"])}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(values))
    shown = warren("preview", tmp_path / "recipe.yaml", "--out", tmp_path / "run")
    assert shown.exit_code == 0, shown.output
    assert not list((tmp_path / "run").glob("compose-*"))
    done = warren("train", tmp_path / "recipe.yaml", "--out", tmp_path / "run")
    assert done.exit_code == 0, done.output
    assert list(directories(tmp_path / "run")) == ["finetune", "export"]
    story = json.loads(warren("why", tmp_path / "run", "000000000", "--json").output)
    assert [one["run"] for one in story] == ["pretrain", "finetune", "finetune"]
    values["model"] = {"llava": str(world / "lm")}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(values))
    refused = warren("train", tmp_path / "recipe.yaml", "--out", tmp_path / "run")
    assert refused.exit_code == 2
    assert "holds no LLaVA model" in refused.output


def test_a_model_of_an_eva_tower_is_exported_averaged_and_answers(
    world: Path, tmp_path: Path
) -> None:
    change = ["--set", f"model.vision_tower={save_eva(tmp_path / 'eva')}"]
    change += ["--set", "finetune.tower_lr=0.001"]
    done = warren("train", world / "recipe.yaml", "--out", tmp_path / "run", *change)
    assert done.exit_code == 0, done.output
    model = directories(tmp_path / "run")["export"]
    composed = load_file(directories(tmp_path / "run")["compose"] / "model.safetensors")
    written = load_file(model / "model.safetensors")
    assert written.keys() == composed.keys()
    block = "vision_tower.encoder.layers.0.mlp.fc2.weight"
    assert bool((written[block] != composed[block]).any())
    card = (model / "README.md").read_text()
    assert "register_eva()" in card
    assert "no code of its own" not in card
    parts = [model, model, "--shares", "0.5,0.5"]
    shutil.copytree(model, tmp_path / "other")
    parts[1] = tmp_path / "other"
    assert warren("average", *parts, "--out", tmp_path / "mean").exit_code == 0
    assert "register_eva()" in (tmp_path / "mean" / "README.md").read_text()
    said = warren("chat", tmp_path / "mean", "--max-tokens", 3, typed="What is it?\n")
    assert said.exit_code == 0, said.output


def test_a_models_hash_is_that_of_all_files_it_is_read_from(tmp_path: Path) -> None:
    tower = save_tower(tmp_path / "tower")
    before = files_hash(str(tower))
    (tower / "pytorch_model.bin").write_bytes(b"not read beside safetensors")
    (tower / "README.md").write_text("neither is this")
    assert files_hash(str(tower)) == before
    (tower / "tokenizer.json").write_text("{}")
    after = files_hash(str(tower))
    assert after != before
    (tower / "model.safetensors").unlink()
    pickled = files_hash(str(tower))
    (tower / "pytorch_model.bin").write_bytes(b"other weights")
    assert len({before, after, pickled, files_hash(str(tower))}) == 4
