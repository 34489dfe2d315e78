"""The rows to select from, part by part, with the figures that rank them.

After dedup a part is one of its items, whose `kept/` table has all that is needed; decontaminate
hands these figures on, by source part. Otherwise a part is a source part, and its figures come from
the tables of that part alone. Nothing here ever joins over all rows.
"""

from __future__ import annotations

from collections.abc import Mapping
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
from manifests.schemas import SELECTABLE, UID_ROW_BITS, conform, empty
from manifests.work import StageDir, View, part_name

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
        if _has_figures(self.view):
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
    """Return the parts in order: those of `kept/` where there is one, or the source parts."""
    if not _has_figures(view):
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


def kept_figures(view: View, part: Mapping[str, Any]) -> pa.Table:
    """Return the SELECTABLE rows of a source part that the stage before kept, by ascending uid.

    Only after dedup or select, whose parts are clusters: of each of their `kept/` tables, which are
    by uid, the row groups that hold any are read. Args: part: one of `view.parts()`.
    """
    first = int(part["first_shard_index"])
    ends = first << UID_ROW_BITS, (first + len(part["shards"])) << UID_ROW_BITS
    found = [store.read_range(path, "uid", *ends) for path in view.previous.files(KEPT)]
    return conform(pa.concat_tables([empty(SELECTABLE), *found]).sort_by("uid"), SELECTABLE)


def has_parts_of_its_own(stage: StageDir) -> bool:
    """Tell whether a stage's parts may be other than the source's."""
    return stage.stage in ("dedup", "select")


def _has_figures(view: View) -> bool:
    """Tell whether the stage before left SELECTABLE tables of what it kept."""
    if view.previous.stage == "decontaminate":
        return "dedup" in view.before
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
