"""The contract: atomic writing, accounts, fingerprints, strict values, paths, lineage, checks."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, Literal

import fsspec
import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pydantic import Field
from small_inputs import (
    embeddings,
    good_tars,
    pair,
    recipe_for,
    run_here,
    stages,
    unit_rows,
    write_tars,
)

from curate.source_config import SourceConfig
from manifests import checks, ledger, lineage, paths, record, store
from manifests.errors import PartDamaged, StageFailed, UserError
from manifests.ledger import Tally
from manifests.schemas import CORESET, VERDICTS, conform, empty
from manifests.strict import Strict, nearest
from manifests.work import StageDir
from pipelines.chain import build
from pipelines.recipe import parse

REPOSITORY = Path(__file__).resolve().parent.parent


def names_below(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


# ---- store


def test_a_written_file_has_the_size_digest_and_rows_that_are_told(tmp_path: Path) -> None:
    table = pa.table({"a": range(1000)})
    array = unit_rows(5)

    def by_hand(file: BinaryIO) -> None:
        file.write(b"one")
        file.write(bytearray(b"two"))

    contents: dict[str, Any] = {"t.parquet": table, "d/a.npy": array, "b": b"bytes", "c": by_hand}
    for name, content in contents.items():
        written = store.write(str(tmp_path), name, content)
        data = (tmp_path / name).read_bytes()
        assert (written.path, written.num_bytes) == (name, len(data))
        assert written.sha256 == hashlib.sha256(data).hexdigest()
        assert written.num_rows == (1000 if name == "t.parquet" else None)
    assert names_below(tmp_path) == sorted(contents)
    assert pq.read_table(tmp_path / "t.parquet").equals(table)
    assert pl.read_parquet(tmp_path / "t.parquet").height == 1000
    assert np.array_equal(store.read_array(str(tmp_path / "d/a.npy")), array)
    assert (tmp_path / "c").read_bytes() == b"onetwo"


@pytest.mark.parametrize("there_before", [True, False])
def test_a_writer_that_raises_leaves_nothing_and_spoils_nothing(
    tmp_path: Path, there_before: bool
) -> None:
    if there_before:
        store.write(str(tmp_path), "x", b"the old one")

    def breaks(file: BinaryIO) -> None:
        file.write(bytes(1 << 20))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        store.write(str(tmp_path), "x", breaks)
    assert names_below(tmp_path) == (["x"] if there_before else [])
    assert not there_before or (tmp_path / "x").read_bytes() == b"the old one"


def test_what_killed_writers_left_is_removed_and_nothing_else(tmp_path: Path) -> None:
    kept = ["part.parquet", ".hidden", "a.tmp", "d/.x"]
    left = [".part.parquet.0123456789ab.tmp", "d/.y.ba9876543210.tmp"]
    for name in [*kept, *left]:
        store.write(str(tmp_path), name, b"")
    store.remove_temporaries(str(tmp_path), depth=1)
    assert names_below(tmp_path) == sorted([*kept, left[1]])
    store.remove_temporaries(str(tmp_path))
    assert names_below(tmp_path) == sorted(kept)
    store.remove_temporaries(str(tmp_path / "none"))


def test_a_folder_that_cannot_be_written_is_a_user_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    for name in ("file/x", "file/deep/x"):
        with pytest.raises(UserError, match="cannot be written"):
            store.write(str(tmp_path), name, b"x")
    with pytest.raises(UserError, match="cannot be written"):
        store.append_line(str(tmp_path / "file" / "events"), "line")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real filesystem of 600 KiB, where this machine lets us mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=600k", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a small filesystem needs root")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize("size", [700_000, 5_000_000])
def test_a_full_disk_is_a_user_error_and_leaves_nothing(small_disk: Path, size: int) -> None:
    rng = np.random.default_rng(0)
    contents: list[Any] = [
        rng.bytes(size),
        rng.integers(0, 255, size, dtype=np.uint8),
        pa.table({"noise": rng.random(size // 8)}),
        lambda file: file.write(rng.bytes(size)),
    ]
    for content in contents:
        with pytest.raises(UserError, match="No space is left"):
            store.write(str(small_disk), "part/x", content)
        assert names_below(small_disk) == []
    store.write(str(small_disk), "part/x", b"small")


def test_a_run_on_a_full_disk_says_so_and_goes_on_when_there_is_space(
    tmp_path: Path, small_disk: Path
) -> None:
    source = good_tars(tmp_path / "in", num_shards=6, num_pairs=30)
    recipe = recipe_for(source, "webdataset", filter={})
    fill = small_disk / "fill"
    fill.write_bytes(bytes(540_000))
    with pytest.raises(UserError, match="No space is left"):
        run_here(recipe, small_disk / "out")
    left = names_below(small_disk / "out")
    assert not [name for name in left if name.endswith(".tmp")]
    assert not (small_disk / "out" / "ingest").exists()
    finished = {n: (small_disk / "out" / n).stat().st_mtime_ns for n in left if "part-" in n}
    assert 0 < len(finished) < 12
    fill.unlink()
    chain = stages(run_here(recipe, small_disk / "out"))
    assert chain["filter"].record()["kept"] == 180  # type: ignore[index]
    for name, stamp in finished.items():
        assert (small_disk / "out" / name).stat().st_mtime_ns == stamp


def test_a_limit_on_file_size_is_told_like_a_full_disk(tmp_path: Path) -> None:
    code = (
        "import sys; from manifests import store\n"
        "from manifests.errors import UserError\n"
        "try: store.write(sys.argv[1], 'x', bytes(1 << 20))\n"
        "except UserError as error: sys.exit(str(error))\n"
    )

    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, 1 << 16))

    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        preexec_fn=limit,  # the limit must not be ours
    )
    assert "No space is left to write" in done.stderr
    assert names_below(tmp_path) == []


def test_another_error_of_the_system_comes_through(tmp_path: Path) -> None:
    def breaks(file: BinaryIO) -> None:
        raise OSError(errno.EIO, "the disk is dying")

    with pytest.raises(OSError, match="dying"):
        store.write(str(tmp_path), "x", breaks)


def test_json_cut_short_reads_as_missing(tmp_path: Path) -> None:
    store.write_json(str(tmp_path), "x.json", {"b": 1, "a": "\u00e9"})
    path = tmp_path / "x.json"
    assert store.read_json(str(path)) == {"a": "\u00e9", "b": 1}
    for cut in range(len(path.read_bytes()) - 1):
        (tmp_path / "cut.json").write_bytes(path.read_bytes()[:cut])
        assert store.read_json(str(tmp_path / "cut.json")) is None
    assert store.read_json(str(tmp_path / "none.json")) is None


def test_a_damaged_parquet_is_part_damaged_wherever_it_is_damaged(tmp_path: Path) -> None:
    store.write(str(tmp_path), "x.parquet", pa.table({"a": np.random.default_rng(0).random(3000)}))
    whole = (tmp_path / "x.parquet").read_bytes()
    rng = np.random.default_rng(0)
    damaged = [whole[:cut] for cut in rng.integers(0, len(whole), 10)]
    damaged += [whole[:at] + b"\xff" * 64 + whole[at + 64 :] for at in (4, len(whole) - 100)]
    for content in [b"", *damaged]:
        (tmp_path / "y.parquet").write_bytes(content)
        with pytest.raises(PartDamaged, match=r"y\.parquet cannot be read"):
            store.read_table(str(tmp_path / "y.parquet"))
    with pytest.raises(PartDamaged):
        store.read_table(str(tmp_path / "none.parquet"))


def test_no_npy_file_however_broken_gives_another_error_than_value_error(tmp_path: Path) -> None:
    store.write(str(tmp_path), "x.npy", unit_rows(4))
    whole = (tmp_path / "x.npy").read_bytes()
    rng = np.random.default_rng(0)
    memory = fsspec.filesystem("memory")
    for _ in range(400):
        content = bytearray(whole[: rng.integers(1, len(whole))] if rng.random() < 0.2 else whole)
        for _ in range(rng.integers(1, 5)):
            content[rng.integers(min(len(content), 128))] = rng.integers(256)
        (tmp_path / "y.npy").write_bytes(content)
        memory.pipe_file("/broken/y.npy", bytes(content))
        for path in (str(tmp_path / "y.npy"), "memory://broken/y.npy"):
            try:
                store.read_array(path)
            except ValueError:
                continue


# ---- ledger and accounts


def verdicts_of(*reasons: str) -> pa.Table:
    return ledger.verdicts(
        "filter", np.arange(len(reasons), dtype=np.uint64), reasons=list(reasons)
    )


def test_a_tally_counts_each_fate_and_adds_up() -> None:
    table = verdicts_of(
        "", "small", "", "quarantine:bad_json", "small", "quarantine:empty_image", ""
    )
    counts = ledger.tally(table)
    assert counts == Tally(7, 3, {"small": 2}, {"bad_json": 1, "empty_image": 1})
    assert (counts.num_dropped, counts.num_quarantined, counts.adds_up) == (2, 2, True)
    assert counts + counts == ledger.tally(pa.concat_tables([table, table]))
    assert Tally.from_json(json.loads(json.dumps(counts.as_json()))) == counts
    assert ledger.tally(empty(VERDICTS)) == Tally()
    assert ledger.kept_uids(table).tolist() == [0, 2, 6]


def test_verdicts_hold_scores_only_where_there_is_one() -> None:
    table = ledger.verdicts(
        "dedup",
        np.array([1, 2], np.uint64),
        reasons=np.array(["", "near_duplicate"], object),
        scores=np.array([np.nan, 0.9]),
        cutoffs=np.array([np.nan, 0.86]),
        evidence=pa.array([None, 1], pa.uint64()),
    )
    assert table.schema.equals(VERDICTS)
    assert table.column("score").to_pylist() == [None, 0.9]
    assert table.column("evidence_uid").to_pylist() == [None, 1]
    assert table.column("keep").to_pylist() == [True, False]


def test_conform_refuses_what_is_not_in_the_schema() -> None:
    good = verdicts_of("")
    assert conform(good.drop_columns(["score"]), VERDICTS).column("score").null_count == 1
    with pytest.raises(ValueError, match="not in the schema"):
        conform(good.append_column("more", [[1]]), VERDICTS)
    with pytest.raises(ValueError, match="uid is missing"):
        conform(good.drop_columns(["uid"]), VERDICTS)
    with pytest.raises(ValueError, match="holds 1 nulls"):
        conform(good.set_column(0, "uid", pa.nulls(1, pa.uint64())), VERDICTS)


def test_accounts_that_do_not_add_up_or_lose_too_much_fail_the_stage() -> None:
    def check(counts: Tally, rows_in: int | None, limit: float) -> None:
        record.check_accounts("filter", counts, rows_in=rows_in, max_quarantine=limit)

    check(Tally(10, 8, {"a": 1}, {"b": 1}), 10, 0.1)
    check(Tally(), None, 0.0)
    with pytest.raises(StageFailed, match="do not add up"):
        check(Tally(10, 8, {"a": 1}, {}), 10, 1)
    with pytest.raises(StageFailed, match="11 rows expected, 10 judged"):
        check(Tally(10, 10), 11, 1)
    with pytest.raises(StageFailed, match="2 of 10 rows are quarantined"):
        check(Tally(10, 8, {}, {"b": 2}), 10, 0.19)


# ---- fingerprints


def marks(values: dict[str, Any]) -> dict[str, str]:
    return {link.stage.name: link.mark for link in build(parse(values), "out")}


def changed(before: dict[str, str], after: dict[str, str]) -> list[str]:
    return [name for name in before if before[name] != after[name]]


def test_a_fingerprint_depends_on_what_decides_the_result_and_on_nothing_else(
    tmp_path: Path,
) -> None:
    folder = embeddings(tmp_path / "in")
    base = recipe_for(folder, "clip_retrieval", filter={}, cluster={"num_clusters": 4})
    first = marks(base)
    assert marks(base | {"filter": {"min_side": 0}}) == first, "a default written out"
    assert marks(base | {"max_quarantine_fraction": 1.0}) == first
    assert changed(first, marks(base | {"filter": {"min_side": 1}})) == ["filter", "cluster"]
    assert changed(first, marks(base | {"seed": 1})) == ["cluster"], (
        "ingest and filter draw nothing"
    )
    assert changed(first, marks(base | {"cluster": {"num_clusters": 5}})) == ["cluster"]
    assert len(set(first.values())) == 3


def test_a_moved_source_is_the_same_and_a_changed_file_is_not(tmp_path: Path) -> None:
    for kind, folder in (
        ("webdataset", good_tars(tmp_path / "tars")),
        ("clip_retrieval", embeddings(tmp_path / "emb")),
    ):
        first = marks(recipe_for(folder, kind))
        moved = folder.rename(folder.with_name("moved" + folder.name))
        assert marks(recipe_for(moved, kind)) == first
        victim = next(path for path in moved.rglob("*") if path.is_file())
        stamp = victim.stat()
        os.utime(victim, ns=(stamp.st_atime_ns, stamp.st_mtime_ns + 1_000_000))
        assert marks(recipe_for(moved, kind)) != first
        os.utime(victim, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
        assert marks(recipe_for(moved, kind)) == first


def test_metadata_that_appear_beside_a_shard_are_another_input(tmp_path: Path) -> None:
    folder = good_tars(tmp_path / "in")
    first = marks(recipe_for(folder, "img2dataset"))
    pq.write_table(pa.table({"key": ["a"]}), folder / "00001.parquet")
    assert marks(recipe_for(folder, "img2dataset")) != first


def test_given_centroids_are_known_by_their_content(tmp_path: Path) -> None:
    folder = embeddings(tmp_path / "in")

    def with_centroids(name: str, rows: Any) -> dict[str, str]:
        np.save(tmp_path / name, rows)
        cluster = {"centroids": str(tmp_path / name)}
        return marks(recipe_for(folder, "clip_retrieval", cluster=cluster))

    first = with_centroids("a.npy", unit_rows(4).astype(np.float32))
    assert with_centroids("b.npy", unit_rows(4).astype(np.float64)) == first
    assert with_centroids("a.npy", unit_rows(4, seed=1)) != first


# ---- strict values


class Inner(Strict):
    """A part of Outer."""

    similarity_above: float = Field(default=0.86, ge=0, le=1)
    keep: Literal["far", "near"] = "far"


class Outer(Strict):
    """A config."""

    count: int
    inner: Inner = Inner()
    maybe: Inner | None = None


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"count": 1, "cuont": 2}, r"r\.cuont is unknown(.|\n)*Did you mean 'count'"),
        ({"count": 1, "zzzz": 2}, r"r\.zzzz is unknown(.|\n)*Remove it"),
        ({"count": 1, "inner": {"kep": "far"}}, r"r\.inner\.kep is unknown(.|\n)*mean 'keep'"),
        ({"count": 1, "maybe": {"kep": "far"}}, r"r\.maybe\.kep is unknown(.|\n)*mean 'keep'"),
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


# ---- paths


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
    sections: dict[str, Any] = {"filter": {"min_caption_chars": 1}, "cluster": {"num_clusters": 4}}
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
    assert [step.stage for step in story.steps] == ["ingest", "filter", "cluster"]


def test_tars_in_memory_are_ingested_like_tars_on_disk(tmp_path: Path) -> None:
    folder = write_tars(tmp_path / "in", {"00000.tar": pair("a"), "00001.tar": pair("b")[:1]})
    copy_to_memory(folder, "/tars")
    values = {"max_quarantine_fraction": 1.0}
    there = stages(run_here(recipe_for("memory://tars", "webdataset", **values), "memory://tout"))
    here = stages(run_here(recipe_for(folder, "webdataset", **values), tmp_path / "out"))
    for kind in ("", "verdicts", "quarantine"):
        ours, theirs = here["ingest"].files(kind), there["ingest"].files(kind)
        assert [store.read_table(p) for p in ours] == [store.read_table(p) for p in theirs]


# ---- lineage


@pytest.fixture
def chain(tmp_path: Path) -> dict[str, StageDir]:
    """A run over a kept, a filtered and a quarantined pair, and a key that two shards have."""
    shards = {
        "00000.tar": [*pair("long", "five words in this caption"), *pair("short", "one")],
        "00001.tar": [("broken.jpg", b""), ("broken.txt", b"x"), *pair("twice", "two words")],
        "00002.tar": [*pair("twice", "two words"), *pair("3", "a key of digits")],
    }
    folder = write_tars(tmp_path / "in", shards)
    recipe = recipe_for(folder, "webdataset", filter={"min_caption_words": 2})
    return stages(run_here(recipe | {"max_quarantine_fraction": 0.5}, tmp_path / "out"))


def test_why_tells_each_sample_its_own_story(chain: dict[str, StageDir]) -> None:
    told = {}
    for name in ("long", "short", "broken"):
        (story,) = lineage.why(chain, name)
        told[name] = (story.uid, story.fate, [(s.stage, s.fate, s.reason) for s in story.steps])
    assert told["long"] == (0, "kept", [("ingest", "kept", ""), ("filter", "kept", "")])
    assert told["short"][1] == "dropped by filter: caption_words_below"
    assert told["broken"] == (
        1 << 24,
        "quarantined by ingest: empty_image",
        [("ingest", "quarantined", "empty_image")],
    )
    (story,) = lineage.why(chain, "short")
    assert dict(story.steps[-1].facts) == {"score": 1.0, "cutoff": 2.0}
    assert story.sample["caption"] == "one"
    (story,) = lineage.why(chain, "broken")
    assert story.steps[0].facts["detail"] == "'broken.jpg' has no bytes"
    json.dumps(story.as_json(), allow_nan=False)


def test_why_takes_a_uid_and_tells_every_sample_of_a_shared_key(chain: dict[str, StageDir]) -> None:
    assert [story.uid for story in lineage.why(chain, "twice")] == [1 << 24 | 1, 2 << 24]
    (story,) = lineage.why(chain, str(1 << 24))
    assert story.key == "broken"
    (story,) = lineage.why(chain, "3")
    assert story.uid == 2 << 24 | 1, "a key goes before a uid"
    for unknown in ("none", "99", str(2**64), "-1", "\u0663", ""):
        with pytest.raises(UserError, match="No sample has the key or uid"):
            lineage.why(chain, unknown)


def test_fates_name_the_stage_and_reason_of_every_loss(chain: dict[str, StageDir]) -> None:
    found = {row["uid"]: row for row in lineage.fates(chain).iter_rows(named=True)}
    assert len(found) == 6
    assert {uid: row["reason"] for uid, row in found.items() if not row["kept"]} == {
        1: "caption_words_below",
        1 << 24: "quarantine:empty_image",
    }
    assert (found[1]["stage"], found[1]["key"]) == ("filter", "short")
    assert (found[0]["stage"], found[0]["reason"]) == ("", "")


def test_a_damaged_table_is_named_by_why(chain: dict[str, StageDir]) -> None:
    Path(chain["ingest"].files()[0]).write_bytes(b"PAR1")
    with pytest.raises(PartDamaged, match="cannot be read"):
        lineage.why(chain, "long")


# ---- checks


Corruption = Callable[[dict[str, StageDir]], None]


def flip_a_byte(chain: dict[str, StageDir]) -> None:
    path = Path(chain["filter"].files()[0])
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def remove_a_part(chain: dict[str, StageDir]) -> None:
    Path(chain["filter"].files()[1]).unlink()


def replace_a_part_by_junk(chain: dict[str, StageDir]) -> None:
    Path(chain["filter"].files()[0]).write_bytes(b"junk")


def remove_a_part_and_its_marker(chain: dict[str, StageDir]) -> None:
    remove_a_part(chain)
    (Path(chain["filter"].path) / "_done" / "part-00001.json").unlink()


def forge(directory: StageDir, path: str, table: pa.Table, *, also_record: bool) -> None:
    """Write another table in a part's place, with a marker (and record) that agree with it."""
    name = path.removeprefix(directory.path + "/")
    written = store.write(directory.path, name, table)
    new = {
        "path": name,
        "bytes": written.num_bytes,
        "sha256": written.sha256,
        "rows": table.num_rows,
    }
    item = Path(name).stem
    marker = next(one for one in directory.markers() if one["item"] == item)
    marker["files"] = [new if one["path"] == name else one for one in marker["files"]]
    store.write_json(directory.path, f"_done/{item}.json", marker)
    kept = directory.record()
    assert kept is not None
    for part in kept["parts"]:
        if part["item"] == item and also_record:
            part["files"] = marker["files"]
    store.write_json(directory.path, "record.json", kept)


