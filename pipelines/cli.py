"""The command line. stdout is the result, stderr is progress; exit 0 ok, 1 bug or failed stage,
2 something the user can mend, said as what, why and fix.

Nothing heavy is imported here: each command imports what it runs.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any, Literal

import click

from manifests.errors import UserError, WarrenError
from pipelines import cli_eval, cli_score, cli_serve, cli_train
from pipelines.cli_options import answer as print_answer
from pipelines.cli_options import json_flag, out_dir, settings

EXIT_FAILED = 1
EXIT_USER_ERROR = 2


class _Group(click.Group):
    """Turns our errors into exit codes, in one place."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except UserError as error:
            _stop(str(error), EXIT_USER_ERROR)
        except WarrenError as error:
            _stop(str(error), EXIT_FAILED)


def _stop(message: str, code: int) -> None:
    click.echo(f"error: {message}", err=True)
    raise SystemExit(code)


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="warren", prog_name="warren")
def main() -> None:
    """Condense image-text pairs into a coreset, exactly, and tell the fate of every sample."""


@main.command()
@click.argument("recipe")
@click.option(
    "--out", required=True, metavar="DIR", help="Run directory; finished stages in it are reused."
)
@click.option("--to", "until", metavar="STAGE", help="Stop after this stage.")
@click.option("--executor", type=click.Choice(["ray", "local"]), default="ray", show_default=True)
@settings
def run(
    recipe: str, out: str, until: str | None, executor: str, overrides: tuple[str, ...]
) -> None:
    """Run a recipe, or go on with a run.

    Example: warren run pipelines/recipes/coreset_from_tars.yaml --out runs/mine --to filter
    """
    from pipelines import ask
    from pipelines.launch import run_recipe
    from pipelines.recipe import load, read_yaml
    from pipelines.show import counts_text, funnel_table
    from pipelines.training.recipe import is_training

    if is_training(read_yaml(recipe)):
        raise UserError(
            f"{recipe} is a recipe of training.",
            "It says which model.",
            "Run it by `warren train`.",
        )
    chain = run_recipe(load(recipe, overrides), out, until=until, executor=executor)
    click.echo(funnel_table(ask.funnel(chain)))
    if "mix" in chain:
        found = ask.counts(out)
        click.echo(counts_text(found))
        _warn_of_counts(found)


@main.command()
@click.argument("recipe")
@click.option("--out", metavar="DIR", help="Run directory to compare with: what is finished there?")
@settings
@json_flag
def plan(recipe: str, out: str | None, overrides: tuple[str, ...], as_json: bool) -> None:
    """Print what a run would reuse, go on with and make, without running anything.

    Example: warren plan recipe.yaml --out runs/mine --set dedup.similarity_above=0.9
    """
    from pipelines import ask
    from pipelines.recipe import load, read_yaml
    from pipelines.show import status_table
    from pipelines.training import ask as ask_training
    from pipelines.training.recipe import is_training, load_training
    from pipelines.training.show import steps_table

    if is_training(read_yaml(recipe)):
        found = ask_training.plan(load_training(recipe, overrides), out)
        print_answer(found, as_json, steps_table)
        return
    rows = [one.as_json() for one in ask.plan(load(recipe, overrides), out)]
    print_answer(rows, as_json, status_table)


@main.command()
@out_dir
@json_flag
def status(out: str, as_json: bool) -> None:
    """Print how far a run is, from its files: also while it runs and after a crash.

    Example: warren status runs/mine
    """
    from pipelines import ask
    from pipelines.show import status_table
    from pipelines.training import ask as ask_training
    from pipelines.training.show import steps_table

    if ask_training.is_training_run(out):
        print_answer(ask_training.status(out), as_json, steps_table)
    else:
        print_answer([one.as_json() for one in ask.status(out)], as_json, status_table)


@main.command()
@out_dir
@json_flag
def funnel(out: str, as_json: bool) -> None:
    """Print what each stage kept and dropped, and why; exit 1 if the accounts do not add up.

    Example: warren funnel runs/mine --json
    """
    from pipelines import ask
    from pipelines.show import funnel_table

    rows = ask.funnel(ask.chain_of(out))
    print_answer(rows, as_json, funnel_table)
    if not ask.adds_up(rows):
        _stop("the accounts do not add up; run `warren check`", EXIT_FAILED)


@main.command()
@out_dir
@click.option("--strict", is_flag=True, help="Exit 1 when a published count differs.")
@json_flag
def counts(out: str, strict: bool, as_json: bool) -> None:
    """Print each source's rows of instruction data, and published counts beside the found ones.

    Example: warren counts runs/bunny --strict
    """
    from pipelines import ask
    from pipelines.show import counts_text

    found = ask.counts(out)
    print_answer(found, as_json, counts_text)
    num_different = _warn_of_counts(found)
    if strict and num_different:
        _stop(f"{num_different} published counts differ", EXIT_FAILED)


@main.command()
@out_dir
@settings
@json_flag
def whatif(out: str, overrides: tuple[str, ...], as_json: bool) -> None:
    """Tell what other dedup and select settings would keep, without changing anything.

    Example: warren whatif runs/mine --set dedup.similarity_above=0.9
    """
    from pipelines.show import whatif_table
    from pipelines.whatif import whatif as answer

    print_answer(answer(out, overrides), as_json, whatif_table)


