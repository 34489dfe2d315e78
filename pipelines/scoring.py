"""An answers file held against a benchmark's own files: its figures, or the file for its server."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from manifests import store
from manifests.errors import UserError
from pipelines.show import table_text
from train.benchmarks import answers, table
from train.benchmarks.contract import Profile

PROFILES: Mapping[str, Profile] = {"bunny": "bunny", "lmms": "lmms"}
_MAX_LISTED = 20

Row = Mapping[str, Any]


def score(
    name: str, questions: str, texts: str, profile: Profile, *, allow_missing: bool = False
) -> dict[str, Any]:
    """Return a benchmark's report on an answers file, as JSON holds it.

    Args: questions: the benchmark's file or folder. texts: the answers file.
    Raises: UserError when the data is incomplete, mixed, or of a form that is not known.
    """
    found = table.benchmark(name)
    asked = table.read_questions(found, questions)
    matched = answers.load(texts, asked, found.answer_id, allow_missing=allow_missing)
    report = found.score(asked, matched.texts, profile)
    names = answers.names_of(asked)
    return {
        "benchmark": found.name,
        "title": found.title,
        "profile": profile,
        "version": asked.version,
        "metrics": dict(report.metrics),
        "columns": {
            column: report.metrics[metric]
            for column, metric in found.columns.items()
            if metric in report.metrics
        },
        "tables": {title: [dict(row) for row in rows] for title, rows in report.tables.items()},
        "items": report.items,
        "missing": [names.get(one, one) for one in report.missing],
        "unreadable": [names.get(one, one) for one in report.unreadable],
        "empty": [names[one] for one in matched.empty],
        "notes": list(dict.fromkeys((*report.notes, *matched.notes))),
        "files": {**asked.files, Path(texts).name: store.sha256_of(texts)},
        "warren": version("warren"),
    }


def write_submission(
    name: str, questions: str, texts: str, out: str, *, allow_missing: bool = False
) -> dict[str, Any]:
    """Write what a benchmark's server takes; return its path, questions and ids without an answer.

    Raises: UserError as `score` does, when the benchmark has no server, or when OUT is there.
    """
    found = table.benchmark(name)
    if found.submission is None:
        raise UserError(
            f"{found.title} has no server that takes a file.", "", f"Use `warren score {name}`."
        )
    path = _free(Path(out), found.submission_suffix)
    asked = table.read_questions(found, questions)
    matched = answers.load(texts, asked, found.answer_id, allow_missing=allow_missing)
    content = found.submission(asked, matched.texts)
    store.write(str(path.parent), path.name, content)
    return {
        "path": str(path),
        "version": asked.version,
        "questions": len(asked.questions),
        "missing": [answers.names_of(asked)[one] for one in matched.missing],
        "notes": list(matched.notes),
    }


def _free(path: Path, suffix: str) -> Path:
    if path.suffix != suffix:
        raise UserError(f"--out {path} does not end with {suffix}.", "The server takes no other.")
    if path.exists():
        raise UserError(f"{path} is there already.", "Nothing is overwritten.", "Name another.")
    return path


def report_text(found: Row) -> str:
    """Return a report for a terminal: figures, tables, counts, notes, and what was read."""
    return "\n".join(_parts(found))


def submission_text(found: Row) -> str:
    """Return what was written, for a terminal."""
    lines = [f"{found['path']}: {found['questions']:,} questions of {found['version']}"]
    if found["missing"]:
        lines.append(f"{len(found['missing']):,} without an answer: {_listed(found['missing'])}")
    return "\n".join([*lines, *(f"note: {one}" for one in found["notes"])])


def _parts(found: Row) -> Iterator[str]:
    title = f"{found['title']}: {found['version']}, profile {found['profile']}"
    rows = [(name, _figure(value)) for name, value in found["metrics"].items()]
    yield title
    yield table_text("figures", ("figure", "value"), rows)
    for name, lines in found["tables"].items():
        heads = list(lines[0]) if lines else []
        yield table_text(name, heads, [[_figure(one.get(head)) for head in heads] for one in lines])
    yield f"items: {found['items']:,}"
    for name in ("missing", "unreadable", "empty"):
        ids = found[name]
        yield f"{name}: {len(ids):,}" + (f" ({_listed(ids)})" if ids else "")
    yield from (f"note: {one}" for one in found["notes"])
    yield from (f"file: {name} sha256 {digest[:16]}" for name, digest in found["files"].items())
    yield f"warren {found['warren']}"


def _listed(ids: Sequence[str]) -> str:
    more = len(ids) - _MAX_LISTED
    return ", ".join(ids[:_MAX_LISTED]) + (f" and {more:,} more" if more > 0 else "")


def _figure(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4f}" if abs(value) <= 1 else f"{value:.2f}"
    return "" if value is None else str(value)