def remove_a_verdict_and_forge_the_marker(chain: dict[str, StageDir]) -> None:
    path = chain["filter"].files()[0]
    forge(chain["filter"], path, store.read_table(path).slice(1), also_record=False)


def remove_a_verdict_and_forge_everything(chain: dict[str, StageDir]) -> None:
    path = chain["filter"].files()[0]
    forge(chain["filter"], path, store.read_table(path).slice(1), also_record=True)
    change_record(chain["filter"], lambda r: r.update(rows_in=r["rows_in"] - 1, kept=r["kept"] - 1))


def judge_a_row_twice(chain: dict[str, StageDir]) -> None:
    path = chain["filter"].files()[0]
    table = store.read_table(path)
    forge(chain["filter"], path, pa.concat_tables([table, table.slice(0, 1)]), also_record=True)


def remove_a_sample(chain: dict[str, StageDir]) -> None:
    path = chain["ingest"].files()[0]
    forge(chain["ingest"], path, store.read_table(path).slice(1), also_record=True)


def remove_a_quarantine_row(chain: dict[str, StageDir]) -> None:
    path = chain["ingest"].files("quarantine")[0]
    forge_quarantine = store.read_table(path).slice(1)
    forge(chain["ingest"], path, forge_quarantine, also_record=True)


