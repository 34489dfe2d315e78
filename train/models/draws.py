"""Which rows a finished run learned from, and in which step: its plan, made again.

Which step a row is in depends on the rows, weights, seed and batch size, not on lengths in tokens,
so no shard is read and no text tokenized.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from manifests import paths, store
from manifests.errors import UserError
from train.data.cuts import Ints
from train.data.index import Index, read_subset
from train.data.lengths import LENGTHS_PREFIX
from train.data.plan import Columns, num_steps, order, plan_hash
from train.learn.checkpoint import data_fingerprints
from train.learn.dropped import BEFORE_PLANNING
from train.models.finished_run import FinishedRun


class Draw(NamedTuple):
    """One time that a row was learned from. step: over all epochs, as in the run's log."""

    epoch: int
    step: int


@dataclass(frozen=True, eq=False)
class Draws:
    """A run's data. index: all rows of its directories; is_chosen: bool [n], those of its subset.

    rows, epochs, steps: int64 [m], every draw of the run in order. warnings: sentences.
    """

    run: FinishedRun
    index: Index
    is_chosen: NDArray[np.bool_]
    reasons: dict[int, str]
    """Of each row that was dropped, why; also of those refused before planning."""
    refused: dict[int, str]
    """Of each row that was refused before planning, and so never drawn, why."""
    rows: Ints
    epochs: Ints
    steps: Ints
    warnings: tuple[str, ...]

    @classmethod
    def of(cls, run: FinishedRun) -> Draws:
        """Return what a run drew. Raises: UserError when its data are gone or have changed."""
        _check_same_data(run)
        index = Index.load(run.data_dirs)
        is_chosen = np.ones(len(index), np.bool_)
        if run.subset is not None:
            is_chosen = np.isin(index.uid, read_subset(run.subset))
        dropped = run.dropped()
        planned = _planned(run, index, np.flatnonzero(is_chosen), dropped)
        drawn = _drawn(run, planned)
        warnings = _doubts(run, planned, drawn[2], dropped)
        reasons = planned.refused | _rows_dropped(index, dropped)
        return cls(run, index, is_chosen, reasons, planned.refused, *drawn, warnings)

    def of_row(self, row: int) -> list[Draw]:
        """Return when a row was drawn, also if it was dropped then."""
        at = np.flatnonzero(self.rows == row)
        return [Draw(int(self.epochs[i]), int(self.steps[i])) for i in at]

    def by_source(self) -> dict[str, dict[str, int]]:
        """Return counts of each source: its rows, those chosen, those refused before planning,
        draws, and draws that were dropped.
        """
        index, dropped = self.index, np.isin(self.rows, list(self.reasons))
        drawn_from = index.source[self.rows]
        counted = {
            "rows": index.source,
            "chosen": index.source[self.is_chosen],
            "refused": index.source[list(self.refused)],
            "drawn": drawn_from,
            "dropped": drawn_from[dropped],
        }
        counts = {n: np.bincount(of, minlength=len(index.sources)) for n, of in counted.items()}
        return {
            source: {name: int(count[at]) for name, count in counts.items()}
            for at, source in enumerate(index.sources)
        }


def _check_same_data(run: FinishedRun) -> None:
    """Check that directories are as they were trained on. Raises: UserError."""
    wanted = [*run.data_dirs, *([run.subset] if run.subset is not None else [])]
    gone = [one for one in wanted if not paths.exists(one)]
    if gone:
        raise UserError(
            f"{', '.join(gone)} is not there any more.",
            f"{run.path} was trained on it: what it holds cannot be told from here.",
            "Bring it back to that place.",
        )
    found = data_fingerprints(list(run.data_dirs))
    changed = [
        one
        for one, now, then in zip(run.data_dirs, found, run.identity["data"], strict=True)
        if now != then
    ]
    if changed:
        raise UserError(
            f"{', '.join(changed)} holds other data than {run.path} was trained on.",
            "Its record has another fingerprint than the run wrote down.",
            "Bring the directory of that time back to this place.",
        )


def _before_planning(dropped: pa.Table) -> pa.Table:
    return dropped.filter(pc.equal(dropped.column("step"), BEFORE_PLANNING))


def _rows_dropped(index: Index, dropped: pa.Table | None) -> dict[int, str]:
    """Return row -> reason by a run's table of dropped rows; copies of a sample share it."""
    found: dict[int, str] = {}
    if not dropped:
        return found
    for told in set(dropped.column("directory").to_pylist()):
        of, name = dropped.filter(pc.equal(dropped.column("directory"), told)), paths.absolute(told)
        uids = of.column("uid").to_numpy()
        reasons = dict(zip(uids.tolist(), of.column("reason").to_pylist(), strict=True))
        is_there = np.array([paths.absolute(one) == name for one in index.directory], np.bool_)
        rows = np.flatnonzero(is_there[index.shard] & np.isin(index.uid, uids))
        found |= {int(row): reasons[int(index.uid[row])] for row in rows}
    return found