@main.command()
@out_dir
@click.option("--rows", default=1000, show_default=True, help="Rows to compare with all others.")
@json_flag
def probe(out: str, rows: int, as_json: bool) -> None:
    """Tell what dedup misses between clusters: a few rows against all of them, by brute force.

    Example: warren probe runs/mine --rows 2000
    """
    from pipelines.ask import probe as answer
    from pipelines.show import probe_table

    print_answer(answer(out, num_sampled=rows), as_json, probe_table)


@main.command()
@out_dir
@click.argument("name", metavar="KEY|UID|URL")
@json_flag
def why(out: str, name: str, as_json: bool) -> None:
    """Tell one sample's story: each stage's verdict, the reason, and the row it lost to.

    Of a model, or a training run, it tells whether the sample was trained on, and when; there KEY
    may also be the path of an image file.

    Example: warren why runs/mine 000120034
    """
    from manifests.lineage import why as stories_of
    from pipelines import ask
    from pipelines.show import story_text
    from pipelines.training import ask as ask_training
    from pipelines.training.show import trained_text

    if ask_training.is_training_run(out):
        print_answer(ask_training.why(out, name), as_json, trained_text)
        return
    stories = [one.as_json() for one in stories_of(ask.chain_of(out), name)]
    print_answer(stories, as_json, lambda found: "\n\n".join(story_text(one) for one in found))


@main.command()
@out_dir
@click.option("--out", "folder", required=True, metavar="FOLDER", help="Where to write them.")
@json_flag
def unmix(out: str, folder: str, as_json: bool) -> None:
    """Turn a run's shards back into a LLaVA JSON file and an image folder, losslessly.

    Example: warren unmix runs/bunny --out bunny_695k
    """
    from pipelines import ask
    from pipelines.unmix import summary
    from pipelines.unmix import unmix as write

    print_answer(write(ask.chain_of(out), folder).as_json(), as_json, summary)


@main.command()
@out_dir
@click.option(
    "--as",
    "kind",
    type=click.Choice(["reference-keys", "datacomp-uids", "urls"]),
    required=True,
    help="Key files per tar, DataComp's sorted uids, or a URL list.",
)
@click.option("--out", "path", required=True, metavar="PATH", help="File or folder to write.")
@json_flag
def lists(
    out: str, kind: Literal["reference-keys", "datacomp-uids", "urls"], path: str, as_json: bool
) -> None:
    """Write a run's coreset as a list that other programs read.

    reference-keys: PATH/tar_000000.npy ..., the int64 keys of each input tar (BAAI's retar).
    datacomp-uids: one npy of dtype u8,u8, sorted (DataComp's resharder).
    urls: one parquet of url, caption, key, uid, hash, md5 and sha256 (img2dataset).

    Example: warren lists runs/mine --as urls --out coreset_urls.parquet
    """
    from pipelines import ask
    from pipelines.lists import write_list

    source = ask.recipe_of(out).source
    found = write_list(source, ask.chain_of(out), kind, path)
    print_answer(
        found,
        as_json,
        lambda one: (
            f"{one['rows']:,} rows, {one['files']:,} file{'s' * (one['files'] > 1)}: {path}"
        ),
    )


@main.command()
@out_dir
@json_flag
def check(out: str, as_json: bool) -> None:
    """Read everything again and check every invariant; exit 1 if one is broken.

    Example: warren check runs/mine
    """
    from dataclasses import asdict

    from manifests.checks import check as findings_of
    from pipelines import ask
    from pipelines.show import findings_table

    findings = [asdict(one) for one in findings_of(out, ask.chain_of(out))]
    print_answer(findings, as_json, findings_table)
    if not all(one["holds"] for one in findings):
        _stop("an invariant is broken", EXIT_FAILED)


@main.command()
@click.option("--out", default="warren-demo", show_default=True, metavar="DIR")
@click.option("--pairs", default=12_000, show_default=True, help="Size of the made world.")
@click.option("--executor", type=click.Choice(["ray", "local"]), default="ray", show_default=True)
def demo(out: str, pairs: int, executor: str) -> None:
    """Make a small world of image-text shards with planted junk and curate it, in minutes.

    Example: warren demo --out /tmp/warren-demo
    """
    from pipelines.demo.show import run_demo

    run_demo(out, num_pairs=pairs, executor=executor, say=click.echo)


def _warn_of_counts(found: Any) -> int:
    """Say on stderr which published counts differ from what was found; return how many do."""
    different = [one for one in found["published"] if not one["ok"]]
    for one in different:
        told = f"{one['found']:,} rows, not the {one['rows']:,} published ({one['origin']})"
        click.echo(f"warning: {one['name']}: {told}", err=True)
    return len(different)


_GROUPS = (cli_train.COMMANDS, cli_eval.COMMANDS, cli_score.COMMANDS, cli_serve.COMMANDS)
for _command in (command for group in _GROUPS for command in group):
    main.add_command(_command)


def run_cli(words: Sequence[str]) -> int:
    """Run the command line in this process and return its exit code (for a submitted job)."""
    try:
        main(args=list(words), standalone_mode=True)
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


if __name__ == "__main__":
    sys.exit(run_cli(sys.argv[1:]))
