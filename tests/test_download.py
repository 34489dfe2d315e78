"""The download stage: img2dataset's layout, each row's fate, and what later stages see of it."""

from __future__ import annotations

import gc
import hashlib
import io
import json
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import hostile_cases
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from download_worlds import (
    download_recipe,
    downloaded,
    fates,
    listing,
    photo,
    serve_photos,
    shard_bytes,
    stats,
    table_of,
    tar_members,
)
from hostile_server import HostileServer
from PIL import Image
from small_inputs import ingest, names_below, record, rows_of, run_here, stages

from curate.download import layout, settle
from curate.download.statuses import Status
from manifests import store
from manifests.checks import check
from manifests.errors import StageFailed, UserError
from manifests.schemas import SAMPLES
from manifests.work import StageDir
from pipelines.cli import run_cli

OWN = {"uid", "warren_status", "http_code", "final_url", "hash_check", "num_attempts"}


@pytest.fixture
def server() -> Iterator[HostileServer]:
    """A server on loopback."""
    with HostileServer() as one:
        yield one


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def test_a_shard_is_laid_out_as_img2dataset_does(server: HostileServer, tmp_path: Path) -> None:
    """Against a listing written by hand from what img2dataset 1.47 wrote for such a table."""
    urls = [*serve_photos(server, 11), server.url("/gone")]
    table = table_of(tmp_path / "in", urls, LICENSE=["?"] * 12, NSFW=["UNLIKELY"] * 12)
    path = Path(downloaded(table, tmp_path / "out", image_size=15).path)
    assert names_below(path / "shards") == [
        f"{shard}{ending}"
        for shard in ("00000", "00001")
        for ending in (".parquet", ".tar", "_stats.json")
    ]
    members = tar_members(path / "shards/00001.tar")
    assert list(members) == ["000010.jpg", "000010.json", "000010.txt"]
    assert members["000010.txt"].decode() == "caption 10, ☀"
    row = json.loads(members["000010.json"])
    assert members["000010.json"].decode() == json.dumps(row, indent=4)
    assert {name: value for name, value in row.items() if name not in OWN} == {
        "source_key": row["source_key"],
        "source": "url_table",
        "similarity": None,
        "punsafe": None,
        "pwatermark": None,
        "aesthetic": None,
        "nsfw": "UNLIKELY",
        "hash": None,
        "published_md5": None,
        "published_sha256": None,
        "LICENSE": "?",
        "caption": "caption 10, ☀",
        "url": urls[10],
        "key": "000010",
        "status": "success",
        "error_message": None,
        "width": 20,
        "height": 15,
        "original_width": 40,
        "original_height": 30,
        "exif": "{}",
        "sha256": sha256(photo(10)),
    }
    good, lost = listing(path / "shards/00001.parquet")
    assert good == row
    assert list(lost) == list(good)
    assert {name: lost[name] for name in ("key", "status", "error_message", "width", "url")} == {
        "key": "000011",
        "status": "failed_to_download",
        "error_message": "HTTP 404",
        "width": None,
        "url": urls[11],
    }
    assert (lost["warren_status"], lost["http_code"], lost["num_attempts"]) == ("http_4xx", 404, 1)
    said = dict(stats(path, 1))
    assert said.pop("end_time") - said.pop("start_time") == said.pop("duration")
    assert said == {
        "count": 2,
        "successes": 1,
        "failed_to_download": 1,
        "failed_to_resize": 0,
        "status_dict": {"http_4xx": 1, "success": 1},
    }


