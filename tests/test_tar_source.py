"""Image tars: every layout, and the fate of every bad or damaged member."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from small_inputs import (
    NOT_UTF8,
    bad_rows,
    good_tars,
    ingest,
    ingest_members,
    only_sample,
    pair,
    picture,
    rows_of,
    tar_of,
    text_array,
    write_tars,
)

from manifests.errors import UserError

TEXT = b"a red circle over a blue square"


# ---- layouts


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


# ---- every bad input is one quarantined row with its class, or a sample


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
