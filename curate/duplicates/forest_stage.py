"""The forest stage: which rows are alike, found once for every threshold above the floor.

Items are buckets: runs of consecutive clusters of about ROWS_PER_BUCKET rows. A cluster that is
larger is cut into blocks of BLOCK_ROWS rows, and every pair of blocks is an item of its own, so
that no cluster holds up the stage; a second phase merges what they found. Neither cut changes the
result, which is unique: ties go to the smaller (uid_a, uid_b).

    part-00000.parquet         FOREST, edges between rows of one cluster
    cross/part-00000.parquet   FOREST, edges between the rows of a cluster and its ghosts
    pieces/...                 what the block pairs of a large cluster found
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from curate.dedup_config import DedupConfig, ForestConfig
from curate.duplicates.forest import Forest, kruskal, spanning_forest
from curate.duplicates.regions import Regions
from curate.duplicates.small_clusters import MOST_ROWS, pairs_within
from curate.vectors.exact import Float16Rows
from curate.vectors.grouped import Grouped, Members, starts_of
from curate.vectors.products import own_device
from manifests import ledger, paths, store
from manifests.schemas import FOREST, conform
from manifests.store import Content
from manifests.strict import Strict
from manifests.work import Item, Output, StageDir, View, part_name

ROWS_PER_BUCKET = 1 << 17
MOST_BUCKETS = 1024
BLOCK_ROWS = 1 << 16
MOST_BLOCKS = 48

Uint64s: TypeAlias = npt.NDArray[np.uint64]
Ints: TypeAlias = npt.NDArray[np.int64]
Edges: TypeAlias = tuple[Uint64s, Uint64s, npt.NDArray[np.float64]]
_NO_EDGES: Edges = (np.empty(0, np.uint64), np.empty(0, np.uint64), np.empty(0))


@dataclass(frozen=True, slots=True)
class Bucket:
    """Clusters first..end-1, and whether it is one that is cut into blocks."""

    number: int
    first: int
    end: int
    num_blocks: tuple[int, int]  # of own rows and of ghosts; (0, 0) when it is not cut

    @property
    def name(self) -> str:
        """Its item, and its part."""
        return part_name(self.number)

    @property
    def payload(self) -> dict[str, Any]:
        """What its items must know."""
        return {"first_cluster": self.first, "end_cluster": self.end}


def forest_of(section: DedupConfig, sections: Mapping[str, Strict]) -> ForestConfig:
    """Return the stage's config: which threshold is cut at is not its business."""
    return ForestConfig.of(section)


def plan(view: View) -> list[Item]:
    """One item per bucket; per pair of blocks for a cluster that is cut."""
    sizes = _groups(view).sizes()
    items: list[Item] = []
    for bucket in buckets(sizes):
        if any(bucket.num_blocks):
            items += _block_items(bucket, sizes[bucket.first])
        else:
            own, ghosts = sizes[bucket.first : bucket.end].astype(float).T
            cost = float((own * (own / 2 + ghosts)).sum())
            items.append(Item(bucket.name, bucket.payload, cost))
    return items


def work(view: View, item: Item) -> Output:
    """Return the forest of a bucket, or what one pair of blocks adds to it."""
    if "top" in item.payload:
        return _work_on_blocks(view, item)
    config = ForestConfig.model_validate(view.config)
    members, rows = _groups(view).read(item.payload["first_cluster"], item.payload["end_cluster"])
    clusters = list(starts_of(members).values())
    within = _within(config, members, rows, [slice(start, ghosts) for start, ghosts, _ in clusters])
    cross = [
        _alike(config, members[start:end], rows[start:end])
        for start, ghosts, end in clusters
        if start < ghosts < end
    ]
    own = np.sort(members["uid"][~members["is_ghost"]])
    return _output(config, item.name, own, within, _joined(cross))


def plan_merges(view: View) -> list[Item]:
    """One item per cluster that was cut."""
    sizes = _groups(view).sizes()
    cut = [bucket for bucket in buckets(sizes) if any(bucket.num_blocks)]
    return [
        Item(
            bucket.name,
            bucket.payload
            | {"pieces": [i.name for i in _block_items(bucket, sizes[bucket.first])]},
            cost=float(sizes[bucket.first].sum()),
        )
        for bucket in cut
    ]