@pytest.mark.parametrize(
    ("rows_per_shard", "key"),
    [(10_000, "000000002"), (1000, "00000002"), (3, "000002"), (1, "00002")],
)
def test_keys_have_the_digits_of_img2dataset(
    rows_per_shard: int, key: str, server: HostileServer, tmp_path: Path
) -> None:
    table = table_of(tmp_path / "in", serve_photos(server, 3))
    stage = downloaded(table, tmp_path / "out", rows_per_shard=rows_per_shard)
    shard = sorted(Path(stage.path, "shards").glob("*.parquet"))[-1]
    assert listing(shard)[-1]["key"] == key


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")  # webdataset leaves them
def test_the_output_is_an_input(server: HostileServer, tmp_path: Path) -> None:
    """As img2dataset's, for our own ingest; as WebDataset's, for its own reader."""
    import webdataset

    urls = [*serve_photos(server, 12), server.url("/gone")]
    table = table_of(tmp_path / "in", urls, similarity=[0.25] * 13)
    path = Path(downloaded(table, tmp_path / "out").path)
    again = rows_of(ingest(path / "shards", "img2dataset"))
    assert [row["url"] for row in again] == urls[:12]
    assert [row["caption"] for row in again] == [f"caption {n}, ☀" for n in range(12)]
    assert {(row["width"], row["height"], row["similarity"]) for row in again} == {(40, 30, 0.25)}
    tars = [str(one) for one in sorted(path.glob("shards/*.tar"))]
    dataset = webdataset.WebDataset(tars, shardshuffle=False, empty_check=False)
    found = list(dataset.decode("pil"))
    assert [one["__key__"] for one in found] == [row["key"] for row in again]
    assert {one["jpg"].size for one in found} == {(40, 30)}
    del dataset
    gc.collect()


def test_samples_say_where_the_images_are_now(server: HostileServer, tmp_path: Path) -> None:
    urls = [*serve_photos(server, 14), server.url("/gone")]
    stage = downloaded(table_of(tmp_path / "in", urls), tmp_path / "out", image_size=15)
    before = StageDir("ingest", str(next((tmp_path / "out").glob("ingest-*"))))
    given = {row["uid"]: row for row in rows_of(before)}
    found = rows_of(stage)
    assert len(found) == 14
    moved = {"shard", "offset", "size", "width", "height", "image_format", "image_sha256"}
    for row in found:
        assert {k: v for k, v in row.items() if k not in moved} == {
            k: v for k, v in given[row["uid"]].items() if k not in moved
        }
        data = Path(stage.path, row["shard"]).read_bytes()[row["offset"] :][: row["size"]]
        assert hashlib.sha256(data).digest() == row["image_sha256"]
        assert Image.open(io.BytesIO(data)).size == (row["width"], row["height"]) == (20, 15)


def test_embed_select_and_assemble_go_on_from_it(server: HostileServer, tmp_path: Path) -> None:
    urls = [*serve_photos(server, 20), server.url("/gone"), server.serve_bytes("/x", b"<html>")]
    recipe = download_recipe(table_of(tmp_path / "in", urls)) | {
        "embed": {"model": "warren:demo/model", "batch_size": 8},
        "select": {"clip_band": [0.0, 1.0], "num_samples": 12},
        "assemble": {"samples_per_shard": 8},
    }
    made = stages(run_here(recipe, tmp_path / "out"))
    counts = {name: record(one)["kept"] for name, one in made.items()}
    assert counts == {"ingest": 22, "download": 20, "embed": 20, "select": 12, "assemble": 12}
    assert run_cli(["check", str(tmp_path / "out")]) == 0
    found = check(str(tmp_path / "out"), made)
    rules = [one.stage for one in found if one.rule == "samples are the kept rows"]
    assert rules == ["ingest", "download"]
    for row in rows_of(made["assemble"]):
        (image,) = row["images"]
        data = Path(made["assemble"].path, row["shard"]).read_bytes()
        number = (row["uid"] >> 24) * 10 + (row["uid"] & 0xFF)
        stored = Image.open(io.BytesIO(data[image["offset"] :][: image["size"]]))
        wanted = Image.open(io.BytesIO(photo(number)))
        assert stored.size == wanted.size


def test_what_a_filter_dropped_is_not_fetched(server: HostileServer, tmp_path: Path) -> None:
    urls = serve_photos(server, 12)
    table = table_of(
        tmp_path / "in", urls, punsafe=[0.9 if n in (3, 10, 11) else 0.1 for n in range(12)]
    )
    recipe = download_recipe(table) | {"filter": {"drop_above_punsafe": 0.45}}
    stage = stages(run_here(recipe, tmp_path / "out"))["download"]
    assert sorted(fates(stage)) == [n for n in range(10) if n != 3]
    assert len(server.requests) == 9
    assert not Path(stage.path, "shards/00001.tar").exists()


