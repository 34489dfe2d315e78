"""How many instruction rows came in, went where and were written, beside published counts.

Read from the tables of a run whose ingest is finished, one part at a time. A uid says which file
its row is from, so fates are counted without looking for the row.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl

from curate.rows.conversation_parts import read_conversations
from curate.rows.mix_config import Published
from curate.rows.row_rules import Where, meets_any
from curate.vectors.exact import Uint64s
from manifests import paths, store
from manifests.errors import PartDamaged
from manifests.ledger import MENDED_PREFIX, QUARANTINE_PREFIX, Tally, kept_uids
from manifests.schemas import UID_ROW_BITS
from manifests.work import StageDir, part_name

MIX = "mix"


@dataclass(frozen=True, slots=True)
class SourceCounts:
    """What became of one source's rows.

    stages: stage -> its counts of these rows, in run order; ingest's rows_in are the rows of the
    source's files. mended: mend -> rows it was made in; a row may have several. kept: rows that the
    mix took; written: samples in the shards, copies included; None while mix is unfinished.
    """

    source: str
    stages: Mapping[str, Tally]
    mended: Mapping[str, int]
    kept: int | None
    written: int | None

    def as_json(self) -> dict[str, Any]:
        """Return plain values."""
        return {
            "source": self.source,
            "rows": self.stages["ingest"].rows_in,
            "kept": self.kept,
            "written": self.written,
            "mended": dict(sorted(self.mended.items())),
            "stages": {name: one.as_json() for name, one in self.stages.items()},
        }


@dataclass(frozen=True, slots=True)
class Comparison:
    """A published count, the rows found that it counts, and those of them that the mix took."""

    published: Published
    found: int
    kept: int | None

    @property
    def holds(self) -> bool:
        """Whether as many rows were found as were published."""
        return self.found == self.published.rows

    def as_json(self) -> dict[str, Any]:
        """Return plain values."""
        return {
            "name": self.published.name,
            "rows": self.published.rows,
            "found": self.found,
            "difference": self.found - self.published.rows,
            "kept": self.kept,
            "ok": self.holds,
            "origin": self.published.origin,
        }


def count_sources(chain: Mapping[str, StageDir], names: Sequence[str]) -> list[SourceCounts]:
    """Return what became of each source's rows.

    Args: chain: stage -> finished directory, ingest at least; names: the sources, in order.
    """
    sources = _sources_by_shard(chain["ingest"])
    fates = {name: _fates(stage).join(sources, on="shard") for name, stage in chain.items()}
    written = _written(chain[MIX]) if MIX in chain else None
    return [_counts_of(name, fates, written) for name in names]


def compare(chain: Mapping[str, StageDir], published: Sequence[Published]) -> list[Comparison]:
    """Return each published count beside the rows as they came in, before anything was dropped.

    A row that ingest could not read counts where only its source is asked for.
    Raises: PartDamaged when ingest's tables do not have the same rows.
    """
    found, kept = np.zeros(len(published), np.int64), np.zeros(len(published), np.int64)
    taken = _taken(chain[MIX]) if MIX in chain else np.zeros(0, np.uint64)
    for rows in _rows_as_read(chain["ingest"]) if published else ():
        met = rows.select(meets_any(one.where).alias(str(at)) for at, one in enumerate(published))
        found += np.array(met.sum().row(0))
        kept += np.array(met.filter(_is_among(rows["uid"], taken)).sum().row(0))
    unread = _unread(chain["ingest"])
    return [
        Comparison(
            one,
            int(found[at]) + _unread_of(unread, one.where),
            int(kept[at]) if MIX in chain else None,
        )
        for at, one in enumerate(published)
    ]


def _counts_of(
    name: str, fates: Mapping[str, pl.DataFrame], written: Counter[str] | None
) -> SourceCounts:
    mine = {stage: found.filter(pl.col("source") == name) for stage, found in fates.items()}
    stages = {stage: _tally(found) for stage, found in mine.items()}
    mended: Counter[str] = Counter()
    for found in mine.values():
        mends = found.filter(pl.col("reason").str.starts_with(MENDED_PREFIX))
        for reason, rows in mends.select("reason", "rows").iter_rows():
            mended.update(dict.fromkeys(reason.removeprefix(MENDED_PREFIX).split(","), rows))
    if written is None:
        return SourceCounts(name, stages, mended, None, None)
    return SourceCounts(name, stages, mended, stages[MIX].kept, written[name])


def _tally(fates: pl.DataFrame) -> Tally:
    kept, lost = 0, Counter[str]()
    for is_kept, reason, rows in fates.select("keep", "reason", "rows").iter_rows():
        if is_kept:
            kept += rows
        else:
            lost[reason] += rows
    bad = {name for name in lost if name.startswith(QUARANTINE_PREFIX)}
    return Tally(
        kept + lost.total(),
        kept,
        {name: rows for name, rows in lost.items() if name not in bad},
        {name.removeprefix(QUARANTINE_PREFIX): lost[name] for name in bad},
    )


def _fates(stage: StageDir) -> pl.DataFrame:
    """Return (shard, keep, reason, rows) of a stage's verdicts."""
    by = ("shard", "keep", "reason")
    schema = {"shard": pl.UInt64, "keep": pl.Boolean, "reason": pl.String, "rows": pl.UInt32}
    found = [pl.DataFrame(schema=schema)]
    for path in stage.verdict_files():
        table = pl.DataFrame(store.read_table(path, ["uid", "keep", "reason"]))
        shard = (pl.col("uid") // (1 << UID_ROW_BITS)).alias("shard")
        found.append(table.with_columns(shard).group_by(by).agg(pl.len().alias("rows")))
    return pl.concat(found).group_by(by).agg(pl.col("rows").cast(pl.Int64).sum())


def _sources_by_shard(ingest: StageDir) -> pl.DataFrame:
    """Return (shard, source): whose file each shard index is."""
    payloads = [marker["payload"] for marker in ingest.markers()]
    found = {one["first_shard_index"]: one["source"] for one in payloads}
    columns = {"shard": list(found), "source": list(found.values())}
    return pl.DataFrame(columns, schema={"shard": pl.UInt64, "source": pl.String})


def _written(mix: StageDir) -> Counter[str]:
    counts: Counter[str] = Counter()
    for path in mix.files():
        counts.update(pl.DataFrame(store.read_table(path, ["source"]))["source"].to_list())
    return counts


def _unread(ingest: StageDir) -> dict[str, int]:
    """Return source -> rows of its files that are not in ingest's tables."""
    fates = _fates(ingest).join(_sources_by_shard(ingest), on="shard")
    counts = fates.filter(~pl.col("keep")).group_by("source").agg(pl.col("rows").sum())
    return dict(counts.iter_rows())


def _unread_of(unread: Mapping[str, int], wheres: Sequence[Where]) -> int:
    """Return how many unread rows surely meet a description: it asks for their source alone."""
    asked = [one.source for one in wheres if not one.needs_the_row]
    return sum(
        rows for name, rows in unread.items() if any(one is None or name in one for one in asked)
    )


def _taken(mix: StageDir) -> Uint64s:
    """Return the uids that the mix took, ascending."""
    found = [kept_uids(store.read_table(path, ["uid", "keep"])) for path in mix.verdict_files()]
    return np.sort(np.concatenate([np.zeros(0, np.uint64), *found]))


def _is_among(uids: pl.Series, taken: Uint64s) -> pl.Series:
    """Return which of a part's uids are taken; both ascend, so a small piece is looked through."""
    mine = uids.to_numpy()
    low = np.searchsorted(taken, mine[:1]).sum()
    high = np.searchsorted(taken, mine[-1:], side="right").sum()
    return pl.Series(np.isin(mine, taken[low:high]))


def _rows_as_read(ingest: StageDir) -> Iterator[pl.DataFrame]:
    """Yield uid, source, key, num_images and first_image of each part's rows."""
    for marker in ingest.markers():
        name = f"{part_name(marker['payload']['part'])}.parquet"
        samples = store.read_table(paths.join(ingest.path, name), ["uid", "source", "key"])
        beside = read_conversations(ingest, marker["payload"]["part"], ["images"])
        images = pl.DataFrame(beside)["images"]
        if len(images) != samples.num_rows:
            raise PartDamaged(f"{name} of ingest has {len(images)} conversations.")
        yield pl.DataFrame(samples).with_columns(
            num_images=images.list.len(), first_image=images.list.first()
        )
