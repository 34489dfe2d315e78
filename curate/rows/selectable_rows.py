"""The rows to select from, part by part, with the figures that rank them.

After dedup a part is one of its items, whose `kept/` table has all that is needed. Otherwise it is
a source part, and its figures come from the tables of that part alone. Nothing here ever joins over
all rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from curate.rows.select import Selectable
from curate.vectors import vector_parts
from manifests import paths, store
from manifests.errors import PartDamaged
from manifests.schemas import SELECTABLE, conform
from manifests.work import View, part_name

KEPT = "kept"
"""Folder of a stage's kept rows as SELECTABLE tables, one per item."""

Uint64s = npt.NDArray[np.uint64]


@dataclass(frozen=True, slots=True)
class SelectablePart:
    """One part of the rows that the stage before kept; cheap to make, read when loaded."""

    view: View
    number: int

    @property
    def name(self) -> str:
        """The part's file stem."""
        return part_name(self.number)

    def load(self) -> Selectable:
        """Return the rows by ascending uid; figures that no stage made are NaN or 0.

        Raises: PartDamaged when a table is missing, or lacks a row.
        """
        if _follows_dedup(self.view):
            folder = paths.join(self.view.previous.path, KEPT)
            return selectable_of(store.read_table(paths.join(folder, f"{self.name}.parquet")))
        uids = self.view.kept_in_part(self.number)
        known, scores = vector_parts.scores_in_part(self.view, self.number)
        clip = scores[_positions(uids, known)]
        if "cluster" not in self.view.before:
            nothing = np.full(len(uids), np.nan), np.zeros(len(uids), np.uint32)
            return Selectable(uids, clip, *nothing)
        path = paths.join(self.view.before["cluster"].path, f"{self.name}.parquet")
        table = store.read_table(path, ["uid", "cluster", "centroid_cosine"]).sort_by("uid")
        at = _positions(uids, table.column("uid").to_numpy())
        cosine, cluster = (table.column(c).to_numpy() for c in ("centroid_cosine", "cluster"))
        return Selectable(uids, clip, cosine[at], cluster[at])


def selectable_parts(view: View) -> list[SelectablePart]:
    """Return the parts in order: dedup's items when it is the stage before, or the source parts."""
    if not _follows_dedup(view):
        return [SelectablePart(view, int(part["part"])) for part in view.parts()]
    numbers = (paths.numeric_suffix(path) for path in view.previous.files(KEPT))
    return [SelectablePart(view, number) for number in numbers if number is not None]


def selectable_of(table: pa.Table) -> Selectable:
    """Return the rows of a SELECTABLE table; null becomes NaN, or cluster 0."""
    filled = (
        pc.fill_null(table.column(name), missing).to_numpy()
        for name, missing in (
            ("clip_score", np.nan),
            ("centroid_cosine", np.nan),
            ("cluster", np.uint32(0)),
        )
    )
    return Selectable(table.column("uid").to_numpy(), *filled)


def table_of(rows: Selectable, *, has_clusters: bool) -> pa.Table:
    """Return the SELECTABLE table of the rows; NaN, and clusters that no stage made, are null."""
    columns: dict[str, Any] = {
        "uid": rows.uid,
        "clip_score": pa.array(rows.clip_score, mask=np.isnan(rows.clip_score)),
        "centroid_cosine": pa.array(rows.centroid_cosine, mask=np.isnan(rows.centroid_cosine)),
        "cluster": pa.array(rows.cluster, mask=np.full(len(rows.uid), not has_clusters)),
    }
    return conform(pa.table(columns), SELECTABLE)


def _follows_dedup(view: View) -> bool:
    return view.previous.stage == "dedup"


def _positions(uids: Uint64s, known: Uint64s) -> npt.NDArray[np.intp]:
    """Return where in `known` (ascending) each uid is. Raises: PartDamaged for one that is not."""
    at = np.searchsorted(known, uids)
    is_there = np.zeros(len(uids), np.bool_)
    is_there[at < len(known)] = True
    is_there[is_there] = known[at[is_there]] == uids[is_there]
    if not is_there.all():
        raise PartDamaged(
            f"Row {uids[~is_there][0]} was kept, but the tables of its part do not have it."
        )
    return at
