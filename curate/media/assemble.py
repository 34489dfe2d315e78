"""The assemble stage: the selected samples' bytes as they lie, as WebDataset shards with an index.

    shards/00000.tar               key.jpg (the bytes as they came), key.json (LLaVA row), key.txt
    shards/sizes.json, wids.json   sample counts for open_clip, shard list for webdataset's wids
    part-00000.parquet             TRAIN_INDEX: where each image and JSON lies in its shard
    pretrain.json                  all rows as one LLaVA-format list
    README.md                      dataset card

Rows by ascending uid are cut into shards of `samples_per_shard`; in a shard, members are sorted by
(key, suffix). The bytes of every file depend on recipe and input alone.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
from pydantic import Field

from curate.media import assembled_tar, dataset_card, llava_rows, shard_list
from curate.media.assembled_rows import (
    OutputRow,
    Uids,
    must_rename,
    parts_of,
    rows_of,
    selected,
)
from curate.media.assembled_tar import Rehearsal
from curate.media.shard_list import SHARDS
from curate.sources import image_root_of
from manifests import ledger, paths
from manifests.strict import Strict
from manifests.work import Item, Output, View, part_name

INDEX = "index"


class AssembleConfig(Strict):
    """How the shards are cut."""

    samples_per_shard: int = Field(default=10_000, ge=1)
    """Samples of one tar; the last has the rest. Readers want several shards per worker."""


def plan(view: View) -> list[Item]:
    """One item per output shard; none when nothing was selected."""
    config = AssembleConfig.model_validate(view.config)
    uids = selected(view)
    renamed = must_rename(view, uids)
    step = config.samples_per_shard
    return [
        _item(view, number, uids[at : at + step], renamed[at : at + step])
        for number, at in enumerate(range(0, len(uids), step))
    ]


def work(view: View, item: Item) -> Output:
    """Make one shard.

    The tar is rehearsed first, which checks every image and gives the offsets; the file itself is
    then written as a stream. So memory holds one sample at a time, however large the shard is.
    """
    rows, root = rows_of(view, item.payload), image_root_of(view)
    rehearsal = assembled_tar.rehearse(rows, root)
    good = [row for row in rows if row.uid not in rehearsal.problems]
    shard = f"{SHARDS}/{item.payload['shard']:05d}.tar"
    files: dict[str, Any] = {
        f"{item.name}.parquet": assembled_tar.index_of(rehearsal, good, shard=shard)
    }
    if good:
        files[shard] = lambda file: assembled_tar.perform(file, good, root, md5=rehearsal.md5)
    by_uid = sorted(rows, key=lambda row: row.uid)
    return Output(
        files=files,
        verdicts=ledger.verdicts(
            "assemble",
            np.array([row.uid for row in by_uid], np.uint64),
            reasons=[_reason(rehearsal, row) for row in by_uid],
        ),
        quarantine=ledger.quarantine(_quarantined(rehearsal, by_uid)),
        notes=_facts(rehearsal, good, shard) if good else {},
    )


def plan_index(view: View) -> list[Item]:
    """One item: what describes all shards."""
    return [Item(INDEX)]


def work_index(view: View, item: Item) -> Output:
    """Return the files that describe all shards."""
    shards = shard_list.written_shards(view)
    suffixes: Counter[str] = Counter()
    for one in shards:
        suffixes.update(one["image_suffixes"])
    contents = dataset_card.Contents(
        shards=[paths.name_of(one["shard"]) for one in shards],
        num_samples=sum(one["samples"] for one in shards),
        num_bytes=sum(one["filesize"] for one in shards),
        image_suffixes=dict(sorted(suffixes.items())),
    )
    return Output(
        files={
            **shard_list.list_files(shards),
            "pretrain.json": lambda file: shard_list.write_json_list(file, _pretrain_rows(view)),
            "README.md": dataset_card.render(view, contents).encode(),
        },
        notes={"samples": contents.num_samples, "shards": len(shards)},
    )


def _item(view: View, number: int, uids: Uids, renamed: npt.NDArray[np.bool_]) -> Item:
    """Return a shard's item; `renamed` lists positions in the shard by uid, None means all."""
    payload = {
        "shard": number,
        "first_uid": int(uids[0]),
        "last_uid": int(uids[-1]),
        "samples": len(uids),
        "parts": parts_of(view, uids),
        "renamed": None if renamed.all() else np.flatnonzero(renamed).tolist(),
    }
    return Item(part_name(number), payload, cost=float(len(uids)))


def _reason(rehearsal: Rehearsal, row: OutputRow) -> str:
    problem = rehearsal.problems.get(row.uid)
    return "" if problem is None else ledger.quarantine_reason(problem.error)


def _quarantined(rehearsal: Rehearsal, rows: list[OutputRow]) -> list[dict[str, Any]]:
    return [
        {name: row.given[name] for name in ("uid", "key", "shard")}
        | rehearsal.problems[row.uid]._asdict()
        for row in rows
        if row.uid in rehearsal.problems
    ]


def _facts(rehearsal: Rehearsal, rows: list[OutputRow], shard: str) -> dict[str, Any]:
    """Return what the index phase must know of a shard."""
    suffixes = Counter(rehearsal.image_suffix(row) for row in rows)
    return {
        "shard": shard,
        "samples": len(rows),
        "filesize": rehearsal.num_bytes,
        "md5sum": rehearsal.md5,
        "image_suffixes": dict(sorted(suffixes.items())),
    }


def _pretrain_rows(view: View) -> Iterator[bytes]:
    """Yield all rows as a LLaVA loader reads them, in shard order, one in memory at a time."""
    for text in shard_list.json_members(view.path, view.own.files()):
        yield llava_rows.as_json(llava_rows.pretrain_row(json.loads(text))).encode()
