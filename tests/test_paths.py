"""Paths: joined, numbered, expanded and made absolute; runs on another filesystem."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import fsspec
import pytest
from small_inputs import embeddings, names_below, pair, recipe_for, run_here, stages, write_tars

from manifests import checks, lineage, paths, store
from manifests.errors import UserError

REPOSITORY = Path(__file__).resolve().parent.parent


def test_paths_are_joined_with_one_slash_on_every_filesystem() -> None:
    assert paths.join("runs/", "/a/", "b") == "runs/a/b"
    assert paths.join("/", "a") == "/a"
    assert paths.join("", "a") == "a"
    assert paths.join("memory://", "a") == "memory://a"
    assert paths.join("s3://bucket/x", "", "b") == "s3://bucket/x/b"


@pytest.mark.parametrize(
    ("name", "number"),
    [
        ("img_emb/img_emb_0012.npy", 12),
        ("00003.tar", 3),
        ("train.tar", None),
        ("laion.00007.tar", 7),
        ("part-00001-51aa-c000.snappy.parquet", 0),
        ("2024/train.tar", None),
        ("x12", 12),
        ("000000000000000000000000000001.tar", 1),
    ],
)
def test_the_number_of_a_shard_is_what_its_stem_ends_in(name: str, number: int | None) -> None:
    assert paths.numeric_suffix(name) == number


def test_shards_go_by_number_then_by_name_and_those_without_a_number_last() -> None:
    names = ["b/2.tar", "a/10.tar", "z.tar", "a/2.tar", "a/002.tar", "c.tar", "x.9.tar"]
    ordered = ["a/002.tar", "a/2.tar", "b/2.tar", "x.9.tar", "a/10.tar", "c.tar", "z.tar"]
    assert paths.shard_order(names) == ordered


def touch(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"")
    return folder


def expand(pattern: object) -> tuple[str, list[str]]:
    return paths.expand(str(pattern), suffix=".tar")


def test_a_folder_a_glob_braces_and_a_list_name_the_same_shards(tmp_path: Path) -> None:
    names = ["00000.tar", "00001.tar", "00003.tar"]
    folder = touch(tmp_path / "in", *names, "00000.parquet", "notes.txt", "sub.tar/x")
    for pattern in (
        folder,
        f"{folder}/",
        f"{folder}/0000?.tar",
        f"{folder}/{{00000..00001}}.tar::{folder}/00003.tar",
        f"{folder}/00003.tar::{folder}/{{00000,00001,00003}}.tar",
        f"file://{folder}",
    ):
        assert expand(pattern) == (str(folder), names), pattern


def test_a_relative_pattern_has_an_absolute_root(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    touch(tmp_path, "data/0.tar")
    monkeypatch.chdir(tmp_path)
    assert expand("data/{0..0}.tar") == (str(tmp_path / "data"), ["0.tar"])


def test_a_location_becomes_absolute_and_nothing_else_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for given, expected in {
        "data": f"{tmp_path}/data",
        "": str(tmp_path),
        "/data/x": "/data/x",
        "a/{0..9}.tar::memory://c": f"{tmp_path}/a/{{0..9}}.tar::memory://c",
        "data/*.tar": f"{tmp_path}/data/*.tar",
        "memory://data": "memory://data",
        "warren:demo/model": "warren:demo/model",
    }.items():
        assert paths.absolute(given) == expected
    with pytest.raises(UserError, match="would start a shell"):
        paths.absolute("data::pipe:cat x")


def test_two_folders_with_the_same_names_stay_apart(tmp_path: Path) -> None:
    touch(tmp_path, "a/0.tar", "a/1.tar", "b/0.tar")
    expected = ["a/0.tar", "b/0.tar", "a/1.tar"]
    assert expand(f"{tmp_path}/a::{tmp_path}/b") == (str(tmp_path), expected)
    assert expand(f"{tmp_path}/*/*.tar")[1] == expected


def test_a_path_that_exists_is_taken_as_it_is_written(tmp_path: Path) -> None:
    folder = touch(tmp_path / "data [v1] {old}*", "0.tar")
    assert expand(folder) == (str(folder), ["0.tar"])
    assert expand(folder / "0.tar") == (str(folder), ["0.tar"])


def test_shards_with_nothing_in_common_but_the_root_are_found_again(tmp_path: Path) -> None:
    touch(tmp_path, "0.tar")
    root, names = expand(f"{tmp_path}/0.tar::/etc/hostname")
    assert root == "/"
    assert all(Path(paths.join(root, name)).exists() for name in names)
    memory = fsspec.filesystem("memory")
    for name in ("/one/0.tar", "/two/1.tar"):
        memory.pipe_file(name, b"")
    root, names = expand("memory://one/0.tar::memory://two/1.tar")
    assert [paths.exists(paths.join(root, name)) for name in names] == [True, True]


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("pipe:cat {}/0.tar", "would start a shell"),
        ("PIPE:cat", "would start a shell"),
        ("{}/0.tar::pipe:cat", "would start a shell"),
        ("{}/none", "does not exist"),
        ("{}/{{0..3}}.tar", "does not exist"),
        ("{}/{{0..3.tar", "cannot be expanded"),
        ("{}/*.zip", "No .tar file"),
        ("{}/empty", "No .tar file"),
        ("nosuchscheme://x/0.tar", "cannot be opened"),
        ("{}/0.tar::memory://mixed/0.tar", "several filesystems"),
    ],
)
def test_a_pattern_that_means_nothing_is_a_user_error(
    tmp_path: Path, pattern: str, message: str
) -> None:
    touch(tmp_path, "0.tar")
    (tmp_path / "empty").mkdir()
    fsspec.filesystem("memory").pipe_file("/mixed/0.tar", b"")
    with pytest.raises(UserError, match=message):
        expand(pattern.format(tmp_path))


def test_a_resource_lies_in_the_package_wherever_the_command_runs() -> None:
    found = Path(paths.resolve_resource("warren:recipes/demo.yaml"))
    assert found == REPOSITORY / "pipelines" / "recipes" / "demo.yaml"
    assert paths.resolve_resource("data/x") == "data/x"


# ---- a whole run on another filesystem


def copy_to_memory(folder: Path, name: str) -> None:
    for file in names_below(folder):
        fsspec.filesystem("memory").pipe_file(f"{name}/{file}", (folder / file).read_bytes())


def test_a_run_in_memory_gives_the_tables_of_a_run_on_disk(tmp_path: Path) -> None:
    folder = embeddings(tmp_path / "in", num_parts=2)
    copy_to_memory(folder, "/source")
    sections: dict[str, Any] = {
        "filter": {"min_caption_chars": 1},
        "cluster": {"num_clusters": 4, "min_rows_per_centroid": 1, "iterations": 4},
        "dedup": {"ghost_margin": 0.1},
    }
    there = stages(
        run_here(recipe_for("memory://source", "clip_retrieval", **sections), "memory://out")
    )
    here = stages(run_here(recipe_for(folder, "clip_retrieval", **sections), tmp_path / "out"))
    for name, directory in here.items():
        for ours, theirs in zip(directory.files(), there[name].files(), strict=True):
            assert store.read_table(ours).equals(store.read_table(theirs))
    again = run_here(recipe_for("memory://source", "clip_retrieval", **sections), "memory://out")
    assert [link.directory for link in again] == list(there.values())
    assert all(one.holds for one in checks.check("memory://out", there))
    (story,) = lineage.why(there, "0000-1")
    assert [step.stage for step in story.steps] == [
        "ingest",
        "filter",
        "centroids",
        "cluster",
        "forest",
        "dedup",
    ]


def test_tars_in_memory_are_ingested_like_tars_on_disk(tmp_path: Path) -> None:
    folder = write_tars(tmp_path / "in", {"00000.tar": pair("a"), "00001.tar": pair("b")[:1]})
    copy_to_memory(folder, "/tars")
    values = {"max_quarantine_fraction": 1.0}
    there = stages(run_here(recipe_for("memory://tars", "webdataset", **values), "memory://tout"))
    here = stages(run_here(recipe_for(folder, "webdataset", **values), tmp_path / "out"))
    for kind in ("", "verdicts", "quarantine"):
        ours, theirs = here["ingest"].files(kind), there["ingest"].files(kind)
        assert [store.read_table(p) for p in ours] == [store.read_table(p) for p in theirs]
