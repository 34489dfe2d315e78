"""The assemble stage: the selected samples' original bytes as WebDataset shards, with an index.

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
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
from pydantic import Field

from curate.media import assembled_tar, dataset_card, llava_rows
from curate.media.assembled_rows import (
    OutputRow,
    Uids,
    must_rename,
    parts_of,
    rows_of,
    selected,
)
from curate.media.assembled_tar import Rehearsal
from curate.media.tars import RangeReader
from curate.sources import root_of
from manifests import ledger, paths, store
from manifests.strict import Strict
from manifests.work import Item, Output, View, part_name

SHARDS = "shards"
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
    rows, root = rows_of(view, item.payload), root_of(view)
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
    shards = [one["notes"] for one in view.own.markers() if "shard" in one["notes"]]
    sizes = {paths.name_of(one["shard"]): one["samples"] for one in shards}
    suffixes: Counter[str] = Counter()
    for one in shards:
        suffixes.update(one["image_suffixes"])
    contents = dataset_card.Contents(
        shards=list(sizes),
        num_samples=sum(sizes.values()),
        num_bytes=sum(one["filesize"] for one in shards),
        image_suffixes=dict(sorted(suffixes.items())),
    )
    return Output(
        files={
            f"{SHARDS}/sizes.json": _json_bytes(sizes),
            f"{SHARDS}/wids.json": _json_bytes(_wids(shards)),
            "pretrain.json": lambda file: _write_pretrain_list(view, file),
            "README.md": dataset_card.render(view, contents).encode(),
        },
        notes={"samples": contents.num_samples, "shards": len(sizes)},
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


def _wids(shards: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the shard list that webdataset's `wids` opens; its URLs are relative to the list."""
    listed = [
        {
            "url": paths.name_of(one["shard"]),
            "md5sum": one["md5sum"],
            "nsamples": one["samples"],
            "filesize": one["filesize"],
        }
        for one in shards
    ]
    return {"__kind__": "wids-shard-index-v1", "wids_version": 1, "shardlist": listed}


def _write_pretrain_list(view: View, file: BinaryIO) -> None:
    """Write all rows as one JSON list, a row a line, in shard order, one in memory at a time."""
    separator = b"[\n"
    for row in _written_rows(view):
        file.write(separator + llava_rows.as_json(llava_rows.pretrain_row(row)).encode())
        separator = b",\n"
    file.write(b"[]\n" if separator == b"[\n" else b"\n]\n")


def _written_rows(view: View) -> Iterator[dict[str, Any]]:
    for path in view.own.files():
        index = store.read_table(path, ["shard", "json_offset", "json_size"]).to_pylist()
        if not index:
            continue
        with RangeReader(paths.join(view.path, index[0]["shard"])) as reader:
            for one in index:
                yield json.loads(reader.read(one["json_offset"], one["json_size"]))


def _json_bytes(value: Any) -> bytes:
    return (json.dumps(value, sort_keys=True, indent=1) + "\n").encode()
