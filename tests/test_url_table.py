"""Tables of URLs: which shard and key a row has, what is read of it, and what becomes of it."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import fsspec
import mmh3
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from laion_tables import (
    LONG_CAPTION,
    base_table,
    csv_bytes,
    gzipped,
    joined_table,
    laion_hash,
    murmur3_x64_128,
    plain_rows,
    write_quirky,
    write_rows,
)
from small_inputs import (
    NOT_UTF8,
    bad_rows,
    events,
    ingest,
    recipe_for,
    record,
    rows_of,
    run_here,
    stages,
)

from curate.rows import laion, table_files, text_tables, url_source
from manifests.errors import PartDamaged, UserError
from manifests.schemas import UID_ROW_BITS
from manifests.work import StageDir
from pipelines.cli import main
from pipelines.recipe import parse


def ingest_urls(path: Path, **options: Any) -> StageDir:
    return ingest(path, "url_table", **options)


def sampled(tmp_path: Path, table: pa.Table, **options: Any) -> list[dict[str, Any]]:
    (tmp_path / "in").mkdir(exist_ok=True)
    pq.write_table(table, tmp_path / "in" / "a.parquet")
    return rows_of(ingest_urls(tmp_path / "in", **options))


@pytest.mark.parametrize("rows_per_shard", [1, 4, 7, 10, 11, 1000])
def test_shards_and_keys_are_those_that_img2dataset_gives(
    tmp_path: Path, rows_per_shard: int
) -> None:
    """img2dataset cuts each file by itself, numbers the pieces on, and key = shard * 10^k + row."""
    counts, expected, shard = [9, 0, 20, 1], [], 0
    digits = len(str(rows_per_shard - 1)) if rows_per_shard > 1 else 0
    for file, count in enumerate(counts):
        rows = plain_rows(count, start=100 * file)
        table = pa.Table.from_pylist(rows, pa.schema([("url", "string"), ("text", "string")]))
        (tmp_path / "in").mkdir(exist_ok=True)
        pq.write_table(table, tmp_path / "in" / f"{file:05d}.parquet", row_group_size=6)
        for row, values in enumerate(rows):
            piece, within = shard + row // rows_per_shard, row % rows_per_shard
            expected.append(
                {
                    "uid": piece << UID_ROW_BITS | within,
                    "key": str(piece * 10**digits + within).zfill(5 + digits),
                    "shard": f"{file:05d}.parquet",
                    "offset": row,
                    "size": 0,
                    "url": values["url"],
                    "caption": values["text"],
                }
            )
        shard += -(-count // rows_per_shard)
    for shards_per_part in (1, 3, 1000):
        options = {"rows_per_shard": rows_per_shard, "shards_per_part": shards_per_part}
        found = rows_of(ingest_urls(tmp_path / "in", **options))
        assert [{k: row[k] for k in expected[0]} for row in found] == expected


FORMS = ["parquet", "feather", "arrow", "csv", "tsv", "jsonl", "json"]


@pytest.mark.parametrize("form", [*FORMS, "csv.gz", "tsv.gz", "jsonl.gz", "json.gz"])
def test_every_form_gives_the_same_rows(tmp_path: Path, form: str) -> None:
    rows = plain_rows(25)
    rows[3]["text"] = "two\nlines" if "tsv" not in form else "one line"
    write_rows(tmp_path / "in" / f"list.{form}", rows)
    found = rows_of(ingest_urls(tmp_path / "in", rows_per_shard=10))
    assert [(row["url"], row["caption"]) for row in found] == [
        (row["url"], row["text"]) for row in rows
    ]
    assert [row["uid"] for row in found] == [n // 10 << UID_ROW_BITS | n % 10 for n in range(25)]


@pytest.mark.parametrize("packed", [False, True])
def test_a_text_file_is_one_url_a_line(tmp_path: Path, packed: bool) -> None:
    content = b'http://e.org/a,b.jpg\r\n\n  http://e.org/"c".jpg\nhttp://e.org/\xe9'
    path = tmp_path / "in" / ("list.txt.gz" if packed else "list.txt")
    path.parent.mkdir()
    path.write_bytes(gzipped(content) if packed else content)
    directory = ingest_urls(path.parent)
    expected = ["http://e.org/a,b.jpg", 'http://e.org/"c".jpg', "http://e.org/\ufffd"]
    assert [row["url"] for row in rows_of(directory)] == expected
    assert [row["caption"] for row in rows_of(directory)] == ["", "", ""]


@pytest.mark.parametrize("form", FORMS)
def test_rows_are_read_from_anywhere_in_any_order(
    tmp_path: Path, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text_tables, "BLOCK_BYTES", 200)
    monkeypatch.setattr(text_tables, "LINES_PER_BATCH", 4)
    monkeypatch.setattr(table_files, "BATCH_ROWS", 4)
    rows = plain_rows(60)
    path = str(write_rows(tmp_path / f"list.{form}", rows))
    assert table_files.count_rows(path) == 60
    rng = random.Random(0)
    for _ in range(30):
        first = rng.randrange(60)
        num = rng.randrange(1, 61 - first)
        batches = list(table_files.read_rows(path, first, num))
        found = [url for one in batches for url in one.table.column("url").to_pylist()]
        found = [one.decode() if isinstance(one, bytes) else one for one in found]
        assert found == [row["url"] for row in rows[first : first + num]]
    with pytest.raises(PartDamaged, match="3 rows fewer"):
        list(table_files.read_rows(path, 40, 23))
    table_files.close()


def test_a_part_reads_its_own_row_groups_only(tmp_path: Path) -> None:
    """The first row group is damaged: rows of the second are read all the same."""
    rows = plain_rows(40)
    path = tmp_path / "a.parquet"
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=20, compression="zstd")
    group = pq.read_metadata(path).row_group(0).column(0)
    data = bytearray(path.read_bytes())
    start = group.dictionary_page_offset or group.data_page_offset
    data[start : start + group.total_compressed_size] = b"\0" * group.total_compressed_size
    path.write_bytes(data)
    (batch,) = table_files.read_rows(str(path), 25, 10)
    assert batch.table.column("url").to_pylist() == [row["url"] for row in rows[25:35]]
    with pytest.raises(UserError, match="not a readable parquet"):
        list(table_files.read_rows(str(path), 0, 10))


def test_the_hash_is_murmur3_of_url_and_text() -> None:
    """The 128-bit value of the pangram: both halves as the reference implementation gives them."""
    pangram = b"The quick brown fox jumps over the lazy dog"
    assert murmur3_x64_128(pangram) == (0xE34BBC7BBC071B6C, 0x7A433CA9C49A9347)
    assert murmur3_x64_128(b"") == (0, 0)
    rng = random.Random(1)
    for length in [*range(40), 1000]:
        data = rng.randbytes(length)
        assert mmh3.hash64(data, 0, signed=False) == murmur3_x64_128(data)
        assert laion.hash_of(data[:5], data[5:]) == laion_hash(data[:5], data[5:])
    assert laion.hash_of(b"u", None) == laion.hash_of(b"u", b"") == laion_hash("u", None)


def test_hashes_are_of_what_the_source_says_not_of_what_we_mend(tmp_path: Path) -> None:
    urls = ["  http://e.org/a ", "http://e.org/\u00e9", "http://e.org/c"]
    texts = [" t\x00 ", None, "x" * 50]
    table = pa.table({"URL": urls, "TEXT": pa.array(texts)})
    found = sampled(tmp_path, table, laion_hash=True, max_caption_characters=20)
    pairs = zip(urls, texts, strict=True)
    assert [row["hash"] for row in found] == [laion_hash(url, text) for url, text in pairs]
    assert [row["url"] for row in found] == [url.strip() for url in urls]
    assert [row["caption"] for row in found] == ["t", "", "x" * 20]
    assert all(row["hash"] is None for row in sampled(tmp_path, table))


def test_hashes_of_the_source_are_compared_and_stay(tmp_path: Path) -> None:
    rows = [("http://e.org/a", "a"), ("http://e.org/b", None), ("http://e.org/c", "c")]
    given = [laion_hash(*rows[0]), 7, None]
    pq.write_table(joined_table(rows, hash=pa.array(given)), tmp_path / "a.parquet")
    directory = ingest_urls(tmp_path / "a.parquet", laion_hash=True)
    assert [row["hash"] for row in rows_of(directory)] == [*given[:2], laion_hash(*rows[2])]
    notes = record(directory)["notes"]["part-00000"]
    assert notes == {"hash_same": 1, "hash_differs": 1, "hash_computed": 1}


@pytest.mark.parametrize(
    ("swapped", "is_base", "size"),
    [
        ("auto", True, (640, 100)),
        ("auto", False, (640, 100)),
        (False, True, (100, 640)),
        (True, False, (100, 640)),
    ],
)
def test_the_swapped_sizes_of_base_laion_are_put_right(
    tmp_path: Path, swapped: Any, is_base: bool, size: tuple[int, int]
) -> None:
    table = base_table(2) if is_base else joined_table([("http://e.org/a", "a")])
    row = sampled(tmp_path, table, swapped_sizes=swapped)[0]
    assert (row["width"], row["height"]) == size


@pytest.mark.parametrize("form", ["json", "jsonl", "csv", "jsonl.gz"])
def test_base_laion_is_known_and_put_right_in_text_forms_too(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], form: str
) -> None:
    rows = base_table(30).to_pylist()
    write_rows(tmp_path / "in" / f"a.{form}", rows)
    recipe = recipe_for(tmp_path / "in", "url_table")
    recipe["source"] |= {"rows_per_shard": 7}
    found = rows_of(stages(run_here(recipe, tmp_path / "out"))["ingest"])
    assert {(row["width"], row["height"]) for row in found} == {(640, 100)}
    assert "Re-LAION" in capsys.readouterr().err


def test_bad_rows_and_rows_without_a_name_do_not_hide_base_laion(tmp_path: Path) -> None:
    rows = base_table(4).to_pylist()
    del rows[0]["LICENSE"], rows[1]["NSFW"]
    (tmp_path / "in").mkdir()
    lines = ["{no json", *map(json.dumps, rows)]
    (tmp_path / "in" / "a.jsonl").write_text("\n".join(lines))
    found = rows_of(ingest_urls(tmp_path / "in"))
    assert [(row["width"], row["height"]) for row in found] == [(640, 100)] * 4


def test_names_of_coyo_datacomp_and_relaion_mean_the_same(tmp_path: Path) -> None:
    coyo = {"id": 7, "url": "u", "text": "t", "width": 3, "clip_similarity_vitb32": 0.2}
    coyo |= {"aesthetic_score_laion_v2": 5.5, "nsfw_score_opennsfw2": 0.1}
    (row,) = sampled(tmp_path, pa.Table.from_pylist([coyo]))
    assert [row[k] for k in ("key", "similarity", "aesthetic", "width")] == ["7", 0.2, 5.5, 3]
    assert json.loads(row["extra"]) == {"nsfw_score_opennsfw2": 0.1}
    pool = {"uid": "ab" * 16, "url": "u", "text": "t", "original_width": 9, "original_height": 8}
    pool |= {"clip_b32_similarity_score": 0.1, "clip_l14_similarity_score": 0.2}
    pool |= {"face_bboxes": [[0.1, 0.2]], "sha256": "cd" * 32}
    (row,) = sampled(tmp_path, pa.Table.from_pylist([pool]))
    assert [row[k] for k in ("key", "similarity", "width", "height")] == ["ab" * 16, 0.2, 9, 8]
    assert row["published_sha256"] == b"\xcd" * 32
    assert json.loads(row["extra"]) == {
        "clip_b32_similarity_score": 0.1,
        "face_bboxes": [[0.1, 0.2]],
    }
    safe = {"url": "u", "caption": "c", "width": 256, "original_width": 900, "status": "success"}
    (row,) = sampled(tmp_path, pa.Table.from_pylist([safe]))
    assert (row["caption"], row["width"], row["key"]) == ("c", 900, "000000000")


@pytest.mark.parametrize("form", ["parquet", "jsonl"])
def test_a_digest_is_read_and_what_is_none_is_kept_as_given(tmp_path: Path, form: str) -> None:
    rows = [{"url": "u", "md5": "0A" * 16}, {"url": "v", "md5": "no digest"}, {"url": "w"}]
    write_rows(tmp_path / "in" / f"a.{form}", [{"md5": None} | row for row in rows])
    found = rows_of(ingest_urls(tmp_path / "in"))
    assert [row["published_md5"] for row in found] == [b"\n" * 16, None, None]
    assert "no digest" in json.loads(found[1]["extra"]).values()


@pytest.mark.parametrize("form", ["parquet", "csv", "jsonl"])
@pytest.mark.parametrize(("column", "digits"), [("sha256", 32), ("md5", 16), ("md5", 64)])
def test_a_digest_of_another_length_is_none(
    tmp_path: Path, form: str, column: str, digits: int
) -> None:
    """An MD5 has as many characters as a SHA-256 has bytes: taken for one, no file would match."""
    write_rows(tmp_path / "in" / f"a.{form}", [{"url": "u", column: "aB" * (digits // 2)}])
    (row,) = rows_of(ingest_urls(tmp_path / "in"))
    assert row[f"published_{column}"] is None
    assert "aB" * (digits // 2) in json.loads(row["extra"]).values()


def test_digests_may_come_as_bytes(tmp_path: Path) -> None:
    digests = pa.array([b"\xff" * 16, None], pa.binary(16))
    found = sampled(tmp_path, pa.table({"url": ["u", "v"], "md5": digests}))
    assert [row["published_md5"] for row in found] == [b"\xff" * 16, None]
    assert [row["extra"] for row in found] == [None, None]


def test_rows_that_are_none_keep_their_places(tmp_path: Path) -> None:
    lines = ["url,text", "u0,a", "u1,b,c,d", "", "u2,x", "u3", "u4,y"]
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.csv").write_bytes(csv_bytes(*lines))
    directory = ingest_urls(tmp_path / "in", rows_per_shard=2)
    assert [row["url"] for row in rows_of(directory)] == ["u0", "u2", "u4"]
    assert [row["offset"] for row in rows_of(directory)] == [0, 2, 4]
    assert bad_rows(directory) == [("000001", "bad_row"), ("000011", "bad_row")]
    assert "4 values in 2 columns" in rows_of(directory, "quarantine")[0]["detail"]


def test_bad_rows_keep_their_places_over_many_blocks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text_tables, "BLOCK_BYTES", 100)
    rng = random.Random(2)
    is_bad = [rng.random() < 0.4 for _ in range(300)] + [True, True]
    lines = [f"u{i}" + ",x" * (2 if bad else 1) for i, bad in enumerate(is_bad)]
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.csv").write_bytes(csv_bytes("url,text", *lines))
    directory = ingest_urls(tmp_path / "in", rows_per_shard=7)
    places = {row["offset"]: row["url"] for row in rows_of(directory)}
    assert places == {i: f"u{i}" for i, bad in enumerate(is_bad) if not bad}
    bad = {row["uid"] for row in rows_of(directory, "quarantine")}
    assert bad == {i // 7 << UID_ROW_BITS | i % 7 for i, bad in enumerate(is_bad) if bad}


def test_rows_that_a_quotation_mark_swallows_are_told(tmp_path: Path) -> None:
    """Tables of tabs seldom quote: this mark opens a value that ends two rows later."""
    captions = ["plain", '"opens', "b", 'ends "here" ok', '5" pipe', '"two\nlines"', "last"]
    lines = [f"u{row}\t{caption}\n" for row, caption in enumerate(captions)]
    (tmp_path / "a.tsv").write_text("url\tcaption\n" + "".join(lines))
    directory = ingest_urls(tmp_path / "a.tsv")
    assert [row["url"] for row in rows_of(directory)] == ["u0", "u4", "u5", "u6"]
    (bad,) = rows_of(directory, "quarantine")
    assert bad["error"] == "bad_row"
    assert "makes 3 lines one value" in bad["detail"]
    assert "u2\tb" in bad["detail"]


def test_bad_lines_of_json_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_tables, "MAX_LINE_BYTES", 3000)
    monkeypatch.setattr(text_tables, "BLOCK_BYTES", 1000)
    lines = [
        b'{"url": "u0", "text": "\xe9"}',
        b'{"url": ',
        b"[1]",
        b'{"url": "u3", "text": "' + b"x" * 9000 + b'"}',
        b'{"url": "u4", "a": ' + b"[" * 1400 + b"]" * 1400 + b"}",
        b'{"URL": "u5", "TEXT": "\\ud800", "SAMPLE_ID": 5, "more": {"b": NaN}}',
        b'{"text": "no url"}',
    ]
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.jsonl").write_bytes(b"\n".join(lines))
    directory = ingest_urls(tmp_path / "in")
    good = rows_of(directory)
    assert [(row["key"], row["url"]) for row in good] == [("000000000", "u0"), ("5", "u5")]
    assert [row["caption"] for row in good] == ["\ufffd", "\ufffd\ufffd\ufffd"]
    assert json.loads(good[1]["extra"]) == {"more": {"b": None}}
    errors = [row["error"] for row in rows_of(directory, "quarantine")]
    assert errors == ["bad_json"] * 4 + ["missing_url"]


def score_table(folder: Path, **columns: Any) -> str:
    folder.mkdir(exist_ok=True)
    path = folder / f"{len(list(folder.iterdir()))}.parquet"
    pq.write_table(pa.table(columns), path)
    return str(path)


def test_scores_are_joined_by_hash_and_the_worst_counts(tmp_path: Path) -> None:
    rows = [(f"http://e.org/{i}", f"t {i}") for i in range(200)]
    rows[7] = rows[3]  # LAION has rows twice
    hashes = [laion_hash(*row) for row in rows]
    rng = np.random.default_rng(0)
    scored = {value: float(rng.random()) for value in hashes[:150]}
    order = rng.permutation(150)
    listed = [hashes[i] for i in order]
    values = [scored[value] for value in listed]
    places = [
        score_table(tmp_path / "p", hash=listed + [12345], punsafe=[*values, 0.5]),
        score_table(tmp_path / "p", HASH=[hashes[9]], punsafe=pa.array([2.0], pa.float32())),
        score_table(tmp_path / "a", hash=hashes[:2], AESTHETIC_SCORE=[6.0, float("nan")]),
    ]
    assert len(places) == 3
    table = joined_table(rows).drop_columns(["hash", "punsafe"])
    pq.write_table(table, tmp_path / "a.parquet")
    join = [str(tmp_path / "p" / "*.parquet"), str(tmp_path / "a")]
    options: dict[str, Any] = {"join": join, "laion_hash": True, "rows_per_shard": 64}
    directory = ingest_urls(tmp_path / "a.parquet", **options)
    found = rows_of(directory)
    scored[hashes[9]] = 2.0
    assert [row["punsafe"] for row in found] == [scored.get(value) for value in hashes]
    assert [row["aesthetic"] for row in found[:3]] == [6.0, None, None]
    joined = [notes["joined"] for notes in record(directory)["notes"].values()]
    matched = sum(value in scored for value in hashes)
    assert sum(one["matched"] for one in joined) == matched
    assert sum(one["unmatched"] for one in joined) == len(rows) - matched
    assert sum(one["filled"].get("punsafe", 0) for one in joined) == matched


def test_a_join_fills_only_what_the_source_lacks_and_goes_by_url_too(tmp_path: Path) -> None:
    table = pa.table({"url": ["u", "v", "w"], "punsafe": [0.1, None, None]})
    digests = ["aa" * 16, "bb" * 16]
    join = [score_table(tmp_path / "p", url=["u", "v"], punsafe=[0.9, 0.8], md5=digests)]
    found = sampled(tmp_path, table, join=join)
    assert [row["punsafe"] for row in found] == [0.1, 0.8, None]
    assert [row["published_md5"] for row in found] == [b"\xaa" * 16, b"\xbb" * 16, None]


def test_rows_without_a_hash_are_joined_to_none(tmp_path: Path) -> None:
    table = pa.table({"url": ["u", "v", "w"], "hash": [None, 0, 5]})
    join = [score_table(tmp_path / "p", hash=[None, 0, 6], punsafe=[0.9, 0.2, 0.3])]
    assert [row["punsafe"] for row in sampled(tmp_path, table, join=join)] == [None, 0.2, None]


def test_tables_may_lie_on_another_filesystem(tmp_path: Path) -> None:
    memory = fsspec.filesystem("memory")
    path = write_rows(tmp_path / "a.parquet", plain_rows(9))
    memory.pipe_file("/urls/in/00000.parquet", path.read_bytes())
    memory.pipe_file("/urls/in/00001.parquet", path.read_bytes())
    packed = write_rows(tmp_path / "a.csv.gz", plain_rows(5)).read_bytes()
    memory.pipe_file("/urls/packed/a.csv.gz", packed)
    for place, num_rows in (("memory://urls/in", 18), ("memory://urls/packed/*.gz", 5)):
        recipe = recipe_for(place, "url_table")
        recipe["source"]["rows_per_shard"] = 4
        rows = rows_of(stages(run_here(recipe, tmp_path / "out"))["ingest"])
        assert len(rows) == num_rows
        assert [row["url"] for row in rows[:5]] == [row["url"] for row in plain_rows(5)]
    memory.rm("/urls", recursive=True)


def test_a_file_that_changed_after_the_plan_is_not_read(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "in" / "a.csv", plain_rows(30))
    source = parse(recipe_for(path.parent, "url_table")).source
    (item,) = url_source.plan(source)
    assert url_source.ingest_part(source, item.payload).verdicts.num_rows == 30
    write_rows(path, plain_rows(29))
    with pytest.raises(PartDamaged, match="a.csv has changed"):
        url_source.ingest_part(source, item.payload)
    path.unlink()
    with pytest.raises(UserError, match="is gone"):
        url_source.ingest_part(source, item.payload)


def test_a_changed_score_table_is_another_input(tmp_path: Path) -> None:
    join = [score_table(tmp_path / "p", url=["u"], punsafe=[0.9])]
    assert sampled(tmp_path, pa.table({"url": ["u"]}), join=join)[0]["punsafe"] == 0.9
    pq.write_table(pa.table({"url": ["u", "v"], "punsafe": [0.2, 0.3]}), join[0])
    assert sampled(tmp_path, pa.table({"url": ["u"]}), join=join)[0]["punsafe"] == 0.2


def test_every_quirk_of_laion_has_its_fate(tmp_path: Path) -> None:
    expected = write_quirky(tmp_path / "in")
    recipe = recipe_for(
        tmp_path / "in",
        "url_table",
        max_quarantine_fraction=0.5,
        filter={"max_aspect_ratio": 3.0, "drop_above_punsafe": 0.45},
    )
    recipe["source"] |= {"rows_per_shard": 100, "laion_hash": True}
    path = tmp_path / "recipe.yaml"
    path.write_text(json.dumps(recipe))
    out = str(tmp_path / "out")
    words = ["run", str(path), "--out", out, "--to", "filter", "--executor", "local"]
    result = CliRunner().invoke(main, words)
    assert result.exit_code == 0, result.output
    told = {}
    for key in expected:
        answer = CliRunner().invoke(main, ["why", out, key, "--json"])
        assert answer.exit_code == 0, answer.output
        (story,) = json.loads(answer.stdout)
        told[key] = next((s["reason"] for s in story["steps"] if s["reason"]), "")
    assert {key: reason.removeprefix("quarantine:") for key, reason in told.items()} == {
        key: reason.removeprefix("quarantine:") for key, reason in expected.items()
    }
    funnel = json.loads(CliRunner().invoke(main, ["funnel", out, "--json"]).stdout)
    assert [row["rows_in"] for row in funnel] == [20, 17]
    assert funnel[0]["quarantined"] == {"missing_url": 2, "url_too_long": 1}
    assert funnel[1]["dropped"] == {"aspect_ratio_above": 1, "punsafe_above": 1}
    assert "Re-LAION-2B-en-research-safe" in result.stderr


def test_the_quirks_are_read_as_they_should(tmp_path: Path) -> None:
    write_quirky(tmp_path / "in")
    directory = ingest_urls(tmp_path / "in", rows_per_shard=100, laion_hash=True)
    rows = {row["key"]: row for row in rows_of(directory)}
    assert (rows["0"]["width"], rows["0"]["height"]) == (640, 480)
    assert rows["2"]["caption"] == NOT_UTF8.decode(errors="replace")
    assert rows["2"]["hash"] == laion_hash("http://e.org/2.jpg", NOT_UTF8)
    assert rows["3"]["caption"] == "a cat[0m"
    assert rows["4"]["caption"] == "x" * 10_000
    assert json.loads(rows["4"]["extra"]) == {"LICENSE": "?", "caption_characters": LONG_CAPTION}
    assert rows["9"]["caption"] == ""
    assert (rows["0000102"]["width"], rows["104"]["width"]) == (None, None)
    assert json.loads(rows["100"]["extra"]) == {"LICENSE": "?", "__index_level_0__": 0}
    assert json.loads(rows["0000300"]["extra"]) == {"status": "success"}
    notes = record(directory)["notes"]
    assert notes["part-00000"]["mended_text"] == 3
    assert notes["part-00000"]["mended_caption_cut"] == 2
    assert notes["part-00002"] == {"hash_same": 1, "hash_differs": 1}


SAFE = {"filter": {"drop_above_punsafe": 0.45}}


@pytest.mark.parametrize(
    ("table", "sections", "warned"),
    [
        (base_table(1), {}, ["Re-LAION"]),
        (base_table(1, LANGUAGE=pa.array(["fr"])), SAFE, ["Re-LAION", "judges nothing"]),
        (joined_table([("http://e.org/a", "a")]), SAFE, ["Re-LAION"]),
        (joined_table([("http://e.org/a", "a")]), {}, ["Re-LAION", "drop_above_punsafe"]),
        (pa.table({"url": ["u"], "punsafe": [0.1]}), {"filter": {}}, ["drop_above_punsafe"]),
        (pa.table({"url": ["u"], "caption": ["c"], "punsafe": [0.1]}), SAFE, []),
        (pa.table({"url": ["u"]}), {}, []),
        (pa.table({"url": ["u"]}), SAFE, ["judges nothing"]),
        (pa.table({"url": ["u"], "alt": ["c"]}), {"filter": {"min_caption_chars": 1}}, ["alt"]),
    ],
)
def test_what_a_person_should_know_is_said_and_kept(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    table: pa.Table,
    sections: dict[str, Any],
    warned: list[str],
) -> None:
    pq.write_table(table, tmp_path / "a.parquet")
    out = tmp_path / "out"
    for _ in range(2):  # the second run reuses everything, and says it again
        links = run_here(recipe_for(tmp_path / "a.parquet", "url_table", **sections), out)
        stderr = capsys.readouterr().err
        assert stderr.count("WARNING: ingest: ") == len(warned)
        assert all(text in stderr for text in warned)
    kept = record(stages(links)["ingest"])["warnings"]
    assert len(kept) == len(warned)
    logged = [one["message"] for one in events(out) if one["event"] == "warning"]
    assert logged == kept * 2


@pytest.mark.parametrize(
    ("files", "options", "what"),
    [
        ({"a.parquet": {"link": ["u"]}}, {}, "no column of URLs"),
        ({"a.parquet": {"http://e.org/a": ["u"]}}, {}, "a line of names above it"),
        ({"a.parquet": {"url": ["u"]}, "b.csv": {"url": ["u"]}}, {}, "several forms"),
        ({"a.parquet": {"url": []}}, {}, "has no rows"),
        ({"a.parquet": {"url": ["u"]}}, {"join": ["{}/scores"]}, "no column hash"),
        ({"a.parquet": {"url": ["u"]}}, {"join": ["{}/in"]}, "cannot be joined"),
        ({"a.parquet": {"url": ["u"]}}, {"join": ["{}/nowhere"]}, "does not exist"),
        ({"a.xlsx": {"url": ["u"]}}, {}, "No .parquet"),
    ],
)
def test_what_cannot_be_used_is_refused_before_anything_is_read(
    tmp_path: Path, files: dict[str, Any], options: dict[str, Any], what: str
) -> None:
    score_table(tmp_path / "scores", hash=[1], punsafe=[0.5])
    (tmp_path / "in").mkdir()
    for name, columns in files.items():
        pq.write_table(pa.table(columns), tmp_path / "in" / name)
    options = {key: [one.format(tmp_path) for one in value] for key, value in options.items()}
    with pytest.raises(UserError, match=what):
        ingest_urls(tmp_path / "in", **options)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.parquet", b"PAR1 no"),
        ("a.feather", b"ARROW1 no"),
        ("a.csv", b""),
        ("a.csv.gz", b"no gzip"),
        ("a.json", b'[{"url": "u"}'),
        ("a.csv", b"url,url\na,b\n"),
    ],
)
def test_a_file_that_is_no_table_is_named(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / name).write_bytes(content)
    with pytest.raises(UserError, match=name):
        ingest_urls(tmp_path / "in")


def test_statistics_of_img2dataset_beside_its_tables_are_no_tables(tmp_path: Path) -> None:
    write_rows(tmp_path / "in" / "00000.parquet", plain_rows(2))
    (tmp_path / "in" / "00000_stats.json").write_text("{}")
    assert len(rows_of(ingest_urls(tmp_path / "in"))) == 2


def test_yes_and_no_of_yaml_are_understood() -> None:
    for value in (True, False, "auto"):
        source = {"kind": "url_table", "path": "x", "swapped_sizes": value}
        assert parse({"source": source}).source.swapped_sizes == value
    with pytest.raises(UserError, match="swapped_sizes"):
        parse({"source": {"kind": "url_table", "path": "x", "swapped_sizes": "maybe"}})
