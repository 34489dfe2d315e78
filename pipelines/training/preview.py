"""What a stage will train on, told before it does: its plan, its tokens, and labels in colour."""

from __future__ import annotations

from manifests import paths, store
from manifests.errors import UserError
from pipelines.training.layout import data_directories, given_directory, tokens_per_image
from pipelines.training.recipe import TrainedStage, TrainingRecipe
from pipelines.training.run import Say, run_training

PREVIEWS_PER_SOURCE = 3


def preview_text(
    recipe: TrainingRecipe, out: str, name: str, *, say: Say, colour: bool = False
) -> str:
    """Return a report of a stage's data; the model is composed first, unless that is done.

    Args: name: pretrain or finetune. colour: whether trained text is green, else in brackets.
    Raises: UserError.
    """
    stage = _stage_named(recipe, name)
    if recipe.model.llava:
        base = given_directory(recipe.model)
    else:
        base = run_training(recipe, out, until="compose", say=say)["compose"]
    return _report(stage, base, paths.absolute(out), colour)


def _report(stage: TrainedStage, model_dir: str, out: str, colour: bool) -> str:
    from train.data.planning import PlannedRows
    from train.data.samples import RowMaker
    from train.learn.preflight import PlanSeen, Preflight, look_at_rows
    from train.learn.preflight_text import lines_of

    config = stage.config(tokens_per_image(model_dir))
    image_id = store.read_json(paths.join(model_dir, "config.json"))["image_token_index"]
    make_row = RowMaker.load(model_dir, config, image_token_id=image_id)
    rows = PlannedRows.read(data_directories(stage), stage.subset, make_row, config, out)
    plan = rows.plan(config, epoch=0, world_size=1)
    sources = look_at_rows(
        rows.index, plan.rows, make_row, previews_per_source=PREVIEWS_PER_SOURCE, colour=colour
    )
    return "\n".join(lines_of(Preflight(sources, PlanSeen.of(plan)), colour=colour))


def _stage_named(recipe: TrainingRecipe, name: str) -> TrainedStage:
    for stage in recipe.trained:
        if stage.name == name:
            return stage
    raise UserError(
        f"The recipe does not train {name!r}.",
        f"It trains {', '.join(stage.name for stage in recipe.trained)}.",
        "Name one of them with --stage.",
    )
