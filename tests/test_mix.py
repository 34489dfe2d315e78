"""The mix stage: which rows are in the shards, in what form, where; and back again."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from small_inputs import picture, record, rows_of, run_here, stages
from small_mixes import (
    image_row,
    mix_recipe,
    text_row,
    turns,
    write_images,
    write_json,
)

from curate.media import mixed_rows
from curate.media.mixed_tar import write_shard
from manifests.checks import check
from manifests.errors import UserError
from manifests.lineage import why
from manifests.schemas import TRAIN_INDEX
from manifests.work import StageDir
from pipelines.cli import main
from pipelines.unmix import Unmixed, put, unmix
from train.data.index import read_samples


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, StageDir]:
    """Return the stages of a run over the small mix."""
    folder = tmp_path_factory.mktemp("mix")
    return stages(run_here(mix_recipe(folder / "world"), folder / "out"))


def members(directory: StageDir) -> list[list[tuple[str, bytes]]]:
    """Return the (name, bytes) of each shard, in order, as Python's tarfile reads them."""
    found = []
    for path in sorted((Path(directory.path) / "shards").glob("*.tar")):
        with tarfile.open(path) as archive:
            found.append([(m.name, archive.extractfile(m).read()) for m in archive])  # type: ignore[union-attr]
    return found


def small(folder: Path, rows: list[Any], images: dict[str, bytes], **mix: Any) -> dict[str, Any]:
    """Return a recipe of one source."""
    return {
        "source": {"kind": "llava_json", "files": {"own": write_json(folder / "own.json", rows)}},
        "clean": {},
        "resolve": {"roots": {"": write_images(folder / "images", images)}},
        "mix": mix,
    }


