"""What an evaluation found, as text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pipelines.scoring import report_text as figures_text


def report_text(report: Mapping[str, Any]) -> str:
    """Return a report's figures, or why it has none, and where its server's file is."""
    model = f"model {report['model']['name']}, sha256 {report['model']['hash'][:16]}"
    lines = [figures_text(report) if report["metrics"] else _without_figures(report), model]
    if report["submission"] is not None:
        lines.append(f"for its server: {report['submission']}")
    return "\n".join(lines)


def _without_figures(report: Mapping[str, Any]) -> str:
    title = f"{report['title']}: {report['version']}"
    return "\n".join([title, *(f"note: {one}" for one in report["notes"])])
