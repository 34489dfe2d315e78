"""The cluster stage: centroids (trained or given), then every row's nearest one, exactly.

Definition: the row's cluster is argmin_k of exact |x - c_k|^2, ties to the smallest k. Centroids
lie on the grid 2^-24, which makes the float64 distance exact and independent of machine and order.
"""

from __future__ import annotations

import hashlib
from typing import Any, ClassVar, Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from pydantic import Field, model_validator

from curate.vectors import assign, exact, kmeans
from curate.vectors.vector_parts import VectorBlock, blocks_of, gather
from manifests import ledger, paths, store
from manifests.errors import UserError
from manifests.schemas import ASSIGNMENTS, conform, empty
from manifests.strict import Strict
from manifests.work import Item, Output, View, part_name

CENTROIDS = "centroids.npy"
ROWS_PER_READ = 1 << 16
"""Rows copied out of an npy file at a time: 100 MB at 768 dimensions."""


class ClusterConfig(Strict):
    """How rows are grouped before near-duplicates are looked for within each group."""

    location_fields: ClassVar[frozenset[str]] = frozenset({"centroids"})

    num_clusters: int | None = Field(default=None, ge=1)
    """Number of centroids; the paper uses 100,000 for 2 billion rows."""
    centroids: str | None = None
    """An npy file [k, d] of finished centroids; nothing is trained then."""
    iterations: int = Field(default=20, ge=1)
    """Lloyd iterations of FAISS k-means."""
    rows_per_centroid: int = Field(default=256, ge=1)
    """Training rows per centroid, a seeded sample of all parts."""
    num_threads: int = Field(default=2, ge=1)
    """Threads of the training; fixed here, not by the machine, for the same rounding everywhere."""

    @model_validator(mode="after")
    def _says_which_clusters(self) -> Self:
        if self.num_clusters is None and self.centroids is None:
            raise ValueError(
                "one of num_clusters and centroids must be set, e.g. num_clusters: 1000 for 20 "
                "million rows"
            )
        return self


def identity(config: ClusterConfig) -> str | None:
    """Return the digest of given centroids: another file is another input."""
    if config.centroids is None:
        return None
    return hashlib.sha256(_given(config.centroids, config.num_clusters).tobytes()).hexdigest()


def plan_training(view: View) -> list[Item]:
    """One item: the centroids."""
    return [Item("centroids")]


def train(view: View, item: Item) -> Output:
    """Return the centroids, float32 [k, d] on the grid 2^-24."""
    config = ClusterConfig.model_validate(view.config)
    if config.centroids is not None:
        centroids = _given(config.centroids, config.num_clusters)
        return Output(files={CENTROIDS: centroids}, notes={"clusters": len(centroids)})
    assert config.num_clusters is not None, "the config was checked when it was read"
    uids = _training_uids(view, config)
    if not len(uids):
        raise UserError(
            "No row is left to cluster.",
            "The stages before dropped all of them; `warren funnel` says why.",
            "Loosen their limits.",
        )
    sample = gather(view, uids)
    centroids = kmeans.train_centroids(
        sample,
        num_clusters=config.num_clusters,
        iterations=config.iterations,
        seed=view.seed,
        num_threads=config.num_threads,
    )
    notes = {"clusters": len(centroids), "training_rows": len(sample)}
    return Output(files={CENTROIDS: centroids}, notes=notes)


def plan(view: View) -> list[Item]:
    """One item per source part."""
    return [Item(part_name(one["part"]), {"part": one["part"]}) for one in view.parts()]


def work(view: View, item: Item) -> Output:
    """Assign one part's rows."""
    part = item.payload["part"]
    centroids = np.asarray(store.read_array(paths.join(view.path, CENTROIDS)))
    kept = view.kept_in_part(part)
    tables = [_assign_block(block, kept, centroids) for block in blocks_of(view, part)]
    table = pa.concat_tables([empty(ASSIGNMENTS), *tables])
    uids = table.column("uid").to_numpy()
    return Output(
        files={f"{item.name}.parquet": table},
        verdicts=ledger.verdicts("cluster", uids, reasons=[""] * len(uids)),
    )


def _training_uids(view: View, config: ClusterConfig) -> npt.NDArray[np.uint64]:
    uids = view.all_kept()
    wanted = (config.num_clusters or 0) * config.rows_per_centroid
    return uids[exact.sample_smallest(uids, wanted, view.seed)]


def _assign_block(
    block: VectorBlock, kept: npt.NDArray[np.uint64], centroids: npt.NDArray[np.float32]
) -> pa.Table:
    uids = block.uids[np.isin(block.uids, kept)]
    _check_width(block.images, centroids)
    found = [
        assign.assign(block.take(uids[at : at + ROWS_PER_READ]), centroids)
        for at in range(0, len(uids), ROWS_PER_READ)
    ]
    columns: dict[str, Any] = {"uid": uids}
    for name in ("cluster", "d2", "centroid_cosine"):
        kind = ASSIGNMENTS.field(name).type.to_pandas_dtype()
        columns[name] = np.concatenate([np.zeros(0, kind), *(getattr(one, name) for one in found)])
    return conform(pa.table(columns), ASSIGNMENTS)


def _check_width(images: npt.NDArray[np.float16], centroids: npt.NDArray[np.float32]) -> None:
    if images.shape[1] != centroids.shape[1]:
        raise UserError(
            f"The centroids have {centroids.shape[1]} columns, the embeddings {images.shape[1]}.",
            "They come from different models.",
            "Give centroids made from these embeddings.",
        )


def _given(path: str, num_clusters: int | None) -> npt.NDArray[np.float32]:
    try:
        array = np.asarray(store.read_array(path))
    except (OSError, ValueError) as error:
        raise UserError(
            f"cluster.centroids {path!r} cannot be read.",
            f"{error}.",
            "Give the path of an npy file, relative to the folder where the command runs.",
        ) from error
    if array.ndim != 2 or array.dtype.kind != "f" or not np.isfinite(array).all() or not len(array):
        raise UserError(
            f"cluster.centroids {path!r} is {array.dtype} {array.shape}.",
            "Centroids are a finite float array [clusters, dimensions].",
            "Give another file.",
        )
    if num_clusters not in (None, len(array)):
        raise UserError(
            f"cluster.num_clusters is {num_clusters}, but {path!r} has {len(array)} rows.",
            "With given centroids the file decides.",
            "Remove num_clusters.",
        )
    return np.asarray(exact.round_to_grid(array), dtype=np.float32)
