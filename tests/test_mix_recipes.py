"""The recipes of published mixes, as they are, over a few rows of each file: every row's fate."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import chdir
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from mix_files import (
    COPY,
    FILES,
    FIRST_COPIED,
    GIF,
    IMAGES,
    IN_SMALL_FILES,
    LAST_COPIED,
    LOST,
    VFLAN_PNG,
    VFLAN_WEBP,
    write_data,
)
from small_inputs import rows_of, run_here, stages

from manifests.ledger import MENDED_PREFIX, QUARANTINE_PREFIX
from manifests.work import StageDir
from pipelines.cli import main
from pipelines.recipe import load

SOURCES = {
    "bunny_695k": ("svit", "wizardlm"),
    "llava_665k": ("llava",),
    "bunny_llava_1.4m": ("svit", "llava", "wizardlm"),
    "bunny_allava_1.3m": ("svit", "wizardlm", "allava_laion", "allava_vflan"),
    "bunny_llava_allava_2m": ("svit", "llava", "wizardlm", "allava_laion", "allava_vflan"),
}
"""Recipe -> its sources, in order."""
NUM_KEPT = {
    "bunny_695k": 11 + 3,
    "llava_665k": 8,
    "bunny_llava_1.4m": 12 + 9 + 4,
    "bunny_allava_1.3m": 11 + 3 + 1 + 3,
    "bunny_llava_allava_2m": 12 + 9 + 4 + 1 + 3,
}
"""Recipe -> rows of each source in its mix, counted by hand."""
KEEPS_COPIES = {"bunny_llava_1.4m", "bunny_llava_allava_2m"}
SEES_DIRT = "max_quarantine_fraction=1.0"  # a quarter of these rows has a bad image


def run_recipe(folder: Path, name: str, *settings: str) -> dict[str, StageDir]:
    """Run a packaged recipe where its relative paths lead to the small files."""
    write_data(folder)
    with chdir(folder):
        recipe = load(f"warren:recipes/{name}.yaml", [SEES_DIRT, *settings])
        return stages(run_here(recipe.as_mapping(), folder / "out"))


@pytest.fixture(scope="module", params=SOURCES)
def made(request: pytest.FixtureRequest, tmp_path_factory: Any) -> tuple[str, dict[str, StageDir]]:
    """Return (recipe, its finished stages)."""
    return request.param, run_recipe(tmp_path_factory.mktemp("mix"), request.param)


def verdicts_of(stage: StageDir) -> list[dict[str, Any]]:
    """Return a stage's verdicts."""
    return [row for path in stage.verdict_files() for row in pq.read_table(path).to_pylist()]


def fates_of(chain: Mapping[str, StageDir]) -> dict[int, str]:
    """Return uid -> the last thing that happened to the row: its mend, who dropped it, or ""."""
    found: dict[int, str] = {}
    for name, stage in chain.items():
        for row in verdicts_of(stage):
            reason = row["reason"].removeprefix(QUARANTINE_PREFIX)
            if not row["keep"]:
                found[row["uid"]] = f"{name}: {reason}"
            else:
                found[row["uid"]] = reason or found.get(row["uid"], "")
    return found


def planted(name: str, *, keeps_copies: bool) -> dict[int, str]:
    """Return uid -> what must become of the row."""
    return {
        place << 24 | row: "" if keeps_copies and one.fate == COPY else one.fate
        for place, source in enumerate(SOURCES[name])
        for row, one in enumerate(FILES[source][1])
    }


def is_kept(fate: str) -> bool:
    return not fate or fate.startswith(MENDED_PREFIX)


def mixed(chain: Mapping[str, StageDir]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((Path(chain["mix"].path) / "mix.json").read_bytes())
    return found


def test_every_row_meets_the_fate_that_was_planted(made: tuple[str, dict[str, StageDir]]) -> None:
    name, chain = made
    expected = planted(name, keeps_copies=name in KEEPS_COPIES)
    assert fates_of(chain) == expected
    kept = [uid for uid, fate in expected.items() if is_kept(fate)]
    assert len(kept) == NUM_KEPT[name] == len(mixed(chain))
    assert sorted(row["uid"] for row in rows_of(chain["mix"])) == kept


def test_the_shards_hold_the_rows_with_the_images_that_they_name(
    made: tuple[str, dict[str, StageDir]],
) -> None:
    _, chain = made
    index = rows_of(chain["mix"])
    for row, written in zip(index, mixed(chain), strict=True):
        shard = (Path(chain["mix"].path) / row["shard"]).read_bytes()
        image = written.get("image")
        inside = [shard[one["offset"] :][: one["size"]] for one in row["images"]]
        assert inside == ([IMAGES[image]] if image else [])
        asked = written["conversations"][0]
        assert asked["from"] == "human"
        assert asked["value"].startswith("<image>\n") == row["has_image"] == (image is not None)
    suffixes = {
        written["image"]: [one["suffix"] for one in row["images"]]
        for row, written in zip(index, mixed(chain), strict=True)
        if "image" in written
    }
    told = {GIF: ["gif"], VFLAN_PNG: ["png"], VFLAN_WEBP: ["webp"]}
    assert suffixes == {image: told.get(image, ["jpg"]) for image in suffixes}
    assert GIF in suffixes


def test_rows_keep_what_their_file_says_of_them(made: tuple[str, dict[str, StageDir]]) -> None:
    name, chain = made
    samples = {row["key"]: row for row in rows_of(chain["ingest"])}
    if "wizardlm" in SOURCES[name]:  # has no ids; Bunny gave it these
        assert samples["wizardlm_1"]["caption"] == "Choose: red or blue?"
        assert samples["wizardlm_1"]["extra"] is None
    if "llava" in SOURCES[name] or "svit" in SOURCES[name]:
        assert json.loads(samples["wgByO4Y_0"]["extra"]) == {"model": ""}
    if "allava_laion" in SOURCES[name]:
        ring = samples["allava_laion_inst_100277305"]
        assert ring["url"] == "https://shop.example/100277305.jpg"
        assert json.loads(ring["extra"])["original_caption"] == "Ring no. 100277305"


def test_published_counts_are_told_beside_those_of_the_small_files(
    made: tuple[str, dict[str, StageDir]],
) -> None:
    name, chain = made
    out = str(Path(chain["mix"].path).parent)
    told = CliRunner().invoke(main, ["counts", out, "--json"])
    assert told.exit_code == 0
    found = {one["name"]: one["found"] for one in json.loads(told.stdout)["published"]}
    assert found == IN_SMALL_FILES[name]
    assert CliRunner().invoke(main, ["counts", out, "--strict"]).exit_code == 1


def test_what_two_files_share_comes_once_when_copies_are_dropped(tmp_path: Path) -> None:
    chain = run_recipe(tmp_path, "bunny_llava_1.4m", "mix.dedup=all")
    copies = range(FIRST_COPIED, LAST_COPIED + 1)
    copied = {1 << 24 | row: COPY for row in copies}
    assert fates_of(chain) == planted("bunny_llava_1.4m", keeps_copies=False) | copied
    lost = {row["uid"]: row["evidence_uid"] for row in verdicts_of(chain["mix"])}
    assert [lost[1 << 24 | row] for row in copies] == [5, 7, 8, 11, 12]


def test_a_missing_file_of_images_is_told_with_its_path(tmp_path: Path) -> None:
    chain = run_recipe(tmp_path, "llava_665k")
    (row,) = [one for one in rows_of(chain["resolve"], "quarantine") if LOST in one["detail"]]
    assert row["error"] == "missing_image"
    assert row["shard"] == "llava/llava_v1_5_mix665k.json"
