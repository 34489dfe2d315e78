"""A benchmark's report as text."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pipelines.show import table_text

Report = Mapping[str, Any]


def report_text(report: Report) -> str:
    """Return a report's figures, its tables, what it was made of, and its notes."""
    return "\n".join(_parts(report))


def _parts(report: Report) -> Iterator[str]:
    title = f"{report['title']}: {report['edition']}, profile {report['profile']}"
    if report["metrics"]:
        rows = [(name, _figure(value)) for name, value in report["metrics"].items()]
        yield table_text(title, ("figure", "value"), rows)
        for name, lines in report["tables"].items():
            yield _table(name, lines)
        counts = (f"{len(report[name])} {name}" for name in ("missing", "unreadable"))
        yield f"{report['items']} questions count, {', '.join(counts)}, {report['empty']} empty"
    else:
        yield title
    if report["submission"] is not None:
        yield f"for its server: {report['submission']}"
    yield from (f"note: {one}" for one in report["notes"])


def _table(name: str, lines: Sequence[Mapping[str, Any]]) -> str:
    heads = list(lines[0]) if lines else []
    rows = [[_figure(line.get(head)) for head in heads] for line in lines]
    return table_text(name, heads, rows)


def _figure(value: Any) -> str:
    return f"{value:.2f}" if isinstance(value, float) else str(value)