def test_hashes_of_the_source_are_checked_before_anything_is_decoded(
    server: HostileServer, tmp_path: Path
) -> None:
    urls = serve_photos(server, 4)
    right = [sha256(photo(n)) for n in range(4)]
    table = table_of(tmp_path / "in", urls, sha256=[right[0], right[0], None, right[3]])
    stage = downloaded(table, tmp_path / "out")
    assert fates(stage) == {0: "", 1: "hash_mismatch", 2: "", 3: ""}
    rows = listing(Path(stage.path, "shards/00000.parquet"))
    assert [row["hash_check"] for row in rows] == ["match", "mismatch", "absent", "match"]
    assert [row["sha256"] for row in rows] == right


def test_what_is_listed_is_not_fetched_or_not_kept(server: HostileServer, tmp_path: Path) -> None:
    urls = serve_photos(server, 5)
    (tmp_path / "urls").write_text(f"{urls[1]}\n")
    (tmp_path / "images").write_text(sha256(photo(2)) + "\n")
    lists: dict[str, Any] = {
        "blocked_urls": [str(tmp_path / "urls")],
        "blocked_images": [str(tmp_path / "images")],
    }
    table = table_of(tmp_path / "in", urls)
    stage = downloaded(table, tmp_path / "out", **lists)
    assert fates(stage) == {0: "", 1: "blocklisted", 2: "blocklisted", 3: "", 4: ""}
    assert sorted(server.paths) == [f"/photo/{n}.jpg" for n in (0, 2, 3, 4)]
    (tmp_path / "urls").write_text(f"{urls[4]}\n")  # another list, another result
    other = downloaded(table, tmp_path / "out", **lists)
    assert other.path != stage.path
    assert fates(other)[4] == "blocklisted"


def test_a_redirect_to_a_listed_domain_is_not_kept(server: HostileServer, tmp_path: Path) -> None:
    (tmp_path / "domains").write_text("127.0.0.2\n")
    with HostileServer("127.0.0.2") as other:
        target = other.serve_bytes("/a.jpg", photo(0))
        urls = [server.redirect("/moved", target), server.serve_bytes("/b.jpg", photo(1)), target]
        table = table_of(tmp_path / "in", urls)
        stage = downloaded(table, tmp_path / "out", blocked_domains=[str(tmp_path / "domains")])
    assert fates(stage) == {0: "blocklisted", 1: "", 2: "blocklisted"}


def test_a_redirect_to_a_listed_url_is_not_kept(server: HostileServer, tmp_path: Path) -> None:
    target = server.serve_bytes("/listed.jpg", photo(0))
    urls = [server.redirect("/moved", target), target + "#x", server.serve_bytes("/b", photo(1))]
    (tmp_path / "urls").write_text(target + "\n")
    table = table_of(tmp_path / "in", urls)
    stage = downloaded(table, tmp_path / "out", blocked_urls=[str(tmp_path / "urls")])
    assert fates(stage) == {0: "blocklisted", 1: "blocklisted", 2: ""}
    assert server.times_asked["/listed.jpg"] == 1


def test_loopback_is_refused_unless_it_is_asked_for(server: HostileServer, tmp_path: Path) -> None:
    table = table_of(tmp_path / "in", serve_photos(server, 3))
    stage = downloaded(table, tmp_path / "out", allow_private_addresses=False)
    assert set(fates(stage).values()) == {"blocked_ip"}
    assert server.num_connections == 0


def test_original_bytes_are_kept_when_asked(server: HostileServer, tmp_path: Path) -> None:
    files = {"a": photo(1), "b": photo(2, kind="PNG"), "c": photo(3, kind="WEBP")}
    urls = [server.serve_bytes(f"/{name}", data) for name, data in files.items()]
    stage = downloaded(table_of(tmp_path / "in", urls), tmp_path / "out", keep_original_bytes=True)
    members = tar_members(Path(stage.path, "shards/00000.tar"))
    images = {name: data for name, data in members.items() if not name.endswith(("json", "txt"))}
    assert images == dict(
        zip(("000000.jpg", "000001.png", "000002.webp"), files.values(), strict=True)
    )
    assert list(members) == sorted(members)


def test_columns_keep_their_types_and_never_hide_ours(
    server: HostileServer, tmp_path: Path
) -> None:
    urls = serve_photos(server, 3)
    columns = {
        "status": ["a", "b", "c"],
        "n": [1, None, 3],
        "x": [0.5, 1.0, None],
        "boxes": [[[1.0]], [], None],
    }
    stage = downloaded(table_of(tmp_path / "in", urls, **columns), tmp_path / "out")
    found = pq.read_table(Path(stage.path, "shards/00000.parquet"))
    assert found.column("source_status").to_pylist() == ["a", "b", "c"]
    assert found.column("status").to_pylist() == ["success"] * 3
    assert found.column("n").to_pylist() == [1, None, 3]
    assert found.column("x").to_pylist() == [0.5, 1.0, None]
    assert json.loads(found.column("boxes")[0].as_py()) == [[1.0]]


