"""What a run says while it works: a bar on a terminal, plain lines elsewhere, events always."""

from __future__ import annotations

import json
import sys
import time
import traceback
from collections.abc import Mapping
from typing import Any

from manifests import paths, store
from manifests.ledger import Tally
from manifests.work import Item
from pipelines.executors import Failed

EVENTS = "events.jsonl"
LINE_INTERVAL_SECONDS = 30.0


class Progress:
    """Writes events.jsonl, and lines per stage and interval to stderr. The base of the live bar."""

    def __init__(self, out: str, *, interval_seconds: float = LINE_INTERVAL_SECONDS) -> None:
        self._events = paths.join(out, EVENTS)
        self._interval_seconds = interval_seconds
        self._next_line = 0.0
        self._started = 0.0
        self.num_items = self.num_done = self._num_before = 0
        self.counts = Tally()

    def stage_reused(self, stage: str, record: Mapping[str, Any]) -> None:
        """A finished stage with this fingerprint is there already."""
        self._event("stage_reused", stage, fingerprint=record["fingerprint"])
        self._say(f"{stage}: reused, {_counts(Tally.from_json(record))}")

    def warned(self, stage: str, text: str) -> None:
        """Something that a person should know before the stage reads what it reads."""
        self._event("warning", stage, message=text)
        self._say(f"WARNING: {stage}: {text}.")

    def phase_started(self, stage: str, *, num_items: int, num_done: int) -> None:
        """Items are about to run; `num_done` of them were finished before."""
        self._event("phase_started", stage, items=num_items, done=num_done)
        self.num_items, self.num_done, self.counts = num_items, num_done, Tally()
        self._num_before = num_done
        self._started = time.monotonic()
        self._next_line = self._started + self._interval_seconds

    def item_done(self, stage: str, marker: Mapping[str, Any]) -> None:
        """One item is committed."""
        self.num_done += 1
        self.counts += Tally.from_json(marker["counts"])
        self._event("item_done", stage, item=marker["item"], seconds=marker["seconds"])
        if time.monotonic() >= self._next_line:
            self._next_line = time.monotonic() + self._interval_seconds
            self._say(f"{stage}: {self.figures()}")

    def item_failed(self, stage: str, failed: Failed[Item]) -> None:
        """One item has used up its attempts."""
        self._event(
            "item_failed",
            stage,
            item=failed.item.name,
            error=failed.error_class,
            message=failed.message,
            traceback=failed.traceback,
        )
        self._say(f"{stage}: {failed.item.name} failed: {failed.error_class}: {failed.message}")

    def stage_failed(self, stage: str, error: Exception) -> None:
        """The run ends here; the error itself is told by whoever runs it."""
        lines = traceback.format_exception(error)
        self._event(
            "stage_failed",
            stage,
            error=type(error).__name__,
            message=str(error),
            traceback="".join(lines),
        )

    def stage_done(self, stage: str, record: Mapping[str, Any]) -> None:
        """The stage has its record."""
        self._event("stage_done", stage, fingerprint=record["fingerprint"])
        line = f"{stage}: {_counts(Tally.from_json(record))}, {record['seconds']:.1f} s"
        self._say(line)
        quality = record["notes"].get("quality")
        if quality:
            self._say(f"{stage}: {quality_text(quality)}")

    def figures(self) -> str:
        """Return done/total, rows per second, kept share and time left of the current phase."""
        seconds = max(time.monotonic() - self._started, 1e-9)
        parts = [f"{self.num_done}/{self.num_items} items"]
        if self.counts.rows_in:
            parts.append(f"{self.counts.rows_in / seconds:,.0f} rows/s")
            parts.append(f"kept {self.counts.kept / self.counts.rows_in:.1%}")
        num_new = self.num_done - self._num_before  # what was done before took no time now
        if num_new and self.num_done < self.num_items:
            left = seconds / num_new * (self.num_items - self.num_done)
            parts.append(f"about {left:,.0f} s left")
        return ", ".join(parts)

    def close(self) -> None:
        """Leave the terminal as it was."""

    def _say(self, line: str) -> None:
        sys.stderr.write(line + "\n")
        sys.stderr.flush()

    def _event(self, event: str, stage: str, **facts: Any) -> None:
        entry = {"time": round(time.time(), 3), "event": event, "stage": stage, **facts}
        store.append_line(self._events, json.dumps(entry, ensure_ascii=False, sort_keys=True))


class LiveProgress(Progress):
    """Adds a bar that is redrawn in place; only for terminals."""

    def __init__(self, out: str) -> None:
        super().__init__(out, interval_seconds=float("inf"))
        from rich.console import Console
        from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
        from rich.progress import Progress as Bars

        columns = ("{task.description:<10}", "{task.fields[figures]}")
        self._bars = Bars(
            TextColumn(columns[0]),
            BarColumn(),
            TextColumn(columns[1]),
            TimeElapsedColumn(),
            console=Console(stderr=True),
            transient=True,
        )
        self._task = self._bars.add_task("", figures="", visible=False)
        self._bars.start()

    def phase_started(self, stage: str, *, num_items: int, num_done: int) -> None:
        """Show the bar of this phase."""
        super().phase_started(stage, num_items=num_items, num_done=num_done)
        self._bars.reset(self._task, total=max(num_items, 1), completed=num_done, visible=True)
        self._bars.update(self._task, description=stage, figures=self.figures())

    def item_done(self, stage: str, marker: Mapping[str, Any]) -> None:
        """Advance the bar."""
        super().item_done(stage, marker)
        self._bars.update(self._task, completed=self.num_done, figures=self.figures())

    def close(self) -> None:
        """Take the bar away."""
        self._bars.stop()

    def _say(self, line: str) -> None:
        self._bars.console.print(line, markup=False, highlight=False)


def quality_text(figures: Mapping[str, Any]) -> str:
    """Return how good the clusters are in one line; see curate/vectors/cluster_quality.py."""
    held_out, sizes = figures["objective_held_out"], figures["size_quantiles"]
    shown = "no row held out" if held_out is None else f"objective {held_out:.5f} on held-out rows"
    return (
        f"{figures['clusters']:,} clusters, {shown}; sizes: 1% {sizes['0.01']:,}, "
        f"median {sizes['0.5']:,}, 99% {sizes['0.99']:,}, largest {figures['rows_largest']:,} "
        f"({figures['largest_share']:.1%} of all), {figures['size_histogram'].get('0', 0):,} empty"
    )


def make_progress(out: str) -> Progress:
    """Return the live bar on a terminal, plain lines otherwise."""
    return LiveProgress(out) if sys.stderr.isatty() else Progress(out)


def _counts(counts: Tally) -> str:
    parts = [f"{counts.rows_in:,} rows in", f"{counts.kept:,} kept"]
    parts += [f"{n:,} {reason}" for reason, n in sorted(counts.dropped.items())]
    parts += [f"{counts.num_quarantined:,} quarantined"] if counts.num_quarantined else []
    return ", ".join(parts)
