"""Each filter rule against tables made by hand: limits are kept at the cutoff, unknown passes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from PIL import Image
from small_inputs import picture, recipe_for, rows_of, run_here, stages, write_tars

from curate.rows.filters import FilterConfig, judge, rules_of
from manifests.errors import UserError
from manifests.schemas import VERDICTS

COLUMNS = {
    "width": pl.UInt32,
    "height": pl.UInt32,
    "caption": pl.String,
    "punsafe": pl.Float64,
    "pwatermark": pl.Float64,
    "aesthetic": pl.Float64,
    "nsfw": pl.String,
    "pixel_std": pl.Float64,
}
GOOD: dict[str, Any] = {
    "width": 300,
    "height": 200,
    "caption": "a small red circle",
    "punsafe": 0.01,
    "pwatermark": 0.02,
    "aesthetic": 6.0,
    "nsfw": "UNLIKELY",
    "pixel_std": 40.0,
}


def verdicts(config: dict[str, Any], *changes: dict[str, Any]) -> list[dict[str, Any]]:
    """Judge one good row per change of it."""
    rows = [GOOD | change for change in changes]
    samples = pl.DataFrame(rows, schema=COLUMNS).with_columns(
        uid=pl.int_range(10, 10 + len(rows), dtype=pl.UInt64)
    )
    table = judge(samples, FilterConfig.load(config, where="recipe.filter"))
    assert table.schema.equals(VERDICTS)
    found = list(table.to_pylist())
    assert [row["uid"] for row in found] == list(range(10, 10 + len(rows)))
    assert all(row["keep"] == (row["reason"] == "") for row in found)
    return found


def reasons(config: dict[str, Any], *changes: dict[str, Any]) -> list[str]:
    return [row["reason"] for row in verdicts(config, *changes)]


RULES: list[tuple[dict[str, Any], str, list[dict[str, Any]], list[dict[str, Any]]]] = [
    (
        {"min_side": 200},
        "side_below",
        [{}, {"width": 200}, {"width": None, "height": None}, {"width": None}],
        [{"height": 199}, {"width": 1}, {"width": None, "height": 10}],
    ),
    (
        {"max_aspect_ratio": 3.0},
        "aspect_ratio_above",
        [
            {"width": 600},
            {"width": 100, "height": 300},
            {"width": None},
            {"width": None, "height": None},
        ],
        [{"width": 601}, {"width": 99, "height": 300}],
    ),
    (
        {"min_caption_chars": 5},
        "caption_chars_below",
        [{"caption": "five5"}, {"caption": "\u00e9" * 5}, {"caption": "\U0001f600" * 5}],
        [{"caption": "four"}, {"caption": ""}, {"caption": "\u00e9" * 4}],
    ),
    (
        {"max_caption_chars": 5},
        "caption_chars_above",
        [{"caption": "five5"}, {"caption": "\U0001f600" * 5}, {"caption": ""}],
        [{"caption": "sixsix"}],
    ),
    (
        {"min_caption_words": 3},
        "caption_words_below",
        [{"caption": "one  two\nthree"}, {"caption": "one\u00a0two\u3000three"}],
        [{"caption": "one two"}, {"caption": " "}, {"caption": "one-two-three"}],
    ),
    (
        {"max_caption_words": 3},
        "caption_words_above",
        [{"caption": "one two three"}, {"caption": ""}],
        [{"caption": "one two three four"}],
    ),
    (
        {"drop_above_punsafe": 0.45},
        "punsafe_above",
        [{"punsafe": 0.45}, {"punsafe": None}, {"punsafe": float("nan")}],
        [{"punsafe": 0.4500001}, {"punsafe": 1.0}],
    ),
    ({"drop_above_punsafe": 0.0}, "punsafe_above", [{"punsafe": 0.0}], [{"punsafe": 1e-9}]),
    (
        {"drop_above_pwatermark": 0.8},
        "pwatermark_above",
        [{"pwatermark": 0.8}, {"pwatermark": None}],
        [{"pwatermark": 0.81}],
    ),
    (
        {"drop_below_aesthetic": 4.5},
        "aesthetic_below",
        [{"aesthetic": 4.5}, {"aesthetic": None}, {"aesthetic": float("nan")}],
        [{"aesthetic": 4.4999}, {"aesthetic": -1.0}],
    ),
    ({"drop_below_aesthetic": 0.0}, "aesthetic_below", [{"aesthetic": 0.0}], [{"aesthetic": -1.0}]),
    (
        {"drop_nsfw_tags": ["NSFW", "unsure"]},
        "nsfw_tag",
        [{"nsfw": "UNLIKELY"}, {"nsfw": None}, {"nsfw": ""}],
        [{"nsfw": "NSFW"}, {"nsfw": "nsfw"}, {"nsfw": "UNSURE"}],
    ),
    (
        {"drop_below_pixel_std": 3.0},
        "pixel_std_below",
        [{"pixel_std": 3.0}, {"pixel_std": None}],
        [{"pixel_std": 2.999}, {"pixel_std": 0.0}],
    ),
]


@pytest.mark.parametrize(("config", "reason", "good", "bad"), RULES)
def test_a_rule_drops_what_lies_beyond_its_limit_and_only_that(
    config: dict[str, Any], reason: str, good: list[dict[str, Any]], bad: list[dict[str, Any]]
) -> None:
    assert reasons(config, *good) == [""] * len(good)
    assert reasons(config, *bad) == [reason] * len(bad)


def test_the_first_rule_that_fails_gives_reason_score_and_cutoff() -> None:
    config = {
        "min_side": 100,
        "max_aspect_ratio": 2.0,
        "min_caption_words": 2,
        "drop_above_punsafe": 0.5,
        "drop_nsfw_tags": ["NSFW"],
        "drop_below_pixel_std": 1.0,
    }
    all_wrong = {
        "width": 10,
        "height": 90,
        "caption": "x",
        "punsafe": 0.9,
        "nsfw": "NSFW",
        "pixel_std": 0,
    }
    mended: dict[str, Any] = {}
    expected: list[tuple[str, float, float, dict[str, Any]]] = [
        ("side_below", 10.0, 100.0, {"width": 100, "height": 900}),
        ("caption_words_below", 1.0, 2.0, {"caption": "x y"}),
        ("aspect_ratio_above", 9.0, 2.0, {"height": 100}),
        ("punsafe_above", 0.9, 0.5, {"punsafe": 0.1}),
        ("nsfw_tag", 1.0, 0.5, {"nsfw": None}),
        ("pixel_std_below", 0.0, 1.0, {"pixel_std": 9.0}),
    ]
    for reason, score, cutoff, mend in expected:
        (row,) = verdicts(config, all_wrong | mended)
        assert (row["reason"], row["score"], row["cutoff"]) == (reason, score, cutoff)
        mended |= mend
    (row,) = verdicts(config, all_wrong | mended)
    assert (row["keep"], row["score"], row["cutoff"]) == (True, None, None)


def test_without_limits_everything_passes_and_no_rows_are_no_verdicts() -> None:
    assert rules_of(FilterConfig()) == []
    assert reasons({}, {"width": 1, "caption": "", "punsafe": 1.0, "nsfw": "NSFW"}) == [""]
    assert verdicts({"min_side": 5, "drop_nsfw_tags": ["NSFW"]}) == []


ABSURD = [
    {"min_side": -1},
    {"max_aspect_ratio": 0.5},
    {"max_aspect_ratio": float("inf")},
    {"min_caption_chars": -5},
    {"max_caption_chars": 0},
    {"min_caption_words": -1},
    {"max_caption_words": 0},
    {"drop_above_punsafe": 1.5},
    {"drop_above_punsafe": -0.1},
    {"drop_above_pwatermark": float("nan")},
    {"drop_below_pixel_std": -1},
    {"drop_below_pixel_std": 200},
    {"drop_nsfw_tags": "NSFW"},
    {"min_side": 1.5},
]


@pytest.mark.parametrize("config", ABSURD)
def test_a_limit_that_makes_no_sense_is_refused(config: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=f"recipe.filter.{next(iter(config))} is"):
        FilterConfig.load(config, where="recipe.filter")


def test_near_empty_images_are_measured_from_their_own_bytes(tmp_path: Path) -> None:
    flat = tmp_path / "flat.png"
    Image.new("RGB", (20, 20), "gray").save(flat)
    members = []
    for key, image in (
        ("good", picture(20, 20)),
        ("flat", flat.read_bytes()),
        ("broken", b"GIF89a?"),
    ):
        members += [(f"{key}.png", image), (f"{key}.txt", b"a caption")]
    folder = write_tars(tmp_path / "in", {"00000.tar": members})
    recipe = recipe_for(folder, "webdataset", filter={"drop_below_pixel_std": 3.0})
    rows = rows_of(stages(run_here(recipe, tmp_path / "out"))["filter"])
    assert [row["reason"] for row in rows] == ["", "pixel_std_below", ""], "decoding is for embed"
    assert rows[1]["score"] == 0.0


def test_the_filter_judges_each_part_like_the_whole(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    captions = ["w " * rng.integers(1, 6) + "end" for _ in range(40)]
    members = [
        member
        for row, caption in enumerate(captions)
        for member in ((f"{row:03d}.jpg", picture()), (f"{row:03d}.txt", caption.encode()))
    ]
    shards = {f"{n}.tar": members[n * 20 : n * 20 + 20] for n in range(4)}
    folder = write_tars(tmp_path / "in", shards)
    found = []
    for shards_per_part in (1, 3):
        recipe = recipe_for(folder, "webdataset", filter={"min_caption_words": 4})
        recipe["source"]["shards_per_part"] = shards_per_part
        chain = stages(run_here(recipe, tmp_path / f"out{shards_per_part}"))
        found.append([row["reason"] for row in rows_of(chain["filter"])])
    expected = ["caption_words_below" if len(c.split()) < 4 else "" for c in captions]
    assert found == [expected, expected]