def test_a_run_on_an_object_store_leaves_nothing_on_this_machine(
    server: HostileServer, tmp_path: Path
) -> None:
    table = table_of(tmp_path / "in", serve_photos(server, 25))
    values = download_recipe(table)
    here = stages(run_here(values, tmp_path / "out"))["download"]
    there = stages(run_here(values, "memory://download-run"))["download"]
    for number in range(3):
        for ending in (".tar", ".parquet"):
            name = f"shards/{number:05d}{ending}"
            assert store.read_bytes(f"{there.path}/{name}") == Path(here.path, name).read_bytes()
    assert list(Path(tempfile.gettempdir()).glob("warren-*/*")) == []


def test_texts_that_are_not_unicode_are_mended(server: HostileServer, tmp_path: Path) -> None:
    extra = pa.array(['{"a": "\\ud800x", "n": 12345678901234567890}', None, '{"n": 1}'])
    samples = pa.Table.from_pylist([{"uid": n, "key": str(n)} for n in range(3)])
    for field in SAMPLES:
        if field.name not in samples.column_names:
            values = extra if field.name == "extra" else pa.nulls(3, field.type)
            samples = samples.append_column(field.name, values)
    found = layout.source_columns(samples)
    assert found.column("a").to_pylist() == ["\ufffdx", None, None]
    assert found.column("n").to_pylist() == ["12345678901234567890", None, "1"]


def test_no_column_of_the_source_hides_another() -> None:
    """Such as of a listing that was a source itself: it has status and source_status."""
    extra = '{"status": 1, "source_status": 2, "source_key": 3, "source_source_key": 4}'
    samples = pa.Table.from_pylist([{"uid": 0, "key": "k", "extra": extra}])
    for field in SAMPLES:
        if field.name not in samples.column_names:
            samples = samples.append_column(field.name, pa.nulls(1, field.type))
    (row,) = layout.source_columns(samples).to_pylist()
    found = {name: value for name, value in row.items() if isinstance(value, int)}
    assert found == {
        "source_status": 2,
        "source_source_status": 1,
        "source_source_source_key": 3,
        "source_source_key": 4,
    }


def test_the_same_answers_make_the_same_bytes(server: HostileServer, tmp_path: Path) -> None:
    table = table_of(tmp_path / "in", [*serve_photos(server, 25), server.url("/gone")])
    one = downloaded(table, tmp_path / "one", concurrency=1, resize_threads=1)
    other = downloaded(table, tmp_path / "two", concurrency=16, resize_threads=3)
    assert shard_bytes(one.path) == shard_bytes(other.path)


def test_an_outage_is_no_result_and_the_same_command_goes_on_after_it(tmp_path: Path) -> None:
    with HostileServer() as server:
        urls = serve_photos(server, 20)
        port = server.port
    table = table_of(tmp_path / "in", [*urls, "ftp://x/"])
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(json.dumps(download_recipe(table, rows_per_shard=30, attempts=1)))
    command = ["run", str(recipe), "--out", str(tmp_path / "out"), "--executor", "local"]
    assert run_cli(command) == 1
    (stage,) = (tmp_path / "out").glob("download-*")
    assert not (stage / "record.json").exists()
    assert not list(stage.glob("shards/*"))
    with HostileServer(port=port) as server:
        serve_photos(server, 20)
        assert run_cli(command) == 0
        assert len(server.requests) == 20
    assert (stage / "record.json").exists()
    assert stats(stage)["status_dict"] == {"blocked_scheme": 1, "success": 20}
    assert not (stage / "_journal").exists()


def test_a_list_that_is_all_gone_is_a_result_if_the_user_says_so(
    server: HostileServer, tmp_path: Path
) -> None:
    table = table_of(tmp_path / "in", [server.url(f"/gone/{n}") for n in range(20)])
    with pytest.raises(StageFailed, match=r"shards/00000.tar: 0 of 20 .*http_4xx"):
        downloaded(table, tmp_path / "out", rows_per_shard=20)
    asked = len(server.requests)
    stage = downloaded(table, tmp_path / "out", rows_per_shard=20, min_success_share=0.0)
    assert record(stage)["dropped"] == {"http_4xx": 20}
    assert len(server.requests) == asked, "what is settled is not asked again"


