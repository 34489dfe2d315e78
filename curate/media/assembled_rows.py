"""Which samples an output shard holds, under which keys, and what is asked about each image."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl
import pyarrow as pa

from curate.media import llava_rows
from curate.media.originals import Place
from curate.media.tars import MAX_KEY_CHARACTERS
from curate.vectors.exact import sample_hashes
from manifests import paths, store
from manifests.errors import PartDamaged
from manifests.schemas import UID_ROW_BITS
from manifests.work import View, part_name

CORESET_FILE = "coreset.parquet"
SAMPLE_COLUMNS = (
    "uid",
    "key",
    "source",
    "shard",
    "offset",
    "size",
    "caption",
    "url",
    "image_sha256",
    "image_format",
)
SCORE_COLUMNS = ("clip_score", "cluster")

Uids = npt.NDArray[np.uint64]

_CLEAN_KEY = re.compile(r"[A-Za-z0-9_-]+")
_UNCLEAN = re.compile(r"[^A-Za-z0-9_-]")
_ENDS_LIKE_A_UID = re.compile(r"-[0-9a-f]{16}$")
_KEPT_KEY_CHARACTERS = 60  # beside a hyphen and the 16 digits of the uid


@dataclass(frozen=True, slots=True)
class OutputRow:
    """A sample to write: `given` has its SAMPLES columns and, after a selection, its scores."""

    key: str
    given: Mapping[str, Any]
    turns: list[dict[str, str]]

    @property
    def uid(self) -> int:
        """The sample's uid."""
        return int(self.given["uid"])

    @property
    def place(self) -> Place:
        """Where the original image lies."""
        return self.given["shard"], self.given["offset"], self.given["size"]

    def as_json(self, image_suffix: str) -> dict[str, Any]:
        """Return the sample's JSON member: the LLaVA row, and where the sample comes from.

        All samples of a run have the same fields of the same types, as HF `datasets` wants it.
        """
        found = {
            "id": self.key,
            "image": f"{self.key}.{image_suffix}",
            "conversations": self.turns,
            "uid": self.uid,
            "source": self.given["source"],
            "source_key": self.given["key"],
            "source_shard": self.given["shard"],
            "url": self.given["url"] or "",
        }
        scores = {name: self.given.get(name) for name in SCORE_COLUMNS}
        return found | {name: value for name, value in scores.items() if value is not None}


def output_key(key: str, uid: int, *, must_rename: bool) -> str:
    """Return the `__key__` of a sample in the output: its own, or one that no other sample has.

    Example: ("000012", 5) -> "000012"; ("a/b.c", 5) -> "a_b_c-0000000000000005"
    """
    if is_clean(key) and not must_rename:
        return key
    return f"{_UNCLEAN.sub('_', key)[:_KEPT_KEY_CHARACTERS] or 'sample'}-{uid:016x}"


def is_clean(key: str) -> bool:
    """Tell whether every reader takes the key as it is, and no renamed key can be equal to it."""
    fits = len(key) <= MAX_KEY_CHARACTERS and _CLEAN_KEY.fullmatch(key) is not None
    return fits and _ENDS_LIKE_A_UID.search(key) is None


def selected(view: View) -> Uids:
    """Return the uids to write, ascending."""
    if view.previous.stage == "select":
        return np.sort(_coreset(view, ["uid"]).column("uid").to_numpy())
    return view.all_kept()


def must_rename(view: View, uids: Uids) -> npt.NDArray[np.bool_]:
    """Return which rows have a key that another row has too, bool [n]."""
    if view.previous.stage == "select":
        tables = [_coreset(view, ["uid", "key"])]
    else:
        tables = [_samples(view, part, ["uid", "key"]) for part in parts_of(view, uids)]
    empty = pl.DataFrame(schema={"uid": pl.UInt64, "key": pl.String})
    keys = pl.concat([empty, *(_only(table, uids) for table in tables)]).sort("uid")
    return keys["key"].is_duplicated().to_numpy()


def parts_of(view: View, uids: Uids) -> list[int]:
    """Return the source parts that hold any of the uids, ascending."""
    indices = np.unique(uids >> np.uint64(UID_ROW_BITS))
    found = []
    for part in view.parts():
        first, num_shards = part["first_shard_index"], len(part["shards"])
        low, high = np.searchsorted(indices, np.array([first, first + num_shards], np.uint64))
        if low < high:
            found.append(int(part["part"]))
    return found


def rows_of(view: View, payload: Mapping[str, Any]) -> list[OutputRow]:
    """Return the rows that an item's payload means, in the order of their output keys.

    Raises: PartDamaged when the earlier stages no longer hold what was planned.
    """
    uids = selected(view)
    ends = np.array([payload["first_uid"], payload["last_uid"]], np.uint64)
    low, high = np.searchsorted(uids, ends)
    frame = _described(view, uids[low : high + 1], payload["parts"])
    if frame.height != payload["samples"]:
        raise PartDamaged(f"{frame.height} of {payload['samples']} selected samples were found.")
    renamed = range(frame.height) if payload["renamed"] is None else set(payload["renamed"])
    hashes = sample_hashes(frame["uid"].to_numpy(), view.seed)
    prompts = (hashes % np.uint64(len(llava_rows.PROMPTS))).tolist()
    rows = [
        _row(given, must_rename=at in renamed, prompt=llava_rows.PROMPTS[prompts[at]])
        for at, given in enumerate(frame.iter_rows(named=True))
    ]
    return sorted(rows, key=lambda row: row.key)


def _row(given: Mapping[str, Any], *, must_rename: bool, prompt: str) -> OutputRow:
    key = output_key(given["key"], given["uid"], must_rename=must_rename)
    return OutputRow(key, given, llava_rows.conversation(given["caption"], prompt))


def _described(view: View, uids: Uids, parts: Sequence[int]) -> pl.DataFrame:
    """Return the SAMPLES columns of the uids and, after a selection, their scores, by uid."""
    tables = [_only(_samples(view, part, SAMPLE_COLUMNS), uids) for part in parts]
    frame = pl.concat(tables).sort("uid")
    if "select" not in view.before:
        return frame
    scores = _only(_coreset(view, ["uid", *SCORE_COLUMNS]), uids)
    return frame.join(scores, on="uid", how="left", maintain_order="left")


def _coreset(view: View, columns: Sequence[str]) -> pa.Table:
    return store.read_table(paths.join(view.before["select"].path, CORESET_FILE), columns)


def _samples(view: View, part: int, columns: Sequence[str]) -> pa.Table:
    folder = view.described_by.path
    return store.read_table(paths.join(folder, f"{part_name(part)}.parquet"), columns)


def _only(table: pa.Table, uids: Uids) -> pl.DataFrame:
    return pl.DataFrame(table).filter(pl.col("uid").is_in(pl.Series(uids).implode()))
