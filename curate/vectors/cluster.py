"""The cluster stage: every row's nearest centroid, exactly, and the rows laid down by cluster.

Definition: the row's cluster is argmin_k of exact |x - c_k|^2, ties to the smallest k. Centroids
lie on the grid 2^-24, which makes the float64 distance exact and independent of machine and order.
Where near-duplicates are looked for afterwards, the same pass over the embeddings finds the ghosts
and writes the rows in order of their cluster (grouped).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from curate.dedup_config import DedupConfig
from curate.vectors import cluster_quality, grouped, lloyd
from curate.vectors.assign import Assigned, Centroids, assign, prepare
from curate.vectors.centroids import CENTROIDS, ClusterConfig, is_trained_on
from curate.vectors.ghosts import nearest_and_ghosts
from curate.vectors.vector_parts import VectorBlock, blocks_of
from manifests import ledger, paths, store
from manifests.errors import UserError
from manifests.schemas import ASSIGNMENTS, conform, empty
from manifests.store import Content
from manifests.strict import Strict
from manifests.work import Item, Output, View, part_name

ROWS_PER_STEP = 1 << 16


class AssignConfig(Strict):
    """What is done with the nearest centroids."""

    is_grouped: bool
    """Whether the rows are also written in order of their cluster."""
    ghost_margin: float | None = None
    """How near a border rows are ghosts; see DedupConfig."""
    ghost_cap: int | None = None
    """In how many clusters."""


def assignment(section: ClusterConfig, sections: Mapping[str, Strict]) -> AssignConfig:
    """Return the stage's config: how the centroids came about is not its business."""
    dedup = sections.get("dedup")
    if not isinstance(dedup, DedupConfig):
        return AssignConfig(is_grouped=False)
    cap = None if dedup.ghost_margin is None else dedup.ghost_cap
    return AssignConfig(is_grouped=True, ghost_margin=dedup.ghost_margin, ghost_cap=cap)


def plan(view: View) -> list[Item]:
    """One item per source part."""
    return [Item(part_name(one["part"]), {"part": one["part"]}) for one in view.parts()]


def work(view: View, item: Item) -> Output:
    """Assign one part's rows."""
    part = item.payload["part"]
    path = paths.join(view.before["centroids"].path, CENTROIDS)
    centroids = np.asarray(store.read_array(path))
    kept = view.kept_in_part(part)
    tables = [empty(ASSIGNMENTS)]
    files: dict[str, Content] = {}
    for number, block in enumerate(blocks_of(view, part)):
        table, more = _block(view, block, kept, centroids, f"{item.name}-{number:03d}")
        tables.append(table)
        files |= more
    table = pa.concat_tables(tables)
    uids = table.column("uid").to_numpy()
    return Output(
        files=files | {f"{item.name}.parquet": table},
        verdicts=ledger.verdicts("cluster", uids, reasons=[""] * len(uids)),
    )


def plan_quality(view: View) -> list[Item]:
    """One item: how good the clusters are."""
    return [Item("quality")]


def quality(view: View, item: Item) -> Output:
    """Return the sizes of the clusters and the objective on rows that were not trained on."""
    centroids = store.length_of(paths.join(view.before["centroids"].path, CENTROIDS))
    tables = (store.read_table(path, ["uid", "cluster", "d2"]) for path in view.own.files())
    figures = cluster_quality.measure(
        tables,
        num_clusters=centroids,
        is_trained_on=is_trained_on(view.before["centroids"], view.seed),
    )
    return Output(notes=figures)


def _block(
    view: View,
    block: VectorBlock,
    kept: npt.NDArray[np.uint64],
    centroids: npt.NDArray[np.float32],
    name: str,
) -> tuple[pa.Table, dict[str, Content]]:
    """Return the ASSIGNMENTS of one npy file's rows, and their group files if wanted."""
    config = AssignConfig.model_validate(view.config)
    at = np.flatnonzero(np.isin(block.uids, kept))
    _check_width(block.images, centroids)
    if not len(at):
        return empty(ASSIGNMENTS), {}
    rows = np.array(block.images)  # one read from end to end: what follows is random access
    ready = prepare(centroids, lloyd.on_own_device(rows[:: max(1, len(rows) // ROWS_PER_STEP)]))
    row = block.rows[at]
    found, ghost_at, ghost_of = _nearest(rows, row, ready, config)
    members = np.zeros(len(at), grouped.MEMBER)
    members["uid"], members["clip_score"] = block.uids[at], block.clip_scores[at]
    for column in ("cluster", "d2", "centroid_cosine"):
        members[column] = getattr(found, column)
    table = _table(members, ghost_at, ghost_of, has_ghosts=config.ghost_margin is not None)
    if not config.is_grouped:
        return table, {}
    ghosts = members[ghost_at]
    ghosts["cluster"], ghosts["is_ghost"] = ghost_of, True
    both = np.concatenate([members, ghosts])
    return table, grouped.content(
        name, rows, row[np.append(np.arange(len(at)), ghost_at)], both, len(centroids)
    )


def _nearest(
    rows: npt.NDArray[np.float16],
    row: npt.NDArray[np.int64],
    ready: Centroids,
    config: AssignConfig,
) -> tuple[Assigned, npt.NDArray[np.int64], npt.NDArray[np.uint32]]:
    """Return the nearest centroids of rows[row], and (position, cluster) of every ghost."""
    found: list[Assigned] = []
    ghosts = [(np.empty(0, np.int64), np.empty(0, np.uint32))]
    for start in range(0, len(row), ROWS_PER_STEP):
        some = lloyd.on_own_device(rows[row[start : start + ROWS_PER_STEP]])
        if config.ghost_margin is None:
            found.append(assign(some, ready))
            continue
        own, at, cluster = nearest_and_ghosts(
            some, ready, margin=config.ghost_margin, cap=config.ghost_cap
        )
        found.append(own)
        ghosts.append((at + start, cluster))
    at, cluster = (np.concatenate(column) for column in zip(*ghosts, strict=True))
    return Assigned.joined(found), at, cluster


def _table(
    members: grouped.Members,
    ghost_at: npt.NDArray[np.int64],
    ghost_of: npt.NDArray[np.uint32],
    *,
    has_ghosts: bool,
) -> pa.Table:
    columns: dict[str, Any] = {
        name: np.ascontiguousarray(members[name])
        for name in ("uid", "cluster", "d2", "centroid_cosine")
    }
    if has_ghosts:
        ends = np.searchsorted(ghost_at, np.arange(len(members) + 1))
        columns["ghosts"] = pa.ListArray.from_arrays(pa.array(ends, pa.int32()), ghost_of)
    return conform(pa.table(columns), ASSIGNMENTS)


def _check_width(images: npt.NDArray[np.float16], centroids: npt.NDArray[np.float32]) -> None:
    if images.shape[1] != centroids.shape[1]:
        raise UserError(
            f"The centroids have {centroids.shape[1]} columns, the embeddings {images.shape[1]}.",
            "They come from different models.",
            "Give centroids made from these embeddings.",
        )
