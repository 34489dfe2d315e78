"""What comes in: every kind of input, good and bad, and the fate of each of its rows."""

from __future__ import annotations

import datetime as dt
import decimal
import io
import json
import random
import shutil
import zipfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from small_inputs import (
    DIM,
    bad_rows,
    embeddings,
    good_tars,
    pair,
    picture,
    recipe_for,
    rows_of,
    run_here,
    stages,
    tar_of,
    unit_rows,
    write_embeddings,
    write_tars,
)

from curate.media import tar_source
from curate.rows.columns import samples_from_columns
from curate.rows.foreign import tame
from curate.source_config import SourceConfig
from curate.vectors import published
from manifests import ledger
from manifests.errors import UserError
from manifests.schemas import MAX_ROWS_PER_SHARD, SAMPLES
from manifests.work import Output, StageDir
from pipelines.recipe import parse

TEXT = b"a red circle over a blue square"
NOT_UTF8 = b"caf\xe9 noir"


def ingest(folder: Path, kind: str = "webdataset", **options: Any) -> StageDir:
    """Ingest a folder however bad it is, check the accounts and return the stage."""
    values = recipe_for(folder, kind, max_quarantine_fraction=1.0)
    values["source"] |= options
    directory = stages(run_here(values, folder.parent / "out"))["ingest"]
    record = directory.record()
    assert record is not None
    kept, bad = rows_of(directory), rows_of(directory, "quarantine")
    assert (record["rows_in"], record["kept"]) == (len(kept) + len(bad), len(kept))
    uids = sorted(row["uid"] for row in kept + bad)
    assert uids == sorted(row["uid"] for row in rows_of(directory, "verdicts"))
    assert len(set(uids)) == len(uids)
    return directory


def ingest_members(tmp_path: Path, *members: tuple[str, bytes], good: int = 0) -> StageDir:
    """Ingest one shard of these members, after `good` good pairs."""
    before = [member for row in range(good) for member in pair(f"good{row}")]
    return ingest(write_tars(tmp_path / "in", {"00000.tar": [*before, *members]}))


def only_sample(directory: StageDir) -> dict[str, Any]:
    (row,) = rows_of(directory)
    assert bad_rows(directory) == []
    return row


# ---- tars: layouts


def test_a_caption_in_txt_becomes_a_sample_that_points_at_the_image_bytes(tmp_path: Path) -> None:
    image = picture(20, 10)
    directory = ingest_members(tmp_path, ("a/b.jpg", image), ("a/b.txt", b" two words \n"))
    row = only_sample(directory)
    content = (tmp_path / "in" / "00000.tar").read_bytes()
    assert content[row["offset"] : row["offset"] + row["size"]] == image
    assert (row["uid"], row["key"], row["shard"], row["source"]) == (
        0,
        "a/b",
        "00000.tar",
        "webdataset",
    )
    assert (row["caption"], row["width"], row["height"]) == ("two words", 20, 10)
    assert row["image_format"] == "jpg"


def test_json_alone_gives_caption_and_columns_and_keeps_the_rest_as_given(tmp_path: Path) -> None:
    values = {
        "caption": "from json",
        "url": "http://x/1",
        "width": "640",
        "height": 480.0,
        "NSFW": "UNLIKELY",
        "punsafe": 0.25,
        "uid": "0f" * 16,
        "status": "success",
        "nothing": None,
    }
    directory = ingest_members(tmp_path, ("k.png", b"?"), ("k.json", json.dumps(values).encode()))
    row = only_sample(directory)
    assert (row["caption"], row["url"], row["nsfw"]) == ("from json", "http://x/1", "UNLIKELY")
    assert (row["width"], row["height"], row["punsafe"]) == (640, 480, 0.25)
    assert json.loads(row["extra"]) == {"status": "success", "uid": "0f" * 16}


def test_txt_goes_before_json_and_a_header_gives_the_sides_that_nobody_wrote(
    tmp_path: Path,
) -> None:
    members = (
        ("k.webp", picture(30, 20, kind="WEBP")),
        ("k.json", b'{"caption": "from json", "width": 0, "height": null}'),
        ("k.txt", b"from txt"),
    )
    row = only_sample(ingest_members(tmp_path, *members))
    assert (row["caption"], row["width"], row["height"]) == ("from txt", 30, 20)


