"""Strict values: what is wrong is named with its place and the nearest key."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Literal

import pytest
from pydantic import Field

from curate.source_config import SourceConfig
from manifests.errors import UserError
from manifests.strict import Strict, nearest


class Inner(Strict):
    """A part of Outer."""

    similarity_above: float = Field(default=0.86, ge=0, le=1)
    keep: Literal["far", "near"] = "far"


class Outer(Strict):
    """A config."""

    count: int
    inner: Inner = Inner()
    maybe: Inner | None = None
    named: dict[str, Inner] = {}


class Listed(Strict):
    """Data that lies somewhere."""

    location_fields: ClassVar[frozenset[str]] = frozenset({"ids"})

    ids: str | None = None
    under: str = ""
    called: str = Field(default="x", alias="with")


class Holder(Strict):
    """Models in every place where a model can be."""

    location_fields: ClassVar[frozenset[str]] = frozenset({"roots"})

    roots: dict[str, str | list[str]] = {}
    one: Listed = Listed()
    maybe: Listed | None = None
    several: list[Listed] = []
    named: dict[str, list[Listed]] = {}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"count": 1, "cuont": 2}, r"r\.cuont is unknown(.|\n)*Did you mean 'count'"),
        ({"count": 1, "zzzz": 2}, r"r\.zzzz is unknown(.|\n)*Remove it"),
        ({"count": 1, "inner": {"kep": "far"}}, r"r\.inner\.kep is unknown(.|\n)*mean 'keep'"),
        ({"count": 1, "maybe": {"kep": "far"}}, r"r\.maybe\.kep is unknown(.|\n)*mean 'keep'"),
        (
            {"count": 1, "named": {"keep": {"kep": "far"}}},
            r"r\.named\.keep\.kep is unknown(.|\n)*mean 'keep'",
        ),
        ({"count": "1"}, r"r\.count is '1' \(str\)(.|\n)*valid integer"),
        ({"count": 1.0}, r"r\.count is 1\.0 \(float\)"),
        ({"count": True}, r"r\.count is True \(bool\)"),
        ({"count": None}, r"r\.count is None"),
        ({"count": 1, "inner": {"similarity_above": 1.1}}, r"r\.inner\.similarity_above is 1\.1"),
        ({"count": 1, "inner": {"similarity_above": float("nan")}}, "similarity_above is nan"),
        ({"count": 1, "inner": {"keep": "middle"}}, r"r\.inner\.keep is 'middle'"),
        ({"count": 1, "inner": [1]}, r"r\.inner is \[1\]"),
        ({}, r"r\.count is missing"),
        ([1], r"r should be a mapping, not \[1\] \(list\)"),
        (None, "r should be a mapping"),
        ({1: 2, "count": 1}, r"r\.1"),
        ({"count": "x" * 5000}, r"\.\.\. \(str\)"),
    ],
)
def test_a_wrong_value_is_named_with_its_place_and_the_nearest_key(
    values: Any, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        Outer.load(values, where="r")


def test_a_right_value_is_frozen_and_its_nearest_name_found() -> None:
    loaded = Outer.load({"count": 1, "inner": {"similarity_above": 1}}, where="r")
    assert loaded.canonical()["inner"] == {"similarity_above": 1.0, "keep": "far"}
    with pytest.raises(ValueError, match="frozen"):
        loaded.count = 2
    assert nearest("similarity_abov", ["keep", "similarity_above"]) == "similarity_above"
    assert nearest("q", ["keep"]) is None


def holder(folder: str) -> Holder:
    listed = {"ids": f"{folder}/a.txt", "under": "coco"}
    values = {
        "roots": {"coco": [f"{folder}/x", f"{folder}/y"], "gqa": f"{folder}/z"},
        "one": listed,
        "maybe": listed | {"with": "y"},
        "several": [listed, {"under": "vg"}],
        "named": {"svit": [listed], "none": []},
    }
    return Holder.load(values, where="r")


def test_models_inside_a_config_name_their_own_locations(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert holder("data").located() == holder(f"{tmp_path}/data")
    assert holder("data").located().located() == holder(f"{tmp_path}/data")


def test_what_decides_is_the_same_wherever_the_data_lies() -> None:
    listed = {"under": "coco", "called": "x"}
    found = holder("data").canonical()
    assert found == holder("elsewhere").canonical()
    assert found == {
        "one": listed,
        "maybe": listed | {"called": "y"},
        "several": [listed, {"under": "vg", "called": "x"}],
        "named": {"svit": [listed], "none": []},
    }


def test_a_key_that_is_no_python_name_is_written_and_read_as_people_write_it() -> None:
    saved = holder("data").model_dump(mode="json")
    assert saved["maybe"] == {"ids": "data/a.txt", "under": "coco", "with": "y"}
    assert Holder.load(saved, where="r") == holder("data")
    with pytest.raises(UserError, match=r"r\.one\.called is unknown(.|\n)*under, with"):
        Holder.load({"one": {"called": "x"}}, where="r")


def test_a_sources_files_become_absolute_and_do_not_decide_what_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    files = {"svit": "a/{0..1}.json", "wiz": "/b/*.json::c/d.json", "all": "memory://e.json"}
    source = SourceConfig.load({"kind": "llava_json", "files": files}, where="s")
    assert list((source.located().files or {}).items()) == [
        ("svit", f"{tmp_path}/a/{{0..1}}.json"),
        ("wiz", f"/b/*.json::{tmp_path}/c/d.json"),
        ("all", "memory://e.json"),
    ]
    assert source.files == files
    elsewhere = SourceConfig.load({"kind": "llava_json", "files": {"x": "y"}}, where="s")
    assert source.canonical() == source.located().canonical() == elsewhere.canonical()
    assert not {"path", "files"} & set(source.canonical())


def test_one_value_where_a_list_is_wanted_is_shown_as_a_list() -> None:
    class Listed(Strict):
        names: list[str] = []

    with pytest.raises(UserError) as told:
        Listed.load({"names": "a.txt"}, where="recipe.x")
    assert told.value.fix == "Write a list: names: [a.txt]."
