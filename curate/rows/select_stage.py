"""The select stage: two rank bands and a seeded sample decide the coreset."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import polars as pl
import pyarrow as pa
from pydantic import Field, field_validator

from curate.rows.select import SELECT_REASONS, Selectable, Selected, select
from curate.sources import source_of
from curate.vectors import vector_parts
from manifests import ledger, paths, store
from manifests.errors import UserError
from manifests.schemas import CORESET, conform
from manifests.strict import Strict
from manifests.work import Item, Output, View, part_name

CORESET_FILE = "coreset.parquet"

Float64s = npt.NDArray[np.float64]
Uint64s = npt.NDArray[np.uint64]
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


def plan(view: View) -> list[Item]:
    """One item: ranks are over all rows."""
    config = SelectConfig.model_validate(view.config)
    wants_scores = config.clip_band is not None or config.policy == "top_clip"
    wants_clusters = config.centroid_band is not None or config.policy == "balanced"
    has_scores = "embed" in view.before or source_of(view).is_embeddings
    if wants_scores and not has_scores:
        raise _lacking("clip scores", "embed: {model: ViT-L-14, pretrained: openai}")
    if wants_clusters and "cluster" not in view.before:
        raise _lacking("clusters", "cluster: {num_clusters: 64}")
    return [Item(part_name(0))]


def work(view: View, item: Item) -> Output:
    """Decide on all rows; score is a dropped row's key, cutoff the nearest key that stayed."""
    config = SelectConfig.model_validate(view.config)
    rows = _rows(view)
    fate = select(
        rows,
        clip_band=_pair(config.clip_band),
        centroid_band=_pair(config.centroid_band),
        num_samples=config.num_samples,
        seed=view.seed,
        policy=config.policy,
    )
    verdicts = ledger.verdicts(
        "select",
        rows.uid,
        reasons=np.array(SELECT_REASONS, dtype=object)[fate.reason],
        scores=fate.score,
        cutoffs=fate.cutoff,
    )
    files = {CORESET_FILE: _coreset(view, rows, fate)}
    return Output(files=files, verdicts=verdicts, notes=_cutoffs(fate))


def _rows(view: View) -> Selectable:
    """Return the previous stage's kept rows by uid; figures that no stage made are NaN or 0."""
    uids = view.all_kept()
    known, scores = vector_parts.clip_scores(view)
    clip = _looked_up(uids, known, scores)
    if "cluster" not in view.before:
        return Selectable(uids, clip, np.full(len(uids), np.nan), np.zeros(len(uids), np.uint32))
    tables = [
        store.read_table(path, ["uid", "cluster", "centroid_cosine"])
        for path in view.before["cluster"].files()
    ]
    found = pl.DataFrame(pa.concat_tables(tables)).sort("uid") if tables else _no_assignments()
    at = np.searchsorted(found["uid"].to_numpy(), uids)
    return Selectable(
        uids, clip, found["centroid_cosine"].to_numpy()[at], found["cluster"].to_numpy()[at]
    )


def _looked_up(uids: Uint64s, known: Uint64s, values: Float64s) -> Float64s:
    if not len(known):
        return np.full(len(uids), np.nan)
    return values[np.searchsorted(known, uids)]


def _no_assignments() -> pl.DataFrame:
    return pl.DataFrame(
        schema={"uid": pl.UInt64, "cluster": pl.UInt32, "centroid_cosine": pl.Float64}
    )


def _coreset(view: View, rows: Selectable, fate: Selected) -> pa.Table:
    """Return the CORESET table of the kept rows, by uid."""
    kept = fate.keep
    columns: dict[str, Any] = {
        "uid": rows.uid[kept],
        "clip_score": _known(rows.clip_score[kept]),
        "centroid_cosine": _known(rows.centroid_cosine[kept]),
        "cluster": pa.array(
            rows.cluster[kept], mask=np.full(int(kept.sum()), "cluster" not in view.before)
        ),
    }
    frame = pl.DataFrame(pa.table(columns)).join(
        _described(view, rows.uid[kept]), on="uid", how="left", maintain_order="left"
    )
    return conform(frame.to_arrow(), CORESET)


def _described(view: View, uids: Uint64s) -> pl.DataFrame:
    """Return uid, key, shard and caption of the rows, read part by part."""
    ingest = view.before["ingest"].path
    wanted = pl.Series(uids)
    found = [
        pl.DataFrame(
            schema={"uid": pl.UInt64, "key": pl.String, "shard": pl.String, "caption": pl.String}
        )
    ]
    for part in view.parts():
        path = paths.join(ingest, f"{part_name(part['part'])}.parquet")
        table = store.read_table(path, ["uid", "key", "shard", "caption"])
        found.append(pl.DataFrame(table).filter(pl.col("uid").is_in(wanted.implode())))
    return pl.concat(found)


def _known(values: Float64s) -> pa.Array:
    return pa.array(values, mask=np.isnan(values))


def _cutoffs(fate: Selected) -> dict[str, float]:
    """Return the absolute cutoff of each reason: the nearest key that stayed."""
    found = {}
    for code, reason in enumerate(SELECT_REASONS):
        cut = fate.cutoff[(fate.reason == code) & ~np.isnan(fate.cutoff)]
        if code and len(cut):
            found[reason] = float(cut[0])
    return found


def _pair(band: Band | None) -> tuple[float, float] | None:
    return None if band is None else (band[0], band[1])


def _lacking(what: str, section: str) -> UserError:
    return UserError(
        f"select needs {what}.", "The recipe has no stage that makes them.", f"Add e.g. {section}."
    )
