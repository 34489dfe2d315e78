"""Lists of benchmark images and the tokenizer: what they drop, and how a run knows them again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from conversation_rows import reasons, says, table, word_tokenizer

from curate.rows.clean import CleanConfig, clean, identity
from manifests.errors import UserError


def test_benchmark_images_are_found_by_path_name_stem_and_last_piece(tmp_path: Path) -> None:
    ids = tmp_path / "ids.txt"
    ids.write_text("\ufeffcoco/a.jpg\r\n b.jpg \n\nc.tar\n000042\n", encoding="utf-8")
    leaked = ["coco/a.jpg", "coco/b.jpg", "b.jpg", "coco/c.tar.jpg", "coco/COCO_val_000042.png"]
    leaked += ["000042", "x/000042"]
    fine = ["gqa/a.jpg", "coco/bb.jpg", "c.jpg", "coco/000042_1.jpg", "coco/1000042.jpg", "x/"]
    rows = [says("<image>", "Yes.", images=[image]) for image in [*leaked, *fine]]
    expected = ["benchmark_leakage"] * len(leaked) + [""] * len(fine)
    assert reasons(rows, leakage=[{"ids": str(ids)}]) == expected
    second = says("<image><image>", "Yes.", images=[fine[0], leaked[0]])
    text_only = says("coco/a.jpg", "Yes.")
    assert reasons([second, text_only], leakage=[{"ids": str(ids)}]) == ["benchmark_leakage", ""]


def test_a_coco_name_of_2014_finds_the_image_of_2017(tmp_path: Path) -> None:
    ids = tmp_path / "pope.txt"
    ids.write_text(
        "COCO_val2014_000000310196.jpg\nval/COCO_val2014_000000000042\nVG_000000000001\n"
    )
    images = [f"coco/train2017/{number:012d}.jpg" for number in (310196, 42, 1, 31019)]
    found = reasons(
        [says("<image>", "Yes.", images=[one]) for one in images], leakage=[{"ids": str(ids)}]
    )
    assert found == ["benchmark_leakage", "benchmark_leakage", "", ""]


def test_benchmark_images_are_looked_for_only_under_their_prefix(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).write_text(name)
    lists = [
        {"ids": str(tmp_path / "one"), "under": "coco/"},
        {"ids": str(tmp_path / "two"), "under": "vg/"},
    ]
    images = ["coco/one.jpg", "vg/one.jpg", "coco/two.jpg", "vg/two.jpg", "x/coco/one.jpg"]
    found = reasons([says("<image>", "Yes.", images=[one]) for one in images], leakage=lists)
    assert found == ["benchmark_leakage", "", "", "benchmark_leakage", ""]


def test_rows_of_too_many_tokens_are_dropped_with_their_number(tmp_path: Path) -> None:
    folder = word_tokenizer(tmp_path / "words")
    rows = [
        says("a b a", "b b"),
        says("a b a b", "b b"),
        says("<image> a", "b", images=["i"]),
        says("<image><image>\na", "b", images=["i", "i"]),
        says("a b a b a b", ""),
        says("a", "b </s>"),  # its space makes the marker two words: 5 tokens with a, b and c
        says("a", "b </s> a a a"),
    ]
    for tokenizer in (folder, folder / "tokenizer.json"):
        config = CleanConfig(tokenizer=str(tokenizer), max_tokens=5, image_tokens=3)
        found = clean(table(rows), config).verdicts.to_pylist()
        assert [(one["reason"], one["score"], one["cutoff"]) for one in found] == [
            ("", None, None),
            ("too_long", 6.0, 5.0),
            ("", None, None),
            ("too_long", 8.0, 5.0),
            ("empty_turn", None, None),
            ("mended:end_string", None, None),
            ("too_long", 7.0, 5.0),
        ]


def test_a_moved_list_or_tokenizer_is_the_same_input_and_a_changed_one_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def decided(folder: Path, *words: str) -> str:
        folder.mkdir()
        (folder / "ids.txt").write_text("\n".join(words))
        word_tokenizer(folder / folder.name, words=words)
        values = {"tokenizer": folder.name, "max_tokens": 5}
        values |= {"leakage": [{"ids": "ids.txt", "under": "coco"}]}
        monkeypatch.chdir(folder)
        config = CleanConfig.load(values, where="recipe.clean").located()
        assert config.leakage[0].ids == str(folder / "ids.txt")
        assert config.tokenizer == str(folder / folder.name)
        monkeypatch.chdir(tmp_path)
        return json.dumps([config.canonical(), identity(config)], sort_keys=True)

    first = decided(tmp_path / "here", "a", "b")
    assert decided(tmp_path / "there", "a", "b") == first
    assert decided(tmp_path / "other", "a", "c") != first
    assert str(tmp_path) not in first


def test_a_tokenizer_of_the_hub_is_known_by_its_name_and_an_unused_one_not_at_all() -> None:
    config = CleanConfig(tokenizer="microsoft/phi-2", max_tokens=2048)
    assert config.located() == config
    assert identity(config) == {"leakage": [], "tokenizer": "microsoft/phi-2"}
    assert identity(CleanConfig(tokenizer="microsoft/phi-2"))["tokenizer"] is None


def test_a_file_that_is_missing_or_not_what_it_should_be_is_named(tmp_path: Path) -> None:
    missing = CleanConfig.load({"leakage": [{"ids": str(tmp_path / "no")}]}, where="r")
    with pytest.raises(UserError, match=r"leakage\.ids '.*no' cannot be read"):
        identity(missing)
    with pytest.raises(UserError, match=r"leakage\.ids '.*no' cannot be read"):
        clean(table([]), missing)
    (tmp_path / "latin").write_bytes(b"caf\xe9")
    with pytest.raises(UserError, match="UTF-8 text file"):
        reasons([], leakage=[{"ids": str(tmp_path / "latin")}])
    with pytest.raises(UserError, match=r"has no tokenizer\.json"):
        identity(CleanConfig(tokenizer=str(tmp_path), max_tokens=5))
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match="cannot be loaded"):
        reasons([says("a", "b")], tokenizer=str(tmp_path), max_tokens=5)


ABSURD: list[tuple[dict[str, Any], str]] = [
    ({"max_tokens": 5}, "needs tokenizer"),
    ({"max_tokens": 0, "tokenizer": "x"}, r"clean\.max_tokens is 0"),
    ({"image_tokens": -1}, r"clean\.image_tokens is -1"),
    ({"repeated_output_min_chars": 0}, r"clean\.repeated_output_min_chars is 0"),
    ({"end_strings": ["x"]}, "2 or more characters"),
    ({"end_strings": ["end of text"]}, "none of them a space"),
    ({"end_strings": ["image"]}, "would break <image>"),
    ({"end_strings": ["x<image>"]}, "would break <image>"),
    ({"leakage": [{"under": "coco"}]}, r"clean\.leakage\.0\.ids is missing"),
    ({"leakage": [{"idz": "coco"}]}, r"Did you mean 'ids'|ids is missing"),
    ({"end_string": []}, "Did you mean 'end_strings'"),
]


@pytest.mark.parametrize(("config", "message"), ABSURD)
def test_a_config_that_makes_no_sense_is_refused(config: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        CleanConfig.load(config, where="recipe.clean")
