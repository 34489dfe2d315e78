"""What became of each source's rows, and published counts beside the found ones: a planted mix."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from small_inputs import good_tars, picture, recipe_for, run_here
from small_mixes import image_row, text_row, write_images, write_json

from manifests import store
from manifests.record import read_latest, write_latest
from pipelines.cli import main
from pipelines.recipe import parse

Row = dict[str, Any]


def planted(folder: Path) -> Row:
    """Write 20 rows of svit and 6 of wizardlm in two files, and return a recipe of all stages."""
    svit: list[Any] = [image_row(f"svit_detail_{n}", f"coco/{n}.jpg") for n in range(5)]
    svit += [image_row(f"svit_complex_{n}", f"vg/{n}.jpg") for n in range(3)]
    svit += [image_row(f"llavav1.5_{n}", f"coco/{n}.jpg") for n in range(6)]
    svit += [text_row(f"sharegpt{n}") for n in range(4)]
    svit[0]["image"] = "coco/missing.jpg"
    svit[6]["conversations"].append({"from": "human", "value": "And?"})
    svit[6]["conversations"].insert(0, {"from": "gpt", "value": "Hello."})
    svit[9]["conversations"].append({"from": "human", "value": "And?"})
    svit[7] = image_row("svit_complex_2", ["vg/0.jpg", "coco/1.jpg"], "Both?", "Yes.")
    svit += [svit[3] | {"id": "again"}, "no row"]
    wizard: list[Row] = [{"instruction": f"Do {n}.", "output": f"{n} is done."} for n in range(6)]
    wizard[4]["output"] = ""
    write_json(folder / "wizard0.json", wizard[:3])
    write_json(folder / "wizard1.json", wizard[3:])
    images = [f"coco/{n}.jpg" for n in range(6)] + [f"vg/{n}.jpg" for n in range(3)]
    root = write_images(folder / "images", {name: picture() for name in images})
    return {
        "max_quarantine_fraction": 0.5,
        "source": {
            "kind": "llava_json",
            "bytes_per_part": 1500,
            "files": {
                "svit": write_json(folder / "svit.json", svit),
                "wizardlm": str(folder / "wizard{0..1}.json"),
            },
        },
        "clean": {},
        "resolve": {"roots": {name: f"{root}/{name}" for name in ("coco", "vg")}},
        "mix": {
            "replace": {"text_only_of": "svit", "with": "wizardlm"},
            "sources": {
                "svit": {"exclude": [{"id_prefix": "llavav1.5_0"}]},
                "wizardlm": {"weight": 2.0},
            },
            "published": [count(*one) for one in PUBLISHED],
        },
    }


def count(name: str, rows: int, where: Row, found: int, kept: int) -> Row:
    return {"name": name, "rows": rows, "where": where, "origin": f"{name}#1"}


# name, published, which rows, found, taken by the mix
PUBLISHED: list[tuple[str, int, Row, int, int]] = [
    ("all", 26, {}, 26, 17),
    ("svit", 20, {"source": "svit"}, 20, 12),
    ("wizardlm", 7, {"source": "wizardlm"}, 6, 5),
    ("both", 26, {"source": ["svit", "wizardlm"]}, 26, 17),
    ("readable", 19, {"source": "svit", "id_not_prefix": "zz"}, 19, 12),
    ("core", 8, {"source": "svit", "id_prefix": "svit_"}, 8, 7),
    ("coco", 11, {"source": "svit", "image_under": "coco"}, 12, 9),
    ("vg", 3, {"image_under": "vg/"}, 3, 3),
    ("others", 11, {"source": "svit", "id_not_prefix": ["svit_", "z"]}, 11, 5),
    ("sharegpt", 4, {"source": "svit", "has_image": False}, 4, 0),
    ("text", 10, {"has_image": False}, 10, 5),
    ("none", 0, {"source": "wizardlm", "has_image": True}, 0, 0),
]
DIFFERENT = ["wizardlm", "coco"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mix")
    run_here(planted(folder / "in"), folder / "out")
    return folder / "out"


def counts(*words: object) -> Result:
    return CliRunner().invoke(main, ["counts", *map(str, words)])


def answer(*words: object) -> Any:
    done = counts(*words, "--json")
    assert done.exit_code == 0, done.stderr
    return json.loads(done.stdout)


def test_every_source_tells_where_its_rows_went(finished: Path) -> None:
    svit, wizardlm = answer(finished)["sources"]
    assert (svit["source"], svit["rows"], svit["kept"], svit["written"]) == ("svit", 20, 12, 12)
    assert svit["mended"] == {"leading_gpt_turn": 1, "dangling_human_turn": 2}
    lost = {name: (one["dropped"], one["quarantined"]) for name, one in svit["stages"].items()}
    assert lost == {
        "ingest": ({}, {"not_an_object": 1}),
        "clean": ({}, {}),
        "resolve": ({}, {"missing_image": 1}),
        "mix": ({"replaced": 4, "excluded": 1, "duplicate_conversation": 1}, {}),
    }
    assert (wizardlm["rows"], wizardlm["kept"], wizardlm["written"]) == (6, 5, 10)
    assert wizardlm["mended"] == {}
    assert wizardlm["stages"]["clean"]["dropped"] == {"empty_turn": 1}


def test_the_sources_add_up_to_the_stages(finished: Path) -> None:
    sources = answer(finished)["sources"]
    for name, directory in read_latest(str(finished)).items():
        record = directory.record()
        assert record is not None
        for figure in ("rows_in", "kept"):
            assert sum(one["stages"][name][figure] for one in sources) == record[figure]


def test_published_counts_stand_beside_the_rows_as_they_came_in(finished: Path) -> None:
    found = {one["name"]: one for one in answer(finished)["published"]}
    assert [(name, one["found"], one["kept"]) for name, one in found.items()] == [
        (name, number, kept) for name, _, _, number, kept in PUBLISHED
    ]
    assert [name for name, one in found.items() if not one["ok"]] == DIFFERENT
    assert [found[name]["difference"] for name in DIFFERENT] == [-1, 1]


def test_a_difference_is_told_on_stderr_and_fails_when_strict(finished: Path) -> None:
    done, strict = counts(finished), counts(finished, "--strict")
    assert (done.exit_code, strict.exit_code) == (0, 1)
    assert strict.stdout == done.stdout
    warnings = done.stderr.splitlines()
    assert warnings[0] == "warning: wizardlm: 6 rows, not the 7 published (wizardlm#1)"
    assert len(warnings) == len(DIFFERENT)
    assert strict.stderr.splitlines() == [*warnings, "error: 2 published counts differ"]
    assert "clean: empty_turn 1" in done.stdout
    assert "resolve: quarantine missing_image 1; mix: replaced 4" in " ".join(done.stdout.split())
    (line,) = [line for line in done.stdout.splitlines() if line.split()[:1] == ["coco"]]
    assert line.split() == ["coco", "11", "12", "+1", "9", "DIFFERS", "coco#1"]


def test_equal_counts_are_quiet(tmp_path: Path, finished: Path) -> None:
    out = shutil.copytree(finished, tmp_path / "out")
    recipe = planted(tmp_path / "in")
    recipe["mix"]["published"] = [count("core", 8, {"id_prefix": "svit_"}, 8, 7)]
    store.write_json(str(out), "recipe.yaml", parse(recipe).as_mapping())
    done = counts(out, "--strict")
    assert (done.exit_code, done.stderr) == (0, "")
    del recipe["mix"]
    store.write_json(str(out), "recipe.yaml", parse(recipe).as_mapping())
    assert answer(out, "--strict")["published"] == []
    assert "published" not in counts(out).stdout


@pytest.mark.parametrize("until", ["ingest", "resolve"])
def test_counts_are_told_while_the_mix_is_unfinished(
    tmp_path: Path, finished: Path, until: str
) -> None:
    out = shutil.copytree(finished, tmp_path / "out")
    chain = list(read_latest(str(out)).values())
    stages = [one.stage for one in chain]
    write_latest(str(out), chain[: stages.index(until) + 1], planned=chain)
    found = answer(out)
    assert [one["found"] for one in found["published"]] == [one[3] for one in PUBLISHED]
    assert {one["kept"] for one in found["published"] + found["sources"]} == {None}
    assert [one["written"] for one in found["sources"]] == [None, None]
    assert list(found["sources"][0]["stages"]) == stages[: stages.index(until) + 1]
    assert "?" in counts(out).stdout


def test_a_source_without_rows_is_listed_with_none(tmp_path: Path) -> None:
    recipe = planted(tmp_path / "in")
    recipe["source"]["files"]["empty"] = write_json(tmp_path / "in/empty.json", [])
    run_here(recipe, tmp_path / "out", until="clean")
    empty = answer(tmp_path / "out")["sources"][-1]
    assert (empty["source"], empty["rows"]) == ("empty", 0)


def test_a_run_of_pairs_has_no_instruction_rows(tmp_path: Path) -> None:
    run_here(recipe_for(good_tars(tmp_path / "in"), "webdataset"), tmp_path / "out")
    done = counts(tmp_path / "out")
    assert done.exit_code == 2
    assert "has no instruction rows" in done.stderr
    assert counts(tmp_path / "nothing").exit_code == 2