@dataclass(frozen=True, eq=False)
class _Planned:
    """Rows that were planned: int64 [k], of the index, and their columns; refused: row -> why."""

    rows: Ints
    columns: Columns
    refused: dict[int, str]

    @classmethod
    def without(cls, refused: dict[int, str], rows: Ints, columns: Columns) -> _Planned:
        """Return all rows but some. columns: of all rows of the index."""
        kept = np.setdiff1d(rows, list(refused))
        names = ("identity", "tokens", "num_images", "source")
        taken = {name: getattr(columns, name)[kept] for name in names}
        return cls(kept, replace(columns, **taken), refused)

    def hash_for(self, run: FinishedRun) -> str:
        """Return the hash of the plan that a run makes of these rows."""
        return plan_hash(self.columns, seed=run.config.seed, config=run.config.plan)


def _planned(run: FinishedRun, index: Index, chosen: Ints, dropped: pa.Table | None) -> _Planned:
    """Return what a run planned by: lengths that it measured and kept, or curation's estimates.

    Told by the plan's hash; if it is none of them, the likeliest.
    """
    refused = _rows_dropped(index, dropped and _before_planning(dropped))
    found = [
        *_measured(run, index, chosen),
        _Planned.without(refused, chosen, index.columns()),
    ]
    return next((one for one in found if one.hash_for(run) == run.identity["plan"]), found[0])


def _measured(run: FinishedRun, index: Index, chosen: Ints) -> Iterator[_Planned]:
    """Yield the rows by each table of lengths in a run's folder: tokens, num_images, reason."""
    for name in paths.list_names(run.path, ".parquet"):
        if not name.startswith(LENGTHS_PREFIX):
            continue
        table = store.read_table(paths.join(run.path, name))
        if len(table) == len(chosen):
            reasons = zip(chosen.tolist(), table.column("reason").to_pylist(), strict=True)
            refused = {row: reason for row, reason in reasons if reason is not None}
            columns = _with_lengths(index.columns(), chosen, table)
            yield _Planned.without(refused, chosen, columns)


def _with_lengths(columns: Columns, rows: Ints, table: pa.Table) -> Columns:
    """Return the columns of an index with some rows' measured lengths."""
    measured = {}
    for name in ("tokens", "num_images"):
        measured[name] = getattr(columns, name).astype(np.int64)
        measured[name][rows] = table.column(name).to_numpy()
    return replace(columns, **measured)


def _drawn(run: FinishedRun, planned: _Planned) -> tuple[Ints, Ints, Ints]:
    """Return all draws in order: rows of the index, epochs and steps, int64 [m] each."""
    columns, plan = planned.columns, run.config.plan
    found: list[tuple[Ints, Ints, Ints]] = []
    before = 0
    for epoch in range(run.config.epochs):
        seed = run.config.seed
        steps = num_steps(columns, seed=seed, epoch=epoch, config=plan)
        drawn = order(columns, seed=seed, epoch=epoch, config=plan)
        drawn = drawn[: steps * plan.global_batch_size]
        step = before + np.arange(len(drawn)) // plan.global_batch_size
        found.append((planned.rows[drawn], np.full(len(drawn), epoch), step))
        before += steps
    joined = [np.concatenate(column) for column in zip(*found, strict=True)]
    return joined[0], joined[1], joined[2]


def _doubts(
    run: FinishedRun, planned: _Planned, steps: Ints, dropped: pa.Table | None
) -> tuple[str, ...]:
    """Return sentences on what speaks against the plan that was made again."""
    doubts = []
    if planned.hash_for(run) != run.identity["plan"]:
        doubts.append("the plan made again has another hash than the run's: draws may be wrong")
    if int(steps[-1]) + 1 != run.steps:
        doubts.append(f"the run took {run.steps} steps, and the plan has {int(steps[-1]) + 1}")
    if dropped is None and (lost := sum(entry["dropped"] for entry in run.log())):
        doubts.append(f"{lost} draws were dropped, and the table that names them is gone")
    return tuple(doubts)


def reasons_of(run: FinishedRun) -> Counter[str]:
    """Return how many draws were dropped for each reason, by the run's log."""
    found: Counter[str] = Counter()
    for entry in run.log():
        found.update(entry["dropped_reasons"])
    return found
