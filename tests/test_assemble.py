"""Assembled shards: the originals byte for byte, found by offset, and what describes them."""

from __future__ import annotations

import hashlib
import json
import tarfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml
from small_inputs import (
    bad_rows,
    embeddings,
    pair,
    picture,
    recipe_for,
    rows_of,
    run_here,
    stages,
    write_tars,
)
from small_models import save_model
from small_shards import PER_SHARD, assembled, originals, plain_keys, recipe, written

from curate.media import assemble, llava_rows
from curate.media.assembled_rows import is_clean, output_key
from curate.vectors.exact import sample_hashes
from manifests.errors import UserError
from manifests.schemas import TRAIN_INDEX
from manifests.work import Item, StageDir, View
from pipelines.chain import build
from pipelines.recipe import parse
from train.data.index import read_samples


def tars_of(directory: StageDir) -> list[Path]:
    return sorted((Path(directory.path) / "shards").glob("*.tar"))


def members_of(path: Path) -> dict[str, bytes]:
    """Return a tar's members in order, read by the standard library."""
    with tarfile.open(path) as archive:
        found = {one.name: archive.extractfile(one) for one in archive.getmembers()}
        return {name: file.read() for name, file in found.items() if file is not None}


def digests(directory: StageDir) -> dict[str, str]:
    base = Path(directory.path)
    files = [path for path in base.rglob("*") if path.is_file()]
    return {
        path.relative_to(base).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
        if path.name != "record.json" and path.parent.name != "_done"
    }


# ---- the shards