def test_the_parquet_beside_a_shard_is_read_as_img2dataset_writes_it(tmp_path: Path) -> None:
    folder = write_tars(tmp_path / "in", {"00000.tar": [*pair("000000000"), *pair("000000002")]})
    listed = {
        "punsafe": pa.array([0.1, 0.2, float("nan")], pa.float32()),
        "caption": ["one", "failed", "three"],
        "url": ["http://x/0", "http://x/1", "http://x/2"],
        "key": ["000000000", "000000001", "000000002"],
        "status": ["success", "failed_to_download", "success"],
        "width": pa.array([64, None, 65], pa.int32()),
        "height": pa.array([64, None, 66], pa.int32()),
    }
    pq.write_table(pa.table(listed), folder / "00000.parquet")
    rows = rows_of(ingest(folder, "img2dataset"))
    assert [row["key"] for row in rows] == ["000000000", "000000002"]
    assert [row["caption"] for row in rows] == [
        "the caption of 000000000",
        "the caption of 000000002",
    ]
    assert [(row["url"], row["width"], row["height"]) for row in rows] == [
        ("http://x/0", 64, 64),
        ("http://x/2", 65, 66),
    ]
    assert [row["punsafe"] for row in rows] == [pytest.approx(0.1), None]
    assert json.loads(rows[1]["extra"]) == {"status": "success"}


def test_a_parquet_caption_is_enough_and_a_row_that_it_lacks_falls_back_to_json(
    tmp_path: Path,
) -> None:
    members = [("a.jpg", picture()), ("a.json", b'{"caption": "json a"}')]
    members += [("b.jpg", picture()), ("b.json", b'{"caption": "json b"}')]
    folder = write_tars(tmp_path / "in", {"00000.tar": members})
    pq.write_table(pa.table({"key": ["a"], "caption": ["parquet a"]}), folder / "00000.parquet")
    assert [row["caption"] for row in rows_of(ingest(folder))] == ["parquet a", "json b"]


def test_the_parquet_beside_a_shard_may_hold_text_that_is_not_utf8(tmp_path: Path) -> None:
    folder = write_tars(tmp_path / "in", {"00000.tar": pair("a")})
    bad = text_array([NOT_UTF8])
    pq.write_table(pa.table({"key": ["a"], "url": bad, "tags": [["x"]]}), folder / "00000.parquet")
    row = only_sample(ingest(folder))
    assert row["url"] == "caf\ufffd noir"
    assert json.loads(row["extra"]) == {"tags": ["x"]}


@pytest.mark.parametrize(
    "content",
    [b"", b"no parquet at all", b"PAR1" + bytes(40) + b"PAR1"],
    ids=["empty", "junk", "only its ends"],
)
def test_a_file_beside_a_shard_that_is_no_parquet_is_a_user_error(
    tmp_path: Path, content: bytes
) -> None:
    folder = write_tars(tmp_path / "in", {"00000.tar": pair("a"), "00000.parquet": content})
    with pytest.raises(UserError, match=r"00000\.parquet is not a readable parquet file"):
        ingest(folder)


def test_image_sha256_is_that_of_the_bytes_when_asked_for(tmp_path: Path) -> None:
    import hashlib

    folder = write_tars(tmp_path / "in", {"00000.tar": pair("a")})
    row = only_sample(ingest(folder, hash_images=True))
    assert row["image_sha256"] == hashlib.sha256(picture()).digest()


# ---- tars: every bad input is one quarantined row with its class, or a sample


BAD_MEMBERS: dict[str, tuple[list[tuple[str, bytes]], list[tuple[str, str]]]] = {
    "zero-byte image": ([("k.jpg", b""), ("k.txt", TEXT)], [("k", "empty_image")]),
    "image without caption": ([("k.jpg", picture())], [("k", "missing_caption")]),
    "empty caption": ([("k.jpg", picture()), ("k.txt", b" \n")], [("k", "missing_caption")]),
    "caption without image": ([("k.txt", TEXT)], [("k", "missing_image")]),
    "json without caption": ([("k.jpg", picture()), ("k.json", b"{}")], [("k", "missing_caption")]),
    "json that is no json": ([("k.jpg", picture()), ("k.json", b"{")], [("k", "bad_json")]),
    "json that is no object": (
        [("k.jpg", picture()), ("k.json", b"[1]")],
        [("k", "missing_caption")],
    ),
    "json caption that is no text": (
        [("k.jpg", picture()), ("k.json", b'{"caption": ["a", "b"]}')],
        [("k", "missing_caption")],
    ),
    "json nested too deeply": (
        [("k.jpg", picture()), ("k.json", b'{"caption": "c", "deep": ' + b"[" * 5000)],
        [("k", "bad_json")],
    ),
    "json with a number of 5000 digits": (
        [("k.jpg", picture()), ("k.json", b'{"caption": "c", "n": ' + b"9" * 5000 + b"}")],
        [("k", "bad_json")],
    ),
    "duplicate keys": (
        [*pair("k"), *pair("other"), *pair("k")],
        [("k", "duplicate_key")],
    ),
    "members apart": (
        [("k.jpg", picture()), *pair("other"), ("k.txt", TEXT)],
        [("k", "non_contiguous_members")] * 2,
    ),
    "parent folder in the name": (pair("../../etc/k"), [("../../etc/k", "unsafe_member_name")]),
    "absolute name": (pair("/etc/k"), [("/etc/k", "unsafe_member_name")]),
}


