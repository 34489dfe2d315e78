"""Small benchmark files in their native layouts, and `warren score` run on them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from click.testing import CliRunner

from pipelines.cli import main

Row = Mapping[str, Any]


def write_lines(path: Path, rows: Iterable[Row]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_json(path: Path, value: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")
    return path


def write_parquet(path: Path, rows: Sequence[Row]) -> Path:
    """Write rows as the hub does; an `image` is bytes, stored as struct{bytes, path}."""
    path.parent.mkdir(parents=True, exist_ok=True)
    stored = [
        {**row, "image": {"bytes": row["image"], "path": None}} if "image" in row else dict(row)
        for row in rows
    ]
    pq.write_table(pa.Table.from_pylist(stored), path)
    return path


def answered(ids: Iterable[Any], texts: Iterable[str]) -> list[dict[str, Any]]:
    """Return answers of Bunny's schema."""
    pairs = zip(ids, texts, strict=True)
    rest = {"prompt": "", "answer_id": "a", "model_id": "m", "metadata": {}}
    return [{"question_id": name, "text": text, **rest} for name, text in pairs]


def score(bench: str, questions: Path, answers: Path, *more: str) -> dict[str, Any]:
    """Return what `warren score --json` prints."""
    run = warren("score", bench, *asked(questions, answers), "--json", *more)
    assert run.exit_code == 0, run.output
    return dict(json.loads(run.stdout))


def refused(bench: str, questions: Path, answers: Path, *more: str) -> str:
    """Return the reason for which `warren score` prints no figure."""
    run = warren("score", bench, *asked(questions, answers), *more)
    assert (run.exit_code, run.stdout) == (2, "")
    return run.stderr


def warren(*words: str) -> Any:
    return CliRunner().invoke(main, list(words))


def asked(questions: Path, answers: Path) -> list[str]:
    return ["--questions", str(questions), "--answers", str(answers)]
