"""The decontaminate stage in whole runs: planted leaks, each method by its definition, why."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Iterator
from contextlib import closing
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from click.testing import CliRunner
from oracle import dot, units
from proof_worlds import results, tar_recipe
from ray_env import ray_cluster  # noqa: F401
from small_benchmarks import brightened, brute_overlap, encoded, halved, smooth_picture
from small_inputs import (
    pair,
    recipe_for,
    record,
    rows_of,
    run_here,
    stages,
    tar_of,
    unit_rows,
    write_embeddings,
    write_tars,
)
from url_server import serving

from curate.contamination.phash import phash
from curate.media.images import decode
from curate.media.originals import read_originals
from manifests.checks import check
from manifests.errors import UserError
from manifests.work import StageDir
from pipelines.chain import Link
from pipelines.cli import main
from pipelines.executors.ray_pool import RayExecutor
from pipelines.progress import Progress
from pipelines.recipe import parse
from pipelines.run import run
from pipelines.whatif import whatif

OFF = {
    "image_hash": False,
    "drop_at_phash_distance": None,
    "drop_above_similarity": None,
    "drop_above_ngram_overlap": None,
}
ONE_METHOD = {
    "image_hash": {"image_hash": True},
    "phash": {"drop_at_phash_distance": 4},
    "clip": {"drop_above_similarity": 0.95},
    "caption": {"drop_above_ngram_overlap": 0.4, "ngram_words": 4},
}
ALL = {name: value for one in ONE_METHOD.values() for name, value in one.items()}


class World:
    """A run up to dedup, and evaluation sets made of rows that it kept."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.recipe = tar_recipe(folder / "world", num_pairs=180, samples_per_shard=60)
        self.before = stages(run_here(self.recipe, folder / "out", until="dedup"))
        kept = {row["uid"] for row in rows_of(self.before["dedup"], "kept")}
        rows = pl.DataFrame(rows_of(self.before["ingest"])).filter(pl.col("uid").is_in(kept))
        root = str(folder / "world" / "shards")
        data = read_originals(root, rows.select("shard", "offset", "size").iter_rows())
        self.rows = rows.sort("uid")
        self.images = dict(zip(rows["uid"], data, strict=True))
        self.planted = self._plant(folder / "benchmark")
        self.sets = {
            "exam": {"images": str(folder / "benchmark" / "exam")},
            "quiz": {
                "images": str(folder / "benchmark" / "quiz.tar"),
                "texts": str(folder / "benchmark" / "quiz.jsonl"),
                "column": "text",
            },
        }

    def _plant(self, folder: Path) -> dict[str, list[int]]:
        """Write the sets; return method -> uids of the rows that it is sure to find."""
        (folder / "exam").mkdir(parents=True)
        uids = [uid for uid in self.rows["uid"] if self.phash(uid) is not None][::3]
        exact, lossy, small, lit = (uids[at : at + 4] for at in range(0, 16, 4))
        captions = dict(self.rows.select("uid", "caption").iter_rows())
        said = [uid for uid in uids[16:] if len(captions[uid].split()) > 3][:4]
        for uid in exact:
            (folder / "exam" / f"exact_{uid}.jpg").write_bytes(self.images[uid])
        for uid in lossy:
            jpeg = encoded(self.picture(uid), "JPEG", quality=70)
            (folder / "exam" / f"lossy_{uid}.jpg").write_bytes(jpeg)
        changed = [(f"small_{uid}.png", encoded(halved(self.picture(uid)))) for uid in small]
        changed += [(f"lit_{uid}.png", encoded(brightened(self.picture(uid), 0.8))) for uid in lit]
        changed += [("other.png", encoded(smooth_picture(1)))]
        (folder / "quiz.tar").write_bytes(tar_of(changed))
        texts = [{"text": f"Q: {captions[uid].upper()}?"} for uid in said]
        lines = "\n".join(map(json.dumps, [*texts, {"text": "nobody ever wrote this down here"}]))
        (folder / "quiz.jsonl").write_text(lines)
        return {"image_hash": exact, "phash": lossy + small, "caption": said}

    def picture(self, uid: int) -> Any:
        return decode(self.images[uid], max_pixels=1 << 24)

    def phash(self, uid: int) -> int | None:
        return phash(self.picture(uid))

    def run(self, **section: Any) -> list[Link]:
        values = self.recipe | {"decontaminate": {"sets": self.sets} | section}
        return run_here(values, self.folder / "out", until="select")

    def items(self) -> Iterator[tuple[str, str, bytes]]:
        """Yield (set, item, bytes) of all images of the sets, read by other means."""
        for path in sorted((self.folder / "benchmark" / "exam").iterdir()):
            yield "exam", f"exam/{path.name}", path.read_bytes()
        with tarfile.open(self.folder / "benchmark" / "quiz.tar") as archive:
            for member in archive:
                file = archive.extractfile(member)
                assert file is not None
                yield "quiz", f"quiz.tar::{member.name}", file.read()


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("decon"))


