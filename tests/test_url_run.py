"""Tables of URLs as LAION has them, through the packaged recipe, over real HTTP, to shards.

Two tables: one with the columns of LAION-400M (sizes under each other's names, SAMPLE_ID, no hash),
one with those of the joined tables (hash, punsafe, md5), whose sizes are float64.
"""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from PIL import Image
from url_server import UrlServer, serving

from manifests.record import read_latest
from manifests.work import StageDir
from pipelines.cli import main
from pipelines.demo.plan import plan_rows
from pipelines.demo.rows import make_sample

SETTINGS = {
    "source.rows_per_shard": 10,
    "max_quarantine_fraction": 0.5,
    "filter.min_side": 32,
    "download.allow_private_addresses": "true",
    "download.image_size": 48,
    "embed.model": "warren:demo/model",
    "embed.pretrained": "null",
    "cluster": "{num_clusters: 2, min_rows_per_centroid: 1}",
    "select": "{}",
    "assemble.samples_per_shard": 12,
}


@dataclass(frozen=True)
class Ran:
    """A finished run over two tables; pictures: path on the server -> (bytes, caption)."""

    out: Path
    server: UrlServer
    pictures: dict[str, tuple[bytes, str]]
    chain: dict[str, StageDir]
    stderr: str

    def reasons(self, stage: str) -> dict[str, str]:
        """Return the key of each row that a stage did not simply keep -> the reason."""
        verdicts = pl.concat([pl.read_parquet(one) for one in self.chain[stage].verdict_files()])
        keys = self.samples("ingest").select("uid", "key")
        found = verdicts.filter(pl.col("reason") != "").join(keys, on="uid", how="left")
        return dict(found.select("key", "reason").rows())

    def samples(self, stage: str) -> pl.DataFrame:
        return pl.concat([pl.read_parquet(one) for one in self.chain[stage].files()])


def pictures() -> dict[str, tuple[bytes, str]]:
    """Return path -> (an image of the demo world, its caption)."""
    rows = [row for row in plan_rows(0, 60) if row.kind == "good"][:24]
    made = [make_sample(0, row, str(at)) for at, row in enumerate(rows)]
    return {f"/{one.key}.jpg": (one.image, one.caption or "") for one in made}


def write_tables(folder: Path, server: UrlServer, shown: dict[str, tuple[bytes, str]]) -> None:
    folder.mkdir()
    paths = list(shown)
    sizes = [Image.open(io.BytesIO(shown[path][0])).size for path in paths]
    first = {
        "SAMPLE_ID": pa.array([1000 + at for at in range(14)], pa.int64()),
        "URL": [server.url(path) for path in paths[:12]] + [server.url(paths[0]), None],
        "TEXT": [shown[path][1] for path in paths[:12]] + ["the same image, told otherwise", "x"],
        "HEIGHT": pa.array([size[0] for size in sizes[:12]] + [64, 64], pa.int32()),
        "WIDTH": pa.array([size[1] for size in sizes[:12]] + [64, 64], pa.int32()),
        "LICENSE": ["?"] * 14,
        "NSFW": ["UNLIKELY"] * 14,
        "similarity": [0.3] * 14,
    }
    pq.write_table(pa.table(first), folder / "part-00000-5114fd87-c000.snappy.parquet")
    digests = [
        hashlib.md5(shown[path][0], usedforsecurity=False).hexdigest() for path in paths[12:]
    ]
    second = {
        "url": [server.url(path) for path in paths[12:]],
        "caption": [shown[path][1] for path in paths[12:]],
        "width": [float(size[0]) for size in sizes[12:]],
        "height": [float(size[1]) for size in sizes[12:]],
        "key": [str(2000 + at) for at in range(12)],
        "punsafe": pa.array([0.9] + [0.01] * 11, pa.float32()),
        "md5": digests,
    }
    pq.write_table(pa.table(second), folder / "part-00001-5114fd87-c000.snappy.parquet")


@pytest.fixture(scope="module", name="ran")
def url_run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ran]:
    folder = tmp_path_factory.mktemp("urls")
    shown = pictures()
    with serving() as server:
        server.files |= {path: image for path, (image, _) in shown.items()}
        write_tables(folder / "tables", server, shown)
        names = list(shown)
        del server.files[names[3]]
        server.files[names[4]] = b"<html>gone</html>"
        server.files[names[20]] = server.files[names[1]]  # another image than its md5 says
        sets = [f"{k}={v}" for k, v in SETTINGS.items()] + [f"source.path={folder}/tables/*"]
        words = [word for one in sets for word in ("--set", one)]
        words = ["run", "warren:recipes/relaion_2b.yaml", "--out", str(folder / "out"), *words]
        found = CliRunner().invoke(main, [*words, "--executor", "local"])
        assert found.exit_code == 0, found.stderr
        chain = read_latest(str(folder / "out"))
        yield Ran(folder / "out", server, shown, chain, found.stderr)


