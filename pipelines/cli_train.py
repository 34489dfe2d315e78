"""Commands about models: compose, import, train, look before training, export, average."""

from __future__ import annotations

import sys

import click

from manifests.errors import StageFailed, UserError
from pipelines.cli_options import settings


@click.command()
@click.argument("recipe")
@click.option(
    "--out", required=True, metavar="DIR", help="Folder; finished stages in it are used again."
)
@click.option("--to", "until", metavar="STAGE", help="Stop after this stage.")
@settings
def train(recipe: str, out: str, until: str | None, overrides: tuple[str, ...]) -> None:
    """Compose, pretrain, finetune and export a model, or go on with that.

    Example: warren train pipelines/recipes/train_bunny_phi2_siglip.yaml --out runs/bunny-3b
    """
    _get_ready()
    from pipelines.training.launch import STOPPED
    from pipelines.training.recipe import load_training
    from pipelines.training.run import run_training

    try:
        made = run_training(load_training(recipe, overrides), out, until=until, say=_say)
    except KeyboardInterrupt as stop:
        raise StageFailed(STOPPED) from stop
    for stage, directory in made.items():
        click.echo(f"{stage:<9} {directory}")


@click.command()
@click.argument("run_dir", metavar="DIR")
@click.option("--out", required=True, metavar="MODEL", help="The model directory to write.")
@click.option("--dtype", default="float16", show_default=True, help="float32, bfloat16, keep.")
def export(run_dir: str, out: str, dtype: str) -> None:
    """Write the model that a finished run trained: adapters merged, in stock LLaVA format.

    Example: warren export runs/bunny-3b --out models/bunny-3b --dtype bfloat16
    """
    _get_ready()
    from pipelines.training.ask import finished_run
    from pipelines.training.show import exported_text
    from train.models.export import export as write

    click.echo(exported_text(write(finished_run(run_dir), out, dtype=dtype)))


@click.command()
@click.argument("models", nargs=-1, required=True, metavar="MODEL...")
@click.option("--shares", required=True, help="Of each model, e.g. 0.3,0.7; they sum to 1.")
@click.option("--out", required=True, metavar="MODEL", help="The model directory to write.")
def average(models: tuple[str, ...], shares: str, out: str) -> None:
    """Write the weighted mean of models of one shape, as Bunny's recipes r1 and r2 are mixed.

    Example: warren average models/recipe-1 models/recipe-2 --shares 0.3,0.7 --out models/bunny-4b
    """
    _get_ready()
    from train.models.averaging import average_of

    average_of(_shares(models, shares), out)
    click.echo(out)


@click.command()
@click.argument("recipe")
@click.option("--out", required=True, metavar="DIR", help="Folder of the training run.")
@click.option("--stage", default="finetune", show_default=True, help="pretrain or finetune.")
@settings
def preview(recipe: str, out: str, stage: str, overrides: tuple[str, ...]) -> None:
    """Show what a stage will train on: labels of a few rows, shares of tokens, the plan.

    The model is composed first, unless that is done.

    Example: warren preview pipelines/recipes/train_bunny_phi2_siglip.yaml --out runs/bunny-3b
    """
    _get_ready()
    from pipelines.training.preview import preview_text
    from pipelines.training.recipe import load_training

    colour = sys.stdout.isatty()
    recipe_read = load_training(recipe, overrides)
    click.echo(preview_text(recipe_read, out, stage, say=_say, colour=colour))


@click.command()
@click.argument("vision_tower")
@click.argument("language_model")
@click.option("--out", required=True, metavar="DIR", help="The LLaVA directory to write.")
@click.option("--image-token", metavar="TOKEN", help="Token of an image; default: a free one.")
@click.option("--resize", default=0, metavar="ROWS", help="Rows to add to a full vocabulary.")
@click.option("--seed", default=0, show_default=True, help="Of the projector's weights.")
def compose(
    vision_tower: str,
    language_model: str,
    out: str,
    image_token: str | None,
    resize: int,
    seed: int,
) -> None:
    """Compose a vision tower and a language model, both directories, into a LLaVA model.

    Example: warren compose models/siglip-so400m-patch14-384 models/phi-2 --out models/composed
    """
    _get_ready()
    from train.models.compose import compose as write
    from train.models.hub import local_directory

    made = write(
        local_directory(vision_tower),
        local_directory(language_model),
        out,
        image_token=image_token,
        resize_vocabulary=resize,
        seed=seed,
    )
    for warning in made.warnings:
        click.echo(f"warning: {warning}", err=True)
    told = f"{made.num_image_tokens} tokens an image, each {made.image_token!r}"
    click.echo(f"{made.path}: {told} (id {made.image_token_id})")


@click.command("import-bunny")
@click.argument("checkpoint")
@click.option("--out", required=True, metavar="DIR", help="The LLaVA directory to write.")
@click.option("--base", metavar="DIR", help="The language model that a LoRA checkpoint adapts.")
@click.option("--vision-tower", metavar="DIR", help="Where the checkpoint has no vision tower.")
@click.option("--dtype", default="keep", show_default=True, help="float32, float16, bfloat16.")
def import_bunny(
    checkpoint: str, out: str, base: str | None, vision_tower: str | None, dtype: str
) -> None:
    """Turn a published Bunny checkpoint, whole or LoRA, into a stock LLaVA model.

    Example: warren import-bunny models/Bunny-v1_0-3B --out models/bunny
    """
    _get_ready()
    from train.models.hub import local_directory
    from train.models.import_bunny import import_bunny as write

    made = write(
        local_directory(checkpoint),
        out,
        base=base and local_directory(base),
        vision_tower=vision_tower and local_directory(vision_tower),
        dtype=dtype,
    )
    if made.added_rows:
        click.echo(f"{made.added_rows} rows were added to the vocabulary, for the image", err=True)
    if made.merge_noise:
        worst = max(made.merge_noise, key=made.merge_noise.__getitem__)
        share = made.merge_noise[worst]
        click.echo(f"rounding adds at most {share:.1%} of an adapter's change ({worst})", err=True)
    click.echo(made.path)


def _shares(models: tuple[str, ...], text: str) -> dict[str, float]:
    """Return each model's share. Raises: UserError when they are not as many numbers."""
    try:
        return dict(zip(models, map(float, text.split(",")), strict=True))
    except ValueError as error:
        raise UserError(
            f"--shares {text} does not fit {len(models)} models.",
            "Each model has one share, a number.",
            "Write e.g. --shares 0.3,0.7.",
        ) from error


def _get_ready() -> None:
    from pipelines.training.launch import ready_for_models

    ready_for_models()


def _say(line: str) -> None:
    click.echo(line, err=True)


COMMANDS = (train, preview, export, average, compose, import_bunny)