def verdicts(directory: StageDir) -> dict[int, tuple[str, float | None]]:
    return {row["uid"]: (row["reason"], row["score"]) for row in rows_of(directory)}


def by_definition(world: World, method: str, directory: StageDir) -> dict[int, dict[Any, float]]:
    """Return uid -> {(set, item): score} of one method, by comparing all with all."""
    items = list(world.items())
    hashes = {item: phash(decode(data, max_pixels=1 << 24)) for _, item, data in items}
    found: dict[int, dict[Any, float]] = {}
    if method == "clip":
        vectors = _benchmark_vectors(directory)
        ours = _vectors(world.before["embed"])
    for uid in world.rows["uid"]:
        ours_hash = world.phash(uid)
        for name, item, data in items:
            score = None
            if method == "image_hash":
                score = 0.0 if data == world.images[uid] else None
            elif method == "phash":
                theirs = hashes[item]
                if ours_hash is not None and theirs is not None:
                    bits = (ours_hash ^ theirs).bit_count()
                    score = float(bits) if bits <= 4 else None
            else:
                exact = dot(ours[uid], vectors[name, item])
                score = float(exact) if exact > Fraction(0.95) else None
            if score is not None:
                found.setdefault(uid, {})[name, item] = score
    return found


def _vectors(embed: StageDir) -> dict[int, Any]:
    found = {}
    for path in sorted(Path(embed.path, "metadata").glob("*.parquet")):
        rows = np.load(str(path).replace("metadata", "img_emb").replace(".parquet", ".npy"))
        uids = pl.read_parquet(path)["uid"]
        found |= dict(zip(uids, map(units, rows), strict=True))
    return found


def _benchmark_vectors(directory: StageDir) -> dict[tuple[str, str], Any]:
    found = {}
    for number, name in enumerate(("exam", "quiz")):
        folder = Path(directory.path, "sets", f"set-{number:05d}")
        items = pl.read_parquet(folder / "images.parquet")["item"]
        rows = np.load(folder / "img_emb.npy")
        found |= {(name, item): units(row) for item, row in zip(items, rows, strict=True)}
    return found


@pytest.mark.parametrize("method", ["image_hash", "phash", "clip"])
def test_each_method_alone_drops_what_its_definition_finds(world: World, method: str) -> None:
    made = stages(world.run(**(OFF | ONE_METHOD[method])))["decontaminate"]
    wanted = by_definition(world, method, made)
    found: dict[int, dict[Any, float]] = {}
    for row in rows_of(made, "evidence"):
        assert row["method"] == method
        found.setdefault(row["uid"], {})[row["set"], row["item"]] = row["score"] or 0.0
    assert found == wanted
    assert set(world.planted.get(method, [])) <= set(wanted)
    best = max if method == "clip" else min
    for uid, (reason, score) in verdicts(made).items():
        assert reason == (f"contaminated:{method}" if uid in wanted else "")
        if uid in wanted and method != "image_hash":
            assert score == best(wanted[uid].values())
    assert len(verdicts(made)) == world.rows.height > len(wanted) >= 4


