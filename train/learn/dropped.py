"""Rows that could not be trained on, each with its reason: none is lost without a word.

While a run goes on, every rank adds to a file of its own, before the step's gradients are added up,
so no checkpoint is ahead of it. At the end all of them become one table.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa

from manifests import paths, store
from train.data.index import Index
from train.learn.lines import Lines, cut_lines, read_lines

DROPPED = "dropped.parquet"
SCHEMA = pa.schema(
    {
        "uid": pa.uint64(),
        "key": pa.string(),
        "source": pa.string(),
        "directory": pa.string(),
        "epoch": pa.int64(),
        "step": pa.int64(),
        "reason": pa.string(),
    }
)
"""directory: of the stage that wrote the row's shard. step: of the run, as in log.jsonl."""

BEFORE_PLANNING = -1

_PREFIX, _SUFFIX = "dropped-", ".jsonl"


class DroppedRows:
    """What one rank drops."""

    def __init__(self, out: str, rank: int, index: Index) -> None:
        self._index = index
        self._lines = Lines(out, f"{_PREFIX}{rank}{_SUFFIX}")

    def add(self, dropped: Sequence[tuple[int, str]], *, epoch: int, step: int) -> None:
        """Write a step's dropped rows: (row of the index, reason) each."""
        lines = _lines(self._index, dropped, epoch=epoch, step=step)
        if lines:
            self._lines.add(lines)
            self._lines.flush()


def cut_dropped(out: str, steps_done: int) -> None:
    """Leave only the rows that these first steps dropped, in the files of all ranks."""
    for name in _names(out):
        cut_lines(out, name, steps_done)


def write_dropped(out: str, chosen: Index, refused: Mapping[int, str]) -> int:
    """Write what all ranks dropped as one table, by step and uid; return its number of rows.

    Args: refused: rows of `chosen` that were refused before planning, by reason: BEFORE_PLANNING is
    their epoch and step.
    """
    rows = _lines(chosen, list(refused.items()), epoch=BEFORE_PLANNING, step=BEFORE_PLANNING)
    rows += [line for name in _names(out) for line in read_lines(paths.join(out, name))]
    rows.sort(key=lambda row: (row["step"], row["uid"], row["reason"]))
    store.write(out, DROPPED, pa.Table.from_pylist(rows, SCHEMA))
    return len(rows)


def remove_dropped_lines(out: str) -> None:
    """Remove the ranks' files, once the table is there."""
    for name in _names(out):
        fs, local = paths.filesystem(paths.join(out, name))
        fs.rm(local)


def _lines(
    index: Index, dropped: Sequence[tuple[int, str]], *, epoch: int, step: int
) -> list[dict[str, Any]]:
    return [
        {
            "uid": int(index.uid[row]),
            "key": index.key[row].as_py(),
            "source": index.sources[index.source[row]],
            "directory": index.directory[index.shard[row]],
            "epoch": epoch,
            "step": step,
            "reason": reason,
        }
        for row, reason in dropped
    ]


def _names(out: str) -> list[str]:
    return [one for one in paths.list_names(out, _SUFFIX) if one.startswith(_PREFIX)]