def merge(view: View, item: Item) -> Output:
    """Return the forest of a large cluster from those of its pairs of blocks."""
    config = ForestConfig.model_validate(view.config)
    found: dict[str, list[Edges]] = {"within": [], "cross": []}
    for name in item.payload["pieces"]:
        kind = "cross" if "ghost" in name else "within"
        found[kind].append(read_edges(paths.join(view.path, f"pieces/{name}.parquet")))
    members = _groups(view).members(item.payload["first_cluster"], item.payload["end_cluster"])
    own = np.sort(members["uid"][~members["is_ghost"]])
    within, cross = (strongest(_joined(found[kind])) for kind in ("within", "cross"))
    return _output(config, item.name, own, within, cross)


def buckets(sizes: Ints) -> list[Bucket]:
    """Return the buckets of clusters with sizes int64 [K, 2] (own rows, ghosts)."""
    rows = sizes.sum(axis=1)
    limit = max(ROWS_PER_BUCKET, -(-int(rows.sum()) // MOST_BUCKETS))
    found: list[Bucket] = []
    first, held = 0, 0
    for cluster, size in enumerate(rows.tolist()):
        if size > limit and first < cluster:
            found.append(Bucket(len(found), first, cluster, (0, 0)))
            first, held = cluster, 0
        held += size
        if held >= limit or cluster == len(rows) - 1:
            blocks = _num_blocks(sizes[cluster]) if size > limit else (0, 0)
            found.append(Bucket(len(found), first, cluster + 1, blocks))
            first, held = cluster + 1, 0
    return found


def finished_buckets(forest: StageDir) -> list[dict[str, Any]]:
    """Return the payload of every bucket of a finished forest, with its `name`."""
    markers = [one for one in forest.markers() if one["item"].startswith("part-")]
    return [{"name": one["item"], **one["payload"]} for one in markers]


def read_edges(path: str) -> Edges:
    """Return (uid_a, uid_b, similarity) of a FOREST table."""
    table = store.read_table(path)
    uid_a, uid_b, similarity = (column.to_numpy() for column in table.columns)
    return uid_a, uid_b, similarity


def strongest(edges: Edges) -> Edges:
    """Return the maximum spanning forest of some edges, by (uid_a, uid_b)."""
    uids, ends = np.unique(np.concatenate(edges[:2]), return_inverse=True)
    a, b = ends.reshape(2, -1)
    kept = kruskal(len(uids), a, b, edges[2])
    kept = kept[np.lexsort((b[kept], a[kept]))]
    return edges[0][kept], edges[1][kept], edges[2][kept]


def local_forest(uids: Uint64s, edges: Edges, floor: float) -> Forest:
    """Return edges between uids as a forest of positions. Args: uids: ascending, all ends."""
    a, b = (np.searchsorted(uids, side) for side in edges[:2])
    order = np.lexsort((b, a))
    return Forest(len(uids), floor, a[order], b[order], edges[2][order])


def _work_on_blocks(view: View, item: Item) -> Output:
    config, what = ForestConfig.model_validate(view.config), item.payload
    groups, cluster = _groups(view), what["first_cluster"]
    tops = groups.block(cluster, *what["top"], ghosts=False)
    if what["top"] == what["left"] and not what["is_ghost"]:
        edges = _alike(config, *tops)
    else:
        lefts = groups.block(cluster, *what["left"], ghosts=what["is_ghost"])
        members, rows = (np.concatenate(pair) for pair in zip(tops, lefts, strict=True))
        is_right = np.arange(len(members)) >= len(tops[0])
        edges = _alike(config, members, rows, is_right=is_right)
    return Output({f"pieces/{item.name}.parquet": _table(edges)})


def _within(
    config: ForestConfig, members: Members, rows: Float16Rows, clusters: list[slice]
) -> Edges:
    """Return the forests of clusters, each a run of own rows in uid order; small ones together."""
    small = [one for one in clusters if one.stop - one.start <= MOST_ROWS]
    pairs = pairs_within(rows, small, config.floor, device=own_device())
    kept = kruskal(len(rows), pairs.row_a, pairs.row_b, pairs.similarity)
    uids, a, b = members["uid"], pairs.row_a[kept], pairs.row_b[kept]
    others = [one for one in clusters if one.stop - one.start > MOST_ROWS]
    others += [small[number] for number in pairs.dense]
    found = [_alike(config, members[one], rows[one]) for one in others]
    return _joined([(uids[a], uids[b], pairs.similarity[kept]), *found])


def _alike(
    config: ForestConfig,
    members: Members,
    rows: Float16Rows,
    *,
    is_right: npt.NDArray[np.bool_] | None = None,
) -> Edges:
    """Return the forest of all pairs of some rows; where there are two sides, of pairs across.

    Ghosts are a side. Ties go to the smaller uid, so rows must be in uid order.
    """
    is_right = members["is_ghost"] if is_right is None and members["is_ghost"].any() else is_right
    uids = members["uid"]
    if is_right is None:
        found = spanning_forest(rows, config.floor, device=own_device())
    else:
        order = np.argsort(uids)
        uids, rows, is_right = uids[order], rows[order], is_right[order]
        where = Regions.of(np.zeros(len(uids), np.bool_), is_right)
        found = spanning_forest(rows, config.floor, regions=where, device=own_device())
    return uids[found.row_a], uids[found.row_b], found.similarity


def _output(config: ForestConfig, name: str, own: Uint64s, within: Edges, cross: Edges) -> Output:
    files: dict[str, Content] = {f"{name}.parquet": _table(within)}
    if config.has_ghosts:
        files[f"cross/{name}.parquet"] = _table(cross)
    notes = {"edges": len(within[0]), "cross_edges": len(cross[0])}
    verdicts = ledger.verdicts("forest", own, reasons=[""] * len(own))
    return Output(files, verdicts, notes=notes)


def _block_items(bucket: Bucket, size: Ints) -> Iterator[Item]:
    """Yield an item per pair of blocks of own rows, and per block of own rows and of ghosts."""
    own, ghosts = (
        _cuts(int(rows), blocks) for rows, blocks in zip(size, bucket.num_blocks, strict=True)
    )
    for at, top in enumerate(own):
        for other, left in enumerate(own[at:], start=at):
            yield _block_item(bucket, top, left, f"{at:03d}-{other:03d}", is_ghost=False)
        for other, left in enumerate(ghosts):
            yield _block_item(bucket, top, left, f"{at:03d}-ghost-{other:03d}", is_ghost=True)


def _block_item(
    bucket: Bucket, top: tuple[int, int], left: tuple[int, int], name: str, *, is_ghost: bool
) -> Item:
    where = {"top": list(top), "left": list(left), "is_ghost": is_ghost}
    pairs = float(top[1] - top[0]) * (left[1] - left[0])
    is_triangle = top == left and not is_ghost
    return Item(
        f"blocks-{bucket.number:05d}-{name}",
        bucket.payload | where,
        cost=pairs / 2 if is_triangle else pairs,
    )


def _num_blocks(size: Ints) -> tuple[int, int]:
    """Return into how many blocks a cluster's own rows and its ghosts are cut."""
    rows = max(BLOCK_ROWS, -(-int(size.max()) // MOST_BLOCKS))
    return -(-int(size[0]) // rows), -(-int(size[1]) // rows)


def _cuts(num_rows: int, num_blocks: int) -> list[tuple[int, int]]:
    ends = [num_rows * at // max(1, num_blocks) for at in range(num_blocks + 1)]
    return list(zip(ends[:-1], ends[1:], strict=True))


def _joined(edges: list[Edges]) -> Edges:
    columns = zip(_NO_EDGES, *edges, strict=True)
    uid_a, uid_b, similarity = (np.concatenate(column) for column in columns)
    return uid_a, uid_b, similarity


def _table(edges: Edges) -> pa.Table:
    order = np.lexsort((edges[1], edges[0]))
    columns = zip(FOREST.names, edges, strict=True)
    return conform(pa.table({name: column[order] for name, column in columns}), FOREST)


def _groups(view: View) -> Grouped:
    return Grouped.at(view.before["cluster"].path)
