"""Which rows a finished run learned from, and in which step: its plan, made again.

Which step a row is in depends on the rows, weights, seed and batch size, not on lengths in tokens,
so no shard is read and no text tokenized.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from manifests import paths
from manifests.errors import UserError
from train.data.index import Index, read_subset
from train.data.plan import Columns, Ints, num_steps, order, plan_hash
from train.learn.checkpoint import data_fingerprints
from train.models.finished_run import FinishedRun

_BEFORE_PLANNING = -1


class Draw(NamedTuple):
    """One time that a row was learned from. step: over all epochs, as in the run's log."""

    epoch: int
    step: int


@dataclass(frozen=True, eq=False)
class Draws:
    """A run's data. index: all rows of its directories. is_chosen, is_planned: bool [n].

    Chosen are the rows of its subset; planned, those of them that were not refused beforehand.
    rows, steps: int64 [m], every draw of the run in order. epochs: int64 [m]. warnings: sentences.
    """

    run: FinishedRun
    index: Index
    is_chosen: NDArray[np.bool_]
    is_planned: NDArray[np.bool_]
    reasons: dict[int, str]
    """Of each row that was dropped, why."""
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
        reasons = _rows_dropped(index, dropped)
        refused = _rows_dropped(index, dropped and _before_planning(dropped))
        is_planned = is_chosen.copy()
        is_planned[list(refused)] = False
        drawn = _drawn(run, index.columns(), np.flatnonzero(is_planned))
        warnings = _doubts(run, index, np.flatnonzero(is_planned), drawn[2], dropped)
        return cls(run, index, is_chosen, is_planned, reasons, *drawn, warnings)

    def of_row(self, row: int) -> list[Draw]:
        """Return when a row was drawn, also if it was dropped then."""
        at = np.flatnonzero(self.rows == row)
        return [Draw(int(self.epochs[i]), int(self.steps[i])) for i in at]

    def by_source(self) -> dict[str, dict[str, int]]:
        """Return for each source its rows, those chosen, draws, and draws that were dropped."""
        index, dropped = self.index, np.isin(self.rows, list(self.reasons))
        drawn_from = index.source[self.rows]
        counted = {
            "rows": index.source,
            "chosen": index.source[self.is_chosen],
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
    return dropped.filter(pc.equal(dropped.column("step"), _BEFORE_PLANNING))


def _rows_dropped(index: Index, dropped: pa.Table | None) -> dict[int, str]:
    """Return row -> reason by a run's table of dropped rows; copies of a sample share it."""
    found: dict[int, str] = {}
    if not dropped:
        return found
    directory = np.array(index.directory, object)[index.shard]
    for told in set(dropped.column("directory").to_pylist()):
        of, name = dropped.filter(pc.equal(dropped.column("directory"), told)), paths.absolute(told)
        uids = of.column("uid").to_numpy()
        reasons = dict(zip(uids.tolist(), of.column("reason").to_pylist(), strict=True))
        rows = np.flatnonzero((directory == name) & np.isin(index.uid, uids))
        found |= {int(row): reasons[int(index.uid[row])] for row in rows}
    return found


def _taken(columns: Columns, rows: Ints) -> Columns:
    arrays = {n: getattr(columns, n)[rows] for n in ("identity", "tokens", "num_images", "source")}
    return replace(columns, **arrays)


def _drawn(run: FinishedRun, columns: Columns, rows: Ints) -> tuple[Ints, Ints, Ints]:
    """Return all draws in order: rows of the index, epochs and steps, int64 [m] each."""
    planned, plan = _taken(columns, rows), run.config.plan
    found: list[tuple[Ints, Ints, Ints]] = []
    before = 0
    for epoch in range(run.config.epochs):
        seed = run.config.seed
        steps = num_steps(planned, seed=seed, epoch=epoch, config=plan)
        drawn = order(planned, seed=seed, epoch=epoch, config=plan)
        drawn = drawn[: steps * plan.global_batch_size]
        step = before + np.arange(len(drawn)) // plan.global_batch_size
        found.append((rows[drawn], np.full(len(drawn), epoch), step))
        before += steps
    joined = [np.concatenate(column) for column in zip(*found, strict=True)]
    return joined[0], joined[1], joined[2]


def _doubts(
    run: FinishedRun, index: Index, rows: Ints, steps: Ints, dropped: pa.Table | None
) -> tuple[str, ...]:
    """Return sentences on what speaks against the plan that was made again."""
    doubts = []
    columns = _taken(index.columns(), rows)
    hashed = plan_hash(columns, seed=run.config.seed, config=run.config.plan)
    if hashed != run.identity["plan"]:
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
