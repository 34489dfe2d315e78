"""Each way to find an evaluation set's items among rows, held against its definition."""

from __future__ import annotations

import json
import re
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from oracle import dot, units
from PIL import Image
from small_benchmarks import brightened, brute_overlap, encoded, halved, smooth_picture
from small_inputs import picture, tar_of, unit_rows

from curate.contamination import benchmark_files, near_images, ngrams, phash
from curate.contamination.config import DecontaminateConfig, identity
from curate.contamination.pairs import Ranked, equal_pairs
from curate.media.images import decode
from curate.rows.id_lists import image_names, read_image_ids
from manifests.errors import UserError


def triples(found: Ranked) -> list[tuple[int, int, float]]:
    return list(zip(found.row.tolist(), found.item.tolist(), found.score.tolist(), strict=True))


def hash_of(picture: Image.Image) -> int:
    found = phash.phash(picture)
    assert found is not None
    return found


def test_a_picture_encoded_sized_or_lit_anew_keeps_its_hash_and_others_are_far() -> None:
    pictures = [smooth_picture(seed) for seed in range(40)]
    hashes = [hash_of(one) for one in pictures]
    for one, known in zip(pictures, hashes, strict=True):
        assert hash_of(decode(encoded(one), max_pixels=1 << 20)) == known
        jpeg = decode(encoded(one, "JPEG", quality=70), max_pixels=1 << 20)
        for changed in (jpeg, halved(one), brightened(one), brightened(one, 0.7)):
            assert (hash_of(changed) ^ known).bit_count() <= 4
    assert min((a ^ b).bit_count() for a in hashes for b in hashes if a != b) > 10
    assert all(one % 2 == 0 for one in hashes)


def test_the_hash_is_that_of_a_slow_transform() -> None:
    for seed in range(3):
        small = smooth_picture(seed).convert("L").resize((32, 32), Image.Resampling.LANCZOS)
        values = np.asarray(small, np.float64)
        at = np.arange(32)
        waves = np.cos(np.pi * (2 * at + 1) * at[:8, None] / 64)
        scale = np.where(at[:8] == 0, np.sqrt(1 / 32), np.sqrt(2 / 32))
        low = (scale[:, None] * waves @ values @ (scale[:, None] * waves).T).ravel()
        bits = (low > np.median(low[1:])) & (np.arange(64) > 0)
        wanted = sum(1 << place for place in np.flatnonzero(bits).tolist())
        assert hash_of(smooth_picture(seed)) == wanted


def test_a_flat_picture_has_no_hash() -> None:
    assert phash.phash(Image.new("RGB", (64, 64), (200, 10, 10))) is None
    assert phash.phash(decode(picture(64, 64), max_pixels=1 << 20)) is not None


def test_hashes_are_compared_all_with_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(phash, "ROWS_PER_TILE", 7)
    monkeypatch.setattr(phash, "ITEMS_PER_TILE", 11)
    rng = np.random.default_rng(0)
    theirs = rng.integers(0, 1 << 63, 40, dtype=np.uint64)
    flips = [sum(1 << int(at) for at in rng.choice(64, n % 9, replace=False)) for n in range(60)]
    ours = theirs[rng.integers(0, 40, 60)] ^ np.array(flips, np.uint64)
    wanted = [
        (row, item, float(distance))
        for row, a in enumerate(ours.tolist())
        for item, b in enumerate(theirs.tolist())
        if (distance := (a ^ b).bit_count()) <= 5
    ]
    assert len(wanted) > 30
    assert triples(phash.near_pairs(ours, theirs, at_most=5, most=99)) == wanted
    none = np.empty(0, np.uint64)
    assert triples(phash.near_pairs(ours, none, at_most=5, most=9)) == []
    assert triples(phash.near_pairs(none, theirs, at_most=5, most=9)) == []


def test_of_many_items_the_nearest_are_listed_and_all_are_counted() -> None:
    theirs = np.array([0b111, 0b1, 0, 0b11, 0b10, 1 << 40], np.uint64)
    found = phash.near_pairs(np.zeros(1, np.uint64), theirs, at_most=3, most=4)
    assert triples(found) == [(0, 2, 0.0), (0, 1, 1.0), (0, 4, 1.0), (0, 5, 1.0)]
    assert found.num_items.tolist() == [6, 6, 6, 6]


