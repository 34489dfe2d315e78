"""Published embeddings -> coreset -> only its images, over real HTTP, through the packaged recipe.

A small demo world is embedded by Warren itself; its vectors, with URLs beside them, are the
published set. Once the coreset is chosen, and before anything is fetched, some of the winners'
files are lost or replaced on the server.
"""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
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
from small_inputs import recipe_for, rows_of, run_here, stages
from url_server import UrlServer, serving

from manifests.record import read_latest
from manifests.work import StageDir
from pipelines.cli import main
from pipelines.demo.world import make_world

PAIRS, PER_SHARD, WINNERS = 240, 80, 60
OTHER_CAPTION = "a caption that was rewritten after the similarity was published"
LATE = ["download", "drift", "decontaminate", "assemble"]


@dataclass(frozen=True)
class Fetched:
    """A finished run. fate: what was done to a winner -> its uid; files: uid -> bytes served."""

    out: Path
    server: UrlServer
    asked: list[str]
    asked_before: list[str]
    fate: dict[str, int]
    coreset: pl.DataFrame
    chain: dict[str, StageDir]

    def verdict(self, stage: str, uid: int) -> dict[str, Any]:
        table = pl.concat([pl.read_parquet(one) for one in self.chain[stage].verdict_files()])
        return table.row(by_predicate=pl.col("uid") == uid, named=True)

    def json(self, *words: str) -> Any:
        found = CliRunner().invoke(main, [words[0], str(self.out), *words[1:], "--json"])
        assert found.exit_code == 0, found.stderr
        return json.loads(found.stdout)


def image_of(shards: Path, row: dict[str, Any]) -> bytes:
    with (shards / row["shard"]).open("rb") as file:
        file.seek(row["offset"])
        return file.read(row["size"])


def publish(folder: Path, server: UrlServer) -> Path:
    """Embed a world, serve its images, and return its vectors as a published set.

    Rows of odd key have no hash; of those whose key ends in 3, the caption was rewritten since.
    """
    world = make_world(folder / "world", num_pairs=PAIRS, samples_per_shard=PER_SHARD)
    embed = {"model": "warren:demo/model"}
    values = recipe_for(world.shards_dir, "img2dataset", embed=embed, max_quarantine_fraction=0.5)
    chain = stages(run_here(values, folder / "embedded"))
    samples = {row["uid"]: row for row in rows_of(chain["ingest"])}
    vectors = Path(chain["embed"].path)
    for path in sorted((vectors / "metadata").iterdir()):
        rows = [samples[uid] for uid in pq.read_table(path).column("uid").to_pylist()]
        for row in rows:
            image = image_of(world.shards_dir, row)
            server.files[f"/{row['key']}"] = image
            row["sha256"] = None if int(row["key"]) % 2 else hashlib.sha256(image).hexdigest()
            row["url"] = server.url(f"/{row['key']}")
            row["caption"] = OTHER_CAPTION if row["key"].endswith("3") else row["caption"]
        names = ("key", "caption", "url", "width", "height", "sha256", "punsafe")
        table = pa.table({name: [row[name] for row in rows] for name in names})
        pq.write_table(table, path)
    return vectors


def replaced(image: bytes, sides: tuple[int, int] | None) -> bytes:
    """Return another picture, or the same one at other sides."""
    picture = Image.open(io.BytesIO(image)).convert("RGB")
    picture = picture.resize(sides) if sides else picture.rotate(90).point(lambda v: 255 - v)
    file = io.BytesIO()
    picture.save(file, "PNG")
    return file.getvalue()


def disturb(server: UrlServer, coreset: pl.DataFrame) -> dict[str, int]:
    """Lose and replace winners' files; return what was done -> the uid."""
    rows = coreset.select("uid", "key", "caption").rows()
    unhashed = [uid for uid, key, text in rows if int(key) % 2 and text != OTHER_CAPTION]
    fate = dict(zip(("lost", "html", "other", "resized"), unhashed[:4], strict=True))
    fate["other_hash"] = next(uid for uid, key, _ in rows if int(key) % 2 == 0)
    fate["leaked"] = unhashed[4]
    fate["rewritten"] = next(uid for uid, _, text in rows if text == OTHER_CAPTION)
    keys = dict(coreset.select("uid", "key").rows())
    path = {name: f"/{keys[uid]}" for name, uid in fate.items()}
    del server.files[path["lost"]]
    server.files[path["html"]] = b"<html>gone</html>"
    for name in ("other", "other_hash"):
        server.files[path[name]] = replaced(server.files[path[name]], None)
    picture = Image.open(io.BytesIO(server.files[path["resized"]]))
    sides = picture.width * 2, picture.height * 2
    server.files[path["resized"]] = replaced(server.files[path["resized"]], sides)
    return fate


def run_recipe(vectors: Path, out: Path, *more: str) -> None:
    values = {
        "source.path": vectors,
        "cluster.num_clusters": 4,
        "select.clip_band": "[0.1, 0.9]",
        "select.centroid_band": "[0.0, 1.0]",
        "select.num_samples": WINNERS,
        "download.keep_original_bytes": "true",
        "download.on_hash_mismatch": "flag",
        "download.allow_private_addresses": "true",
        "drift.embed": '{model: "warren:demo/model"}',
        "decontaminate.sets": f"{{bench: {{images: {vectors.parent / 'bench'}}}}}",
        "decontaminate.drop_above_similarity": "null",
        "assemble.samples_per_shard": 25,
    }
    sets = [word for name, value in values.items() for word in ("--set", f"{name}={value}")]
    words = ["run", "warren:recipes/laion_embeddings_2m.yaml", "--out", str(out), *sets, *more]
    found = CliRunner().invoke(main, [*words, "--executor", "local"])
    assert found.exit_code == 0, found.stderr


