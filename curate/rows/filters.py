"""The filter stage: one small function per rule, the first that fails gives the reason.

A value that the source does not bring (null) passes: a rule judges only what it can see.
Thresholds in the literature: DataComp's basic filter keeps more than 2 words, more than 5
characters, shorter side >= 200 px and aspect ratio <= 3 (arXiv 2304.14108); LAION recommends
punsafe 0.5 and pwatermark 0.8 (laion.ai/blog/laion-5b).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import polars as pl
import pyarrow as pa
from pydantic import Field

from curate.media import images
from curate.media.originals import read_originals
from curate.sources import root_of
from manifests import ledger
from manifests.strict import Strict
from manifests.work import Item, Output, View, part_name

MAX_PIXELS = 128_000_000
"""Images of more pixels are left to the embed stage, which quarantines decompression bombs."""

Scores = npt.NDArray[np.float64]


class FilterConfig(Strict):
    """Limits of the filter; None, or 0 where it is the default, switches a rule off."""

    min_side: int = Field(default=0, ge=0)
    """Shorter side in pixels; smaller images are dropped."""
    max_aspect_ratio: float | None = Field(default=None, ge=1)
    """Longer side over shorter side; stretched images above it are dropped."""
    min_caption_chars: int = Field(default=0, ge=0)
    """Characters; shorter captions are dropped."""
    max_caption_chars: int | None = Field(default=None, ge=1)
    """Characters; longer captions are dropped."""
    min_caption_words: int = Field(default=0, ge=0)
    """Words between white space; captions of fewer are dropped."""
    max_caption_words: int | None = Field(default=None, ge=1)
    """Words between white space; captions of more are dropped."""
    drop_above_punsafe: float | None = Field(default=None, ge=0, le=1)
    """Published probability of unsafe content, 0..1. For tables of URLs set 0.45, where
    LAION's research-safe release ends: a run that sets none is warned."""
    drop_above_pwatermark: float | None = Field(default=None, ge=0, le=1)
    """Published probability of a watermark, 0..1."""
    drop_below_aesthetic: float | None = None
    """Published aesthetic score, about 1..10; LAION-Aesthetics keeps 4.5 and above, and 5, 6 or 6.5
    for its smaller sets."""
    drop_nsfw_tags: list[str] = []
    """Published NSFW tags to drop, e.g. [NSFW, UNSURE]; case does not matter."""
    drop_below_pixel_std: float = Field(default=0.0, ge=0, le=127.5)
    """Standard deviation of luminance, 0..127.5; near-empty images below it are dropped. Any value
    above 0 makes this stage read and decode every image."""


@dataclass(frozen=True, slots=True)
class Rule:
    """A limit: rows whose score lies on the wrong side of the cutoff get the reason."""

    reason: str
    cutoff: float
    score: Callable[[pl.DataFrame], pl.Series]
    drop_above: bool

    def fails(self, scores: Scores) -> npt.NDArray[np.bool_]:
        """Return the mask of rows to drop; NaN (unknown) never fails."""
        return scores > self.cutoff if self.drop_above else scores < self.cutoff


def rules_of(config: FilterConfig) -> list[Rule]:
    """Return the rules that are switched on, in the order in which they judge."""
    above = (
        ("aspect_ratio_above", config.max_aspect_ratio, aspect_ratio),
        ("caption_chars_above", config.max_caption_chars, caption_chars),
        ("caption_words_above", config.max_caption_words, caption_words),
        ("punsafe_above", config.drop_above_punsafe, punsafe),
        ("pwatermark_above", config.drop_above_pwatermark, pwatermark),
    )
    below = (
        ("side_below", config.min_side, shorter_side),
        ("caption_chars_below", config.min_caption_chars, caption_chars),
        ("caption_words_below", config.min_caption_words, caption_words),
    )
    rules = [Rule(reason, cut, score, drop_above=False) for reason, cut, score in below if cut]
    rules += [
        Rule(reason, cut, score, drop_above=True) for reason, cut, score in above if cut is not None
    ]
    if (worst := config.drop_below_aesthetic) is not None:
        rules.append(Rule("aesthetic_below", worst, aesthetic, drop_above=False))
    if config.drop_nsfw_tags:
        rules.append(Rule("nsfw_tag", 0.5, nsfw_tag(config.drop_nsfw_tags), drop_above=True))
    if least := config.drop_below_pixel_std:
        rules.append(Rule("pixel_std_below", least, pixel_std, drop_above=False))
    return rules