def test_captions_alone_drop_those_that_share_words(world: World) -> None:
    quiz = {name: one for name, one in world.sets["quiz"].items() if name != "images"}
    section = OFF | ONE_METHOD["caption"] | {"sets": {"quiz": quiz}}
    made = stages(world.run(**section))["decontaminate"]
    lines = (world.folder / "benchmark" / "quiz.jsonl").read_text().splitlines()
    wanted = {
        (uid, f"quiz.jsonl:{number}"): score
        for uid, caption in world.rows.select("uid", "caption").iter_rows()
        for number, line in enumerate(lines, start=1)
        if (score := brute_overlap(caption, json.loads(line)["text"], 4)) > 0.4
    }
    found = {(row["uid"], row["item"]): row["score"] for row in rows_of(made, "evidence")}
    assert found == wanted
    reasons = verdicts(made)
    assert {uid for uid, (reason, _) in reasons.items() if reason} == {uid for uid, _ in wanted}
    for uid in world.planted["caption"]:
        assert reasons[uid] == ("contaminated:caption", 1.0)


def test_the_first_method_gives_the_reason_and_the_run_adds_up(world: World) -> None:
    links = world.run(**ALL)
    made = stages(links)
    reasons = {uid: reason for uid, (reason, _) in verdicts(made["decontaminate"]).items()}
    for uid in world.planted["image_hash"]:
        assert reasons[uid] == "contaminated:image_hash"
    for uid in world.planted["phash"]:
        assert reasons[uid] == "contaminated:phash"
    methods = {
        uid: {
            row["method"] for row in rows_of(made["decontaminate"], "evidence") if row["uid"] == uid
        }
        for uid in world.planted["image_hash"]
    }
    assert all({"image_hash", "phash", "clip"} <= one for one in methods.values())
    dropped = {uid for uid, reason in reasons.items() if reason}
    figures = {row["uid"]: row for row in rows_of(made["dedup"], "kept")}
    kept = {row["uid"]: row for row in rows_of(made["decontaminate"], "kept")}
    assert kept == {uid: row for uid, row in figures.items() if uid not in dropped}
    assert {row["uid"] for row in rows_of(made["select"])} == set(kept)
    findings = check(str(world.folder / "out"), made)
    assert [one for one in findings if not one.holds] == []


def test_why_names_the_item(world: World) -> None:
    world.run(**ALL)
    uid = world.planted["image_hash"][0]
    told = CliRunner().invoke(main, ["why", str(world.folder / "out"), str(uid)])
    assert told.exit_code == 0
    assert "dropped by decontaminate: contaminated:image_hash" in told.output
    assert f"in exam: exam/exact_{uid}.jpg by image_hash" in told.output
    assert f"in exam: exam/exact_{uid}.jpg by phash (0)" in told.output
    as_json = CliRunner().invoke(main, ["why", str(world.folder / "out"), str(uid), "--json"])
    assert f'"item": "exam/exact_{uid}.jpg"' in as_json.output


def test_whatif_of_dedup_looks_at_the_sets_again(world: World, tmp_path: Path) -> None:
    world.run(**ALL)
    rows = {row["stage"]: row for row in whatif(str(world.folder / "out"), ["dedup.keep=far"])}
    values = world.recipe | {"decontaminate": {"sets": world.sets} | ALL}
    truth = stages(run_here(values | {"dedup": {"keep": "far"}}, tmp_path, until="select"))
    for name in ("dedup", "decontaminate", "select"):
        assert rows[name]["kept"] == record(truth[name])["kept"]


@pytest.mark.ray
@pytest.mark.timeout(240)
def test_ray_workers_make_the_bytes_of_the_local_executor(
    tmp_path: Path,
    ray_cluster: None,  # noqa: F811
) -> None:
    shards, sets = leaks(tmp_path)
    recipe = recipe_for(shards, "webdataset", decontaminate=no_clip(sets))
    made = stages(run_here(recipe, tmp_path / "here"))["decontaminate"]
    assert {row["method"] for row in rows_of(made, "evidence")} == {"image_hash", "phash"}
    with closing(RayExecutor(max_workers=2)) as executor:
        out = str(tmp_path / "ray")
        run(parse(recipe), out, executor=executor, progress=Progress(out))
    assert results(tmp_path / "ray") == results(tmp_path / "here")