def test_each_row_has_its_fate(ran: Ran) -> None:
    quarantine = pl.concat(
        [pl.read_parquet(one) for one in ran.chain["ingest"].files("quarantine")]
    )
    assert quarantine.select("key", "error").rows() == [("1013", "missing_url")]
    assert ran.reasons("filter") == {"2000": "punsafe_above"}
    assert ran.reasons("download") == {
        "1003": "http_4xx",
        "1004": "not_an_image",
        "2008": "hash_mismatch",
    }


def test_a_dead_link_is_found_by_its_url(ran: Ran) -> None:
    dead, twice = list(ran.pictures)[3], list(ran.pictures)[0]
    for path, keys in ((dead, ["1003"]), (twice, ["1000", "1012"])):
        found = CliRunner().invoke(main, ["why", str(ran.out), ran.server.url(path), "--json"])
        assert [one["key"] for one in json.loads(found.stdout)] == keys
    told = CliRunner().invoke(main, ["why", str(ran.out), ran.server.url(dead)]).stdout
    assert "dropped by download: http_4xx" in told
    lost = CliRunner().invoke(main, ["why", str(ran.out), ran.server.url("/never")])
    assert lost.exit_code == 2
    assert "such as '1000'" in lost.stderr


def test_every_url_is_accounted_for_and_asked_once(ran: Ran) -> None:
    """The URL of two rows is asked for each; the unsafe row's not at all."""
    paths = list(ran.pictures)
    assert Counter(ran.server.asked) == Counter([*paths[:12], paths[0], *paths[13:]])
    found = CliRunner().invoke(main, ["funnel", str(ran.out), "--json"])
    rows = {row["stage"]: row for row in json.loads(found.stdout)}
    assert rows["ingest"]["rows_in"] == 26
    assert rows["download"]["rows_in"] == rows["filter"]["kept"] == 24
    assert rows["download"]["kept"] == 24 - 3
    checked = CliRunner().invoke(main, ["check", str(ran.out), "--json"])
    assert all(one["holds"] for one in json.loads(checked.stdout)), checked.stdout


def test_sizes_are_those_of_the_images_in_both_tables(ran: Ran) -> None:
    told = {row["url"]: (row["width"], row["height"]) for row in ran.samples("ingest").to_dicts()}
    for path, (image, _) in list(ran.pictures.items())[1:]:
        assert told[ran.server.url(path)] == Image.open(io.BytesIO(image)).size


def test_the_same_image_under_two_captions_is_one_sample(ran: Ran) -> None:
    lost = ran.reasons("dedup")
    assert len({"1000", "1012"} & set(lost)) == 1
    assert set(lost.values()) == {"near_duplicate"}


def test_shards_hold_the_fetched_images_resized(ran: Ran) -> None:
    samples = {row["uid"]: row for row in ran.samples("assemble").to_dicts()}
    rows: list[dict[str, Any]] = []
    for path in sorted((Path(ran.chain["assemble"].path) / "shards").glob("*.tar")):
        with tarfile.open(path) as tar:
            members = {one.name: tar.extractfile(one).read() for one in tar}  # type: ignore[union-attr]
        for name in (one for one in members if one.endswith(".json")):
            row = json.loads(members[name])
            rows.append(row)
            given, caption = ran.pictures[row["url"].removeprefix(ran.server.base)]
            before = Image.open(io.BytesIO(given)).size
            after = Image.open(io.BytesIO(members[row["image"]]))
            assert after.format == "JPEG"
            assert min(after.size) == min(48, *before)
            assert row["conversations"][1]["value"] in (caption, "the same image, told otherwise")
    assert {row["uid"] for row in rows} == set(samples)
    assert len(rows) == 21 - len(ran.reasons("dedup"))
    card = (Path(ran.chain["assemble"].path) / "README.md").read_text()
    assert "what their URLs gave, written anew as jpg (keep_ratio at 48 px)" in card


def test_the_base_table_is_warned_of(ran: Ran) -> None:
    assert "Re-LAION" in ran.stderr