def shorter_side(samples: pl.DataFrame) -> pl.Series:
    """Return the shorter side in pixels."""
    return samples.select(pl.min_horizontal("width", "height")).to_series()


def aspect_ratio(samples: pl.DataFrame) -> pl.Series:
    """Return longer side / shorter side."""
    longer, shorter = pl.max_horizontal("width", "height"), pl.min_horizontal("width", "height")
    return samples.select(longer / shorter).to_series()


def caption_chars(samples: pl.DataFrame) -> pl.Series:
    """Return the caption's length in characters (code points)."""
    return samples["caption"].str.len_chars()


def caption_words(samples: pl.DataFrame) -> pl.Series:
    """Return the number of words between white space."""
    return samples["caption"].str.count_matches(r"\S+")


def punsafe(samples: pl.DataFrame) -> pl.Series:
    """Return the published probability of unsafe content."""
    return samples["punsafe"]


def pwatermark(samples: pl.DataFrame) -> pl.Series:
    """Return the published probability of a watermark."""
    return samples["pwatermark"]


def aesthetic(samples: pl.DataFrame) -> pl.Series:
    """Return the published aesthetic score."""
    return samples["aesthetic"]


def nsfw_tag(tags: list[str]) -> Callable[[pl.DataFrame], pl.Series]:
    """Return a score that is 1 where the published tag is one of `tags`."""
    wanted = [tag.lower() for tag in tags]
    return lambda samples: samples["nsfw"].str.to_lowercase().is_in(wanted).cast(pl.Float64)


def pixel_std(samples: pl.DataFrame) -> pl.Series:
    """Return the column that `work` measured from the images."""
    return samples["pixel_std"]


def judge(samples: pl.DataFrame, config: FilterConfig) -> pa.Table:
    """Return one VERDICTS row per sample: the first failing rule, its score and cutoff."""
    num = samples.height
    reasons: npt.NDArray[np.object_] = np.full(num, "", dtype=object)
    scores, cutoffs = np.full(num, np.nan), np.full(num, np.nan)
    for rule in rules_of(config):
        values = rule.score(samples).cast(pl.Float64).fill_null(np.nan).to_numpy()
        failed = rule.fails(values) & (reasons == "")
        reasons[failed], cutoffs[failed] = rule.reason, rule.cutoff
        scores[failed] = values[failed]
    uids = samples["uid"].to_numpy()
    return ledger.verdicts("filter", uids, reasons=reasons, scores=scores, cutoffs=cutoffs)


def plan(view: View) -> list[Item]:
    """One item per source part."""
    return [Item(part_name(one["part"]), {"part": one["part"]}) for one in view.parts()]


def work(view: View, item: Item) -> Output:
    """Judge one part."""
    config = FilterConfig.model_validate(view.config)
    table = view.samples(item.payload["part"])
    samples = pl.DataFrame(table)
    if config.drop_below_pixel_std:
        samples = samples.with_columns(_measured_pixel_std(view, samples))
    return Output(verdicts=judge(samples, config))


def _measured_pixel_std(view: View, samples: pl.DataFrame) -> pl.Series:
    """Return pixel_std of every image; null for those that do not decode: embed will say why."""
    places = samples.select("shard", "offset", "size").iter_rows()
    found = [_pixel_std_of(data) for data in read_originals(root_of(view), places)]
    return pl.Series("pixel_std", found, pl.Float64)


def _pixel_std_of(data: bytes | None) -> float | None:
    try:
        return (
            None if data is None else images.pixel_std(images.decode(data, max_pixels=MAX_PIXELS))
        )
    except images.ImageError:
        return None
