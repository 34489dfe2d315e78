"""The dedup stage: one row of every near-duplicate component stays.

The forest is cut at the threshold, which takes no embedding: only `inner_middle`, which compares
rows with their component's mean, reads them. Items are the forest's buckets. Where rows are
compared across clusters (ghosts), components are global, and one item does them all, with about 100
bytes a row.

    part-00000.parquet        VERDICTS; a dropped row's score is the weakest similarity on the
                              strongest chain of near-duplicates to the row that stays in its place
    kept/part-00000.parquet   SELECTABLE, the rows that stay
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from curate.dedup_config import DedupConfig, ForestConfig
from curate.duplicates.forest import Forest
from curate.duplicates.forest_stage import (
    Edges,
    finished_buckets,
    local_forest,
    read_edges,
    strongest,
)
from curate.duplicates.judge import Judged, judge
from curate.rows.select import Selectable
from curate.rows.selectable_rows import KEPT, table_of
from curate.vectors import vector_parts
from curate.vectors.grouped import Grouped, Members
from manifests import ledger, paths
from manifests.errors import UserError
from manifests.work import Item, Output, View, part_name

__all__ = ["DedupConfig", "plan", "work"]

REASON = "near_duplicate"


def plan(view: View) -> list[Item]:
    """One item per bucket of the forest, or one for all of them where there are ghosts."""
    if "cluster" not in view.before:
        raise UserError(
            "dedup needs clusters.",
            "Rows are compared within their cluster; the recipe has no cluster section.",
            "Add e.g. cluster: {num_clusters: auto}.",
        )
    found = finished_buckets(view.before["forest"])
    if not _has_ghosts(view):
        return [Item(one["name"], _payload([one])) for one in found]
    return [Item(part_name(0), _payload(found))]


def work(view: View, item: Item) -> Output:
    """Judge the rows of some clusters."""
    config = DedupConfig.model_validate(view.config)
    members = _members(view, item)
    floor = ForestConfig.of(config).floor
    forest = local_forest(members["uid"], _edges(view, item.payload["parts"]), floor)
    labels = forest.cut(config.similarity_above)
    judged = judge(
        labels,
        np.ascontiguousarray(members["d2"]),
        np.ascontiguousarray(members["uid"]),
        keep=config.keep,
        clip_scores=members["clip_score"],
        rows=vector_parts.gather(view, members["uid"]) if config.keep == "inner_middle" else None,
    )
    notes = {"components": int(judged.keep.sum()), "largest_component": _largest(labels)}
    return Output(
        {f"{KEPT}/{item.name}.parquet": _selectable(members[judged.keep])},
        _verdicts(config, members["uid"], judged, forest),
        notes=notes,
    )


def _payload(found: list[dict[str, Any]]) -> dict[str, Any]:
    first = min((one["first_cluster"] for one in found), default=0)
    end = max((one["end_cluster"] for one in found), default=0)
    return {"first_cluster": first, "end_cluster": end, "parts": [one["name"] for one in found]}


def _has_ghosts(view: View) -> bool:
    return DedupConfig.model_validate(view.config).ghost_margin is not None


def _members(view: View, item: Item) -> Members:
    """Return the own rows of the item's clusters, by uid."""
    groups = Grouped.at(view.before["cluster"].path)
    found = groups.members(item.payload["first_cluster"], item.payload["end_cluster"])
    own = found[~found["is_ghost"]]
    return np.asarray(own[np.argsort(own["uid"])])


def _edges(view: View, parts: list[str]) -> Edges:
    folder = view.before["forest"].path
    kinds = ("", "cross/") if _has_ghosts(view) else ("",)
    found = [read_edges(paths.join(folder, f"{kind}{p}.parquet")) for kind in kinds for p in parts]
    none = (np.empty(0, np.uint64), np.empty(0, np.uint64), np.empty(0))
    uid_a, uid_b, similarity = (np.concatenate(one) for one in zip(none, *found, strict=True))
    return (
        strongest((uid_a, uid_b, similarity)) if _has_ghosts(view) else (uid_a, uid_b, similarity)
    )


def _verdicts(
    config: DedupConfig, uids: npt.NDArray[np.uint64], judged: Judged, forest: Forest
) -> pa.Table:
    links = forest.weakest_links(config.similarity_above, judged.keep)
    return ledger.verdicts(
        "dedup",
        uids,
        reasons=np.where(judged.keep, "", REASON),
        scores=np.where(judged.keep, np.nan, links),
        cutoffs=np.where(judged.keep, np.nan, config.similarity_above),
        evidence=pa.array(uids[judged.survivor], pa.uint64(), mask=judged.keep),
    )


def _selectable(kept: Members) -> pa.Table:
    names = ("uid", "clip_score", "centroid_cosine", "cluster")
    rows = Selectable(*(np.ascontiguousarray(kept[name]) for name in names))
    return table_of(rows, has_clusters=True)


def _largest(labels: npt.NDArray[np.int64]) -> int:
    return int(np.bincount(labels).max()) if len(labels) else 0
