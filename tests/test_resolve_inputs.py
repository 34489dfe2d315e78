"""What of its places the resolve stage depends on: another listing is another input."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from small_inputs import picture, write_tars
from small_resolves import SOURCE, bytes_of, resolve, write_files

from curate.media.image_places import RootMap
from curate.media.resolve import ResolveConfig, identity, plan
from manifests.errors import UserError
from manifests.work import StageDir, View

# --- config and identity -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("roots", "expected"),
    [
        ({}, "roots"),
        ({"/coco": "x"}, "relative path"),
        ({"coco/": "x"}, "relative path"),
        ({"../coco": "x"}, "relative path"),
        ({"coco": ""}, "no place"),
        ({"coco": []}, "no place"),
        ({"coco": ["x", ""]}, "no place"),
    ],
)
def test_roots_that_mean_nothing_are_refused(roots: dict[str, Any], expected: str) -> None:
    with pytest.raises(UserError, match=expected):
        ResolveConfig.load({"roots": roots}, where="recipe.resolve")


def test_a_moved_folder_is_the_same_input_and_a_new_file_is_another(tmp_path: Path) -> None:
    files = {"a.jpg": picture(), "deep/b.jpg": picture(9)}

    def found(folder: Path) -> Any:
        return identity(ResolveConfig(roots={"coco": str(folder)}))

    root = write_files(tmp_path / "in", files)
    first = found(root)
    assert found(write_files(tmp_path / "moved", dict(reversed(files.items())))) == first
    assert ResolveConfig(roots={"coco": str(root)}).canonical().keys() == {"check", "max_pixels"}
    assert identity(ResolveConfig(roots={"vg": str(root)})) != first
    write_files(root, {"deep/c.jpg": b""})
    second = found(root)
    write_files(root, {"deep/c.jpg": b"1"})
    third = found(root)
    (root / "deep" / "c.jpg").rename(root / "c.jpg")
    assert len({str(one) for one in (first, second, third, found(root))}) == 4
    (root / "c.jpg").unlink()
    assert found(root) == first


def test_a_changed_tar_is_another_input(tmp_path: Path) -> None:
    tars = write_tars(tmp_path / "in", {"0.tar": [("a.jpg", picture())]})
    config = ResolveConfig(roots={"": str(tars / "*.tar")})
    first = identity(config)
    os.utime(tars / "0.tar", (1, 1))
    second = identity(config)
    write_tars(tars, {"1.tar": [("b.jpg", picture())]})
    assert len({str(one) for one in (first, second, identity(config))}) == 3


@pytest.mark.parametrize("name", ["gone", "gone.tar", "{0..3}.tar", "file.txt"])
def test_a_missing_place_is_named_with_its_prefix(tmp_path: Path, name: str) -> None:
    write_files(tmp_path, {"file.txt": b""})
    with pytest.raises(UserError) as caught:
        identity(ResolveConfig(roots={"coco/train2017": str(tmp_path / name)}))
    assert "coco/train2017" in str(caught.value)
    assert str(tmp_path) in str(caught.value)


def test_items_are_the_source_parts_and_without_tars_nothing_is_listed(tmp_path: Path) -> None:
    root = write_files(tmp_path / "in", {"a.jpg": picture()})
    directory = resolve(tmp_path, [("1", ["a.jpg"]), ("2", [])], parts=2, roots={"": str(root)})
    view = View(
        "resolve",
        ResolveConfig(roots={"": str(root)}),
        SOURCE,
        0,
        directory.path,
        {"ingest": StageDir("ingest", str(tmp_path / "ingest-1"))},
    )
    assert [item.name for item in plan(view)] == ["part-00000", "part-00001"]
    assert len(directory.markers()) == 2


# --- reading what was resolved -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "change"),  # a tar may grow behind its members
    [
        *(("folder", how) for how in ("gone", "longer", "shorter")),
        ("tar", "gone"),
        ("tar", "shorter"),
    ],
)
def test_what_changed_after_it_was_resolved_is_told(tmp_path: Path, kind: str, change: str) -> None:
    write_files(tmp_path / "in", {"a.jpg": picture()})
    write_tars(tmp_path / "in", {"a.tar": [("a.jpg", picture())]})
    path = tmp_path / "in" / ("a.jpg" if kind == "folder" else "a.tar")
    roots = {"": str(tmp_path / "in") if kind == "folder" else str(path)}
    directory = resolve(tmp_path, [("1", ["a.jpg"])], roots=roots)
    before = path.read_bytes()
    path.unlink()
    if change != "gone":
        path.write_bytes(before + b"1" if change == "longer" else before[:600])
    with pytest.raises(UserError, match=r"any more|has changed"):
        bytes_of(directory, roots)


def test_a_place_taken_out_of_the_roots_is_told(tmp_path: Path) -> None:
    for asked in (("vg", 0), ("", 1)):
        with pytest.raises(UserError, match="has no place"):
            RootMap({"": str(tmp_path)}).place(*asked)
