"""Drift: fetched images beside what was published, rule by rule, on figures worked out by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pytest
from small_inputs import picture, recipe_for, run_here, unit_rows, write_embeddings
from url_server import serving

from curate.vectors.drift import DriftConfig, judge, side_ratio
from manifests.errors import UserError

QUIET = {
    "is_other_file": False,
    "side_ratio": 1.0,
    "image_cosine": 0.99,
    "score": 0.30,
    "published_score": 0.31,
}
SCHEMA = {name: pl.Float64 for name in QUIET} | {"is_other_file": pl.Boolean}


def judged(config: DriftConfig, **facts: Any) -> tuple[str, float, float]:
    """Return (reason, score, cutoff) of one row; NaN is told as -1."""
    row = pl.DataFrame([QUIET | facts], schema=SCHEMA)
    reasons, scores, cutoffs = judge(row, config)
    score, cutoff = (float(np.nan_to_num(one[0], nan=-1)) for one in (scores, cutoffs))
    return reasons[0], score, cutoff


@pytest.mark.parametrize(
    ("facts", "expected"),
    [
        ({}, ("", -1, -1)),
        ({"is_other_file": True}, ("hash_drifted", -1, -1)),
        ({"side_ratio": 1.05}, ("", -1, -1)),
        ({"side_ratio": 1.06}, ("flagged:size_drifted", 1.06, 1.05)),
        ({"image_cosine": 0.9}, ("", -1, -1)),
        ({"image_cosine": 0.89}, ("image_drifted", 0.89, 0.9)),
        ({"score": 0.5, "published_score": 0.75}, ("similarity_drifted", 0.25, 0.1)),
        ({"score": 0.75, "published_score": 0.5}, ("similarity_drifted", 0.25, 0.1)),
        ({"score": 0.75, "published_score": None}, ("", -1, -1)),
        ({"is_other_file": None, "side_ratio": None, "image_cosine": None}, ("", -1, -1)),
        # the first that drops gives the reason, whatever is flagged
        ({"side_ratio": 3.0, "image_cosine": 0.2, "score": 0.9}, ("image_drifted", 0.2, 0.9)),
        ({"is_other_file": True, "image_cosine": 0.2}, ("hash_drifted", -1, -1)),
    ],
)
def test_each_rule_and_which_comes_first(
    facts: dict[str, Any], expected: tuple[str, float, float]
) -> None:
    assert judged(DriftConfig(), **facts) == pytest.approx(expected)


def test_a_row_is_flagged_by_all_rules_and_scored_by_the_first() -> None:
    config = DriftConfig(on_hash="flag", on_image="flag", on_similarity="flag")
    facts = {"is_other_file": True, "side_ratio": 2.0, "image_cosine": 0.5, "score": 0.9}
    every = "flagged:hash_drifted,size_drifted,image_drifted,similarity_drifted"
    assert judged(config, **facts) == (every, -1, -1)
    assert judged(config, **facts | {"is_other_file": False})[:2] == (
        "flagged:size_drifted,image_drifted,similarity_drifted",
        2.0,
    )


def test_a_rule_that_is_off_judges_nothing() -> None:
    limits = ("drop_above_side_ratio", "drop_below_image_cosine", "drop_above_score_change")
    config = DriftConfig(on_hash=None, **dict.fromkeys(limits))
    facts = {"is_other_file": True, "side_ratio": 2.0, "image_cosine": 0.5, "score": 0.9}
    assert judged(config, **facts) == ("", -1, -1)


@pytest.mark.parametrize(
    ("published", "fetched", "ratio"),
    [
        ((640, 480), (640, 480), 1.0),
        ((640, 480), (480, 640), 1.0),  # base LAION tables swap the two; EXIF turns pictures
        ((640, 480), (320, 240), 2.0),
        ((320, 240), (640, 480), 2.0),
        ((640, 480), (640, 400), 1.2),
        ((None, 480), (640, 480), None),
        ((640, 480), (None, 480), None),
        ((0, 480), (640, 480), None),
    ],
)
def test_sides_are_compared_shorter_with_shorter(
    published: tuple[Any, Any], fetched: tuple[Any, Any], ratio: float | None
) -> None:
    names = ("width", "height", "original_width", "original_height")
    row = dict(zip(names, (*published, *fetched), strict=True))
    found = side_ratio(pl.DataFrame([row], schema=dict.fromkeys(names, pl.Float64)))
    assert found.to_list() == pytest.approx([ratio])


def test_embeddings_of_another_model_are_refused(tmp_path: Path) -> None:
    """The demo's model makes 64 dimensions; these were published with 16."""
    with serving() as server:
        server.files["/0"] = picture()
        table = pa.table({"key": ["0"], "caption": ["a picture"], "url": [server.url("/0")]})
        folder = write_embeddings(tmp_path / "in", 0, unit_rows(1), metadata=table)
        sections = {
            "download": {"allow_private_addresses": True, "keep_original_bytes": True},
            "drift": {"embed": {"model": "warren:demo/model"}},
        }
        with pytest.raises(UserError, match=r"have 16(.|\n)*one model must have made both"):
            run_here(recipe_for(folder, "clip_retrieval", **sections), tmp_path / "out")