def leaks(folder: Path) -> tuple[Path, dict[str, Any]]:
    """Write two shards of four pictures each, without embeddings, and a set with two of them."""
    shards = {}
    for shard in range(2):
        members: list[tuple[str, bytes]] = []
        for row in range(4):
            key = f"{shard}{row:03d}"
            data = encoded(smooth_picture(10 * shard + row))
            members += [(f"{key}.png", data), (f"{key}.txt", f"picture {key}".encode())]
        shards[f"{shard:05d}.tar"] = members
    (folder / "set").mkdir(parents=True)
    (folder / "set" / "same.png").write_bytes(encoded(smooth_picture(11)))
    (folder / "set" / "jpeg.jpg").write_bytes(encoded(smooth_picture(2), "JPEG", quality=70))
    return write_tars(folder / "in", shards), {"s": {"images": str(folder / "set")}}


def no_clip(sets: dict[str, Any], **section: Any) -> dict[str, Any]:
    return {"sets": sets, "drop_above_similarity": None} | section


def test_a_source_without_embeddings_is_judged_by_its_own_parts(tmp_path: Path) -> None:
    shards, sets = leaks(tmp_path)
    recipe = recipe_for(shards, "webdataset", decontaminate=no_clip(sets))
    made = stages(run_here(recipe | {"select": {"num_samples": 99}}, tmp_path / "out"))
    lost = {row["uid"]: row["reason"] for row in rows_of(made["decontaminate"]) if row["reason"]}
    assert lost == {(1 << 24) + 1: "contaminated:image_hash", 2: "contaminated:phash"}
    coreset = pl.read_parquet(tmp_path / "out" / "coreset.parquet")
    assert coreset["key"].to_list() == ["0000", "0001", "0003", "1000", "1002", "1003"]
    with_clip = recipe | {"decontaminate": {"sets": sets}}
    with pytest.raises(UserError, match="needs embeddings"):
        parse(with_clip)


def test_unreadable_images_of_a_set_are_named_or_counted(tmp_path: Path) -> None:
    shards, sets = leaks(tmp_path)
    (tmp_path / "set" / "broken.jpg").write_bytes(b"<html>")
    recipe = recipe_for(shards, "webdataset", decontaminate=no_clip(sets))
    with pytest.raises(UserError, match=r"set/broken\.jpg"):
        run_here(recipe, tmp_path / "out")
    recipe["decontaminate"] |= {"skip_unreadable": True}
    made = stages(run_here(recipe, tmp_path / "out"))["decontaminate"]
    notes = next(one["notes"] for one in made.markers() if one["item"] == "set-00000")
    assert notes["images"] == 2
    assert [one.partition(":")[0] for one in notes["unreadable"]] == ["set/broken.jpg"]


def test_rows_whose_image_cannot_be_compared_are_quarantined(tmp_path: Path) -> None:
    _, sets = leaks(tmp_path)
    members = [*pair("good"), ("bad.jpg", b"not an image"), ("bad.txt", b"x")]
    shards = write_tars(tmp_path / "two", {"00000.tar": members})
    recipe = recipe_for(shards, "webdataset", max_quarantine_fraction=0.5)
    made = stages(run_here(recipe | {"decontaminate": no_clip(sets)}, tmp_path / "out"))
    reasons = [row["reason"] for row in rows_of(made["decontaminate"])]
    assert reasons == ["", "quarantine:unknown_format"]
    (bad,) = rows_of(made["decontaminate"], "quarantine")
    assert (bad["key"], bad["error"]) == ("bad", "unknown_format")


