"""A preflight's findings as text: a table of sources, the plan, memory, and rows with labels."""

from __future__ import annotations

import io
from typing import Literal

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from train.learn.preflight import Preflight

_GIB = 2**30


def rendered(seen: Preflight) -> RenderableType:
    """Return the findings for rich's console; previews keep the colours that they have."""
    parts: list[RenderableType] = [_sources(seen), _facts(seen)]
    for one in seen.sources:
        for at, text in enumerate(dict.fromkeys(one.previews)):  # a row may be drawn twice
            heading = [Text(f"\n{one.name}, trained text marked:", style="bold")] if not at else []
            parts += [*heading, Text(""), Text.from_ansi(text)]
    return Group(*parts)


def lines_of(seen: Preflight, *, width: int = 100, colour: bool = False) -> list[str]:
    """Return the findings as lines: without colour for a log file."""
    file = io.StringIO()
    system: Literal["standard"] | None = "standard" if colour else None
    console = Console(file=file, width=width, color_system=system, force_terminal=colour)
    console.print(rendered(seen))
    return [line.rstrip() for line in file.getvalue().splitlines()]


def _sources(seen: Preflight) -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column("source")
    for name in ("rows", "images", "tokens", "trained", "share"):
        table.add_column(name, justify="right")
    table.add_column("dropped")
    for one in seen.sources:
        counts = (one.rows, one.images, one.tokens, one.trained)
        reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(one.dropped.items()))
        table.add_row(one.name, *map(str, counts), f"{one.trained_share:.1%}", reasons)
    return table


def _facts(seen: Preflight) -> Text:
    plan, largest = seen.plan, seen.largest
    lines = [
        f"first epoch: {plan.steps} steps of {plan.samples} samples, {plan.micro_batches} "
        f"micro-batches, padding {plan.padding:.1%} (random batches: {plan.naive_padding:.1%}), "
        f"ranks idle {plan.idle:.1%}"
    ]
    if largest is not None:
        lines.append(
            f"largest micro-batch: {largest.rows} rows, {largest.padded_tokens} tokens with "
            f"padding, {largest.images} images; a run needs about {largest.memory / _GIB:.1f} GiB"
        )
    return Text("\n".join(lines))
