"""The paper's table: what a model's reports say, beside the published rows; JSON and markdown."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from manifests import store
from train.benchmarks.published import COLUMNS, published

Report = Mapping[str, Any]

TABLE = "table"
_DECIMALS = 1
_WIDTH = 140


def table_of(reports: Iterable[Report]) -> dict[str, Any]:
    """Return the table of reports of one model, JSON-ready; a column without a report has no cell.

    columns: their names. rows: ours first, one for each model and profile, then the published
    ones, with their sources. A cell of ours tells its value and what it was made of: the set, the
    benchmark's version and files, the profile, counts, the model's hash, its training data.
    """
    ours: dict[tuple[Any, ...], dict[str, Any]] = {}
    for one in reports:
        which = (_name(one), one["model"]["hash"], one["model"]["adapter"])  # a name may be shared
        row = ours.setdefault(which, {"model": _name(one), "source": None, "cells": {}})
        row["cells"] |= {column: _cell(one, value) for column, value in one["columns"].items()}
    theirs = [
        {
            "model": one.model,
            "source": one.source,
            "cells": {column: {"value": value} for column, value in one.values.items()},
        }
        for one in published()
    ]
    return {"columns": list(COLUMNS), "rows": [*ours.values(), *theirs]}


def write_table(out: str, table: Mapping[str, Any]) -> None:
    """Write table.json and table.md in a folder."""
    store.write_json(out, f"{TABLE}.json", table)
    store.write(out, f"{TABLE}.md", markdown(table).encode())


def reports_in(out: str) -> list[dict[str, Any]]:
    """Return the reports of a folder's sets, by name of the set."""
    files = sorted(Path(out).glob("*/report*.json"))
    found = (store.read_json(str(one)) for one in files)
    return [one for one in found if one is not None]


def markdown(table: Mapping[str, Any]) -> str:
    """Return the table in markdown, and below it where each row is from."""
    heads = ["model", *table["columns"]]
    lines = [_line(heads), _line(["---"] + ["---:"] * len(table["columns"]))]
    lines += [_line(one) for one in _texts(table)]
    return "\n".join([*lines, "", *_sources(table), ""])


def table_shown(table: Mapping[str, Any]) -> str:
    """Return the table for a terminal."""
    from pipelines.show import table_text

    text = table_text("benchmarks", ["model", *table["columns"]], _texts(table), _WIDTH)
    return "\n".join([text, *_sources(table)])


def _name(report: Report) -> str:
    name, profile = str(report["model"]["name"]), report["profile"]
    return name if profile == "bunny" else f"{name} ({profile})"


def _cell(report: Report, value: float) -> dict[str, Any]:
    told = ("set", "benchmark", "version", "profile", "items", "files", "model", "warren")
    return {
        "value": value,
        **{name: report[name] for name in told},
        "unreadable": len(report["unreadable"]),
    }


def _texts(table: Mapping[str, Any]) -> list[list[str]]:
    return [
        [row["model"], *(_value(row["cells"].get(column)) for column in table["columns"])]
        for row in table["rows"]
    ]


def _value(cell: Mapping[str, Any] | None) -> str:
    return "" if cell is None else f"{cell['value']:.{_DECIMALS}f}"


def _line(texts: Sequence[str]) -> str:
    return "| " + " | ".join(text.replace("|", "\\|") for text in texts) + " |"


def _sources(table: Mapping[str, Any]) -> list[str]:
    """Return a line for each published source, and one on what is of whole sets or not."""
    sources: dict[str, list[str]] = {}
    for row in table["rows"]:
        if row["source"] is not None:
            sources.setdefault(row["source"], []).append(row["model"])
    lines = [f"{models[0]} to {models[-1]}: {source}" for source, models in sources.items()]
    editions = {
        column: f"{cell['benchmark']}, {cell['version']}"
        for row in table["rows"]
        if row["source"] is None
        for column, cell in row["cells"].items()
    }
    return [*(f"{column}: {text}" for column, text in editions.items()), *lines]