def test_the_output_holds_the_original_bytes_under_the_original_keys(tmp_path: Path) -> None:
    shards = originals()
    directory = assembled(written(tmp_path / "in", shards))
    out = [members_of(path) for path in tars_of(directory)]
    assert [len(members) for members in out] == [12, 12, 12, 9]
    together = {name: data for members in out for name, data in members.items()}
    given = {name: data for members in shards.values() for name, data in members.items()}
    assert {n: d for n, d in together.items() if not n.endswith(".json")} == given
    for members in out:
        split = [tuple(name.split(".")) for name in members]
        assert split == sorted(split)
        assert [suffix for _, suffix in split] == ["jpg", "json", "txt"] * (len(split) // 3)


def test_the_index_finds_every_image_and_row_in_its_shard(tmp_path: Path) -> None:
    shards = originals()
    directory = assembled(written(tmp_path / "in", shards))
    given = {name: data for members in shards.values() for name, data in members.items()}
    index = rows_of(directory)
    assert [row["uid"] for row in index] == [s << 24 | r for s in range(3) for r in range(5)]
    assert pq.read_schema(directory.files()[0]).equals(TRAIN_INDEX)
    for row in index:
        content = (Path(directory.path) / row["shard"]).read_bytes()
        (place,) = row["images"]
        image = content[place["offset"] : place["offset"] + place["size"]]
        text = json.loads(content[row["json_offset"] : row["json_offset"] + row["json_size"]])
        assert image == given[f"{row['key']}.{place['suffix']}"]
        assert (text["id"], text["uid"]) == (row["key"], row["uid"])
        assert (row["has_image"], row["turns"], row["source"]) == (True, 1, "webdataset")
    assert [sample.images for sample in read_samples(directory.path)] == [
        [given[f"{row['key']}.jpg"]] for row in index
    ]


def test_each_row_asks_a_seeded_question_and_answers_with_the_caption(tmp_path: Path) -> None:
    folder = written(tmp_path / "in", originals(num_shards=6, num_pairs=20))
    rows = [sample.row for sample in read_samples(assembled(folder, seed=7).path)]
    for row in rows:
        human, gpt = row["conversations"]
        prompts = sample_hashes(np.array([row["uid"]], np.uint64), 7)
        prompt = llava_rows.PROMPTS[int(prompts[0]) % len(llava_rows.PROMPTS)]
        assert human == {"from": "human", "value": f"<image>\n{prompt}"}
        assert gpt["from"] == "gpt"
        assert row["image"] == f"{row['id']}.jpg"
        assert row["source_key"] == row["id"]
        assert row["source_shard"] == f"{row['uid'] >> 24:05d}.tar"
    asked = Counter(row["conversations"][0]["value"] for row in rows)
    assert set(asked) == {f"<image>\n{prompt}" for prompt in llava_rows.PROMPTS}
    other = [sample.row for sample in read_samples(assembled(folder, "other", seed=8).path)]
    assert Counter(row["conversations"][0]["value"] for row in other) != asked


def test_a_placeholder_in_a_caption_is_no_second_image(tmp_path: Path) -> None:
    folder = write_tars(tmp_path / "in", {"0.tar": pair("a", "an <image> tag")})
    directory = assembled(folder)
    row = next(read_samples(directory.path)).row
    assert sum(turn["value"].count("<image>") for turn in row["conversations"]) == 1
    assert members_of(tars_of(directory)[0])["a.txt"] == b"an <image> tag"


def test_two_runs_give_the_same_bytes(tmp_path: Path) -> None:
    folder = written(tmp_path / "in")
    first, second = assembled(folder, "first"), assembled(folder, "second")
    assert digests(first) == digests(second)
    names = {path.split("/")[0].split("-")[0] for path in digests(first)}
    assert names == {"shards", "part", "verdicts", "pretrain.json", "README.md", "items.json"}


# ---- keys


def test_awkward_and_repeated_keys_get_their_uid(tmp_path: Path) -> None:
    long = "k" * 90
    shards = {
        "0.tar": [*pair("same"), *pair("dir/deep"), *pair("clean-1_B"), *pair("größe")],
        "1.tar": [*pair("same"), *pair(long), *pair("looks-00000000000000ff"), *pair("a b")],
    }
    directory = assembled(write_tars(tmp_path / "in", shards), assemble={})
    by_uid = {row["uid"]: row["key"] for row in rows_of(directory)}
    second = 1 << 24
    assert by_uid == {
        0: "same-0000000000000000",
        1: "dir_deep-0000000000000001",
        2: "clean-1_B",
        3: "gr__e-0000000000000003",
        second: "same-0000000001000000",
        second + 1: f"{'k' * 60}-0000000001000001",
        second + 2: "looks-00000000000000ff-0000000001000002",
        second + 3: "a_b-0000000001000003",
    }
    rows = [sample.row for sample in read_samples(directory.path)]
    assert {row["source_key"] for row in rows} == {
        *("same", "dir/deep", "clean-1_B", "größe", long, "looks-00000000000000ff", "a b")
    }
    names = list(members_of(tars_of(directory)[0]))
    assert all(len(name) <= 100 and name.count(".") == 1 for name in names)


def test_a_key_that_only_lost_rows_share_is_kept(tmp_path: Path) -> None:
    small = [("same.jpg", picture(4, 4)), ("same.txt", b"small")]
    folder = write_tars(tmp_path / "in", {"0.tar": pair("same"), "1.tar": small})
    assert plain_keys(assembled(folder, filter={"min_side": 5})) == ["same"]


@pytest.mark.parametrize("key", ["", ".", "..", "a.b", "../x", "/x", "a\\b", "é", "x" * 200, "-"])
def test_every_output_key_is_safe_and_no_two_are_equal(key: str) -> None:
    renamed = output_key(key, 2**63, must_rename=True)
    assert renamed.endswith("-8000000000000000")
    assert len(renamed) <= 80 and "." not in renamed and renamed.isascii()
    assert not is_clean(renamed)  # so no sample can have it as its own key
    assert output_key(key, 1, must_rename=True) != output_key(key, 2, must_rename=True)


# ---- bad bytes


def assemble_item(values: dict[str, Any], out: Path) -> tuple[View, Item]:
    """Return the assemble stage's view and first item in a run whose ingest is done."""
    view = build(parse(values), str(out))[-1].view
    return view, assemble.plan(view)[0]


@pytest.mark.parametrize("hash_images", [False, True])
def test_changed_source_bytes_are_quarantined(tmp_path: Path, hash_images: bool) -> None:
    keys = ("a", "b", "c")
    shard = write_tars(tmp_path / "in", {"0.tar": [m for k in keys for m in pair(k)]}) / "0.tar"
    values = recipe(shard)
    values["source"]["hash_images"] = hash_images
    run_here(values, tmp_path / "out", until="ingest")
    view, item = assemble_item(values, tmp_path / "out")
    content = bytearray(shard.read_bytes())
    image = picture()
    content[content.find(image) + len(image) - 9] ^= 1  # the header stays whole
    shard.write_bytes(content[: content.rfind(image) + 100])
    output = assemble.work(view, item)
    assert output.verdicts is not None
    assert output.quarantine is not None
    lost = ["a", "c"] if hash_images else ["c"]
    reasons = output.verdicts.column("reason").to_pylist()
    assert reasons == ["quarantine:unreadable_bytes" if key in lost else "" for key in keys]
    assert output.quarantine.column("key").to_pylist() == lost
    shard.unlink()
    with pytest.raises(UserError, match="is gone"):
        assemble.work(view, item)


def test_a_source_that_changes_between_check_and_copy_is_an_error(tmp_path: Path) -> None:
    shard = write_tars(tmp_path / "in", {"0.tar": pair("a")}) / "0.tar"
    values = recipe(shard)
    run_here(values, tmp_path / "out", until="ingest")
    output = assemble.work(*assemble_item(values, tmp_path / "out"))
    content = bytearray(shard.read_bytes())
    content[512 + 300] ^= 1
    shard.write_bytes(content)
    write = output.files["shards/00000.tar"]
    assert callable(write)
    with pytest.raises(UserError, match="changed while"), (tmp_path / "x").open("wb") as file:
        write(file)


def test_bytes_that_are_no_image_are_quarantined(tmp_path: Path) -> None:
    bad = [("bad.jpg", b"<html>not found</html>"), ("bad.txt", b"words")]
    folder = write_tars(tmp_path / "in", {"0.tar": [*pair("a"), *bad, *pair("c")]})
    directory = assembled(folder)
    assert bad_rows(directory) == [("bad", "unknown_format")]
    assert plain_keys(directory) == ["a", "c"]
    assert json.loads((Path(directory.path) / "shards/sizes.json").read_text()) == {"00000.tar": 2}


def test_a_shard_of_bad_images_only_is_not_written(tmp_path: Path) -> None:
    bad = [m for n in range(PER_SHARD) for m in [(f"b{n}.jpg", b"no"), (f"b{n}.txt", b"words")]]
    good = [m for n in range(6) for m in pair(f"g{n}")]
    directory = assembled(write_tars(tmp_path / "in", {"0.tar": good[:8] + bad + good[8:]}))
    assert [path.name for path in tars_of(directory)] == ["00000.tar", "00002.tar"]
    assert plain_keys(directory) == [f"g{n}" for n in range(6)]
    assert "shards/00000.tar::shards/00002.tar" in card_of(directory)
    assert len(json.loads((Path(directory.path) / "pretrain.json").read_text())) == 6


def test_a_missing_suffix_is_told_from_the_bytes_and_a_wrong_one_is_kept(tmp_path: Path) -> None:
    members = [
        ("wrong.jpg", picture(kind="PNG")),
        ("wrong.txt", b"a PNG named jpg"),
        ("small.WEBP", picture(kind="WEBP")),
        ("small.txt", b"capital suffix"),
    ]
    directory = assembled(write_tars(tmp_path / "in", {"0.tar": members}))
    assert [row["images"][0]["suffix"] for row in rows_of(directory)] == ["webp", "jpg"]
    assert "`datasets` wants one kind" in card_of(directory)


# ---- selections


def test_nothing_selected_is_a_finished_stage_that_says_so(tmp_path: Path) -> None:
    directory = assembled(written(tmp_path / "in"), filter={"min_side": 1000})
    record = directory.record()
    assert record is not None
    assert (record["rows_in"], record["kept"]) == (0, 0)
    assert tars_of(directory) == []
    base = Path(directory.path)
    assert json.loads((base / "pretrain.json").read_text()) == []
    assert json.loads((base / "shards/sizes.json").read_text()) == {}
    assert "No sample is left" in card_of(directory)
    assert list(read_samples(directory.path)) == []


def test_selected_rows_carry_their_scores(tmp_path: Path) -> None:
    model = save_model(tmp_path / "model")
    chain = stages(
        run_here(
            recipe(
                written(tmp_path / "in"),
                embed={"model": str(model)},
                cluster={"num_clusters": 2, "min_rows_per_centroid": 1},
                select={"clip_band": [0.1, 0.9], "num_samples": 7},
            ),
            tmp_path / "out",
        )
    )
    coreset = pq.read_table(Path(chain["select"].path) / "coreset.parquet").to_pylist()
    assert len(coreset) == 7
    scores = {row["uid"]: (row["clip_score"], row["cluster"]) for row in coreset}
    rows = [sample.row for sample in read_samples(chain["assemble"].path)]
    assert {row["uid"]: (row["clip_score"], row["cluster"]) for row in rows} == scores
    card = card_of(chain["assemble"])
    record = chain["select"].record()
    assert record is not None
    for cutoff in record["notes"]["cuts"].values():
        assert repr(cutoff) in card
    for stage, directory in chain.items():
        found = directory.record()
        assert found is not None
        assert stage == "assemble" or found["fingerprint"][:16] in card


def test_a_source_of_embeddings_has_no_images_to_assemble(tmp_path: Path) -> None:
    values = recipe_for(embeddings(tmp_path / "in"), "clip_retrieval", assemble={})
    with pytest.raises(UserError, match="assemble needs images"):
        run_here(values, tmp_path / "out")


# ---- what describes the shards


def card_of(directory: StageDir) -> str:
    return (Path(directory.path) / "README.md").read_text(encoding="utf-8")


def test_the_card_has_the_funnel_and_nothing_of_this_machine(tmp_path: Path) -> None:
    directory = assembled(written(tmp_path / "in"), filter={"min_side": 17}, seed=3)
    card = card_of(directory)
    _, head, body = card.split("---\n", 2)
    assert yaml.safe_load(head)["configs"][0]["data_files"][0]["path"] == "shards/*.tar"
    assert "| filter | 15 | 10 | side_below 5 | 0 |" in body
    assert "Recipe seed: 3" in body
    assert '"min_side":17' in body
    assert str(tmp_path) not in card


def test_the_pretrain_list_is_llava_format_in_shard_order(tmp_path: Path) -> None:
    directory = assembled(written(tmp_path / "in"))
    found = json.loads((Path(directory.path) / "pretrain.json").read_text(encoding="utf-8"))
    assert [row["id"] for row in found] == plain_keys(directory)
    assert all(set(row) == {"id", "image", "conversations"} for row in found)
    assert found[0]["conversations"][1]["value"] == "número 0, 絵 <0> & ☀"
    unpacked = [name for path in tars_of(directory) for name in members_of(path)]
    assert {row["image"] for row in found} <= set(unpacked)


def test_the_wids_list_says_what_the_files_are(tmp_path: Path) -> None:
    directory = assembled(written(tmp_path / "in"))
    listed = json.loads((Path(directory.path) / "shards/wids.json").read_text())["shardlist"]
    for entry, path in zip(listed, tars_of(directory), strict=True):
        content = path.read_bytes()
        assert entry == {
            "url": path.name,
            "filesize": len(content),
            "md5sum": hashlib.md5(content, usedforsecurity=False).hexdigest(),
            "nsamples": len(members_of(path)) // 3,
        }
