"""Benchmark files written and scored as `warren score` does, for tests of the scorers."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from train.benchmarks.answers import load
from train.benchmarks.contract import Profile, QuestionSet, Report
from train.benchmarks.table import benchmark, read_questions


def png(colour: tuple[int, int, int] = (255, 0, 0)) -> bytes:
    written = BytesIO()
    Image.new("RGB", (2, 2), colour).save(written, "PNG")
    return written.getvalue()


def hub_image(data: bytes | None) -> dict[str, Any] | None:
    """An image as the hub's parquet stores it."""
    return None if data is None else {"bytes": data, "path": "picture.png"}


def write_json(path: Path, value: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")
    return path


def write_jsonl(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_parquet(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist([dict(row) for row in rows]), path)
    return path


def questions_of(name: str, path: Path) -> QuestionSet:
    return read_questions(benchmark(name), str(path))


def scored(
    name: str,
    path: Path,
    texts: Mapping[Any, str] | Path,
    profile: Profile = "bunny",
    *,
    allow_missing: bool = False,
) -> Report:
    """Score a mapping of id to text, or an answers file, against the questions at a path."""
    found = benchmark(name)
    questions = read_questions(found, str(path))
    file = texts
    if not isinstance(file, Path):
        rows = [{"question_id": one, "text": text} for one, text in file.items()]
        # Beside the questions, as people keep them: they must not be taken for questions.
        folder = path if path.is_dir() else path.parent
        file = write_jsonl(folder / f"{name}_answers.jsonl", rows)
    answers = load(file, questions, found.answer_id, allow_missing=allow_missing)
    return found.score(questions, answers.texts, profile)