def test_an_outage_is_told_though_no_shard_has_enough_rows_to_tell(tmp_path: Path) -> None:
    with HostileServer() as server:
        urls = serve_photos(server, 24)
    table = table_of(tmp_path / "in", urls)
    with pytest.raises(StageFailed, match=r"0 of 24 URLs .*over all shards: .*connection.*Delete"):
        downloaded(table, tmp_path / "out", rows_per_shard=8, attempts=1)
    (path,) = (tmp_path / "out").glob("download-*")
    assert not (path / "record.json").exists()
    stage = downloaded(table, tmp_path / "out", rows_per_shard=8, attempts=1, min_success_share=0.0)
    assert record(stage)["dropped"] == {"connection": 24}


def test_addresses_that_are_not_public_are_no_outage_and_the_setting_is_named(
    server: HostileServer, tmp_path: Path
) -> None:
    table = table_of(tmp_path / "in", serve_photos(server, 20))
    with pytest.raises(StageFailed, match="set download.allow_private_addresses: true") as told:
        downloaded(table, tmp_path / "out", rows_per_shard=20, allow_private_addresses=False)
    assert "blocked_ip 20" in str(told.value)
    assert "outage" not in str(told.value)
    assert not server.requests


def is_text(url: str) -> bool:
    """Tell whether a table can hold it."""
    return not any("\ud800" <= letter <= "\udfff" for letter in url)


def test_every_hostile_case_ends_with_its_status(
    server: HostileServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The whole table through a run; names are resolved by the table, not by this machine."""
    network = hostile_cases.network()
    monkeypatch.setattr(settle, "fetch", partial(settle.fetch, network=network))
    with HostileServer("127.0.0.2") as forbidden:
        cases = [one for one in hostile_cases.made(server, forbidden) if is_text(one.url)]
        table = table_of(tmp_path / "in", [case.url for case in cases])
        settings = hostile_cases.CONFIG.model_dump() | hostile_cases.LIMITS.model_dump()
        recipe = download_recipe(table, rows_per_shard=1000, **settings)
        made = stages(run_here(recipe | {"max_quarantine_fraction": 1.0}, tmp_path / "out"))
        assert forbidden.num_connections == 0
    found = {row["uid"]: row["reason"] for row in rows_of(made["download"], "verdicts")}
    early = {row["uid"] for row in rows_of(made["ingest"], "quarantine")}
    for number, case in enumerate(cases):
        wanted = "" if case.final_status is Status.OK else case.final_status.value
        if number in early:
            assert case.times_asked == 0, case.name
        else:
            assert found[number] == wanted, case.name
    assert len(found) + len(early) == len(cases)
    listed = {
        row["uid"]: row for row in listing(Path(made["download"].path, "shards/00000.parquet"))
    }
    assert {uid: row["warren_status"] for uid, row in listed.items()} == {
        uid: reason or "ok" for uid, reason in found.items()
    }
    assert all(row["error_message"] for row in listed.values() if row["warren_status"] != "ok")


def test_a_blocklist_with_a_bad_line_is_told_before_anything_is_fetched(
    server: HostileServer, tmp_path: Path
) -> None:
    (tmp_path / "images").write_text("not a hash\n")
    table = table_of(tmp_path / "in", serve_photos(server, 1))
    with pytest.raises(UserError, match="line 1"):
        downloaded(table, tmp_path / "out", blocked_images=[str(tmp_path / "images")])
    assert server.requests == []


def test_a_table_without_rows_for_a_part_leaves_an_empty_part(
    server: HostileServer, tmp_path: Path
) -> None:
    table = table_of(tmp_path / "in", serve_photos(server, 12), punsafe=[0.0] * 10 + [1.0] * 2)
    recipe = download_recipe(table) | {"filter": {"drop_above_punsafe": 0.45}}
    recipe |= {"assemble": {}}
    made = stages(run_here(recipe, tmp_path / "out"))
    assert record(made["assemble"])["kept"] == 10
    assert len(made["download"].files()) == 2
