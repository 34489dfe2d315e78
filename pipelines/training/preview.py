"""What a stage will train on, told before it does: its plan, its tokens, and labels in colour."""

from __future__ import annotations

from typing import Any

from manifests.errors import UserError
from pipelines.training.layout import data_directories
from pipelines.training.recipe import TrainedStage, TrainingRecipe
from pipelines.training.run import Say, run_training, tokens_per_image


def preview_text(recipe: TrainingRecipe, out: str, name: str, *, say: Say) -> str:
    """Return a report of a stage's data; the model is composed first, unless that is done.

    Args: name: pretrain or finetune. Raises: UserError.
    """
    stage = _stage_named(recipe, name)
    base = recipe.model.llava
    if base is None:
        base = run_training(recipe, out, until="compose", say=say)["compose"]
    return _report(stage, base)


def _report(stage: TrainedStage, model_dir: str) -> str:
    from train.learn.preflight import look

    config: Any = stage.config(tokens_per_image(model_dir))
    return look(config, model_dir, data_directories(stage), subset=stage.subset)


def _stage_named(recipe: TrainingRecipe, name: str) -> TrainedStage:
    for stage in recipe.trained:
        if stage.name == name:
            return stage
    raise UserError(
        f"The recipe does not train {name!r}.",
        f"It trains {', '.join(stage.name for stage in recipe.trained)}.",
        "Name one of them with --stage.",
    )