def change_record(directory: StageDir, change: Callable[[dict[str, Any]], None]) -> None:
    kept = directory.record()
    assert kept is not None
    change(kept)
    store.write_json(directory.path, "record.json", kept)


CORRUPTIONS: dict[str, tuple[Corruption, str, str]] = {
    "a flipped byte": (flip_a_byte, "filter", "files have their digests"),
    "a part removed": (remove_a_part, "filter", "files have their digests"),
    "a part and its marker removed": (
        remove_a_part_and_its_marker,
        "filter",
        "files have their digests",
    ),
    "a verdict removed, marker forged": (
        remove_a_verdict_and_forge_the_marker,
        "filter",
        "markers are the record's",
    ),
    "a verdict removed, all forged": (
        remove_a_verdict_and_forge_everything,
        "filter",
        "judges what the stage before kept",
    ),
    "a row judged twice": (judge_a_row_twice, "filter", "each row judged once"),
    "a sample removed": (remove_a_sample, "ingest", "samples are the kept rows"),
    "a quarantine row removed": (
        remove_a_quarantine_row,
        "ingest",
        "quarantine tables are complete",
    ),
    "counts forged": (
        lambda chain: change_record(chain["filter"], lambda r: r.update(kept=0, rows_in=0)),
        "filter",
        "counts are the record's",
    ),
    "made from another stage": (
        lambda chain: change_record(chain["filter"], lambda r: r["inputs"].update(ingest="0" * 64)),
        "filter",
        "made from the stages before",
    ),
    "another fingerprint": (
        lambda chain: change_record(chain["filter"], lambda r: r.update(fingerprint="0" * 64)),
        "filter",
        "directory has its fingerprint",
    ),
    "no record": (
        lambda chain: (Path(chain["filter"].path) / "record.json").unlink(),
        "filter",
        "finished",
    ),
    "a part that is no parquet": (
        replace_a_part_by_junk,
        "filter",
        "readable",
    ),
}


