"""Answers about training as text for a terminal or a log."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from manifests.paths import name_of
from pipelines.show import story_text, table_text

Row = Mapping[str, Any]


def steps_table(rows: Sequence[Row]) -> str:
    """Return one line per stage: its state, and the last step's figures."""
    body = [
        (
            row["stage"],
            row["state"],
            _figure(row["steps_done"], ","),
            _figure(row["loss"], ".4f"),
            _figure(row["tokens_per_s"], ",.0f"),
            _figure(row["seconds"], ".1f"),
            row["directory"],
        )
        for row in rows
    ]
    heads = ("stage", "state", "steps done", "loss", "tokens/s", "s", "directory")
    return table_text("training", heads, body)


def trained_text(findings: Sequence[Row]) -> str:
    """Return what became of a sample in each run of training, and its story before."""
    if not findings:
        return "not trained on: no shard of any run holds it"
    silent = [one for one in findings if one["trained"] is None]
    samples: dict[tuple[str, int], list[Row]] = {}
    for one in findings:
        if one["trained"] is not None:
            samples.setdefault((one["directory"], one["uid"]), []).append(one)
    parts = [_sample_text(found) for found in samples.values()]
    parts += [f"{one['run']} {one['run_dir']}: cannot be told: {one['why']}" for one in silent]
    return "\n\n".join(parts)


def _sample_text(findings: Sequence[Row]) -> str:
    """Return a sample's fate in each run, and its story, which is the same for all of them."""
    first = findings[0]
    lines = [f"{first['key']} (uid {first['uid']}, {first['source']})"]
    lines += [line for one in findings for line in _fate_lines(one)]
    story = first.get("story")
    return "\n".join([*lines, *([story_text(story)] if story else [])])


def _fate_lines(found: Row) -> list[str]:
    fate = "trained on" if found["trained"] else f"not trained on: {found['why']}"
    drawn = "; ".join(f"epoch {one['epoch']}, step {one['step']}" for one in found["draws"])
    lines = [f"  {name_of(found['run_dir'])}: {fate}{drawn and f' in {drawn}'}"]
    return lines + [f"    warning: {one}" for one in found["warnings"]]


def exported_text(told: Any) -> str:
    """Return what an export wrote, and what its rounding costs. told: train.models.export's."""
    lines = [f"{told.path}: {told.dtype}"]
    if told.adapter:
        lines.append(f"  adapter   {told.adapter}")
    worst = next(iter(told.noise.items()), None)
    if worst and worst[1]:
        lines.append(f"  rounding  at most {worst[1]:.1%} of what training changed ({worst[0]})")
    return "\n".join(lines)


def _figure(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)
