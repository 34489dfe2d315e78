"""What several commands take, and how an answer is printed."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import click

out_dir = click.argument("out", metavar="DIR")
json_flag = click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
settings = click.option(
    "--set",
    "overrides",
    multiple=True,
    metavar="KEY=VALUE",
    help="Override a recipe value, e.g. dedup.keep=far. Repeatable.",
)


def answer(rows: Any, as_json: bool, table: Callable[[Any], str]) -> None:
    """Print rows as JSON, or by `table`."""
    text = json.dumps(rows, indent=1, ensure_ascii=False) if as_json else table(rows)
    click.echo(text)
