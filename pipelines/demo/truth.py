"""What became of the planted junk and of the good pairs: the truth joined with a run's fates.

Both functions are pure. `truth` is the world's truth.parquet. `fates` has one row per sample that
was ingested: key str, kept bool, stage str (where it was dropped, "" if kept), reason str.
"""

from __future__ import annotations

from collections.abc import Sequence

import polars as pl

STAGE_ORDER = ("ingest", "filter", "embed", "cluster", "dedup", "decontaminate", "select")
NEVER_INGESTED = "not ingested"
"""The stage given to rows without a fate: their download failed, so the tars do not hold them."""


def junk_table(
    truth: pl.DataFrame, fates: pl.DataFrame, *, stage_order: Sequence[str] = STAGE_ORDER
) -> pl.DataFrame:
    """Return per junk kind: kind, planted, caught, where (list of {stage, rows}, largest first).

    Of duplicates only the surplus is junk: a group of m pictures, its good original counted in, has
    m - 1 surplus rows, and all of them are caught when at most one row of the group is kept. The
    row that came furthest in `stage_order` stands for the picture and is left out of `where`. The
    placeholder's group, which has no good original, is counted alike.
    """
    rows = _with_fates(truth, fates)
    furthest = _progress(stage_order)
    surplus = (
        rows.filter(pl.col("group").is_not_null())
        .with_columns(_kind_of_group())
        .sort("group", furthest, "key", descending=[False, True, False])
        .filter(pl.int_range(pl.len()).over("group") > 0)
    )
    lone = rows.filter(pl.col("group").is_null() & (pl.col("kind") != "good"))
    junk = pl.concat([lone, surplus])
    counts = junk.group_by("kind").agg(
        planted=pl.len().cast(pl.Int64), caught=(~pl.col("kept")).sum().cast(pl.Int64)
    )
    return counts.join(_where(junk), on="kind", how="left").sort("kind")


def good_table(truth: pl.DataFrame, fates: pl.DataFrame) -> pl.DataFrame:
    """Return how many good pictures survived: aspect, value, planted, survived.

    Aspects are "all", "layout", "shapes" (how many), "digit" and "caption style". A picture
    survives when its row or any copy of it is kept: dedup may well prefer a copy to the original.
    """
    rows = _with_fates(truth, fates).with_columns(
        kept=pl.when(pl.col("group").is_null())
        .then(pl.col("kept"))
        .otherwise(pl.col("kept").any().over("group"))
    )
    good = rows.filter(pl.col("kind") == "good")
    aspects = {
        "all": pl.lit("all"),
        "layout": pl.col("layout"),
        "shapes": pl.col("num_things").cast(pl.String),
        "digit": pl.col("digit").cast(pl.String).fill_null("none"),
        "caption style": pl.col("caption_style"),
    }
    return pl.concat([_survivors(good, name, value) for name, value in aspects.items()])


def _with_fates(truth: pl.DataFrame, fates: pl.DataFrame) -> pl.DataFrame:
    """Return the truth with `kept` and `stage`; rows without a fate were never ingested."""
    return truth.join(fates.select("key", "kept", "stage"), on="key", how="left").with_columns(
        kept=pl.col("kept").fill_null(value=False),
        stage=pl.col("stage").fill_null(NEVER_INGESTED),
    )


def _progress(stage_order: Sequence[str]) -> pl.Expr:
    """Return how far a row came: its stage's place in the order, last of all when it was kept."""
    places = {NEVER_INGESTED: -1, **{stage: place for place, stage in enumerate(stage_order)}}
    unknown = len(stage_order)
    place = pl.col("stage").replace_strict(places, default=unknown, return_dtype=pl.Int32)
    return pl.when(pl.col("kept")).then(unknown + 1).otherwise(place)


def _kind_of_group() -> pl.Expr:
    """Return the kind of a group's copies, for its good original too."""
    copies = pl.col("kind").filter(pl.col("kind") != "good")
    return copies.first().over("group").alias("kind")


def _where(junk: pl.DataFrame) -> pl.DataFrame:
    """Return kind and the stages that caught its rows, the largest count first."""
    return (
        junk.filter(~pl.col("kept"))
        .group_by("kind", "stage")
        .agg(rows=pl.len().cast(pl.Int64))
        .sort("kind", "rows", "stage", descending=[False, True, False])
        .group_by("kind", maintain_order=True)
        .agg(where=pl.struct("stage", "rows"))
    )


def _survivors(good: pl.DataFrame, aspect: str, value: pl.Expr) -> pl.DataFrame:
    return (
        good.group_by(value.alias("value"))
        .agg(planted=pl.len().cast(pl.Int64), survived=pl.col("kept").sum().cast(pl.Int64))
        .select(pl.lit(aspect).alias("aspect"), "value", "planted", "survived")
        .sort("value")
    )
