"""The demo's instruction mix: its rows and dirt are as planted, and the judge sees both."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from PIL import Image

from manifests.work import StageDir
from pipelines.demo.conversations import FILES, Mix, make_mix
from pipelines.demo.mix_dirt import CLEAN, DIRT, KINDS
from pipelines.demo.mix_judge import fates_of_mix, judge_fates, judge_written, judgement_text
from pipelines.demo.mix_pictures import FOLDERS
from pipelines.demo.mix_show import mix_recipe, published_counts
from pipelines.demo.world import FILE_TIME
from pipelines.launch import run_recipe
from pipelines.recipe import read_yaml

NUM_PICTURES = 120


@pytest.fixture(scope="module")
def mix(tmp_path_factory: pytest.TempPathFactory) -> Mix:
    """Return a small mix, made once."""
    return make_mix(tmp_path_factory.mktemp("mix"), seed=3, num_pictures=NUM_PICTURES)


@pytest.fixture(scope="module")
def truth(mix: Mix) -> pl.DataFrame:
    return pl.read_parquet(mix.truth_path)


@pytest.fixture(scope="module")
def records(mix: Mix) -> dict[str, list[Any]]:
    """Return the rows of each file as they stand there; text for a line that is no JSON."""
    found = {
        source: json.loads((mix.instruct_dir / FILES[source]).read_text())
        for source in ("svit", "wizardlm")
    }
    lines = (mix.instruct_dir / FILES["messages"]).read_text().splitlines()
    return found | {"messages": [json.loads(x) if x.endswith("}") else x for x in lines]}


@pytest.fixture(scope="module")
def images(mix: Mix) -> dict[str, bytes]:
    """Return the bytes of every image by the path that rows give it."""
    base = mix.images_dir
    found = {
        p.relative_to(base).as_posix(): p.read_bytes()
        for p in base.rglob("*")
        if p.is_file() and p.suffix != ".tar"
    }
    with tarfile.open(base / FOLDERS["vg"].place) as tar:
        for member in tar:
            stream = tar.extractfile(member)
            assert stream is not None
            found[f"vg/VG_100K/{member.name}"] = stream.read()
    return found


def planted(truth: pl.DataFrame, records: dict[str, list[Any]], kind: str) -> list[Any]:
    """Return the rows of one kind as they stand in the files; there must be some."""
    rows = truth.filter(pl.col("kind") == kind)
    assert rows.height, kind
    return [records[source][row] for source, row in rows.select("source", "row").iter_rows()]


# -- files --


def test_every_kind_of_dirt_is_planted_twice_at_least_and_counted(
    mix: Mix, truth: pl.DataFrame, records: dict[str, list[Any]]
) -> None:
    counts = dict(truth.group_by("kind").len().sort("kind").iter_rows())
    assert counts == mix.num_rows_by_kind
    assert set(counts) == set(KINDS)
    assert min(counts.values()) >= 2
    assert mix.num_rows_by_source == {source: len(rows) for source, rows in records.items()}
    assert truth.select("source", "key").is_unique().all()


def test_clean_rows_are_in_the_files_as_the_truth_has_them(
    truth: pl.DataFrame, records: dict[str, list[Any]]
) -> None:
    for row in truth.filter(pl.col("kind").is_in(["clean", "text-only row"])).iter_rows(named=True):
        record = records[row["source"]][row["row"]]
        assert rounds_in(record) == [(one["question"], one["answer"]) for one in row["rounds"]]
        if row["source"] == "svit":
            assert record["id"] == row["key"]
            assert record.get("image", []) == (row["images"][0] if row["images"] else [])
            assert ("model" in record) == (not row["images"])


def rounds_in(record: dict[str, Any]) -> list[tuple[str, str]]:
    """Return the rounds of a row in any of the three formats, placeholders taken out."""
    if "instruction" in record:
        return [(record["instruction"], record["output"])]
    if "messages" in record:
        texts = [
            m["content"] if isinstance(m["content"], str) else m["content"][-1]["text"]
            for m in record["messages"]
        ]
    else:
        texts = [t["value"].replace("<image>", "").strip() for t in record["conversations"]]
    return list(zip(texts[::2], texts[1::2], strict=True))


def test_the_ids_and_prompts_are_those_of_the_real_mix(
    truth: pl.DataFrame, records: dict[str, list[Any]]
) -> None:
    rows = planted(truth, records, "clean")
    begins = Counter(r["id"].rpartition("_")[0] for r in rows if "conversations" in r)
    kinds = ("detail", "conversation", "complex", "referring")
    assert set(begins) == {"llavav1.5", *(f"svit_{kind}" for kind in kinds)}
    text = json.dumps(rows)
    for prompt in ("single word or phrase.", "option's letter", "Reference OCR token", "<st>"):
        assert prompt in text
    first = [r["conversations"][0]["value"] for r in rows if "image" in r]
    assert any(one.startswith("<image>\n") for one in first)
    assert any(one.endswith("\n<image>") for one in first)


def test_images_are_where_the_rows_say_and_have_the_bytes_of_the_truth(
    truth: pl.DataFrame, images: dict[str, bytes]
) -> None:
    used = set()
    for row in truth.filter("is_kept").iter_rows(named=True):
        digests = [hashlib.sha256(images[path]).digest() for path in row["images"]]
        assert digests == row["image_sha256"]
        formats = [opened(images[path]).format for path in row["images"]]
        assert formats == [{"jpg": "JPEG", "gif": "GIF"}[one] for one in row["suffixes"]]
        used |= {path.rpartition("/")[0] for path in row["images"]}
    assert used == {folder.prefix for folder in FOLDERS.values()}


def opened(image: bytes) -> Image.Image:
    """Return the image, decoded whole."""
    picture = Image.open(io.BytesIO(image))
    picture.load()
    return picture


def test_damaged_images_are_damaged(truth: pl.DataFrame, images: dict[str, bytes]) -> None:
    def files(kind: str) -> list[bytes | None]:
        paths = truth.filter(pl.col("kind") == kind)["images"]
        return [images.get(path) for (path,) in paths]

    assert set(files("no such file")) == set(files("not in the tar")) == {None}
    assert set(files("file of no bytes")) == {b""}
    assert all(image and image.startswith(b"<!DOCTYPE html") for image in files("HTML named .jpg"))
    for image in files("cut JPEG"):
        with pytest.raises(OSError, match="truncated"):
            opened(image or b"")


def texts_of(record: dict[str, Any]) -> list[tuple[str, str]]:
    return [(turn["from"], turn["value"]) for turn in record["conversations"]]


MARKS = {
    "text for a row": lambda r: isinstance(r, str),
    "no conversation": lambda r: not {"conversations", "messages", "instruction"} & set(r),
    "turns are text": lambda r: isinstance(r["conversations"], str),
    "cut line": lambda r: isinstance(r, str) and not r.endswith("}"),
    "empty answer": lambda r: not texts_of(r)[1][1].strip(),
    "two human turns": lambda r: [role for role, _ in texts_of(r)][:2] == ["human"] * 2,
    "unknown role": lambda r: "function" in dict(texts_of(r)),
    "two placeholders": lambda r: json.dumps(r).count("<image>") == 2,
    "placeholder, no image": lambda r: "<image>" in json.dumps(r) and "image" not in r,
    "no answer at all": lambda r: [role for role, _ in texts_of(r)] == ["human"],
    "message is empty": lambda r: texts_of(r)[1][1] == "message is empty",
    "answer in question": lambda r: r["output"] in r["instruction"] and len(r["output"]) >= 30,
    "endless answer": lambda r: len(texts_of(r)[1][1].split()) > 10_000,
    "leaked image": lambda r: r["image"].startswith("coco/"),
    "leaked name elsewhere": lambda r: r["image"].startswith("gqa/"),
    "blank system turn": lambda r: texts_of(r)[0] == ("system", ""),
    "greeting first": lambda r: texts_of(r)[0][0] == "gpt",
    "question last": lambda r: texts_of(r)[-1][0] == "human" and len(texts_of(r)) > 2,
    "end string": lambda r: texts_of(r)[1][1].endswith("</s>"),
    "path with ..": lambda r: "/../" in r["image"],
}


@pytest.mark.parametrize("kind", MARKS)
def test_dirt_is_in_its_rows_and_in_no_clean_one(
    kind: str, truth: pl.DataFrame, records: dict[str, list[Any]]
) -> None:
    source = KINDS[kind].source
    assert all(MARKS[kind](record) for record in planted(truth, records, kind))
    if kind.startswith("leaked"):
        return  # a list says which
    clean = truth.filter((pl.col("kind") == "clean") & (pl.col("source") == source))
    assert not any(MARKS[kind](records[source][row]) for row in clean["row"])


def test_all_dirt_on_rows_is_looked_at_above() -> None:
    assert {one.kind for one in DIRT if one.mar is not CLEAN.mar} <= set(MARKS)


def test_the_leaked_list_names_leaked_coco_images_and_the_names_found_elsewhere(
    mix: Mix, truth: pl.DataFrame
) -> None:
    listed = (mix.instruct_dir / "leaked.txt").read_text().split()
    assert listed == sorted(listed)
    rows = truth.filter(pl.col("images").list.len() > 0).explode("images")
    named = rows.filter(pl.col("images").str.extract(r"([^/]+)\.jpg$").is_in(listed))
    assert set(named["kind"]) == {"leaked image", "leaked name elsewhere"}
    assert named.height == len(listed)
    in_coco = named.filter(pl.col("images").str.starts_with("coco/"))
    assert set(in_coco["kind"]) == {"leaked image"}


def test_copies_say_what_a_row_before_them_says(truth: pl.DataFrame) -> None:
    order = {source: at for at, source in enumerate(FILES)}
    first: dict[str, str] = {}
    copies = Counter()
    ordered = sorted(truth.iter_rows(named=True), key=lambda r: (order[r["source"]], r["row"]))
    for row in ordered:
        said = json.dumps([row["images"], row["rounds"]])
        if said in first:
            copies[row["kind"]] += 1
            assert (first[said] == "text-only row") == (row["kind"] == "copy of a replaced row")
        else:
            assert row["reason"] != "duplicate_conversation"
        first.setdefault(said, row["kind"])
    assert set(copies) == {one for one in KINDS if one.startswith("copy")}
    assert set(copies.values()) == {2}


def test_the_same_seed_gives_the_same_bytes_and_another_seed_does_not(tmp_path: Path) -> None:
    contents = []
    for name, seed in (("first", 0), ("second", 0), ("other", 1)):
        make_mix(tmp_path / name, seed=seed, num_pictures=20)
        paths = [path for path in sorted((tmp_path / name).rglob("*")) if path.is_file()]
        assert {path.stat().st_mtime for path in paths} == {FILE_TIME}
        contents.append({p.relative_to(tmp_path / name): p.read_bytes() for p in paths})
    assert contents[0] == contents[1]
    assert (
        contents[0][Path("instruct/svit_mix.json")] != contents[2][Path("instruct/svit_mix.json")]
    )


# -- the judge --

TRUTH = pl.DataFrame(
    {
        "source": ["a", "a", "a", "b"],
        "key": ["1", "2", "3", "1"],
        "kind": ["clean", "clean", "empty answer", "end string"],
        "stage": ["", "", "clean", "clean"],
        "reason": ["", "", "empty_turn", "mended:end_string"],
    }
)
FATES = pl.DataFrame(
    {
        "source": ["a", "a", "a", "b"],
        "key": ["1", "2", "3", "1"],
        "fate": ["kept", "kept", "clean: empty_turn", "clean: mended:end_string"],
    }
)


def test_the_judge_finds_what_was_planted() -> None:
    found = judge_fates(TRUTH, FATES)
    assert [(one.kind, one.planted, dict(one.found)) for one in found] == [
        ("clean", 2, {"kept": 2}),
        ("empty answer", 1, {"clean: empty_turn": 1}),
        ("end string", 1, {"clean: mended:end_string": 1}),
    ]
    assert all(one.is_right for one in found)
    assert "WRONG" not in judgement_text(found, "fates", "row")


@pytest.mark.parametrize(
    ("fates", "wrong"),
    [
        (FATES.with_columns(fate=pl.lit("kept")), {"empty answer", "end string"}),
        (FATES.filter(pl.col("source") == "b"), {"clean", "empty answer"}),
        (FATES.with_columns(source=pl.lit("a")).tail(1), {"clean", "empty answer", "end string"}),
        (
            pl.concat([FATES, FATES.head(1).with_columns(key=pl.lit("9"))]),
            {"not planted"},
        ),
    ],
    ids=["all kept", "a file unread", "under another source", "a row from nowhere"],
)
def test_the_judge_marks_every_row_that_met_another_fate(
    fates: pl.DataFrame, wrong: set[str]
) -> None:
    found = judge_fates(TRUTH, fates)
    assert {one.kind for one in found if not one.is_right} == wrong
    assert judgement_text(found, "fates", "row").count("WRONG") == len(wrong)


# -- the run --


@pytest.fixture(scope="module")
def run(mix: Mix, tmp_path_factory: pytest.TempPathFactory) -> dict[str, StageDir]:
    """Return the finished stages of the demo's recipe over the small mix."""
    out = tmp_path_factory.mktemp("run")
    return run_recipe(mix_recipe(mix.truth_path.parent), str(out), executor="local")