def test_similarities_are_decided_exactly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(near_images, "ROWS_PER_TILE", 32)
    theirs = unit_rows(70, dim=24, seed=1)
    noise = np.random.default_rng(2).normal(scale=0.05, size=(150, 24))
    moved = theirs[np.arange(150) % 50] + noise
    ours = (moved / np.linalg.norm(moved, axis=1, keepdims=True)).astype(np.float16)
    exact = {
        (row, item): dot(a, b)
        for row, a in enumerate(map(units, ours))
        for item, b in enumerate(map(units, theirs))
    }
    likely = sorted(score for score in exact.values() if score > Fraction(9, 10))
    above = float(likely[len(likely) // 2])  # the dot of one pair itself: strictly above it
    wanted = {pair: score for pair, score in exact.items() if score > Fraction(above)}
    assert 20 < len(wanted) < len(likely)
    found = triples(near_images.near_pairs(ours, theirs, above=above, most=99))
    assert {(row, item): Fraction(score) for row, item, score in found} == wanted


def test_other_dimensions_are_refused() -> None:
    with pytest.raises(UserError, match="24 dimensions, those of the evaluation set 16"):
        near_images.near_pairs(unit_rows(2, dim=24), unit_rows(2), above=0.5, most=1)


def test_words_are_runs_of_letters_and_digits_in_one_form() -> None:
    text = "A ﬁne_looking DOG's ２nd walk, Ærøskøbing—1.5 km!"
    wanted = "a fine looking dog s 2nd walk ærøskøbing 1 5 km"
    assert ngrams.words_of(text) == wanted.split()
    assert ngrams.words_of("犬が 走る。") == ["犬が", "走る"]
    assert ngrams.words_of(" -- ") == []


@pytest.mark.parametrize(("num_words", "above"), [(3, 0.0), (3, 0.5), (1, 0.6), (5, 0.0)])
def test_captions_overlap_as_defined(num_words: int, above: float) -> None:
    rng = np.random.default_rng(3)

    def texts(count: int) -> list[str]:
        return [
            ", ".join(f"Wort{word}" for word in rng.integers(0, 5, rng.integers(0, 12)))
            for _ in range(count)
        ]

    captions, known = texts(200), texts(60)
    captions[7] = "Before, " + known[3].upper() + " -- and after"
    normal = [" ".join(ngrams.words_of(one)) for one in known]
    found = ngrams.overlapping(
        captions,
        lambda item: normal[item],
        ngrams.index_of(normal, num_words),
        num_words=num_words,
        above=above,
        most=999,
    )
    wanted = {
        (row, item): score
        for row, caption in enumerate(captions)
        for item, text in enumerate(known)
        if (score := brute_overlap(caption, text, num_words)) > above
    }
    assert len(wanted) > 20
    assert {(row, item): score for row, item, score in triples(found)} == wanted


def test_gpt_3s_rule_is_any_13_words_and_a_short_text_must_be_the_whole_caption() -> None:
    words = [f"w{at}" for at in range(30)]
    long, short = " ".join(words), "Is there a dog?"
    index = ngrams.index_of([long, " ".join(ngrams.words_of(short))], 13)
    captions = [
        "x " + " ".join(words[4:17]),
        " ".join(words[4:16]),
        "IS there a dog",
        "is there a dog now",
        "",
    ]
    found = ngrams.overlapping(
        captions,
        lambda item: [long, "is there a dog"][item],
        index,
        num_words=13,
        above=0.0,
        most=9,
    )
    assert triples(found) == [(0, 0, 0.5), (2, 1, 1.0)]


def test_equal_values_are_paired_with_all_that_are_equal() -> None:
    found = equal_pairs(np.array([3, 1, 7]), np.array([1, 3, 1, 9]))
    assert list(zip(found.row.tolist(), found.item.tolist(), strict=True)) == [
        (0, 1),
        (1, 0),
        (1, 2),
    ]


def test_an_id_finds_a_key_or_url_by_four_names(tmp_path: Path) -> None:
    (tmp_path / "ids.txt").write_text("COCO_val2014_000000262148.jpg\n000000000042\n")
    ids = read_image_ids(str(tmp_path / "ids.txt"), where="here")
    good = ["http://x/train2017/000000262148.jpg", "COCO_train2014_000000000042", "000000000042"]
    bad = ["http://x/1000000262148.jpg", "000000000042/other.jpg", ""]
    names = image_names(pl.Series([*good, *bad]))
    hit = [any(name[row] in ids.to_list() for name in names) for row in range(len(good + bad))]
    assert hit == [True] * len(good) + [False] * len(bad)


def test_images_are_read_from_folders_tars_and_files(tmp_path: Path) -> None:
    inner = tmp_path / "val" / "deep"
    inner.mkdir(parents=True)
    data = picture()
    (tmp_path / "val" / "b.JPG").write_bytes(data)
    (inner / "a.png").write_bytes(data)
    (inner / "notes.json").write_text("{}")
    (tmp_path / "val" / "more.tar").write_bytes(tar_of([("x/y.webp", data), ("x/y.txt", b"no")]))
    (tmp_path / "one.tar").write_bytes(tar_of([("z.jpg", data)]))
    given = [str(tmp_path / "val"), str(tmp_path / "one.tar"), str(inner / "a.png")]
    files = benchmark_files.image_files("s", given)
    found = list(benchmark_files.read_images(files))
    assert [one.name for one in found] == [
        "val/b.JPG",
        "val/deep/a.png",
        "val/more.tar::x/y.webp",
        "one.tar::z.jpg",
        "a.png",
    ]
    assert all(one.data == data and not one.error for one in found)


ROWS = [{"text": "one", "n": 1}, {"text": 'two, "2"'}, {"text": None}, {"text": ["a", "b"]}]


@pytest.mark.parametrize(
    ("name", "content", "column", "wanted"),
    [
        ("t.txt", "one\ntwo\n", None, ["1:one", "2:two", "3:"]),
        ("t.json", json.dumps(["one", "two"]), None, ["1:one", "2:two"]),
        ("t.json", json.dumps(ROWS), "text", ["1:one", '2:two, "2"', "4:a", "4:b"]),
        (
            "pope.json",
            "\n".join(map(json.dumps, ROWS)) + "\n",
            "text",
            ["1:one", '2:two, "2"', "4:a", "4:b"],
        ),
        ("t.jsonl", '{"text": "x"}\n\n{"text": "y"}', "text", ["1:x", "3:y"]),
        ("t.json", '{"text": "x"}', "text", ["1:x"]),
        ("t.csv", '\ufeffid,text\n1,"a, b\nc"\n2,d\n', "text", ["1:a, b\nc", "2:d"]),
        ("t.tsv", "id\ttext\n1\ta, b\n", "text", ["1:a, b"]),
    ],
)
def test_texts_are_read_from_files_of_each_kind(
    tmp_path: Path, name: str, content: str, column: str | None, wanted: list[str]
) -> None:
    (tmp_path / name).write_text(content, encoding="utf-8")
    (file,) = benchmark_files.text_files("s", str(tmp_path / name))
    found = benchmark_files.read_texts(file, column)
    assert [f"{item.removeprefix(f'{name}:')}:{text}" for item, text in found] == wanted


@pytest.mark.parametrize(
    ("name", "content", "column", "says"),
    [
        ("t.json", b'["a", ', None, "cannot be read as texts"),
        ("t.txt", b"caf\xe9", None, "cannot be read as texts"),
        ("t.csv", b"a,b\n1,2\n", None, r"column must name one of \['a', 'b'\]"),
        ("t.jsonl", b'{"q": "x"}', "text", r"row 1 has no 'text', it has \['q'\]"),
        ("t.jsonl", b'"x"', "text", "row 1 has no fields"),
    ],
)
def test_texts_that_are_not_what_is_said_are_refused(
    tmp_path: Path, name: str, content: bytes, column: str | None, says: str
) -> None:
    (tmp_path / name).write_bytes(content)
    (file,) = benchmark_files.text_files("s", str(tmp_path / name))
    with pytest.raises(UserError, match=says):
        list(benchmark_files.read_texts(file, column))


def test_missing_and_empty_places_are_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for name in ("empty", "gone", "gone.tar", "gone.jpg"):
        with pytest.raises(UserError, match=re.escape(name)):
            benchmark_files.image_files("s", str(tmp_path / name))
    for name in ("gone.txt", "texts.parquet"):
        with pytest.raises(UserError, match=re.escape(name)):
            benchmark_files.text_files("s", str(tmp_path / name))


def config(**values: Any) -> DecontaminateConfig:
    return DecontaminateConfig.load(values, where="recipe.decontaminate")


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({}, "nothing to compare with"),
        ({"sets": {"a": {}}}, "needs images: ... or texts"),
        ({"sets": {"a": {"images": "x", "column": "q"}}}, "column is of texts"),
        (
            {"sets": {"a": {"texts": "t.txt"}}, "drop_above_ngram_overlap": None},
            "sets.a is compared by no method",
        ),
        ({"sets": {"a": {"image": "x"}}}, "Did you mean 'images'"),
    ],
)
def test_a_section_that_compares_nothing_is_refused(values: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=re.escape(says)):
        config(**values)


def test_moved_sets_are_the_same_input_and_changed_ones_are_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here" / "val").mkdir(parents=True)
    (tmp_path / "here" / "val" / "a.jpg").write_bytes(picture())
    (tmp_path / "here" / "ids.txt").write_text("1")

    def decided(folder: Path) -> str:
        monkeypatch.chdir(folder)
        section = config(sets={"s": {"images": "val"}}, id_lists={"l": {"ids": "ids.txt"}})
        located = section.located()
        assert located.sets["s"].images == str(folder / "val")
        monkeypatch.chdir(tmp_path)
        return json.dumps([located.canonical(), identity(located)], sort_keys=True)

    first = decided(tmp_path / "here")
    assert str(tmp_path) not in first
    (tmp_path / "here").rename(tmp_path / "there")
    assert decided(tmp_path / "there") == first
    (tmp_path / "there" / "val" / "b.jpg").write_bytes(picture())
    assert decided(tmp_path / "there") != first