def broken(tmp_path: Path, chain: dict[str, StageDir]) -> set[tuple[str, str]]:
    findings = checks.check(str(tmp_path / "out"), chain)
    return {(one.stage, one.rule) for one in findings if not one.holds}


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_check_finds_the_planted_corruption(
    tmp_path: Path, chain: dict[str, StageDir], name: str
) -> None:
    assert broken(tmp_path, chain) == set()
    corrupt, stage, rule = CORRUPTIONS[name]
    corrupt(chain)
    assert (stage, rule) in broken(tmp_path, chain)


@pytest.fixture
def selected(tmp_path: Path) -> dict[str, StageDir]:
    """A run up to select, on embeddings."""
    recipe = recipe_for(
        embeddings(tmp_path / "in"),
        "clip_retrieval",
        cluster={"num_clusters": 4},
        dedup={},
        select={"clip_band": [0.1, 0.9], "centroid_band": [0.1, 0.9], "num_samples": 20},
    )
    return stages(run_here(recipe, tmp_path / "out"))


def test_check_finds_a_changed_coreset(tmp_path: Path, selected: dict[str, StageDir]) -> None:
    assert broken(tmp_path, selected) == set()
    top = tmp_path / "out" / "coreset.parquet"
    table = pq.read_table(top)
    assert table.schema.equals(CORESET)
    assert table.num_rows == 20
    pq.write_table(table.slice(1), top)
    assert broken(tmp_path, selected) == {("select", "top coreset.parquet is a copy")}
    top.unlink()
    assert broken(tmp_path, selected) == {("select", "top coreset.parquet is a copy")}
    inner = Path(selected["select"].path) / "coreset.parquet"
    pq.write_table(table.take(pa.array(range(20)[::-1])), inner)
    assert ("select", "coreset is the kept rows by uid") in broken(tmp_path, selected)
    inner.unlink()
    assert ("select", "readable") in broken(tmp_path, selected)


# ---- records


def test_a_record_says_what_went_in_what_came_out_and_what_made_it(
    chain: dict[str, StageDir],
) -> None:
    found = chain["filter"].record()
    assert found is not None
    assert (found["stage"], found["rows_in"], found["kept"]) == ("filter", 5, 4)
    assert found["dropped"] == {"caption_words_below": 1}
    assert found["config"]["min_caption_words"] == 2
    assert found["inputs"] == {"ingest": chain["ingest"].record()["fingerprint"]}  # type: ignore[index]
    assert [part["item"] for part in found["parts"]] == ["part-00000", "part-00001", "part-00002"]
    assert found["versions"]["pyarrow"] == pa.__version__
    assert re.fullmatch(r"filter-[0-9a-f]{8}", paths.name_of(chain["filter"].path))


def test_canonical_json_is_one_text_per_value() -> None:
    assert record.canonical_json({"b": 1, "a": [1.5, "\u00e9"]}) == '{"a":[1.5,"\\u00e9"],"b":1}'
    with pytest.raises(ValueError, match="Out of range"):
        record.canonical_json(float("nan"))


def test_every_source_config_says_what_is_a_location() -> None:
    config = SourceConfig(kind="webdataset", path="a")
    assert "path" not in config.canonical()