def test_every_planted_row_meets_its_fate_and_every_clean_one_is_kept(
    truth: pl.DataFrame, run: dict[str, StageDir]
) -> None:
    findings = judge_fates(truth, fates_of_mix(run))
    assert {one.kind for one in findings} == set(KINDS)
    assert [one for one in findings if not one.is_right] == []


def test_every_written_row_is_as_the_truth_has_it(
    truth: pl.DataFrame, run: dict[str, StageDir]
) -> None:
    findings = judge_written(truth, run)
    assert len(findings) == 5
    assert {one.planted for one in findings} == {truth["is_kept"].sum()}
    assert [one for one in findings if not one.is_right] == []


def reworded(name: str) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """Return what gives a row's first round another question or answer."""
    return lambda row: {"rounds": [row["rounds"][0] | {name: "another"}]}


CHANGES = {
    "questions": reworded("question"),
    "answers": reworded("answer"),
    "image bytes": lambda _: {"image_sha256": [b"another"]},
    "image suffixes": lambda _: {"suffixes": ["png"]},
    "rows": lambda _: {"is_kept": False},
}


@pytest.mark.parametrize("aspect", CHANGES)
def test_the_judge_sees_one_row_that_is_not_as_planted(
    aspect: str, truth: pl.DataFrame, run: dict[str, StageDir]
) -> None:
    rows = truth.to_dicts()
    one = next(r for r in rows if r["is_kept"] and len(r["rounds"]) == len(r["images"]) == 1)
    one |= CHANGES[aspect](one)
    findings = judge_written(pl.DataFrame(rows, schema=truth.schema), run)
    wrong = {finding.kind: finding.found["wrong"] for finding in findings if not finding.is_right}
    assert wrong.pop(aspect) == 1
    # of a row that should not be there, all is right but that: the others count one too many
    assert set(wrong) <= (set(CHANGES) if aspect == "rows" else set())


def test_the_recipe_has_the_counts_of_the_whole_mix(tmp_path: Path) -> None:
    made = make_mix(tmp_path)
    given = read_yaml("warren:recipes/demo_mix.yaml")
    assert given["mix"]["published"] == published_counts(pl.read_parquet(made.truth_path))
    assert list(given["source"]["files"]) == list(FILES)
    assert set(given["resolve"]["roots"]) == {folder.prefix for folder in FOLDERS.values()}
