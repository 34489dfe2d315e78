"""Answers as text for a terminal or a log: rich tables without colours when piped."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from typing import Any

Row = Mapping[str, Any]

_WIDTH = 120
_FIGURE = re.compile(r"[-+\d.,%?]*")


def table_text(
    title: str, heads: Sequence[str], rows: Sequence[Sequence[str]], width: int = _WIDTH
) -> str:
    """Return a table of at most `width` characters; columns of figures are right-aligned."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left", pad_edge=False)
    for at, head in enumerate(heads):
        is_figures = bool(rows) and all(_FIGURE.fullmatch(row[at]) for row in rows)
        table.add_column(head, justify="right" if is_figures else "left", overflow="fold")
    for row in rows:
        table.add_row(*map(_printable, row))
    sink = io.StringIO()
    console = Console(file=sink, width=width, markup=False, highlight=False, emoji=False)
    console.print(table, markup=False)
    lines = (line.rstrip() for line in sink.getvalue().splitlines())
    return "\n".join(line for line in lines if line)


def funnel_table(rows: Sequence[Row]) -> str:
    """Return the funnel: one line per stage."""
    first = max(rows[0]["rows_in"], 1) if rows else 1
    body = [
        (
            row["stage"],
            f"{row['rows_in']:,}",
            f"{row['kept']:,}",
            f"{row['kept'] / first:.1%}",
            f"{row['seconds']:.1f}",
            _reasons(row),
        )
        for row in rows
    ]
    return table_text("funnel", ("stage", "in", "kept", "of all", "s", "lost to"), body)


def status_table(rows: Sequence[Row]) -> str:
    """Return one line per stage: its state and how many items are done."""
    body = [
        (
            row["stage"],
            row["state"],
            str(row["items_done"]),
            "?" if row["items"] is None else str(row["items"]),
            f"{row['rows_in']:,}",
            f"{row['kept']:,}",
            row["directory"],
        )
        for row in rows
    ]
    heads = ("stage", "state", "items done", "of", "rows in", "kept", "directory")
    return table_text("stages", heads, body)


def findings_table(rows: Sequence[Row]) -> str:
    """Return one line per invariant."""
    body = [
        (row["stage"], "ok" if row["holds"] else "BROKEN", row["rule"], row["detail"])
        for row in rows
    ]
    return table_text("invariants", ("stage", "", "rule", "seen"), body)


def whatif_table(rows: Sequence[Row]) -> str:
    """Return one line per stage: what it keeps now and what it would keep."""
    body = [
        (
            row["stage"],
            "" if row["kept_now"] is None else f"{row['kept_now']:,}",
            f"{row['kept']:,}",
            "" if row["shared"] is None else f"{row['shared']:,}",
            "as it is" if row["is_finished"] else f"{row['seconds']:.2f} s",
            _reasons(row),
        )
        for row in rows
    ]
    heads = ("stage", "keeps now", "would keep", "in both", "made", "lost to")
    return table_text("what if", heads, body)


def probe_table(found: Row) -> str:
    """Return what comparing within clusters, and with ghosts, finds and misses."""
    rows = found["rows"]
    ghosts = f"with ghosts, margin {found['ghost_margin']:g}, cap {found['ghost_cap'] or 'none'}"
    body = [
        (
            name,
            f"{found[f'pairs_found_{kind}']:.2%}",
            f"{rows * found[f'components_{kind}_per_row']:,.0f}",
            f"{found[f'excess_{kind}']:.2%}",
        )
        for name, kind in (("within clusters", "within"), (ghosts, "with_ghosts"))
    ]
    kept = rows * found["components_per_row"]
    body.append(("all rows with all rows", "100.00%", f"{kept:,.0f}", "0.00%"))
    body.append(("SemDeDup's rule", "", f"{rows * found['pairwise_max_per_row']:,.0f}", ""))
    title = (
        f"{found['sampled']:,} of {rows:,} rows against all, {found['pairs']:,} pairs above "
        f"{found['similarity_above']:g}; {found['open_rows']:,} in components too large to follow"
    )
    heads = ("compared", "pairs found", "rows kept, about", "too many")
    return table_text(title, heads, body)


