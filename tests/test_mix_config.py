"""The mix section: what makes no sense is refused, with its place and the nearest name."""

from __future__ import annotations

from typing import Any

import pytest

from curate.rows.mix_config import MixConfig, check_names
from manifests.errors import UserError

COUNT = {"name": "n", "rows": 1, "where": {}, "origin": "a paper"}


def config_of(**values: Any) -> MixConfig:
    return MixConfig.load(values, where="recipe.mix")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"sources": {"svti": {}}}, r"mix\.sources names 'svti'(.|\n)*mean 'svit'"),
        ({"replace": {"text_only_of": "svi", "with": "wizardlm"}}, r"text_only_of names 'svi'"),
        ({"replace": {"text_only_of": "svit", "with": "wizard"}}, r"replace\.with names 'wizard'"),
        (
            {"published": [COUNT | {"where": {"source": ["svit", "x"]}}]},
            r"published\.0\.where\.source names 'x'(.|\n)*svit, wizardlm(.|\n)*Add it there",
        ),
    ],
)
def test_a_source_that_is_not_there_is_named_with_the_nearest(
    values: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        check_names(config_of(**values), ["svit", "wizardlm"])


def test_sources_that_are_there_pass() -> None:
    where = {"source": "svit", "has_image": False}
    config = config_of(
        replace={"text_only_of": ["svit"], "with": "wizardlm"},
        sources={"wizardlm": {"weight": 2}},
        published=[
            {"name": "ShareGPT", "rows": 40688, "where": where, "origin": "LLaVA#657"},
            {"name": "all", "rows": 735298, "where": {}, "origin": "their sum"},
        ],
    )
    assert check_names(config, ["svit", "wizardlm"]) is None
    assert MixConfig.load(config.model_dump(mode="json"), where="saved") == config


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"sources": {"a": {"include": [{}]}}}, r"include\.0(.|\n)*needs a condition"),
        ({"sources": {"a": {"exclude": [{"id_prefix": []}]}}}, r"exclude\.0\.id_prefix"),
        ({"sources": {"a": {"exclude": [{"image_under": ""}]}}}, r"exclude\.0\.image_under"),
        ({"sources": {"a": {"weight": -1}}}, r"a\.weight is -1"),
        ({"sources": {"a": {"weight": 1e9}}}, r"a\.weight is 1000000000"),
        ({"sources": {"a": {"num_rows": 5, "weight": 0.5}}}, "give one of them"),
        ({"sources": {"a": {"wieght": 2}}}, r"sources\.a\.wieght(.|\n)*mean 'weight'"),
        ({"replace": {"text_only_of": "a", "with": "a"}}, "cannot stand for its own"),
        ({"replace": {"text_only_of": "a"}}, r"replace\.with is missing"),
        ({"dedup": "some"}, r"mix\.dedup is 'some'"),
        ({"published": [{**COUNT, "rows": -1}]}, r"published\.0\.rows is -1"),
        ({"published": [{"name": "n", "rows": 1, "where": {}}]}, r"0\.origin is missing"),
        ({"samples_per_shard": 0}, r"samples_per_shard is 0"),
    ],
)
def test_a_section_that_makes_no_sense_is_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        config_of(**values)
