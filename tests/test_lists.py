"""The coreset as lists for other programs, read back as those programs read them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from small_inputs import (
    good_tars,
    names_below,
    pair,
    recipe_for,
    run_here,
    unit_rows,
    write_embeddings,
    write_tars,
)

from pipelines.cli import main

UIDS = (
    "ffffffffffffffff0000000000000000",
    "00000000000000ff0000000000000002",
    "00000000000000ff0000000000000001",
    "0000000000000001ffffffffffffffff",
)


def ask(*words: str) -> Any:
    return CliRunner().invoke(main, ["lists", *words])


def selected(path: Path | str, kind: str, out: Path, **sections: Any) -> str:
    """Run to a coreset of all rows, or of what `sections` leave."""
    run_here(recipe_for(path, kind, **{"select": {}, **sections}), out)
    return str(out)


def published(folder: Path, **columns: list[Any]) -> Path:
    """Write published embeddings with these metadata."""
    num = len(next(iter(columns.values())))
    captions = [f"caption number {row}" for row in range(num)]
    table = pa.table({"caption": captions, **columns})
    return write_embeddings(folder, 0, unit_rows(num), unit_rows(num, seed=9), table)


def test_each_input_tar_has_its_keys_as_the_reference_reads_them(tmp_path: Path) -> None:
    shards = {
        "000000.tar": [*pair("0000000145"), *pair("0000002678", "one two three four")],
        "000001.tar": [*pair("0000010001", "five words are in here")],
        "000002.tar": [*pair("0000020001")],
    }
    tars = write_tars(tmp_path / "in", shards)
    kept = {"min_caption_words": 4}
    out = selected(tars, "webdataset", tmp_path / "out", filter=kept)
    assert ask(out, "--as", "reference-keys", "--out", str(tmp_path / "keys")).exit_code == 0
    read = {
        tar: set(np.load(tmp_path / "keys" / f"tar_{tar[:-4]}.npy").astype(int)) for tar in shards
    }
    assert read == {"000000.tar": {145, 2678}, "000001.tar": {10001}, "000002.tar": {20001}}
    assert np.load(tmp_path / "keys" / "tar_000000.npy").dtype == np.int64


def test_a_tar_without_a_selected_row_has_an_empty_list(tmp_path: Path) -> None:
    shards = {"000000.tar": pair("0000000001", "x"), "000001.tar": pair("0000010001")}
    tars = write_tars(tmp_path / "in", shards)
    kept = {"min_caption_words": 2}
    out = selected(tars, "webdataset", tmp_path / "out", filter=kept)
    found = ask(out, "--as", "reference-keys", "--out", str(tmp_path / "keys"), "--json")
    assert json.loads(found.stdout) == {"rows": 1, "files": 2}
    assert np.load(tmp_path / "keys" / "tar_000000.npy").tolist() == []


def test_published_keys_go_to_the_tar_of_their_ten_thousand(tmp_path: Path) -> None:
    """As the reference does: `assign_array[i // 10000].append(i)`."""
    keys = ["0000030002", "0000000007", "0000009999", "0000010000"]
    folder = published(tmp_path / "in", key=keys)
    out = selected(folder, "clip_retrieval", tmp_path / "out")
    assert ask(out, "--as", "reference-keys", "--out", str(tmp_path / "keys")).exit_code == 0
    assert names_below(tmp_path / "keys") == [f"tar_{tar:06d}.npy" for tar in range(4)]
    lists = [np.load(tmp_path / "keys" / f"tar_{tar:06d}.npy").tolist() for tar in range(4)]
    assert lists == [[7, 9999], [10000], [], [30002]]


def test_keys_of_no_tar_are_refused(tmp_path: Path) -> None:
    """A SAMPLE_ID would be in tar 299,057,500, and every tar up to it would get a file."""
    folder = published(tmp_path / "in", key=["2990575000000", "7"])
    out = selected(folder, "clip_retrieval", tmp_path / "out")
    found = ask(out, "--as", "reference-keys", "--out", str(tmp_path / "keys"))
    assert found.exit_code == 2
    assert "2990575000000 is in no tar" in found.stderr
    assert not (tmp_path / "keys").exists()


@pytest.mark.parametrize("column", ["key", "uid"])
def test_datacomp_uids_are_found_by_bisection_as_its_resharder_does(
    tmp_path: Path, column: str
) -> None:
    """A uid's halves are (255, 1) etc.; the key may be img2dataset's where `uid` is a column."""
    columns = {column: list(UIDS)} | ({"key": list("dcba")} if column == "uid" else {})
    out = selected(published(tmp_path / "in", **columns), "clip_retrieval", tmp_path / "out")
    path = tmp_path / "subset.npy"
    assert ask(out, "--as", "datacomp-uids", "--out", str(path)).exit_code == 0
    subset = np.load(path, mmap_mode="r")
    assert subset.dtype == np.dtype("u8,u8")
    assert subset.tolist() == [(1, 2**64 - 1), (255, 1), (255, 2), (2**64 - 1, 0)]
    for text in (*UIDS, "00000000000000ff0000000000000003"):
        uid = np.array([(int(text[:16], 16), int(text[16:32], 16))], np.dtype("u8,u8"))[0]
        count = np.searchsorted(subset, uid, "right") - np.searchsorted(subset, uid, "left")
        assert count == (text in UIDS)


def test_a_url_list_has_what_img2dataset_is_told(tmp_path: Path) -> None:
    urls = [f"https://host.example/{row}.jpg" for row in range(3)]
    md5 = [f"{row:032x}" for row in range(3)]
    columns = {"key": ["5", "6", "7"], "hash": [-3, 2**62, 0], "md5": md5}
    folder = published(tmp_path / "in", url=urls, **columns)
    out = selected(folder, "clip_retrieval", tmp_path / "out", filter={})
    assert ask(out, "--as", "urls", "--out", str(tmp_path / "urls.parquet")).exit_code == 0
    rows = pq.read_table(tmp_path / "urls.parquet").to_pylist()
    assert [row["url"] for row in rows] == urls
    assert rows[1] == {
        "url": urls[1],
        "caption": "caption number 1",
        "key": "6",
        "uid": 1,
        "hash": 2**62,
        "md5": md5[1],
        "sha256": None,
    }


def test_ids_that_the_rows_do_not_have_are_refused_and_nothing_is_written(tmp_path: Path) -> None:
    tars = write_tars(tmp_path / "in", {"00000.tar": pair("a/b-1")})
    out = selected(tars, "webdataset", tmp_path / "out")
    cases = {
        "reference-keys": "The key 'a/b-1' is no number",
        "datacomp-uids": "has no DataComp uid",
        "urls": "1 samples of the coreset have no URL, the first is 'a/b-1'",
    }
    for kind, message in cases.items():
        found = ask(out, "--as", kind, "--out", str(tmp_path / "list"))
        assert found.exit_code == 2
        assert message in found.stderr
        assert not (tmp_path / "list").exists()


def test_no_coreset_no_list_and_nothing_is_overwritten(tmp_path: Path) -> None:
    tars = good_tars(tmp_path / "in", num_shards=1)
    run_here(recipe_for(tars, "webdataset", select={}), tmp_path / "out", until="ingest")
    words = (str(tmp_path / "out"), "--as", "reference-keys", "--out", str(tmp_path / "keys"))
    assert "has no coreset" in ask(*words).stderr
    selected(tars, "webdataset", tmp_path / "out")
    assert ask(*words).exit_code == 0
    assert "Nothing is overwritten" in ask(*words).stderr


def test_two_input_tars_of_one_name_cannot_be_told_apart(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        write_tars(tmp_path / folder, {"00000.tar": pair("5")})
    out = str(tmp_path / "out")
    selected(f"{tmp_path}/{{a,b}}/00000.tar", "webdataset", tmp_path / "out")
    found = ask(out, "--as", "reference-keys", "--out", str(tmp_path / "keys"))
    assert "Two input tars are named 00000.tar" in found.stderr
