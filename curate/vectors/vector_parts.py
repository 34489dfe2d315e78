"""The embedding rows of a part, whoever made them: the embed stage or the source itself."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from curate.sources import root_of, source_of
from curate.vectors.published import read_rows
from manifests import paths, store
from manifests.errors import UserError
from manifests.schemas import UID_ROW_BITS
from manifests.work import View, part_name

_ROW_MASK = np.uint64((1 << UID_ROW_BITS) - 1)


@dataclass(frozen=True, slots=True)
class VectorBlock:
    """Some rows of one npy file.

    uids: uint64 [n], ascending. rows: int64 [n], their rows in `images`. clip_scores: float64 [n].
    images: float16 [m, d], memory-mapped when local, m >= n.
    """

    uids: npt.NDArray[np.uint64]
    rows: npt.NDArray[np.int64]
    clip_scores: npt.NDArray[np.float64]
    images: npt.NDArray[np.float16]

    def take(self, uids: npt.NDArray[np.uint64]) -> npt.NDArray[np.float16]:
        """Return the embeddings of `uids` (ascending, all in this block), float16 [n, d]."""
        at = np.searchsorted(self.uids, uids)
        assert np.array_equal(self.uids.take(at, mode="clip"), uids), "a row is not in its block"
        return np.asarray(self.images[self.rows[at]])


def blocks_of(view: View, part: int) -> list[VectorBlock]:
    """Return the embeddings of a part's rows, all of them, whatever later stages dropped."""
    if "embed" in view.before:
        return _embedded(view, part)
    if source_of(view).is_embeddings:
        return _published(view, part)
    raise UserError(
        f"Stage {view.stage} needs embeddings.",
        "The source brings images and the recipe has no embed section.",
        "Add e.g. embed: {model: ViT-L-14, pretrained: openai}.",
    )


def scores_in_part(view: View, part: int) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.float64]]:
    """Return (uids, their clip scores) of a part, without touching embeddings.

    uint64 [n] ascending and float64 [n], NaN where the row has no score.
    """
    table = _score_table(view, part).sort_by("uid")
    scores = table.column("clip_score").to_numpy()
    return table.column("uid").to_numpy(), np.asarray(scores, dtype=np.float64)


def gather(view: View, uids: npt.NDArray[np.uint64]) -> npt.NDArray[np.float16]:
    """Return the embeddings of `uids` (ascending, unique), float16 [n, d], in that order.

    Each part that holds any of them is opened once and read in row order.
    """
    pieces = [
        block.take(_inside(uids, block.uids))
        for block in _blocks_with(view, uids)
        if len(block.uids)
    ]
    if not pieces:
        return np.zeros((0, 1), np.float16)
    return np.concatenate(pieces)


def _inside(uids: npt.NDArray[np.uint64], known: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    first, last = np.searchsorted(uids, [known[0], known[-1] + np.uint64(1)])
    return uids[first:last]


def _blocks_with(view: View, uids: npt.NDArray[np.uint64]) -> Iterator[VectorBlock]:
    for part in _parts_with(view, uids):
        yield from blocks_of(view, part)


def _parts_with(view: View, uids: npt.NDArray[np.uint64]) -> Iterator[int]:
    """Yield the parts that may hold any of the uids."""
    indices = np.unique(uids >> np.uint64(UID_ROW_BITS))
    for part in view.parts():
        first, num = part["first_shard_index"], len(part["shards"])
        low, high = np.searchsorted(indices, [first, first + num])
        if low < high:
            yield int(part["part"])


def _score_table(view: View, part: int) -> pa.Table:
    columns = ["uid", "clip_score"]
    if "embed" in view.before:
        path = _metadata_path(view, part)
        if paths.size_of(path) is None:
            return pa.table({"uid": np.zeros(0, np.uint64), "clip_score": np.zeros(0)})
        return store.read_table(path, columns)
    return store.read_table(_samples_path(view, part), columns)


def _embedded(view: View, part: int) -> list[VectorBlock]:
    path = _metadata_path(view, part)
    if paths.size_of(path) is None:  # no row of the part could be embedded: a gap
        return []
    table = store.read_table(path, ["uid", "clip_score", "row"])
    array = store.read_array(
        paths.join(view.before["embed"].path, f"img_emb/img_emb_{part:04d}.npy")
    )
    return [
        VectorBlock(
            table.column("uid").to_numpy(),
            table.column("row").to_numpy().astype(np.int64),
            table.column("clip_score").to_numpy(),
            array,
        )
    ]


def _published(view: View, part: int) -> list[VectorBlock]:
    table = store.read_table(_samples_path(view, part), ["uid", "clip_score", "shard"])
    uids, scores = table.column("uid").to_numpy(), table.column("clip_score").to_numpy()
    names = table.column("shard").to_pylist()
    found = []
    for index in np.unique(uids >> np.uint64(UID_ROW_BITS)):
        mine = np.flatnonzero(uids >> np.uint64(UID_ROW_BITS) == index)
        images = read_rows(paths.join(root_of(view), names[mine[0]]))
        rows = (uids[mine] & _ROW_MASK).astype(np.int64)
        found.append(VectorBlock(uids[mine], rows, scores[mine], images))
    return found


def _metadata_path(view: View, part: int) -> str:
    return paths.join(view.before["embed"].path, f"metadata/metadata_{part:04d}.parquet")


def _samples_path(view: View, part: int) -> str:
    return paths.join(view.before["ingest"].path, f"{part_name(part)}.parquet")
