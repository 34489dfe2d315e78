"""What the mix recipes say is published: each count means the rows it names, and the sums agree."""

from __future__ import annotations

from pathlib import Path

import polars as pl
import pytest
from mix_files import ALLAVA, CORE, FILES, IN_SMALL_FILES, OF_PATH, OTHER_COCO, Planted

from curate.rows.mix_config import MixConfig
from curate.rows.row_rules import meets_any
from pipelines.recipe import load

RECIPES = Path(__file__).resolve().parent.parent / "pipelines" / "recipes"
TOTALS = {
    "bunny_695k": 694_610,
    "llava_665k": 665_298,
    "bunny_llava_1.4m": 1_359_908,
    "bunny_allava_1.3m": 1_356_183,
    "bunny_llava_allava_2m": 2_021_481,
}


def mix_of(name: str) -> MixConfig:
    section = load(f"warren:recipes/{name}.yaml").sections["mix"]
    assert isinstance(section, MixConfig)
    return section


def published(name: str) -> dict[str, int]:
    return {one.name: one.rows for one in mix_of(name).published}


def as_facts(source: str, number: int, planted: Planted) -> dict[str, object]:
    """Return what the rules see of a row; a text in place of a row has neither id nor image."""
    row = planted.row if isinstance(planted.row, dict) else {}
    return {
        "source": source,
        "key": row.get("id", f"{source}_{number}"),
        "num_images": int("image" in row),
        "first_image": row.get("image"),
    }


@pytest.mark.parametrize("name", IN_SMALL_FILES)
def test_each_published_count_means_the_rows_that_its_name_says(name: str) -> None:
    sources = load(f"warren:recipes/{name}.yaml").source.files or {}
    facts = pl.DataFrame(
        [
            as_facts(source, number, planted)
            for source in sources
            for number, planted in enumerate(FILES[source][1])
        ]
    )
    counted = {
        one.name: facts.filter(meets_any(one.where)).height for one in mix_of(name).published
    }
    assert counted == IN_SMALL_FILES[name]


@pytest.mark.parametrize("name", TOTALS)
def test_the_total_in_the_header_is_the_sum_of_what_is_published(name: str) -> None:
    mix, rows = mix_of(name), published(name)
    whole = ("SVIT-mix-665K", "LLaVA-v1.5-mix665K", "WizardLM", *ALLAVA)
    total = sum(rows.get(one, 0) for one in whole)
    if mix.replace is not None:
        assert mix.replace.text_only_of == ["svit"]
        total -= rows.get("ShareGPT of SVIT-mix", rows.get("ShareGPT", 0))
    assert total == TOTALS[name] == list(rows.values())[-1 if mix.replace is not None else 0]
    assert f"expected  {total:,} rows" in (RECIPES / f"{name}.yaml").read_text()


def test_the_pieces_of_each_file_are_all_of_it() -> None:
    bunny, llava = published("bunny_695k"), published("llava_665k")
    assert sum(bunny[one] for one in CORE) == bunny["SVIT-core-150K"]
    of_path = sum(bunny[one] for one in OF_PATH)
    assert bunny["SVIT-core-150K"] + bunny[OTHER_COCO] + of_path == bunny["SVIT-mix-665K"]
    assert bunny[OTHER_COCO] == 82_783 + 8_998 + 66_160 + 48_447
    assert llava["images of COCO"] + of_path == llava["LLaVA-v1.5-mix665K"]