@pytest.mark.parametrize("name", BAD_MEMBERS)
def test_bad_members_are_quarantined_with_their_class_and_the_others_kept(
    tmp_path: Path, name: str
) -> None:
    members, expected = BAD_MEMBERS[name]
    directory = ingest_members(tmp_path, *members, good=2)
    assert bad_rows(directory) == expected
    kept = [row["key"] for row in rows_of(directory)]
    assert [key for key in kept if key.startswith("good")] == ["good0", "good1"]


@pytest.mark.parametrize("depth", [300, 700, 900])
def test_json_that_can_be_read_but_is_too_deep_to_write_never_stops_the_shard(
    tmp_path: Path, depth: int
) -> None:
    deep = b'{"caption": "c", "deep": ' + b"[" * depth + b"]" * depth + b"}"
    directory = ingest_members(tmp_path, ("k.jpg", picture()), ("k.json", deep), good=1)
    assert [key for key, _ in bad_rows(directory)] in ([], ["k"])


def test_bad_json_beside_a_txt_costs_the_metadata_only(tmp_path: Path) -> None:
    row = only_sample(
        ingest_members(tmp_path, ("k.jpg", picture()), ("k.json", b"{"), ("k.txt", TEXT))
    )
    assert row["caption"] == TEXT.decode()
    assert "json_error" in json.loads(row["extra"])


def test_an_undecodable_image_is_left_to_the_stage_that_decodes(tmp_path: Path) -> None:
    row = only_sample(ingest_members(tmp_path, ("k.jpg", b"GIF89a broken"), ("k.txt", TEXT)))
    assert (row["width"], row["height"]) == (None, None)


def test_text_that_is_not_unicode_is_repaired(tmp_path: Path) -> None:
    members = [("a.jpg", picture()), ("a.txt", NOT_UTF8)]
    members += [
        ("b.jpg", picture()),
        ("b.json", b'{"caption": "half \\ud83d", "\\udc00": "\\ud800"}'),
    ]
    members += [("c.jpg", picture()), ("c.txt", b"\xef\xbb\xbfwith a byte order mark")]
    rows = rows_of(ingest_members(tmp_path, *members))
    assert [row["caption"] for row in rows] == [
        "caf\ufffd noir",
        "half \ufffd",
        "with a byte order mark",
    ]
    assert json.loads(rows[1]["extra"]) == {"\ufffd": "\ufffd"}


def test_numbers_in_json_that_mean_nothing_become_unknown_not_zero(tmp_path: Path) -> None:
    text = (
        '{"caption": "c", "punsafe": NaN, "similarity": Infinity, "width": 1e400, "height": -5,'
        ' "hash": 99999999999999999999999, "pwatermark": "n/a", "odd": NaN, "huge": %s}'
        % ("9" * 400)
    )
    row = only_sample(ingest_members(tmp_path, ("k.jpg", picture(9, 7)), ("k.json", text.encode())))
    names = ("punsafe", "similarity", "hash", "pwatermark")
    assert [row[name] for name in names] == [None] * 4
    assert (row["width"], row["height"]) == (9, 7)
    assert json.loads(row["extra"]) == {"huge": int("9" * 400), "odd": None}