def test_a_sample_is_its_images_and_its_json_and_nothing_else(tmp_path: Path) -> None:
    pictures = {"a.jpg": picture(), "b/c.jpg": picture(kind="GIF"), "d.png": picture(kind="PNG")}
    rows = [
        image_row("one", "a.jpg", "Who?", "I.", "Why?", "So."),
        text_row("two", "Hi", "Ho é"),
        image_row("three", ["b/c.jpg", "d.png"], "Which?", "Both."),
    ]
    recipe = small(tmp_path, rows, pictures, shuffle=False)
    (shard,) = members(stages(run_here(recipe, tmp_path / "out"))["mix"])
    said = turns("<image>\nWho?", "I.", "Why?", "So.")
    assert [name for name, _ in shard] == [
        "000000000.jpg",
        "000000000.json",
        "000000001.json",
        "000000002.0.gif",
        "000000002.1.png",
        "000000002.json",
    ]
    by_name = dict(shard)
    assert by_name["000000000.jpg"] == pictures["a.jpg"]
    assert by_name["000000002.0.gif"] == pictures["b/c.jpg"]
    assert by_name["000000002.1.png"] == pictures["d.png"]
    first = json.loads(by_name["000000000.json"])
    assert first == {"id": "one", "image": "a.jpg", "conversations": said}
    second = {"id": "two", "conversations": turns("Hi", "Ho é")}
    text = json.dumps(second, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    assert by_name["000000001.json"] == text.encode()
    assert json.loads(by_name["000000002.json"])["image"] == ["b/c.jpg", "d.png"]


def test_the_index_finds_every_member_and_knows_its_row(made: dict[str, StageDir]) -> None:
    directory = made["mix"]
    tars = {path.name: path.read_bytes() for path in Path(directory.path).glob("shards/*.tar")}
    listed: Counter[str] = Counter()
    for row in rows_of(directory):
        content = tars[row["shard"].removeprefix("shards/")]
        text = json.loads(content[row["json_offset"] :][: row["json_size"]])
        named = text.get("image", [])
        assert len(row["images"]) == (1 if isinstance(named, str) else len(named))
        assert row["has_image"] == bool(row["images"])
        assert row["turns"] == sum(turn["from"] == "gpt" for turn in text["conversations"])
        for place in row["images"]:
            data = content[place["offset"] :][: place["size"]]
            assert data.startswith({"jpg": b"\xff\xd8", "png": b"\x89PNG"}[place["suffix"]])
        listed[row["shard"]] += 1
    assert pq.read_schema(directory.files()[0]).equals(TRAIN_INDEX)
    sizes = json.loads((Path(directory.path) / "shards/sizes.json").read_text())
    assert {f"shards/{name}": number for name, number in sizes.items()} == dict(listed)
    wids = json.loads((Path(directory.path) / "shards/wids.json").read_text())
    for one in wids["shardlist"]:
        content = tars[one["url"]]
        assert len(content) == one["filesize"]


def test_every_row_has_its_fate_and_the_shards_hold_the_kept_ones(
    made: dict[str, StageDir],
) -> None:
    lost = {
        name: Counter(record(stage)["dropped"]) + Counter(record(stage)["quarantined"])
        for name, stage in made.items()
    }
    assert lost == {
        "ingest": {"not_an_object": 1},
        "clean": {"empty_turn": 1},
        "resolve": {"missing_image": 1, "truncated_image": 1},
        "mix": {"replaced": 30, "duplicate_conversation": 1},
    }
    copies = Counter(row["uid"] for row in rows_of(made["mix"]))
    folder = Path(made["mix"].path)
    kept = {
        row["uid"]
        for path in folder.glob("verdicts/*.parquet")
        for row in pq.read_table(path).to_pylist()
        if row["keep"]
    }
    assert set(copies) == kept
    source = {row["uid"]: row["source"] for row in rows_of(made["ingest"])}
    scans = [number for uid, number in copies.items() if source[uid] == "scans"]
    assert Counter(scans) == {1: 45, 2: 45}  # weight 1.5
    assert {number for uid, number in copies.items() if source[uid] != "scans"} == {1}
    assert all(one.holds for one in check(str(folder.parent), made))


def test_the_order_is_a_shuffle_of_the_seed(tmp_path: Path) -> None:
    orders = {}
    for seed in (1, 2):
        recipe = mix_recipe(tmp_path / "world") | {"seed": seed}
        orders[seed] = [
            row["uid"] for row in rows_of(stages(run_here(recipe, tmp_path / "out"))["mix"])
        ]
    assert sorted(orders[1]) != orders[1] != orders[2]
    with_seed_1 = Counter(orders[1])
    assert sum(with_seed_1.values()) == sum(Counter(orders[2]).values())


def test_the_flat_list_is_the_json_of_the_shards(made: dict[str, StageDir]) -> None:
    directory = made["mix"]
    flat = json.loads((Path(directory.path) / "mix.json").read_text())
    inside = [
        json.loads(data)
        for shard in members(directory)
        for name, data in shard
        if name.endswith(".json")
    ]
    assert flat == inside == [dict(sample.row) for sample in read_samples(directory.path)]


def test_back_to_json_and_images_and_again_to_the_same_shards(tmp_path: Path) -> None:
    first = stages(run_here(mix_recipe(tmp_path / "world"), tmp_path / "out"))
    done = unmix(first, str(tmp_path / "back"))
    assert done.num_rows == len(rows_of(first["mix"]))
    assert not list((tmp_path / "back").rglob("*.tmp"))
    recipe = {
        "source": {"kind": "llava_json", "files": {"back": str(tmp_path / "back/rows.json")}},
        "clean": {},
        "resolve": {"roots": {"": str(tmp_path / "back/images")}},
        "mix": {"shuffle": False, "dedup": "none", "samples_per_shard": 16},
    }
    second = stages(run_here(recipe, tmp_path / "again"))
    assert members(second["mix"]) == members(first["mix"])
    unmix(second, str(tmp_path / "back2"))
    assert (tmp_path / "back2/rows.json").read_bytes() == (tmp_path / "back/rows.json").read_bytes()


def test_unmix_goes_on_where_it_was_and_overwrites_nothing(
    made: dict[str, StageDir], tmp_path: Path
) -> None:
    folder = tmp_path / "back"
    unmix(made, str(folder))
    with pytest.raises(UserError, match="finished"):
        unmix(made, str(folder))
    wanted = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    (folder / "rows.json").unlink()
    next(folder.rglob("7.jpg")).unlink()
    unmix(made, str(folder))
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == wanted
    (folder / "rows.json").unlink()
    next(folder.rglob("7.jpg")).write_bytes(b"another")
    with pytest.raises(UserError, match="other bytes"):
        unmix(made, str(folder))


def test_two_images_of_one_path_stay_two(tmp_path: Path) -> None:
    done, folder = Unmixed(), str(tmp_path)
    assert put(folder, "x.jpg", b"one", done) == "x.jpg"
    renamed = put(folder, "x.jpg", b"two", done)
    assert renamed == f"x-{hashlib.sha256(b'two').hexdigest()[:8]}.jpg"
    assert put(folder, "x.jpg", b"two", done) == renamed
    assert (done.num_images, done.renamed) == (2, 1)
    assert (tmp_path / "images" / renamed).read_bytes() == b"two"


def test_why_tells_an_instruction_rows_story(made: dict[str, StageDir]) -> None:
    def fate(name: str) -> str:
        (story,) = why(made, name)
        return story.fate

    assert fate("svit_5") == "quarantined by resolve: missing_image"
    assert fate("svit_9") == "dropped by clean: empty_turn"
    assert fate("chat_2") == "dropped by mix: replaced"
    assert fate("wizard_2") == "quarantined by ingest: not_an_object"
    (again,) = why(made, "again")
    assert again.steps[-1].facts["evidence_key"] == "scan_4"
    (mended,) = why(made, "svit_7")
    assert mended.fate == "kept"
    assert [s.reason for s in mended.steps if s.stage == "clean"] == ["mended:dangling_human_turn"]
    (by_member,) = why(made, mended.steps[-1].facts["member"])
    assert by_member.uid == mended.uid
    (first,) = why(made, "000000001")  # the sample of that key, not the row of uid 1
    assert first.steps[-1].facts["member"] == "000000001"


def test_an_image_that_changes_after_it_was_found_is_not_written(tmp_path: Path) -> None:
    recipe = small(tmp_path, [image_row("a", "x.jpg")], {"x.jpg": picture()})
    mix = stages(run_here(recipe, tmp_path / "out"))["mix"]
    rows = mixed_rows.of_shard(mix.path, ["rows-00000"], 0)
    roots: dict[str, str | list[str]] = {"": str(tmp_path / "images")}
    (tmp_path / "images/x.jpg").write_bytes(picture() + b"more")
    with pytest.raises(UserError, match=r"x\.jpg"):
        write_shard(io.BytesIO(), rows, roots)
    (tmp_path / "images/x.jpg").unlink()
    with pytest.raises(UserError, match=r"x\.jpg"):
        write_shard(io.BytesIO(), rows, roots)


def test_nothing_left_is_an_empty_mix_that_says_so(tmp_path: Path) -> None:
    recipe = small(tmp_path, [text_row("a", "Hi", " ")], {})
    made = stages(run_here(recipe, tmp_path / "out"))
    assert rows_of(made["mix"]) == []
    assert json.loads((Path(made["mix"].path) / "mix.json").read_text()) == []
    assert "Mix of 0 instruction rows" in (Path(made["mix"].path) / "README.md").read_text()


def test_a_file_without_rows_is_an_empty_mix_too(tmp_path: Path) -> None:
    made = stages(run_here(small(tmp_path, [], {}), tmp_path / "out"))
    assert record(made["mix"])["rows_in"] == 0
    assert json.loads((Path(made["mix"].path) / "mix.json").read_text()) == []


def test_unmix_from_the_command_line(made: dict[str, StageDir], tmp_path: Path) -> None:
    out = str(Path(made["mix"].path).parent)
    done = CliRunner().invoke(main, ["unmix", out, "--out", str(tmp_path / "back"), "--json"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["rows"] == len(rows_of(made["mix"]))


def test_a_run_prints_each_sources_counts_and_warns_of_published_ones(tmp_path: Path) -> None:
    rows = [image_row("a", "x.jpg"), text_row("b")]
    published = [{"name": "all of it", "rows": 3, "where": {}, "origin": "a paper"}]
    recipe = small(tmp_path, rows, {"x.jpg": picture()}, published=published)
    path = tmp_path / "recipe.yaml"
    path.write_text(json.dumps(recipe))
    words = ["run", str(path), "--out", str(tmp_path / "out"), "--executor", "local"]
    done = CliRunner().invoke(main, words)
    assert done.exit_code == 0, done.output
    assert "all of it" in done.stdout
    assert "warning: all of it: 2 rows, not the 3 published (a paper)" in done.stderr