@pytest.fixture(scope="module", name="run")
def select_then_fetch(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fetched]:
    folder = tmp_path_factory.mktemp("fetch")
    with serving() as server:
        vectors, out = publish(folder, server), folder / "out"
        run_recipe(vectors, out, "--to", "select")
        asked_before = list(server.asked)
        coreset = pl.read_parquet(out / "coreset.parquet")
        fate = disturb(server, coreset)
        bench = vectors.parent / "bench"
        bench.mkdir()
        leaked = dict(coreset.select("uid", "key").rows())[fate["leaked"]]
        (bench / "question-7.jpg").write_bytes(server.files[f"/{leaked}"])
        run_recipe(vectors, out)
        yield Fetched(
            out, server, list(server.asked), asked_before, fate, coreset, read_latest(str(out))
        )


def test_only_the_winners_are_asked_for_each_once(run: Fetched) -> None:
    assert run.asked_before == []
    assert run.coreset.height == WINNERS
    assert sorted(run.asked) == sorted(f"/{key}" for key in run.coreset["key"])
    assert len(run.server.files) > 3 * WINNERS


def test_what_became_of_each_winner_is_a_verdict(run: Fetched) -> None:
    expected = {
        "lost": ("download", False, "http_4xx", 404.0),
        "html": ("download", False, "not_an_image", None),
        "other_hash": ("drift", False, "hash_drifted", None),
        "resized": ("drift", True, "flagged:size_drifted", 2.0),
    }
    for name, (stage, keep, reason, score) in expected.items():
        found = run.verdict(stage, run.fate[name])
        assert (found["keep"], found["reason"], found["score"]) == (keep, reason, score), name
    other = run.verdict("drift", run.fate["other"])
    assert (other["reason"], other["cutoff"]) == ("image_drifted", 0.9)
    assert other["score"] < 0.9
    leaked = run.verdict("decontaminate", run.fate["leaked"])
    assert (leaked["keep"], leaked["reason"]) == (False, "contaminated:image_hash")
    rewritten = run.verdict("drift", run.fate["rewritten"])
    assert (rewritten["reason"], rewritten["cutoff"]) == ("similarity_drifted", 0.1)
    assert rewritten["score"] > 0.1


def test_shards_hold_the_images_of_the_rest_and_their_scores(run: Fetched) -> None:
    dropped = set()
    for stage in LATE:
        rows = [pl.read_parquet(one) for one in run.chain[stage].verdict_files()]
        dropped |= set(pl.concat(rows).filter(~pl.col("keep"))["uid"])
    assert {uid for name, uid in run.fate.items() if name != "resized"} <= dropped
    written = pl.concat([pl.read_parquet(one) for one in run.chain["assemble"].files()])
    assert set(written["uid"]) == set(run.coreset["uid"]) - dropped
    members: dict[str, bytes] = {}
    for path in sorted((Path(run.chain["assemble"].path) / "shards").glob("*.tar")):
        with tarfile.open(path) as tar:
            members |= {one.name: tar.extractfile(one).read() for one in tar}  # type: ignore[union-attr]
    scores = dict(zip(run.coreset["uid"], run.coreset["clip_score"], strict=True))
    found = [json.loads(data) for name, data in members.items() if name.endswith(".json")]
    assert len(found) == written.height
    card = (Path(run.chain["assemble"].path) / "README.md").read_text()
    assert "Images are the bytes that their URLs gave" in card
    for row in found:
        assert members[row["image"]] == run.server.files[f"/{row['source_key']}"]
        assert row["clip_score"] == scores[row["uid"]]
        assert row["url"] == run.server.url(f"/{row['source_key']}")


def test_a_lost_winner_tells_its_story(run: Fetched) -> None:
    (story,) = run.json("why", str(run.fate["lost"]))
    assert story["fate"] == "dropped by download: http_4xx"
    assert [step["stage"] for step in story["steps"]][-2:] == ["select", "download"]
    last = story["steps"][-1]
    assert last["http_code"] == 404
    assert last["num_attempts"] == 1
    found = CliRunner().invoke(main, ["why", str(run.out), str(run.fate["lost"])])
    assert "download dropped http_4xx (404)" in " ".join(found.stdout.split())
    found = CliRunner().invoke(main, ["why", str(run.out), str(run.fate["leaked"])])
    assert "question-7.jpg" in found.stdout
    (story,) = run.json("why", str(run.fate["resized"]))
    assert story["fate"] == "kept"
    assert [s["reason"] for s in story["steps"] if s["stage"] == "drift"] == [
        "flagged:size_drifted"
    ]


def test_answers_know_the_order(run: Fetched) -> None:
    names = [row["stage"] for row in run.json("funnel")]
    assert names == [
        *("ingest", "filter", "centroids", "cluster", "forest", "dedup", "select"),
        *LATE,
    ]
    assert [row["stage"] for row in run.json("status")] == names
    assert {row["state"] for row in run.json("status")} == {"finished"}
    assert all(one["holds"] for one in run.json("check"))
    rows = {row["stage"]: row for row in run.json("whatif", "--set", "select.num_samples=10")}
    assert (rows["select"]["kept"], rows["select"]["shared"]) == (10, 10)
    assert list(rows) == names[: names.index("select") + 1]


def test_a_second_run_fetches_nothing(run: Fetched) -> None:
    vectors = run.out.parent / "embedded"
    (embed,) = vectors.glob("embed-*")
    run_recipe(embed, run.out)
    assert len(run.server.asked) == len(run.asked)
