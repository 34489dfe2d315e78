"""The store: atomic writing, full disks, damaged tables, arrays and JSON."""

from __future__ import annotations

import errno
import hashlib
import resource
import shutil
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import fsspec
import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from small_inputs import good_tars, names_below, recipe_for, run_here, stages, unit_rows

from manifests import store
from manifests.errors import PartDamaged, UserError

REPOSITORY = Path(__file__).resolve().parent.parent


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
    outcomes = {"disk": Counter[str](), "memory": Counter[str]()}
    for _ in range(400):
        content = bytearray(whole[: rng.integers(1, len(whole))] if rng.random() < 0.2 else whole)
        for _ in range(rng.integers(1, 5)):
            content[rng.integers(min(len(content), 128))] = rng.integers(256)
        (tmp_path / "y.npy").write_bytes(content)
        memory.pipe_file("/broken/y.npy", bytes(content))
        for place, path in (("disk", str(tmp_path / "y.npy")), ("memory", "memory://broken/y.npy")):
            try:
                store.read_array(path)
                outcomes[place]["read"] += 1
            except ValueError:
                outcomes[place]["refused"] += 1
    assert outcomes["disk"].total() == 400
    assert outcomes["disk"]["refused"] > 0
    assert outcomes["memory"] == outcomes["disk"]


def test_a_range_of_rows_is_read_from_a_file_of_many_row_groups_or_none(tmp_path: Path) -> None:
    uids = np.arange(1000, dtype=np.uint64) + np.uint64(5 << 24)
    table = pa.table({"uid": uids, "score": np.arange(1000.0)})
    pq.write_table(table, tmp_path / "many.parquet", row_group_size=64)
    pq.write_table(table.slice(0, 0), tmp_path / "none.parquet")
    first = 5 << 24
    found = store.read_range(str(tmp_path / "many.parquet"), "uid", first + 60, first + 200)
    assert found.equals(table.slice(60, 140))
    assert store.read_range(str(tmp_path / "many.parquet"), "uid", 0, first).num_rows == 0
    assert store.read_range(str(tmp_path / "none.parquet"), "uid", 0, first).num_rows == 0
    with pytest.raises(PartDamaged):
        store.read_range(str(tmp_path / "gone.parquet"), "uid", 0, 1)
