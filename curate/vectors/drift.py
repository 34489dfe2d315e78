"""The drift stage: is the image behind a URL still the one that was published?

Years pass between a table's making and the download: files are replaced, domains are sold, servers
scale. What was fetched is compared with what was published of it:

    hash_drifted         MD5 or SHA-256 of the file, where download was told to flag a mismatch
    size_drifted         width and height of the file as it was fetched
    image_drifted        cosine of its embedding to the published embedding of the image
    similarity_drifted   its similarity to the caption, beside the published one

A rule judges only what was published. The first that drops a row gives its reason; a row that is
only flagged is kept, and its reason names the rules ("flagged:size_drifted").
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import orjson
import polars as pl
import pyarrow as pa
from pydantic import Field

from curate.download.layout import shard_name
from curate.sources import image_root_of, source_of
from curate.vectors import clip_model, embed, exact, vector_parts
from curate.vectors.embed import EmbedConfig, Problem
from curate.vectors.halving import Halving
from manifests import ledger, paths, store
from manifests.errors import UserError
from manifests.schemas import UID_ROW_BITS
from manifests.strict import Strict
from manifests.work import Item, Output, View, part_name

Action = Literal["drop", "flag"]
Float64s = npt.NDArray[np.float64]

HASH, SIZE = "hash_drifted", "size_drifted"
IMAGE, SIMILARITY = "image_drifted", "similarity_drifted"
_PUBLISHED = ("uid", "width", "height", "similarity", "clip_score", "extra")
_FETCHED = ("uid", "original_width", "original_height", "hash_check")


class DriftConfig(Strict):
    """How far an image may be from what was published of it. A limit that is null judges nothing.

    The defaults of the last two limits were measured with the demo world's model on 1,414 of its
    images, scaled to 384 px (JPEG, quality 95) or written anew at quality 75: the cosine stays
    above 0.908 (99% above 0.966), the similarity within 0.096 (99% within 0.039). With the image
    of another row the cosine is below 0.30 nine times in ten. A larger model on real photographs
    will differ: flag first, and look at the scores.
    """

    embed: EmbedConfig | None = None
    """The model of the published embeddings or similarities (of LAION-400M's, ViT-B-32 by openai);
    None: the last two rules judge nothing. recipe.embed is not taken for it: it may be another."""
    on_hash: Action | None = "drop"
    """What becomes of hash_drifted rows; null: they are not looked for."""
    drop_above_side_ratio: float | None = Field(default=1.05, ge=1)
    """Larger side over smaller, of the published and the fetched width or height. Shorter sides are
    compared with shorter ones: tables that swap the two are no drift."""
    on_size: Action = "flag"
    """What becomes of size_drifted rows: many servers only scale their images anew."""
    drop_below_image_cosine: float | None = Field(default=0.9, ge=-1, le=1)
    """Smallest cosine of the fetched image's embedding to the published one (clip_retrieval)."""
    on_image: Action = "drop"
    """What becomes of image_drifted rows."""
    drop_above_score_change: float | None = Field(default=0.1, ge=0, le=2)
    """Largest difference between the similarity of image and caption now and as published."""
    on_similarity: Action = "drop"
    """What becomes of similarity_drifted rows."""


class Rule(NamedTuple):
    """A rule with what it found in n rows: fails bool [n], score float64 [n] with NaN unknown."""

    reason: str
    action: Action
    fails: npt.NDArray[np.bool_]
    score: Float64s
    cutoff: float


def identity(config: DriftConfig) -> Any:
    """Return what the model is, as the embed stage does."""
    return None if config.embed is None else embed.identity(config.embed)


def plan(view: View) -> list[Item]:
    """One item per source part. Raises: UserError for a model that open_clip does not know."""
    config = DriftConfig.model_validate(view.config)
    if config.embed is not None:
        clip_model.check_known(clip_model.find(config.embed.model, config.embed.pretrained))
    return [Item(part_name(one["part"]), {"part": one["part"]}) for one in view.parts()]


def work(view: View, item: Item) -> Output:
    """Judge one part's images. Notes: rows of each flag."""
    config = DriftConfig.model_validate(view.config)
    samples = view.samples(item.payload["part"], embed.COLUMNS).sort_by("uid")
    if not samples.num_rows:
        return Output(verdicts=ledger.verdicts("drift", np.zeros(0, np.uint64), reasons=[]))
    facts = _facts(view, item.payload["part"], samples.column("uid").to_numpy())
    problems: dict[int, Problem] = {}
    if config.embed is not None and _compares_similarity(config):
        found, problems = _similarities(view, config, config.embed, samples)
        facts = facts.with_columns(**found)
    reasons, scores, cutoffs = judge(facts, config)
    for at, problem in problems.items():
        reasons[at] = ledger.quarantine_reason(problem.error)
        scores[at] = cutoffs[at] = np.nan
    uids = samples.column("uid").to_numpy()
    table = ledger.verdicts("drift", uids, reasons=reasons, scores=scores, cutoffs=cutoffs)
    notes = {"flagged": flags} if (flags := _num_flagged(reasons)) else {}
    return Output(verdicts=table, quarantine=embed.quarantine_of(samples, problems), notes=notes)


def judge(
    facts: pl.DataFrame, config: DriftConfig
) -> tuple[npt.NDArray[np.object_], Float64s, Float64s]:
    """Return (reasons, scores, cutoffs) of n rows; a score is the first failing rule's.

    Args: facts: is_other_file bool, side_ratio, image_cosine, score and published_score float64,
    null where unknown; the last three columns may be missing.
    """
    rules = _rules(facts, config)
    reasons: npt.NDArray[np.object_] = np.full(facts.height, "", dtype=object)
    scores, cutoffs = np.full(facts.height, np.nan), np.full(facts.height, np.nan)
    for rule in (one for one in rules if one.action == "flag"):
        first, also = rule.fails & (reasons == ""), rule.fails & (reasons != "")
        reasons[first] = ledger.FLAGGED_PREFIX + rule.reason
        reasons[also] = reasons[also] + f",{rule.reason}"
        scores[first], cutoffs[first] = rule.score[first], rule.cutoff
    is_dropped = np.zeros(facts.height, np.bool_)
    for rule in (one for one in rules if one.action == "drop"):
        first = rule.fails & ~is_dropped
        reasons[first], scores[first], cutoffs[first] = rule.reason, rule.score[first], rule.cutoff
        is_dropped |= first
    return reasons, scores, cutoffs


def side_ratio(facts: pl.DataFrame) -> pl.Series:
    """Return larger over smaller of the sides as published and as fetched, the worse of the two.

    Null where either is unknown. Args: facts: width, height, original_width, original_height.
    """
    columns = ("width", "height", "original_width", "original_height")
    width, height, now_width, now_height = (pl.col(name).cast(pl.Float64) for name in columns)
    ratios = []
    for pick in (pl.min_horizontal, pl.max_horizontal):
        ratio = pick(width, height) / pick(now_width, now_height)
        ratios.append(pl.max_horizontal(ratio, 1 / ratio))
    known = pl.all_horizontal(pl.col(name).is_not_null() & (pl.col(name) > 0) for name in columns)
    return facts.select(pl.when(known).then(pl.max_horizontal(ratios))).to_series()


def _rules(facts: pl.DataFrame, config: DriftConfig) -> list[Rule]:
    """Return the rules that are switched on and have something to judge, in their order."""
    found: list[Rule] = []
    if config.on_hash is not None:
        fails = facts["is_other_file"].fill_null(False).to_numpy()
        found.append(Rule(HASH, config.on_hash, fails, np.full(facts.height, np.nan), np.nan))
    if (cutoff := config.drop_above_side_ratio) is not None:
        score = _known(facts["side_ratio"])
        found.append(Rule(SIZE, config.on_size, score > cutoff, score, cutoff))
    if (cutoff := config.drop_below_image_cosine) is not None and "image_cosine" in facts.columns:
        score = _known(facts["image_cosine"])
        found.append(Rule(IMAGE, config.on_image, score < cutoff, score, cutoff))
    if (cutoff := config.drop_above_score_change) is not None and "score" in facts.columns:
        score = np.abs(_known(facts["score"]) - _known(facts["published_score"]))
        found.append(Rule(SIMILARITY, config.on_similarity, score > cutoff, score, cutoff))
    return found


def _known(values: pl.Series) -> Float64s:
    return np.asarray(values.cast(pl.Float64).fill_null(np.nan).to_numpy())


def _compares_similarity(config: DriftConfig) -> bool:
    limits = config.drop_below_image_cosine, config.drop_above_score_change
    return any(one is not None for one in limits)


def _facts(view: View, part: int, uids: npt.NDArray[np.uint64]) -> pl.DataFrame:
    """Return what was published and what was fetched of each row, in the order of `uids`."""
    rows = pl.DataFrame({"uid": uids})
    path = paths.join(view.before["ingest"].path, f"{part_name(part)}.parquet")
    published = pl.DataFrame(store.read_table(path, _PUBLISHED))
    folder = view.before["download"].path
    shards = (shard_name(int(n), ".parquet") for n in np.unique(uids >> np.uint64(UID_ROW_BITS)))
    listings = [pl.DataFrame(store.read_table(paths.join(folder, s), _FETCHED)) for s in shards]
    facts = rows.join(published, on="uid", how="left", maintain_order="left")
    facts = facts.join(pl.concat(listings), on="uid", how="left", maintain_order="left")
    facts = facts.with_columns(_original_sides(facts))
    return facts.with_columns(
        side_ratio=side_ratio(facts),
        is_other_file=pl.col("hash_check") == "mismatch",
        published_score=pl.coalesce("clip_score", "similarity"),
    )


def _original_sides(facts: pl.DataFrame) -> list[pl.Series]:
    """Return the published width and height: of the file itself where the source tells both.

    Published embeddings come with what img2dataset noted: `width` of the image that it stored,
    `original_width` of the file.
    """
    parsed = [orjson.loads(text) if text else {} for text in facts["extra"]]
    found = []
    for name in ("width", "height"):
        given = (one.get(f"original_{name}") for one in parsed)
        sides = [float(one) if isinstance(one, int | float) and one >= 1 else None for one in given]
        column = facts[name].cast(pl.Float64)
        found.append(pl.Series(name, sides, pl.Float64).fill_null(column))
    return found


def _similarities(
    view: View, config: DriftConfig, model: EmbedConfig, samples: pa.Table
) -> tuple[dict[str, pl.Series], dict[int, Problem]]:
    """Return the columns image_cosine and score of the rows, and why some have none."""
    clip = clip_model.load(
        clip_model.find(model.model, model.pretrained), gpu_precision=model.gpu_precision
    )
    frame = pl.DataFrame(samples)
    with clip_model.pinned_threads(model.num_threads):
        root, halving = image_root_of(view), Halving(model.batch_size)
        embedded = embed.embed_rows(clip, model, frame, root, halving=halving)
    found = {"score": pl.Series([None] * frame.height, dtype=pl.Float64)}
    if embedded.positions:
        images, texts = np.concatenate(embedded.images), np.concatenate(embedded.texts)
        found["score"] = found["score"].scatter(
            embedded.positions, exact.clip_score(images, texts).tolist()
        )
        if source_of(view).is_embeddings and config.drop_below_image_cosine is not None:
            uids = frame["uid"].gather(embedded.positions).to_numpy()
            cosines = exact.row_dots(images, _published(view, uids, images.shape[1])).tolist()
            column = pl.Series([None] * frame.height, dtype=pl.Float64)
            found["image_cosine"] = column.scatter(embedded.positions, cosines)
    return found, embedded.problems


def _published(view: View, uids: npt.NDArray[np.uint64], dim: int) -> npt.NDArray[np.float16]:
    """Return the published embeddings of some rows. Raises: UserError for another dimension."""
    rows = vector_parts.gather(view, uids)
    if rows.shape[1] != dim:
        raise UserError(
            f"drift.embed makes embeddings of {dim} dimensions, the published have "
            f"{rows.shape[1]}.",
            "They are compared with each other, so one model must have made both.",
            "Give drift.embed the model that the embeddings were published for.",
        )
    return rows


def _num_flagged(reasons: npt.NDArray[np.object_]) -> dict[str, int]:
    flags = [one.removeprefix(ledger.FLAGGED_PREFIX) for one in reasons if _is_flag(one)]
    names = [name for one in flags for name in one.split(",")]
    return {name: names.count(name) for name in sorted(set(names))}


def _is_flag(reason: str) -> bool:
    return reason.startswith(ledger.FLAGGED_PREFIX)
