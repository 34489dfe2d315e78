"""Two orders of one table: images come first, or, with published embeddings, after select."""

from __future__ import annotations

from typing import Any

import pytest

from manifests.errors import UserError
from pipelines.recipe import parse
from pipelines.stages import STAGES, run_order

TARS: dict[str, Any] = {"source": {"kind": "img2dataset", "path": "data"}}
URLS: dict[str, Any] = {"source": {"kind": "url_table", "path": "data"}}
EMBEDDINGS: dict[str, Any] = {"source": {"kind": "clip_retrieval", "path": "data"}}
CURATED: dict[str, Any] = {
    "filter": {},
    "cluster": {"num_clusters": 5},
    "dedup": {},
    "select": {"clip_band": [0.4, 0.6]},
    "assemble": {},
}
FETCHED: dict[str, Any] = {
    "download": {},
    "drift": {},
    "decontaminate": {"sets": {"pope": {"images": "pope"}}, "drop_above_similarity": None},
}
EMBED: dict[str, Any] = {"embed": {"model": "m"}}


def order(*parts: dict[str, Any]) -> list[str]:
    values = {name: given for part in parts for name, given in part.items()}
    return list(parse(values).configs)


def test_urls_are_fetched_before_anything_is_compared() -> None:
    assert order(URLS, CURATED, FETCHED, EMBED) == [
        *("ingest", "filter", "download", "drift", "embed", "centroids", "cluster"),
        *("forest", "dedup", "decontaminate", "select", "assemble"),
    ]


def test_with_published_embeddings_only_the_winners_are_fetched() -> None:
    assert order(EMBEDDINGS, CURATED, FETCHED) == [
        *("ingest", "filter", "centroids", "cluster", "forest", "dedup", "select"),
        *("download", "drift", "decontaminate", "assemble"),
    ]
    assert order(EMBEDDINGS, {"download": {}}) == ["ingest", "download"]


def test_both_orders_have_every_stage_and_a_source_of_images_the_table_s() -> None:
    assert run_order(brings_embeddings=False) == list(STAGES.values())
    late = run_order(brings_embeddings=True)
    assert sorted(one.name for one in late) == sorted(STAGES)
    names = [one.name for one in late]
    assert names.index("select") < names.index("download") < names.index("assemble")
    assert order(TARS, CURATED, EMBED) == [
        one for one in STAGES if one in order(TARS, CURATED, EMBED)
    ]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (TARS | {"download": {}}, r"recipe\.download has nothing to fetch(.|\n)*url_table"),
        (TARS | {"drift": {}}, r"recipe\.drift has nothing to fetch"),
        (URLS | EMBED, r"recipe\.embed needs images(.|\n)*brings URLs(.|\n)*download: \.\.\."),
        (URLS | {"assemble": {}}, r"recipe\.assemble needs images(.|\n)*download: \.\.\."),
        (EMBEDDINGS | {"assemble": {}}, r"recipe\.assemble needs images(.|\n)*embeddings"),
        (URLS | {"drift": {}}, r"recipe\.drift needs recipe\.download"),
        (EMBEDDINGS | {"drift": {}}, r"recipe\.drift needs recipe\.download"),
        (
            EMBEDDINGS | EMBED | {"download": {}},
            r"recipe\.embed needs images before anything is selected(.|\n)*drift: \.\.\.",
        ),
        *(
            (
                source | {"filter": {"drop_below_pixel_std": 3.0}, "download": {}},
                r"drop_below_pixel_std needs images(.|\n)*before any image is fetched",
            )
            for source in (URLS, EMBEDDINGS)
        ),
        (URLS | {"download": {}, "cluster": {"num_clusters": 5}}, r"cluster needs recipe\.embed"),
    ],
)
def test_images_are_asked_for_where_there_are_none_and_only_there(
    values: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        parse(values)


@pytest.mark.parametrize("values", [URLS | {"download": {}} | EMBED, EMBEDDINGS])
def test_assemble_is_fine_once_images_are_fetched(values: dict[str, Any]) -> None:
    assert order(values | {"download": {}, "assemble": {}})[-1] == "assemble"