def counts_text(found: Row) -> str:
    """Return what became of each source's rows; then published counts, if the recipe has any."""
    heads = ("source", "rows", "kept", "samples", "mended", "lost to")
    tables = [table_text("sources", heads, [_source_row(one) for one in found["sources"]])]
    if found["published"]:
        tables.append(_published_table(found["published"]))
    return "\n\n".join(tables)


def _published_table(rows: Sequence[Row]) -> str:
    heads = ("published count", "published", "found", "difference", "kept", "", "from")
    body = [_published_row(one) for one in rows]
    return table_text("published counts, of rows as they came in", heads, body)


def _source_row(one: Row) -> tuple[str, ...]:
    lost = (
        f"{stage}: {reasons}" for stage, row in one["stages"].items() if (reasons := _reasons(row))
    )
    return (
        one["source"],
        f"{one['rows']:,}",
        _count(one["kept"]),
        _count(one["written"]),
        ", ".join(f"{mend} {rows:,}" for mend, rows in one["mended"].items()),
        "; ".join(lost),
    )


def _published_row(one: Row) -> tuple[str, ...]:
    return (
        one["name"],
        f"{one['rows']:,}",
        f"{one['found']:,}",
        f"{one['difference']:+,}" if one["difference"] else "0",
        _count(one["kept"]),
        "ok" if one["ok"] else "DIFFERS",
        one["origin"],
    )


def _count(number: int | None) -> str:
    return "?" if number is None else f"{number:,}"


def story_text(story: Row) -> str:
    """Return one sample's story, a line per stage."""
    sample = story["sample"]
    width = max([8, *(len(step["stage"]) for step in story["steps"])])
    lines = [
        f"{_printable(story['key'])} (uid {story['uid']}): {story['fate']}",
        *(
            f"  {name:<{width}} {_shortened(str(sample[name]))}"
            for name in ("shard", "caption", "url")
            if sample.get(name)
        ),
    ]
    return "\n".join([*lines, *(_step_text(step, width) for step in story["steps"])])


def _step_text(step: Row, width: int) -> str:
    words = [step["fate"]]
    if step["reason"]:
        words.append(step["reason"])
    if "score" in step:
        against = f" against {step['cutoff']:.6g}" if "cutoff" in step else ""
        words.append(f"({step['score']:.6g}{against})")
    if "evidence_uid" in step:
        winner = _printable(step.get("evidence_key") or "?")
        words.append(f"lost to {winner} (uid {step['evidence_uid']})")
    shown = {"fate", "reason", "stage", "score", "cutoff", "evidence_uid", "evidence_key"}
    shown.add("evidence")
    words += [f"{k} {_figure(v)}" for k, v in step.items() if k not in shown]
    first = f"  {step['stage']:<{width}} {' '.join(words)}"
    indent = " " * (width + 3)
    return "\n".join([first, *(indent + _evidence_text(one) for one in step.get("evidence", ()))])


def _evidence_text(one: Row) -> str:
    score = f" ({one['score']:.6g})" if "score" in one else ""
    more = f", one of {one['num_items']:,}" if one["num_items"] > 1 else ""
    item = f"{_printable(one['set'])}: {_printable(one['item'])}"
    return f"in {item} by {one['method']}{score}{more}"


def _reasons(row: Row) -> str:
    lost = {**row["dropped"], **{f"quarantine {k}": n for k, n in row["quarantined"].items()}}
    ranked = sorted(lost.items(), key=lambda one: (-one[1], one[0]))
    return ", ".join(f"{reason} {num:,}" for reason, num in ranked)


def _figure(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else _printable(str(value))


def _printable(text: str) -> str:
    """Return the text without what could steer a terminal: captions come from strangers."""
    return "".join(char if char.isprintable() else "\ufffd" for char in text)


def _shortened(text: str, limit: int = 100) -> str:
    flat = _printable(" ".join(text.split()))
    return flat if len(flat) <= limit else flat[: limit - 3] + "..."
