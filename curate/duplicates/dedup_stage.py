"""The dedup stage: one row of every near-duplicate component stays, decided within each cluster.

Items are runs of consecutive clusters of about `ROWS_PER_ITEM` rows; how clusters are packed into
items does not change the result.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import numpy as np
import numpy.typing as npt
import polars as pl
import pyarrow as pa
from pydantic import Field

from curate.duplicates.components import components
from curate.duplicates.judge import judge, survivor_similarity
from curate.rows.select import Selectable
from curate.rows.selectable_rows import KEPT, table_of
from curate.vectors import vector_parts
from manifests import ledger, store
from manifests.errors import UserError
from manifests.strict import Strict
from manifests.work import Item, Output, View, part_name

ROWS_PER_ITEM = 1 << 17
REASON = "near_duplicate"

Float64s = npt.NDArray[np.float64]
Uint64s = npt.NDArray[np.uint64]


class DedupConfig(Strict):
    """What counts as a near-duplicate, and which one stays."""

    similarity_above: float = Field(default=0.86, ge=-1.0, le=1.0)
    """Rows of one cluster whose exact similarity is above this (strictly) are joined; the paper's
    value, with ViT-L/14 embeddings."""
    keep: Literal["middle", "far", "near", "clip_max", "inner_middle"] = "middle"
    """Which row of a component stays, by distance to the cluster's centroid: the upper median (the
    paper's), the farthest, the nearest; or the largest clip score; or the median by distance to the
    component's mean (rounded, so the one policy that is not exact)."""


def plan(view: View) -> list[Item]:
    """Items of consecutive clusters; a cluster is never cut."""
    if "cluster" not in view.before:
        raise UserError(
            "dedup needs clusters.",
            "Rows are compared within their cluster; the recipe has no cluster section.",
            "Add e.g. cluster: {num_clusters: 64}.",
        )
    sizes = _cluster_sizes(view)
    cuts = _cuts(sizes)
    return [
        Item(
            part_name(number),
            {"first_cluster": int(first), "end_cluster": int(end)},
            cost=float(np.square(sizes[first:end].astype(float)).sum()),
        )
        for number, (first, end) in enumerate(cuts)
    ]


def work(view: View, item: Item) -> Output:
    """Judge the rows of some clusters; a dropped row's score is its similarity to its survivor."""
    config = DedupConfig.model_validate(view.config)
    table = _members(view, item.payload["first_cluster"], item.payload["end_cluster"])
    uids = table["uid"].to_numpy()
    rows = vector_parts.gather(view, uids)
    scores = vector_parts.scores_of(view, uids)
    survivors, similarities = uids.copy(), np.full(len(uids), np.nan)
    for at in _by_cluster(table["cluster"].to_numpy()):
        lost_to, similarity = _judge_cluster(
            config,
            rows[at],
            uids[at],
            table["d2"].to_numpy()[at],
            scores[at],
        )
        survivors[at], similarities[at] = lost_to, similarity
    cosine, clusters = (table[name].to_numpy() for name in ("centroid_cosine", "cluster"))
    kept = Selectable(uids, scores, cosine, clusters).take(np.flatnonzero(survivors == uids))
    return Output(
        files={f"{KEPT}/{item.name}.parquet": table_of(kept, has_clusters=True)},
        verdicts=_verdicts(config, uids, survivors, similarities),
    )


def _judge_cluster(
    config: DedupConfig,
    rows: npt.NDArray[np.float16],
    uids: Uint64s,
    d2: Float64s,
    scores: Float64s,
) -> tuple[Uint64s, Float64s]:
    """Return (survivor's uid, similarity to it or NaN when the row is it) of each row."""
    labels = components(rows, config.similarity_above)
    judged = judge(labels, d2, uids, keep=config.keep, clip_scores=scores, rows=rows)
    return uids[judged.survivor], survivor_similarity(rows, judged)


def _verdicts(
    config: DedupConfig, uids: Uint64s, survivors: Uint64s, similarities: Float64s
) -> pa.Table:
    is_kept = survivors == uids
    return ledger.verdicts(
        "dedup",
        uids,
        reasons=np.where(is_kept, "", REASON),
        scores=similarities,
        cutoffs=np.where(is_kept, np.nan, config.similarity_above),
        evidence=pa.array(survivors, pa.uint64(), mask=is_kept),
    )


def _cluster_sizes(view: View) -> npt.NDArray[np.int64]:
    sizes = np.zeros(0, np.int64)
    for path in view.before["cluster"].files():
        clusters = store.read_table(path, ["cluster"]).column("cluster").to_numpy()
        sizes = _added(sizes, np.bincount(clusters))
    return sizes


def _added(left: npt.NDArray[np.int64], right: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    total = np.zeros(max(len(left), len(right)), np.int64)
    total[: len(left)] += left
    total[: len(right)] += right
    return total


def _cuts(sizes: npt.NDArray[np.int64]) -> Iterator[tuple[int, int]]:
    """Yield runs [first, end) of clusters, each closed once it holds ROWS_PER_ITEM rows."""
    first, held = 0, 0
    for cluster, size in enumerate(sizes):
        held += int(size)
        if held >= ROWS_PER_ITEM:
            yield first, cluster + 1
            first, held = cluster + 1, 0
    if held:
        yield first, len(sizes)


def _members(view: View, first: int, end: int) -> pl.DataFrame:
    """Return the ASSIGNMENTS of the rows in clusters [first, end), by ascending uid."""
    wanted = pl.col("cluster").is_between(first, end, closed="left")
    files = view.before["cluster"].files()
    tables = [pl.DataFrame(store.read_table(path)).filter(wanted) for path in files]
    return pl.concat(tables).sort("uid")


def _by_cluster(clusters: npt.NDArray[np.uint32]) -> Iterator[npt.NDArray[np.int64]]:
    """Yield the positions of each cluster's rows, uid order within."""
    order = np.argsort(clusters, kind="stable")
    yield from np.split(order, np.flatnonzero(np.diff(clusters[order])) + 1)
