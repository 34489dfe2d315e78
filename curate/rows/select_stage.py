"""The select stage: two rank bands and a seeded sample decide the coreset.

    cuts.json                 where each step cuts, from passes over the parts
    part-00000.parquet        VERDICTS of one part of the stage before, by the cuts alone
    kept/part-00000.parquet   SELECTABLE: the kept rows' figures
    coreset.parquet           CORESET: these with key, shard and caption, by uid

No item holds all rows. The first holds one part, the counts of `order_statistics` (about 1 MB) and
the rows that it sorts (at most 2^20); with the policy `balanced` also some 40 bytes of each row
that the bands leave. An item of the second phase holds one part. The last holds the figures of the
coreset (28 bytes a row, twice while they are sorted), one part of SAMPLES and one row group.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, BinaryIO, Literal

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field, field_validator

from curate.rows.cuts import Cuts, Steps, find_cuts, judge
from curate.rows.select import SELECT_REASONS
from curate.rows.selectable_rows import KEPT, SelectablePart, selectable_parts, table_of
from curate.sources import source_of
from manifests import ledger, paths, store
from manifests.errors import UserError
from manifests.schemas import CORESET, SELECTABLE, UID_ROW_BITS, conform, empty
from manifests.strict import Strict
from manifests.work import Item, Output, View, part_name

CORESET_FILE = "coreset.parquet"
CUTS_FILE = "cuts.json"

Band = list[float]


class SelectConfig(Strict):
    """Which of the kept rows make the coreset. A step that is null is left out."""

    clip_band: Band | None = Field(default=None, min_length=2, max_length=2)
    """Shares [from, to) of the ranking by clip score, largest first; the paper's: [0.40, 0.60]."""
    centroid_band: Band | None = Field(default=None, min_length=2, max_length=2)
    """Shares [from, to) of the ranking by cosine to the centroid, largest first, of the rows that
    the clip band left; the paper's is [0.15, 0.35]."""
    num_samples: int | None = Field(default=None, ge=0)
    """Rows of the coreset; the paper samples 2,000,000."""
    policy: Literal["paper", "top_clip", "balanced"] = "paper"
    """Which rows fill num_samples: a seeded random sample (the paper's), the largest clip scores,
    or an even share of every cluster."""

    @field_validator("clip_band", "centroid_band")
    @classmethod
    def _is_a_band(cls, band: Band | None) -> Band | None:
        if band is not None and not 0 <= band[0] < band[1] <= 1:
            raise ValueError("a band is [from, to) with 0 <= from < to <= 1")
        return band


def plan_cuts(view: View) -> list[Item]:
    """One item: ranks are over all rows."""
    config = SelectConfig.model_validate(view.config)
    wants_scores = config.clip_band is not None or config.policy == "top_clip"
    wants_clusters = config.centroid_band is not None or config.policy == "balanced"
    has_scores = "embed" in view.before or source_of(view).is_embeddings
    if wants_scores and not has_scores:
        raise _lacking("clip scores", "embed: {model: ViT-L-14, pretrained: openai}")
    if wants_clusters and "cluster" not in view.before:
        raise _lacking("clusters", "cluster: {num_clusters: 64}")
    return [Item("cuts")]


def work_cuts(view: View, item: Item) -> Output:
    """Return where each step cuts and, for `balanced`, each part's ranks; notes: the cutoffs."""
    config = SelectConfig.model_validate(view.config)
    parts = selectable_parts(view)
    steps = Steps(
        clip_band=_pair(config.clip_band),
        centroid_band=_pair(config.centroid_band),
        num_samples=config.num_samples,
        seed=view.seed,
        policy=config.policy,
    )
    num_rows = _num_kept_before(view)
    cuts, ranks = find_cuts([part.load for part in parts], steps, num_rows=num_rows)
    files: dict[str, Any] = {CUTS_FILE: cuts.model_dump_json(indent=1).encode() + b"\n"}
    if ranks is not None:
        names = [_ranks_file(part.name) for part in parts]
        files |= dict(zip(names, ranks, strict=True))
    return Output(files=files, notes=cuts.nearest_kept())