def test_ids_drop_rows_by_key_and_url(tmp_path: Path) -> None:
    members = [
        *pair("COCO_train2014_000000000042"),
        *pair("a", url="http://x.org/val/COCO_val2014_000000262148.jpg?w=9"),
        *pair("000000000007"),
        *pair("b"),
    ]
    shards = write_tars(tmp_path / "in", {"00000.tar": members})
    (tmp_path / "ids.txt").write_text("000000000042\nCOCO_val2014_000000262148.jpg\n000000000007\n")
    for match, wanted in ((["key", "url"], [True, True, True, False]), (["url"], [0, 1, 0, 0])):
        lists = {"pope": {"ids": str(tmp_path / "ids.txt"), "match": match}}
        recipe = recipe_for(shards, "webdataset", decontaminate={"id_lists": lists})
        made = stages(run_here(recipe, tmp_path / "out"))["decontaminate"]
        reasons = [row["reason"] for row in rows_of(made)]
        assert reasons == ["contaminated:id_list" if one else "" for one in wanted]
    (row,) = rows_of(made, "evidence")
    name = "COCO_val2014_000000262148.jpg"
    wanted = {"uid": 1, "method": "id_list", "set": "pope", "item": name}
    assert row == wanted | {"score": None, "num_items": 1}


def published(folder: Path, section: dict[str, Any]) -> dict[str, Any]:
    """Write 20 published embeddings of unlike rows; return a recipe that selects all of them."""
    write_embeddings(folder / "in", 0, unit_rows(20, dim=24))
    recipe = recipe_for(folder / "in", "clip_retrieval", decontaminate=section)
    recipe |= {"cluster": {"num_clusters": 2, "min_rows_per_centroid": 1}}
    return recipe | {"dedup": {"similarity_above": 0.99}, "select": {"num_samples": 99}}


def test_captions_of_published_embeddings_are_judged_after_select(tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text("A caption of 0000-3\n")
    recipe = published(tmp_path, {"sets": {"t": {"texts": str(tmp_path / "t.txt")}}})
    links = run_here(recipe, tmp_path / "out")
    assert [link.stage.name for link in links][-2:] == ["select", "decontaminate"]
    reasons = verdicts(stages(links)["decontaminate"])
    assert len(reasons) == 20
    lost = {uid: one for uid, one in reasons.items() if one[0]}
    assert lost == {3: ("contaminated:caption", 1.0)}


def test_published_embeddings_need_the_model_that_made_them(tmp_path: Path) -> None:
    _, sets = leaks(tmp_path / "leaks")
    recipe = published(tmp_path, {"sets": sets})
    with pytest.raises(UserError, match="needs the rows' images"):
        parse(recipe)
    only_clip = {"sets": sets, "image_hash": False, "drop_at_phash_distance": None}
    with pytest.raises(UserError, match=r"decontaminate\.embed is missing"):
        parse(recipe | {"decontaminate": only_clip})
    only_clip["embed"] = {"model": "warren:demo/model"}
    with pytest.raises(UserError, match="24 dimensions"):
        run_here(recipe | {"decontaminate": only_clip}, tmp_path / "out")


def test_a_fetched_file_is_known_however_it_is_stored(tmp_path: Path) -> None:
    """The set holds the very file behind a URL; the shard has it smaller, as another JPEG."""
    files = [encoded(smooth_picture(row), "JPEG", quality=95) for row in range(3)]
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "seen.jpg").write_bytes(files[1])
    sets = {"s": {"images": str(tmp_path / "set")}}
    with serving() as server:
        server.files |= {f"/{row}": data for row, data in enumerate(files)}
        (tmp_path / "urls.txt").write_text("\n".join(map(server.url, server.files)))
        sections = {
            "download": {"allow_private_addresses": True, "image_size": 16},
            "decontaminate": no_clip(sets, drop_at_phash_distance=None),
        }
        recipe = recipe_for(tmp_path / "urls.txt", "url_table", **sections)
        made = stages(run_here(recipe, tmp_path / "out"))["decontaminate"]
    reasons = [row["reason"] for row in rows_of(made)]
    assert reasons == ["", "contaminated:image_hash", ""]
    (proof,) = rows_of(made, "evidence")
    assert (proof["uid"], proof["item"]) == (1, "set/seen.jpg")
