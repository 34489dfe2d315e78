"""Training recipes: the packaged ones are Bunny's, and what a recipe cannot mean is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from manifests.errors import UserError
from pipelines.training.recipe import load_training, parse_training

RECIPES = sorted((Path(__file__).parents[1] / "pipelines" / "recipes").glob("train_*.yaml"))
BUNNY = [path for path in RECIPES if "bunny" in path.name]
PRETRAIN = {"data": ["runs/pairs"], "template": "plain", "projector_lr": 1e-3}
FINETUNE = {"data": ["runs/mix"], "template": "bunny", "projector_lr": 1e-5}
MODEL = {"vision_tower": "models/tower", "language_model": "models/lm"}
VALUES: dict[str, Any] = {"model": MODEL, "pretrain": PRETRAIN, "finetune": FINETUNE}
# learning rate of stage 1; template, length and rates of stage 2:
# BAAI-DCAI/Bunny script/train/tutorials, the --learning_rate, --version, --model_max_length,
# --learning_rate and --mm_projector_lr of each
PUBLISHED = {
    "phi2_siglip": (5e-4, "bunny", 2048, 2e-4, 2e-5),
    "phi2_eva": (5e-5, "bunny", 2048, 2e-4, 2e-5),
    "phi15_siglip": (5e-4, "bunny", 2048, 2e-4, 2e-5),
    "phi15_eva": (1e-3, "bunny", 2048, 2e-4, 2e-5),
    "stablelm2_siglip": (5e-4, "bunny", 2048, 2e-4, 2e-5),
    "stablelm2_eva": (1e-3, "bunny", 2048, 2e-4, 2e-5),
    "qwen15_siglip": (5e-4, "bunny", 2048, 2e-4, 2e-5),
    "minicpm_siglip": (5e-4, "minicpm", 2048, 2e-4, 2e-5),
    "phi3_siglip": (1e-3, "phi3", 4096, 2e-4, 2e-5),
    "phi3_siglip_recipe2": (1e-3, "phi3", 4096, 2e-4, 2e-5),
    "llama3_siglip": (1e-3, "llama", 2048, 2e-4, 2e-5),
    "llama3_siglip_recipe2": (1e-3, "llama", 2048, 1e-4, 1e-5),
}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_packaged_recipe_says_how_it_is_run_and_survives_being_saved(path: Path) -> None:
    recipe = load_training(str(path))
    assert parse_training(yaml.safe_load(yaml.safe_dump(recipe.as_mapping()))).as_mapping() == (
        recipe.as_mapping()
    )
    header = path.read_text().split("\nmodel", 1)[0]
    assert f"warren train pipelines/recipes/{path.name}" in header
    assert "hardware" in header
    assert "source" in header
    assert load_training(f"warren:recipes/{path.name}").as_mapping() == recipe.as_mapping()


@pytest.mark.parametrize("path", BUNNY, ids=lambda path: path.stem)
def test_bunnys_recipes_have_the_published_settings(path: Path) -> None:
    one, two = (stage.config() for stage in load_training(str(path)).trained)
    found = (
        *(one.projector_lr, two.template, two.plan.max_length),
        *(two.adapter_lr, two.projector_lr),
    )
    assert found == PUBLISHED[path.stem.removeprefix("train_bunny_")]
    assert (one.stage, one.template, one.image_mode) == ("projector", "plain", "square")
    assert (two.stage, two.image_mode) == ("adapter", "pad")
    assert (one.plan.global_batch_size, two.plan.global_batch_size) == (256, 128)
    assert one.plan.max_length == 2048
    assert (two.lora.rank, two.lora.alpha, two.lora.dropout) == (128, 256, 0.05)
    # --per_device_train_batch_size, and transformers' loss of those days
    assert (one.plan.rows_per_micro_batch, two.plan.rows_per_micro_batch) == (
        8,
        4 if "phi3" in path.stem else 8,
    )
    for both in (one, two):
        assert both.loss_normalisation == "micro_batch_mean"
        assert (both.warmup_share, both.weight_decay, both.epochs) == (0.03, 0.0, 1)
        assert (both.max_grad_norm, both.end_token, both.betas) == (None, False, (0.9, 0.999))


def test_every_published_combination_has_its_recipe() -> None:
    assert {path.stem.removeprefix("train_bunny_") for path in BUNNY} == set(PUBLISHED)


def test_stages_follow_from_the_sections() -> None:
    recipe = parse_training(VALUES)
    assert recipe.stages() == ["compose", "pretrain", "finetune", "export"]
    assert recipe.stages("pretrain") == ["compose", "pretrain"]
    given = parse_training({"model": {"llava": "models/bunny"}, "finetune": FINETUNE})
    assert given.stages() == ["finetune", "export"]
    with pytest.raises(UserError, match="no stage 'pretrain'"):
        given.stages("pretrain")


def test_tokens_per_image_are_the_models_unless_the_recipe_says_otherwise() -> None:
    one, two = parse_training(
        VALUES | {"finetune": FINETUNE | {"plan": {"tokens_per_image": 7}}}
    ).trained
    assert one.config(64).plan.tokens_per_image == 64
    assert two.config(64).plan.tokens_per_image == 7


REFUSED = [
    ({"modle": {}}, "recipe.modle is unknown"),
    ({"model": {}}, "recipe.model.vision_tower is missing"),
    ({"model": {"vision_tower": "a"}}, "recipe.model.language_model is missing"),
    ({"model": {**MODEL, "llava": "c"}}, "takes the place of the two"),
    ({"pretrain": {**PRETRAIN, "data": []}}, "recipe.pretrain.data is"),
    ({"pretrain": {**PRETRAIN, "data": "runs/mine"}}, "recipe.pretrain.data is 'runs/mine'"),
    ({"pretrain": {**PRETRAIN, "stage": "adapter"}}, "recipe.pretrain.stage is 'adapter'"),
    ({"finetune": {**FINETUNE, "adaptor_lr": 1}}, "recipe.finetune.adaptor_lr is unknown"),
    ({"finetune": None}, "recipe.finetune is no mapping"),
    ({"export": {"dtype": "int8"}}, "recipe.export.dtype is 'int8'"),
    ({"launch": {"ranks": 0}}, "recipe.launch.ranks is 0"),
]


@pytest.mark.parametrize(("change", "told"), REFUSED, ids=lambda one: str(one)[:40])
def test_what_a_recipe_cannot_mean_is_refused(change: dict[str, Any], told: str) -> None:
    with pytest.raises(UserError) as error:
        parse_training(VALUES | change)
    assert told in str(error.value)


def test_a_recipe_that_trains_nothing_is_refused() -> None:
    with pytest.raises(UserError, match="trains nothing"):
        parse_training({"model": MODEL})