def blocks(entries: list[tuple[str, bytes]]) -> bytes:
    """Return a tar without its end-of-archive marker."""
    num_blocks = sum(1 + -(-len(data) // 512) for _, data in entries)
    return tar_of(entries)[: 512 * num_blocks]


DAMAGED: dict[str, tuple[bytes, list[tuple[str, str]], int]] = {
    "no tar": (b"<html>not found</html>" * 100, [("", "damaged_shard")], 0),
    "empty file": (b"", [("", "damaged_shard")], 0),
    "tar of nothing": (tar_of([]), [], 0),
    "cut in an image": (
        blocks([*pair("a"), ("b.txt", TEXT), ("b.jpg", bytes(5000))])[:-600],
        [("b", "truncated_member")],
        1,
    ),
    "cut in a header": (
        blocks(pair("a")) + tar_of(pair("b"))[:100],
        [("", "damaged_shard")],
        1,
    ),
    "cut between members": (
        blocks([*pair("a"), ("b.jpg", picture())]) + tar_of([("b.txt", TEXT)])[:100],
        [("b", "truncated_member")],
        1,
    ),
    "a broken header in the middle": (
        blocks(pair("a")) + b"\xff" * 512 + tar_of(pair("b")),
        [("", "damaged_shard")],
        1,
    ),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_what_is_readable_of_a_damaged_shard_is_kept_and_the_rest_named(
    tmp_path: Path, name: str
) -> None:
    content, expected, num_kept = DAMAGED[name]
    folder = write_tars(tmp_path / "in", {"00000.tar": content, "00001.tar": pair("z")})
    directory = ingest(folder)
    assert bad_rows(directory) == expected
    kept = rows_of(directory)
    assert len(kept) == num_kept + 1
    assert kept[-1]["uid"] == 1 << 24


def test_shards_behind_links_are_read_and_a_broken_link_is_an_error(tmp_path: Path) -> None:
    real = good_tars(tmp_path / "blobs", num_shards=1, num_pairs=2)
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "00000.tar").symlink_to(real / "00000.tar")
    assert len(rows_of(ingest(folder))) == 2
    (folder / "00001.tar").symlink_to(real / "gone.tar")
    with pytest.raises(UserError, match="is gone"):
        ingest(folder)


def test_a_shard_whose_name_is_not_utf8_is_a_user_error(tmp_path: Path) -> None:
    folder = good_tars(tmp_path / "in", num_shards=1)
    shutil.copy(folder / "00000.tar", str(folder) + "/a\udcff1.tar")
    with pytest.raises(UserError, match="not UTF-8"):
        ingest(folder)


def test_an_appended_shard_changes_no_uid(tmp_path: Path) -> None:
    folder = good_tars(tmp_path / "in", num_shards=2)
    before = {row["key"]: row["uid"] for row in rows_of(ingest(folder))}
    write_tars(folder, {"00010.tar": pair("late")})
    after = {row["key"]: row["uid"] for row in rows_of(ingest(folder))}
    assert after == before | {"late": 2 << 24}


def test_several_shards_in_a_part_give_the_same_rows(tmp_path: Path) -> None:
    folder = good_tars(tmp_path / "in", num_shards=5)
    single, grouped = ingest(folder), ingest(folder, shards_per_part=2)
    assert rows_of(single) == rows_of(grouped)
    assert len(grouped.files()) == 3


# ---- published embeddings


def ingest_embeddings(folder: Path, **options: Any) -> StageDir:
    return ingest(folder, "clip_retrieval", **options)


def test_embedding_rows_get_uids_by_file_and_row_whatever_the_gaps_and_padding(
    tmp_path: Path,
) -> None:
    folder = tmp_path / "in"
    for name in ("9", "0010", "0200"):
        write_embeddings(folder, name, unit_rows(3))
    rows = rows_of(ingest_embeddings(folder))
    assert [row["uid"] for row in rows] == [n << 24 | i for n in range(3) for i in range(3)]
    assert [row["key"] for row in rows[::3]] == ["9-0", "0010-0", "0200-0"]
    assert rows[3]["shard"] == "img_emb/img_emb_0010.npy"
    before = rows
    write_embeddings(folder, "0300", unit_rows(1))
    after = rows_of(ingest_embeddings(folder))
    assert after[:9] == before
    assert after[9]["uid"] == 3 << 24


def test_files_of_one_number_are_paired_under_different_padding(tmp_path: Path) -> None:
    folder = write_embeddings(tmp_path / "in", 7, unit_rows(2))
    (folder / "text_emb" / "text_emb_0007.npy").rename(folder / "text_emb" / "text_emb_07.npy")
    assert len(rows_of(ingest_embeddings(folder))) == 2


def test_clip_score_is_the_exact_dot_of_the_two_rows(tmp_path: Path) -> None:
    images, texts = unit_rows(20, seed=1), unit_rows(20, seed=2)
    rows = rows_of(ingest_embeddings(write_embeddings(tmp_path / "in", 0, images, texts)))
    exact = (images.astype(np.float64) * texts.astype(np.float64)).sum(axis=1)
    assert [row["clip_score"] for row in rows] == exact.tolist()


def test_rows_that_cannot_be_compared_are_quarantined(tmp_path: Path) -> None:
    images, texts = unit_rows(7), unit_rows(7, seed=1)
    images[1, 3], images[2], images[3, 0] = np.nan, 0, np.inf
    texts[4], texts[5, 0] = 0, -np.inf
    images[6] *= np.float16(20)
    directory = ingest_embeddings(write_embeddings(tmp_path / "in", 0, images, texts))
    assert [row["key"] for row in rows_of(directory)] == ["0000-0"]
    assert bad_rows(directory) == [
        ("0000-1", "non_finite_embedding"),
        ("0000-2", "zero_embedding"),
        ("0000-3", "non_finite_embedding"),
        ("0000-4", "zero_embedding"),
        ("0000-5", "non_finite_embedding"),
        ("0000-6", "embedding_norm_too_large"),
    ]


def test_float32_rows_are_rounded_to_float16_and_too_large_ones_quarantined(tmp_path: Path) -> None:
    images = unit_rows(3).astype(np.float32) + np.float32(1e-6)
    texts = unit_rows(3, seed=1).astype(np.float32)
    images[2, 0] = 1e6
    directory = ingest_embeddings(write_embeddings(tmp_path / "in", 0, images, texts))
    rounded = [one.astype(np.float16).astype(np.float64) for one in (images[:2], texts[:2])]
    scores = [row["clip_score"] for row in rows_of(directory)]
    assert scores == (rounded[0] * rounded[1]).sum(axis=1).tolist()
    assert bad_rows(directory) == [("0000-2", "non_finite_embedding")]


def test_an_empty_part_is_no_rows_and_no_error(tmp_path: Path) -> None:
    folder = write_embeddings(tmp_path / "in", 0, unit_rows(2))
    write_embeddings(folder, 1, np.zeros((0, DIM), np.float16))
    write_embeddings(folder, 2, unit_rows(1))
    assert [row["uid"] >> 24 for row in rows_of(ingest_embeddings(folder))] == [0, 0, 2]


def npz_bytes() -> bytes:
    file = io.BytesIO()
    np.savez(file, unit_rows(4))
    return file.getvalue()


def zip_bytes() -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("a", "b")
    return file.getvalue()


def npy_bytes(array: np.ndarray, *, allow_pickle: bool = False) -> bytes:
    file = io.BytesIO()
    np.save(file, array, allow_pickle=allow_pickle)
    return file.getvalue()


NOT_EMBEDDINGS: dict[str, tuple[bytes, str]] = {
    "python objects": (npy_bytes(np.array([{}] * 4, object), allow_pickle=True), "plain npy"),
    "one dimension": (npy_bytes(np.zeros(4, np.float16)), r"shape \(4,\)"),
    "three dimensions": (npy_bytes(np.zeros((4, 2, 2), np.float16)), "shape"),
    "float64": (npy_bytes(np.zeros((4, DIM))), "float64"),
    "integers": (npy_bytes(np.zeros((4, DIM), np.int8)), "int8"),
    "big-endian": (npy_bytes(np.zeros((4, DIM), ">f2")), "float16"),
    "empty file": (b"", "plain npy"),
    "cut short": (npy_bytes(unit_rows(4))[:-5], "plain npy"),
    "only a header": (npy_bytes(unit_rows(4))[:128], "plain npy"),
    "a pickle": (b"\x80\x04N.", "plain npy"),
    "text": (b"<html>", "plain npy"),
    "an npz": (npz_bytes(), "plain npy"),
    "a zip": (zip_bytes(), "plain npy"),
    "a cut zip": (zip_bytes()[:20], "plain npy"),
}


@pytest.mark.parametrize("kind", ["img_emb", "text_emb"])
@pytest.mark.parametrize("name", NOT_EMBEDDINGS)
def test_a_file_that_holds_no_embeddings_is_a_user_error_that_names_it(
    tmp_path: Path, name: str, kind: str
) -> None:
    content, expected = NOT_EMBEDDINGS[name]
    folder = write_embeddings(tmp_path / "in", 0, unit_rows(4))
    (folder / kind / f"{kind}_0000.npy").write_bytes(content)
    with pytest.raises(UserError, match=expected) as caught:
        ingest_embeddings(folder)
    assert f"{kind}_0000.npy" in str(caught.value)


@pytest.mark.parametrize(
    ("images", "texts", "rows"), [(4, 3, 4), (3, 4, 4), (4, 4, 3), (4, 4, 5), (4, 4, 0)]
)
def test_row_counts_that_differ_are_a_user_error(
    tmp_path: Path, images: int, texts: int, rows: int
) -> None:
    table = pa.table({"key": [str(row) for row in range(rows)]})
    write_embeddings(tmp_path / "in", 3, unit_rows(images), unit_rows(texts), table)
    with pytest.raises(UserError, match=f"{images} image rows, {texts} text rows, {rows} metadata"):
        ingest_embeddings(tmp_path / "in")


@pytest.mark.parametrize("where", ["img_emb", "text_emb", "other file"])
def test_another_dimension_is_a_user_error(tmp_path: Path, where: str) -> None:
    folder = write_embeddings(tmp_path / "in", 0, unit_rows(2))
    wide = unit_rows(2, dim=DIM * 2)
    if where == "other file":
        write_embeddings(folder, 1, wide)
    else:
        np.save(folder / where / f"{where}_0000.npy", wide)
    with pytest.raises(UserError, match="columns, the first file has"):
        ingest_embeddings(folder)


@pytest.mark.parametrize("kind", ["img_emb", "text_emb", "metadata"])
def test_a_number_that_lacks_one_of_its_files_is_a_user_error(tmp_path: Path, kind: str) -> None:
    folder = embeddings(tmp_path / "in")
    next((folder / kind).glob("*_0001.*")).unlink()
    with pytest.raises(UserError, match=f"{kind}/ has no file number 1"):
        ingest_embeddings(folder)


def test_a_folder_in_another_layout_is_a_user_error(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    with pytest.raises(UserError, match="holds no img_emb"):
        ingest_embeddings(tmp_path / "in")
    write_embeddings(tmp_path / "in", 1, unit_rows(1))
    write_embeddings(tmp_path / "in", "01", unit_rows(1))
    with pytest.raises(UserError, match="two files number 1"):
        ingest_embeddings(tmp_path / "in")
    write_embeddings(tmp_path / "named", "all", unit_rows(1))
    with pytest.raises(UserError, match="has no number"):
        ingest_embeddings(tmp_path / "named")


@pytest.mark.parametrize(
    "content",
    [b"", b"junk" * 50, b"PAR1" + bytes(40) + b"PAR1"],
    ids=["empty", "junk", "only its ends"],
)
def test_metadata_that_are_no_parquet_are_a_user_error(tmp_path: Path, content: bytes) -> None:
    folder = write_embeddings(tmp_path / "in", 0, unit_rows(2))
    (folder / "metadata" / "metadata_0000.parquet").write_bytes(content)
    with pytest.raises(UserError, match="not a readable parquet file"):
        ingest_embeddings(folder)


def test_a_damaged_page_of_the_metadata_is_a_user_error(tmp_path: Path) -> None:
    folder = write_embeddings(tmp_path / "in", 0, unit_rows(2000))
    path = folder / "metadata" / "metadata_0000.parquet"
    content = bytearray(path.read_bytes())
    content[4:400] = bytes(396)
    path.write_bytes(content)
    with pytest.raises(UserError, match="not a readable parquet file"):
        ingest_embeddings(folder)


def test_two_metadata_columns_of_one_name_are_a_user_error(tmp_path: Path) -> None:
    table = pa.table([pa.array(["a"]), pa.array(["b"])], names=["key", "key"])
    write_embeddings(tmp_path / "in", 0, unit_rows(1), None, table)
    with pytest.raises(UserError, match="two columns 'key'"):
        ingest_embeddings(tmp_path / "in")


def test_a_file_of_more_rows_than_a_uid_can_number_is_refused(tmp_path: Path) -> None:
    folder = write_embeddings(tmp_path / "in", 0, unit_rows(1))
    path = folder / "img_emb" / "img_emb_0000.npy"
    np.lib.format.open_memmap(path, mode="w+", dtype=np.float16, shape=(MAX_ROWS_PER_SHARD + 1, 1))
    with pytest.raises(UserError, match=r"more than 2\^24 rows"):
        ingest_embeddings(folder)


# ---- columns


def text_array(values: list[bytes]) -> pa.Array:
    """Return a string array of any bytes, UTF-8 or not, as parquet files may hold."""
    return pa.Array.from_buffers(pa.string(), len(values), pa.array(values, pa.binary()).buffers())


def samples(**columns: Any) -> list[dict[str, Any]]:
    table = pa.table(columns)
    uids = np.arange(table.num_rows, dtype=np.uint64)
    found = samples_from_columns(table, uids, source="s", shard="x.npy")
    assert found.schema.equals(SAMPLES)
    found.validate(full=True)
    return list(found.to_pylist())


def test_names_of_laion_img2dataset_and_datacomp_mean_the_same() -> None:
    (laion,) = samples(
        SAMPLE_ID=[5], URL=["u"], TEXT=[" t "], WIDTH=[1.0], HEIGHT=[2.0], NSFW=["NSFW"]
    )
    assert [laion[k] for k in ("key", "url", "caption", "width", "height", "nsfw")] == [
        "5",
        "u",
        "t",
        1,
        2,
        "NSFW",
    ]
    (coco,) = samples(top_caption=["c"], all_captions=[["c", "d"]], hash=[-5])
    assert (coco["caption"], coco["hash"], coco["key"]) == ("c", -5, "x.npy:0")
    assert json.loads(coco["extra"]) == {"all_captions": ["c", "d"]}


def test_a_source_without_captions_gets_empty_ones() -> None:
    assert [row["caption"] for row in samples(url=["a", None])] == ["", ""]
    assert [row["key"] for row in samples(key=["a", None], caption=[None, "b"])] == ["a", ""]


HUGE = 2**64 - 1
WEIRD: dict[str, tuple[pa.Array, list[Any]]] = {
    "dictionary": (pa.array(["a", None]).dictionary_encode(), ["a", None]),
    "dictionary, not UTF-8": (
        pa.DictionaryArray.from_arrays(pa.array([0, 1]), text_array([NOT_UTF8, b"b"])),
        ["caf\ufffd noir", "b"],
    ),
    "text, not UTF-8": (text_array([NOT_UTF8, b"b"]), ["caf\ufffd noir", "b"]),
    "large text": (pa.array(["a", None], pa.large_string()), ["a", None]),
    "text view": (pa.array(["a", None], pa.string_view()), ["a", None]),
    "bytes": (pa.array([b"\xff", b"ab"]), ["\ufffd", "ab"]),
    "bytes of one size": (pa.array([b"\xff\x00", b"ab"], pa.binary(2)), ["\ufffd\x00", "ab"]),
    "list": (pa.array([[1, 2], None]), [[1, 2], None]),
    "list of text, not UTF-8": (
        pa.ListArray.from_arrays(pa.array([0, 1, 2]), text_array([NOT_UTF8, b"b"])),
        ['["caf\ufffd noir"]', '["b"]'],
    ),
    "list of bytes": (pa.array([[b"\xff"], [b"a"]]), ['["\ufffd"]', '["a"]']),
    "list of NaN": (pa.array([[float("nan")], [1.5]]), [[None], [1.5]]),
    "struct": (pa.array([{"a": 1}, None]), [{"a": 1}, None]),
    "struct of times": (
        pa.array([{"t": dt.datetime(2020, 1, 2)}, None], pa.struct({"t": pa.timestamp("ns")})),
        ['{"t": "2020-01-02 00:00:00.000000000"}', None],
    ),
    "map": (pa.array([[("k", 1)], []], pa.map_(pa.string(), pa.int64())), ['[["k", 1]]', "[]"]),
    "time stamp": (pa.array([0, None], pa.timestamp("s")), ["1970-01-01 00:00:00", None]),
    "time stamp in a zone": (
        pa.array([0, None], pa.timestamp("s", "America/New_York")),
        ["1970-01-01 00:00:00", None],
    ),
    "time stamp of nanoseconds": (
        pa.array([1, None], pa.timestamp("ns")),
        ["1970-01-01 00:00:00.000000001", None],
    ),
    "time stamp beyond the calendar": (
        pa.array([2**62, None], pa.timestamp("s")),
        ["<value out of range: 4611686018427387904>", None],
    ),
    "date": (pa.array([dt.date(2020, 1, 2), None]), ["2020-01-02", None]),
    "time": (pa.array([dt.time(1, 2, 3), None]), ["01:02:03.000000", None]),
    "duration": (pa.array([5, None], pa.duration("s")), ["5", None]),
    "interval": (
        pa.array([pa.MonthDayNano([1, 2, 3]), None]),
        ["MonthDayNano(months=1, days=2, nanoseconds=3)", None],
    ),
    "decimal": (pa.array([decimal.Decimal("1.50"), None]), ["1.50", None]),
    "wide decimal": (
        pa.array([decimal.Decimal("1.50"), None], pa.decimal256(50, 2)),
        ["1.50", None],
    ),
    "runs": (pa.RunEndEncodedArray.from_arrays([2], ["a"]), ["a", "a"]),
    "extension": (
        pa.ExtensionArray.from_storage(pa.uuid(), pa.array([b"a" * 16, None], pa.binary(16))),
        ["a" * 16, None],
    ),
    "nulls": (pa.nulls(2), [None, None]),
    "booleans": (pa.array([True, None]), [True, None]),
    "half floats": (pa.array([1.5, float("nan")], pa.float16()), [1.5, None]),
    "unsigned": (pa.array([HUGE, 0], pa.uint64()), [HUGE, 0]),
}


@pytest.mark.parametrize("name", WEIRD)
def test_columns_of_any_type_are_kept_as_json(name: str) -> None:
    column, expected = WEIRD[name]
    assert [json.loads(row["extra"])["odd"] for row in samples(odd=column)] == expected


@pytest.mark.parametrize("column", ["key", "caption", "url", "width", "punsafe", "hash"])
@pytest.mark.parametrize("name", WEIRD)
def test_a_known_column_may_come_in_any_type(name: str, column: str) -> None:
    rows = samples(**{column: WEIRD[name][0]})
    assert len(rows) == 2
    values = WEIRD[name][0].type
    if column == "caption" and name.startswith("dictionary"):
        assert rows[0]["caption"] == WEIRD[name][1][0]
    if pa.types.is_nested(values) and column == "url" and name == "list":
        assert json.loads(rows[0]["extra"]) == {"url": [1, 2]}


def test_numbers_are_read_from_any_column_that_holds_them() -> None:
    expected = [7, None]
    for column in (
        pa.array([7, None], pa.int64()),
        pa.array([7, 2**40], pa.int64()),
        pa.array([7, 0], pa.int32()),
        pa.array([7, HUGE], pa.uint64()),
        pa.array([7.9, float("inf")]),
        pa.array([7, -1e300]),
        pa.array(["7", "seven"]),
        pa.array(["7", "nan"]).dictionary_encode(),
        pa.array([decimal.Decimal(7), None]),
        text_array([b"7", NOT_UTF8]),
    ):
        assert [row["width"] for row in samples(width=column)] == expected
    hashes = pa.array([-(2**63), 2**63 - 1])
    assert [row["hash"] for row in samples(hash=hashes)] == hashes.to_pylist()
    for column in (pa.array([7, HUGE], pa.uint64()), pa.array([7.0, 1e30]), pa.array(["7", ""])):
        assert [row["hash"] for row in samples(hash=column)] == expected


def test_one_row_of_bad_text_does_not_change_the_others() -> None:
    good, bad = pa.array([b" a ", b"b"]), text_array([b" a ", NOT_UTF8])
    alone = samples(caption=good.cast(pa.string()))
    assert samples(caption=bad)[0]["caption"] == alone[0]["caption"] == "a"


def test_taming_leaves_plain_columns_alone() -> None:
    for column in (pa.array([1, None]), pa.array([[1.5]]), pa.array([{"a": "b"}])):
        chunked = pa.chunked_array([column])
        assert tame(chunked) is chunked


# ---- random damage


def damaged(content: bytes, rng: random.Random) -> bytes:
    """Return the bytes with some changed, cut out or repeated."""
    data = bytearray(content)
    for _ in range(rng.randint(1, 8)):
        at, length = rng.randrange(len(data)), rng.randrange(1, 1500)
        kind = rng.choice(("change", "cut", "repeat"))
        if kind == "change":
            data[at] = rng.randrange(256)
        else:
            data[at : at + (length if kind == "cut" else 0)] = (
                b"" if kind == "cut" else data[at : at + length]
            )
    return bytes(data)


def check_output(output: Output) -> None:
    """Check that every row of an ingested part has exactly one fate."""
    (table,) = output.files.values()
    assert isinstance(table, pa.Table)
    assert output.verdicts is not None
    assert output.quarantine is not None
    counts = ledger.tally(output.verdicts)
    assert counts.adds_up
    table.validate(full=True)
    assert (table.num_rows, output.quarantine.num_rows) == (counts.kept, counts.num_quarantined)


def test_tars_damaged_at_random_are_rows_or_user_errors(tmp_path: Path) -> None:
    rng = random.Random(0)
    members = [m for row in range(4) for m in pair(f"k{row}", url="u", width=8, n=[1, {"a": 2}])]
    folder = write_tars(tmp_path / "in", {"0.tar": members})
    pq.write_table(pa.table({"key": ["k0", "k1"], "url": ["u", "v"]}), folder / "0.parquet")
    whole, listing = (folder / "0.tar").read_bytes(), (folder / "0.parquet").read_bytes()
    source = SourceConfig(kind="webdataset", path=str(folder))
    for attempt in range(150):
        (folder / "0.tar").write_bytes(damaged(whole, rng))
        (folder / "0.parquet").write_bytes(listing if attempt % 3 else damaged(listing, rng))
        with suppress(UserError):
            check_output(tar_source.ingest_part(source, str(folder), 0, [(0, "0.tar")]))


def test_embedding_files_damaged_at_random_are_rows_or_user_errors(tmp_path: Path) -> None:
    rng = random.Random(0)
    columns = {
        "key": [f"k{row}" for row in range(20)],
        "width": range(20),
        "tags": [["a", "b"]] * 20,
        "kind": pa.array(["u", "v"] * 10).dictionary_encode(),
    }
    folder = write_embeddings(
        tmp_path / "in", 0, unit_rows(20), unit_rows(20, seed=1), pa.table(columns)
    )
    whole = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    source = SourceConfig(kind="clip_retrieval", path=str(folder))
    for _ in range(150):
        for path, content in whole.items():
            path.write_bytes(damaged(content, rng) if rng.random() < 0.4 else content)
        published.forget_listing()
        with suppress(UserError):
            root, names = published.shards(str(folder))
            published.check_files(root, names)
            check_output(published.ingest_part(source, root, 0, [(0, names[0])]))


# ---- where the source lies


def test_a_source_path_that_is_not_there_is_a_user_error_before_anything_is_made(
    tmp_path: Path,
) -> None:
    for kind in ("webdataset", "clip_retrieval"):
        with pytest.raises(UserError, match="fix:"):
            run_here(recipe_for(tmp_path / "none", kind), tmp_path / "out")
    assert not list((tmp_path / "out").glob("ingest-*"))


def test_a_source_kind_that_is_unknown_is_a_user_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"recipe\.source\.kind"):
        parse(recipe_for(tmp_path, "parquet"))
