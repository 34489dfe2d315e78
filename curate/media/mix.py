"""The mix stage: instruction rows of several sources as shuffled WebDataset shards, with an index.

    shards/00000.tar               key.jpg (the bytes as they came), key.json (LLaVA row)
    shards/sizes.json, wids.json   sample counts for open_clip, shard list for webdataset's wids
    part-00000.parquet             TRAIN_INDEX: where each image and JSON lies in its shard
    mix.json                       all rows as one LLaVA-format list
    README.md                      dataset card
    verdicts/                      what became of each row that resolve kept
    order/  rows/                  who comes where in the output; the rows on their way there

First all rows are judged and put in order at once (a few bytes each), then each part writes its
rows for the shards, then each shard is made of its pieces. The bytes of every file depend on recipe
and input alone. Rules: curate/rows/mix_config.py, curate/rows/mix_order.py.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any, BinaryIO, ClassVar

import numpy as np
import numpy.typing as npt
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc

from curate.media import mix_card, mixed_rows, mixed_tar, shard_list
from curate.media.resolve import ResolveConfig
from curate.media.shard_list import SHARDS
from curate.rows import mix_config
from curate.rows.clean_config import CleanConfig
from curate.rows.conversation_parts import read_conversations
from curate.rows.mend import MendConfig, mend
from curate.rows.mix_config import MixConfig
from curate.rows.mix_order import decide, shuffled
from manifests import ledger, paths, store
from manifests.ledger import kept_uids
from manifests.strict import Strict
from manifests.work import Item, Output, View, part_name

ORDER = "order"
INDEX = "index"
_UIDS, _COPIES, _LOST = f"{ORDER}/uids.npy", f"{ORDER}/copies.npy", f"{ORDER}/lost.parquet"

_FACTS: dict[str, Any] = {
    "uid": pl.UInt64,
    "source": pl.String,
    "key": pl.String,
    "num_images": pl.UInt16,
    "conversation_hash": pl.Binary,
    "first_image": pl.String,
}

__all__ = ["MixConfig"]

Uids = npt.NDArray[np.uint64]


class MixWork(Strict):
    """What the stage must know: its own section, and of those before it what it does again."""

    location_fields: ClassVar[frozenset[str]] = frozenset({"roots"})

    mix: MixConfig
    mend: MendConfig
    roots: dict[str, str | list[str]]


def with_places(section: MixConfig, sections: Mapping[str, Strict]) -> MixWork:
    """Return the stage's config. Published counts are only compared with: they make nothing."""
    clean, resolve = sections["clean"], sections["resolve"]
    assert isinstance(clean, CleanConfig) and isinstance(resolve, ResolveConfig)
    return MixWork(
        mix=section.model_copy(update={"published": []}),
        mend=MendConfig(end_strings=clean.end_strings),
        roots=resolve.roots,
    )


def identity(config: MixWork) -> Any:
    """Return what the lists of ids are that the rules name."""
    return mix_config.identity(config.mix)


def plan_order(view: View) -> list[Item]:
    """One item: all rows are judged together."""
    return [Item(ORDER)]


def work_order(view: View, item: Item) -> Output:
    """Judge every row and put the kept ones in order. About 100 bytes a row in memory."""
    config = _config(view).mix
    made = decide(_facts(view), config, view.seed)
    uids, copies = shuffled(made.uids, made.copies, seed=view.seed, shuffle=config.shuffle)
    mixed_tar.check_space_for_keys(len(uids))
    return Output(
        files={_UIDS: uids, _COPIES: copies, _LOST: made.lost},
        notes={"samples": len(uids), "rows": int((made.copies > 0).sum())},
    )


def plan_rows(view: View) -> list[Item]:
    """One item per part."""
    return [
        Item(f"rows-{part['part']:05d}", {"part": part["part"]}, cost=float(part["rows"]))
        for part in view.parts()
    ]


def work_rows(view: View, item: Item) -> Output:
    """Write a part's rows for the shards, and its verdicts."""
    config, part = _config(view), item.payload["part"]
    judged = np.sort(kept_uids(view.before["resolve"].verdicts_of(part)))
    table = _mixed(view, config, part, judged)
    per_shard = config.mix.samples_per_shard
    stream, starts = mixed_rows.pieces(table, _num_shards(view, per_shard), per_shard)
    base = f"{mixed_rows.FOLDER}/{item.name}"
    return Output(
        files={f"{base}.arrow": stream, f"{base}.npy": starts},
        verdicts=_verdicts(view, judged),
    )


def plan_shards(view: View) -> list[Item]:
    """One item per output shard; none when no row is left."""
    per_shard = _config(view).mix.samples_per_shard
    num_samples = _num_samples(view)
    return [
        Item(part_name(at), {"shard": at}, float(min(per_shard, num_samples - at * per_shard)))
        for at in range(_num_shards(view, per_shard))
    ]


def work_shard(view: View, item: Item) -> Output:
    """Make one shard from its pieces."""
    number = item.payload["shard"]
    parts = [f"rows-{part['part']:05d}" for part in view.parts()]
    rows = mixed_rows.of_shard(view.path, parts, number)
    shard = f"{SHARDS}/{number:05d}.tar"
    notes = _about(rows, shard)

    def write(file: BinaryIO) -> None:
        notes["filesize"] = mixed_tar.write_shard(file, rows, _config(view).roots)

    index = mixed_tar.index_of(rows, shard)
    return Output(files={f"{item.name}.parquet": index, shard: write}, notes=notes)