def plan(view: View) -> list[Item]:
    """One item per part of the stage before."""
    return [Item(part.name, {"part": part.number}) for part in selectable_parts(view)]


def work(view: View, item: Item) -> Output:
    """Judge one part's rows; score is a dropped row's key, cutoff the nearest key that stayed."""
    rows = SelectablePart(view, item.payload["part"]).load()
    cuts = Cuts.model_validate_json(store.read_bytes(paths.join(view.path, CUTS_FILE)))
    ranks = None
    if cuts.sample is not None and cuts.policy == "balanced":
        ranks = np.asarray(store.read_array(paths.join(view.path, _ranks_file(item.name))))
    fate = judge(rows, cuts, ranks)
    kept = rows.take(np.flatnonzero(fate.keep))
    verdicts = ledger.verdicts(
        "select",
        rows.uid,
        reasons=np.array(SELECT_REASONS, dtype=object)[fate.reason],
        scores=fate.score,
        cutoffs=fate.cutoff,
    )
    table = table_of(kept, has_clusters="cluster" in view.before)
    return Output(files={f"{KEPT}/{item.name}.parquet": table}, verdicts=verdicts)


def plan_coreset(view: View) -> list[Item]:
    """One item: the coreset is one file."""
    return [Item("coreset")]


def work_coreset(view: View, item: Item) -> Output:
    """Return the coreset; it is written as it is read, a row group at a time."""
    return Output(files={CORESET_FILE: lambda file: _write_coreset(view, file)})


def _write_coreset(view: View, file: BinaryIO) -> None:
    """Write the CORESET rows by uid: as the source's parts follow each other, so do their uids."""
    kept = pl.concat(
        [
            pl.DataFrame(empty(SELECTABLE)),
            *(pl.DataFrame(store.read_table(path)) for path in view.own.files(KEPT)),
        ]
    ).sort("uid")
    waiting = empty(CORESET)
    with pq.ParquetWriter(file, waiting.schema, compression="zstd") as writer:
        for part in view.parts():
            waiting = pa.concat_tables([waiting, _described(view, part, kept)])
            while waiting.num_rows >= store.ROW_GROUP_ROWS:
                writer.write_table(waiting.slice(0, store.ROW_GROUP_ROWS))
                waiting = waiting.slice(store.ROW_GROUP_ROWS)
        if waiting.num_rows:
            writer.write_table(waiting)


def _described(view: View, part: Mapping[str, Any], kept: pl.DataFrame) -> pa.Table:
    """Return the CORESET rows of one source part. Args: kept: all rows' figures, by uid."""
    first = int(part["first_shard_index"])
    ends = np.array([first, first + len(part["shards"])], np.uint64) << np.uint64(UID_ROW_BITS)
    low, high = np.searchsorted(kept["uid"].to_numpy(), ends)
    if low == high:
        return empty(CORESET)
    path = paths.join(view.described_by.path, f"{part_name(part['part'])}.parquet")
    samples = pl.DataFrame(store.read_table(path, ["uid", "key", "shard", "caption"]))
    mine = kept.slice(low, high - low)
    joined = mine.join(samples, on="uid", how="left", maintain_order="left")
    return conform(joined.to_arrow(), CORESET)


def _num_kept_before(view: View) -> int:
    record = view.previous.record()
    assert record is not None, "a stage begins when the one before is finished"
    return int(record["kept"])


def _ranks_file(part: str) -> str:
    return f"ranks/{part}.npy"


def _pair(band: Band | None) -> tuple[float, float] | None:
    return None if band is None else (band[0], band[1])


def _lacking(what: str, section: str) -> UserError:
    return UserError(
        f"select needs {what}.", "The recipe has no stage that makes them.", f"Add e.g. {section}."
    )
