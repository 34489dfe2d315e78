"""Commands about benchmarks: answer and score them."""

from __future__ import annotations

import click

from manifests.errors import UserError
from pipelines.cli_options import answer as print_answer
from pipelines.cli_options import json_flag, settings

_EVERY = "all"


class _WithAll(click.Command):
    """Reads `--all` as `--bench all`."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse, with the one word in place of the other."""
        words = [
            word for one in args for word in (["--bench", _EVERY] if one == "--all" else [one])
        ]
        return super().parse_args(ctx, words)


@click.command("eval", cls=_WithAll)
@click.argument("model", metavar="MODEL")
@click.option("--bench", required=True, metavar="NAME[,NAME]", help="Or --all: all that DATA has.")
@click.option("--data", required=True, metavar="DATA", help="DATA/NAME, or the benchmark's files.")
@click.option("--out", required=True, metavar="DIR", help="Answers; what is there is used again.")
@settings
@json_flag
def evaluate(
    model: str, bench: str, data: str, out: str, overrides: tuple[str, ...], as_json: bool
) -> None:
    """Answer benchmarks from files on disk; print the paper's figures, or write a server's file.

    One or more benchmarks by name print their report, --all prints the paper's table beside the
    published rows. A stopped run goes on by the same command. DATA holds a folder per benchmark,
    called by its name ("mme"), or by its name and more ("mmbench-dev"); for one benchmark it may be
    the files themselves. Settings: profile, executor, template, image_mode, batch_size,
    max_new_tokens, num_chunks, dtype, device, num_threads, adapter.

    Example: warren eval models/mine --bench mme,pope --data benchmarks --out runs/eval
    """
    from pipelines.evaluating.run import EvalConfig, evaluate, sets_in
    from pipelines.evaluating.show import report_text
    from pipelines.evaluating.table import reports_in, table_of, table_shown, write_table
    from pipelines.recipe import apply_setting
    from train.models.hub import local_directory

    values: dict[str, object] = {}
    for one in overrides:
        apply_setting(values, one)
    config = EvalConfig.load(values, where="eval")
    names = None if bench == _EVERY else _names(bench)
    sets = sets_in(data, names)
    reports = evaluate(local_directory(model), sets, out, config, _notice)
    table = table_of(reports_in(out))
    write_table(out, table)
    if names is None:
        print_answer(table, as_json, table_shown)
    else:
        print_answer(reports, as_json, lambda found: "\n\n".join(map(report_text, found)))


def _names(bench: str) -> list[str]:
    found = [name.strip() for name in bench.split(",") if name.strip()]
    if not found:
        raise UserError("--bench names no benchmark.", fix="Write e.g. --bench mme,pope.")
    return list(dict.fromkeys(found))


def _notice(text: str) -> None:
    click.echo(text, err=True)


COMMANDS = (evaluate,)