def plan_index(view: View) -> list[Item]:
    """One item: what describes all shards."""
    return [Item(INDEX)]


def work_index(view: View, item: Item) -> Output:
    """Return the files that describe all shards."""
    shards = shard_list.written_shards(view)
    index = view.own.files()
    return Output(
        files={
            **shard_list.list_files(shards),
            "mix.json": lambda file: shard_list.write_json_list(
                file, shard_list.json_members(view.path, index)
            ),
            "README.md": mix_card.render(view, shards).encode(),
        }
    )


def _config(view: View) -> MixWork:
    return MixWork.model_validate(view.config)


def _facts(view: View) -> pl.DataFrame:
    """Return what the rules ask of each row that resolve kept, by uid."""
    frames = [_facts_of(view, part["part"]) for part in view.parts()]
    return pl.concat([pl.DataFrame(schema=_FACTS), *frames]).sort("uid")


def _facts_of(view: View, part: int) -> pl.DataFrame:
    name = f"{part_name(part)}.parquet"
    sample = store.read_table(
        paths.join(view.before["ingest"].path, name), ["uid", "source", "key"]
    )
    cleaned = store.read_table(
        paths.join(view.before["clean"].path, name), ["uid", "num_images", "conversation_hash"]
    )
    resolved = store.read_table(
        paths.join(view.before["resolve"].path, name), ["uid", "position", "image"]
    )
    first = resolved.filter(pc.equal(resolved.column("position"), 0)).select(["uid", "image"])
    kept = pl.Series(kept_uids(view.before["resolve"].verdicts_of(part)))
    return (
        pl.DataFrame(sample)
        .filter(pl.col("uid").is_in(kept.implode()))
        .join(pl.DataFrame(cleaned), on="uid", how="left")
        .join(pl.DataFrame(first), on="uid", how="left")
        .rename({"image": "first_image"})
    )


def _mixed(view: View, config: MixWork, part: int, judged: Uids) -> pa.Table:
    """Return a part's MIXED rows, by position; a row is there once for each of its copies."""
    positions, owners = _places_in_output(view, judged)
    used = np.unique(owners)
    name = f"{part_name(part)}.parquet"
    ingest, clean = view.before["ingest"].path, view.before["clean"].path
    conversations = _only(read_conversations(view.before["ingest"], part), used).combine_chunks()
    samples = _only(store.read_table(paths.join(ingest, name), ["uid", "key", "source"]), used)
    cleaned = _only(store.read_table(paths.join(clean, name)), used)
    resolved = store.read_table(paths.join(view.before["resolve"].path, name))
    mended = mend(conversations, cleaned.column("mended").to_pylist(), config.mend)
    table = pa.Table.from_arrays(
        [
            pa.array(used),  # the position comes below
            pa.array(used),
            samples.column("source"),
            _texts(samples, mended),
            cleaned.column("rounds"),
            cleaned.column("token_estimate"),
            mixed_rows.places_by_uid(resolved, used),
        ],
        schema=mixed_rows.MIXED,
    )
    table = table.take(pa.array(np.searchsorted(used, owners)))
    return table.set_column(0, mixed_rows.MIXED.field(0), pa.array(positions)).combine_chunks()


def _texts(samples: pa.Table, mended: pa.Table) -> pa.Array:
    keys, conversations = pl.DataFrame(samples)["key"], pl.DataFrame(mended)
    return mixed_rows.json_rows(keys, conversations).to_arrow().cast(pa.binary())


def _places_in_output(view: View, judged: Uids) -> tuple[Uids, Uids]:
    """Return (positions in the output, ascending; whose they are) of a part's rows."""
    uids = store.read_array(paths.join(view.path, _UIDS))
    if not len(judged):
        return np.zeros(0, np.uint64), np.zeros(0, np.uint64)
    at = np.flatnonzero((uids >= judged[0]) & (uids <= judged[-1]))
    return at.astype(np.uint64), np.asarray(uids[at])


def _only(table: pa.Table, uids: Uids) -> pa.Table:
    """Return the rows with these uids, ascending."""
    found = table.filter(pc.is_in(table.column("uid"), pa.array(uids))).sort_by("uid")
    assert found.num_rows == len(uids), "an earlier stage has lost rows that it recorded"
    return found


def _verdicts(view: View, judged: Uids) -> pa.Table:
    lost = store.read_table(paths.join(view.path, _LOST))
    found = pl.DataFrame({"uid": judged}).join(
        pl.DataFrame(lost), on="uid", how="left", maintain_order="left"
    )
    return ledger.verdicts(
        "mix",
        judged,
        reasons=found["reason"].fill_null("").to_numpy(),
        scores=found["score"].fill_null(np.nan).to_numpy(),
        cutoffs=found["cutoff"].fill_null(np.nan).to_numpy(),
        evidence=found["evidence_uid"].to_arrow(),
    )


def _num_samples(view: View) -> int:
    return store.length_of(paths.join(view.path, _UIDS))


def _num_shards(view: View, per_shard: int) -> int:
    return -(-_num_samples(view) // per_shard)


def _about(rows: pl.DataFrame, shard: str) -> dict[str, Any]:
    """Return what the index phase must know of a shard."""
    suffixes = Counter(rows["images"].explode(empty_as_null=False).struct.field("suffix"))
    return {
        "shard": shard,
        "samples": rows.height,
        "sources": dict(sorted(Counter(rows["source"]).items())),
        "image_suffixes": dict(sorted(suffixes.items())),
        "text_only": int((rows["images"].list.len() == 0).sum()),
    }
