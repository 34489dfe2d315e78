"""The demo world: its files are what img2dataset writes, and its truth is true."""

from __future__ import annotations

import gc
import io
import json
import tarfile
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from PIL import Image

import pipelines.demo
from pipelines.demo.plan import JUNK_SHARES, plan_rows
from pipelines.demo.practice import make_practice
from pipelines.demo.scenes import make_scene
from pipelines.demo.truth import NEVER_INGESTED, good_table, junk_table
from pipelines.demo.world import FILE_TIME, World, make_world

NUM_PAIRS, SAMPLES_PER_SHARD = 1_500, 500
MODEL_DIR = Path(pipelines.demo.__file__).parent / "model"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """Return a small world, made once."""
    out_dir = tmp_path_factory.mktemp("world")
    return make_world(out_dir, seed=5, num_pairs=NUM_PAIRS, samples_per_shard=SAMPLES_PER_SHARD)


@pytest.fixture(scope="module")
def rows(world: World) -> pl.DataFrame:
    """Return the truth joined with what the shards' parquet files say."""
    tables = [pl.read_parquet(path) for path in sorted(world.shards_dir.glob("*.parquet"))]
    truth = pl.read_parquet(world.truth_path)
    return truth.join(pl.concat(tables), on="key", how="inner", validate="1:1")


@pytest.fixture(scope="module")
def images(world: World) -> dict[str, bytes]:
    """Return the image bytes of every downloaded sample by key."""
    found = {}
    for path in sorted(world.shards_dir.glob("*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                stream = tar.extractfile(member)
                if member.name.endswith(".jpg") and stream is not None:
                    found[member.name.removesuffix(".jpg")] = stream.read()
    return found


def keys_of(rows: pl.DataFrame, kind: str) -> list[str]:
    """Return the keys of one kind, of which there must be some."""
    keys = rows.filter(pl.col("kind") == kind)["key"].to_list()
    assert keys, kind
    return keys


def opened(image: bytes) -> Image.Image:
    """Return the decoded RGB picture of a file's bytes."""
    with Image.open(io.BytesIO(image)) as picture:
        return picture.convert("RGB")


def test_shards_are_named_and_counted_as_img2dataset_does(world: World) -> None:
    names = sorted(path.name for path in world.shards_dir.iterdir())
    expected = [f"0000{i}{end}" for i in range(3) for end in (".parquet", ".tar", "_stats.json")]
    assert names == expected
    stats = json.loads((world.shards_dir / "00001_stats.json").read_text())
    assert stats["count"] == SAMPLES_PER_SHARD
    assert stats["successes"] + stats["failed_to_download"] == SAMPLES_PER_SHARD
    assert stats["failed_to_download"] > 0


def test_parquet_has_img2dataset_columns_after_the_source_columns(world: World) -> None:
    schema = pl.read_parquet_schema(world.shards_dir / "00000.parquet")
    assert list(schema.items()) == [
        *(("similarity", pl.Float64), ("hash", pl.Int64)),
        *(("punsafe", pl.Float32), ("pwatermark", pl.Float32)),
        *((name, pl.String) for name in ("caption", "url", "key", "status", "error_message")),
        *((name, pl.Int32) for name in ("width", "height", "original_width", "original_height")),
        *((name, pl.String) for name in ("exif", "sha256")),
    ]


def test_keys_are_shard_times_a_power_of_ten_plus_row_and_failed_downloads_leave_gaps(
    rows: pl.DataFrame, images: dict[str, bytes]
) -> None:
    expected = [f"{s * 1000 + r:08d}" for s in range(3) for r in range(SAMPLES_PER_SHARD)]
    assert rows["key"].to_list() == expected
    failed = set(keys_of(rows, "failed_download"))
    assert set(expected) - set(images) == failed
    assert set(rows.filter(pl.col("status") != "success")["key"]) == failed


# webdataset leaves the last tar open for the garbage collector to close.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_webdataset_reads_every_downloaded_sample(world: World, rows: pl.DataFrame) -> None:
    import webdataset

    path = str(world.shards_dir / "00000.tar")
    samples = list(webdataset.WebDataset(path, shardshuffle=False))
    gc.collect()
    of_shard = rows.filter((pl.col("shard") == "00000") & (pl.col("status") == "success"))
    assert [sample["__key__"] for sample in samples] == of_shard["key"].to_list()
    for sample, row in zip(samples, of_shard.iter_rows(named=True), strict=True):
        record = json.loads(sample["json"])
        assert record["caption"] == row["caption"]
        assert record["sha256"] == row["sha256"]
        assert sample.get("txt", b"").decode() == (row["caption"] or "")


def test_tar_members_are_plain_and_sorted(world: World) -> None:
    with tarfile.open(world.shards_dir / "00002.tar") as tar:
        members = tar.getmembers()
    assert [m.name for m in members] == sorted(m.name for m in members)
    assert {(m.mtime, m.uid, m.gid, m.mode, m.uname) for m in members} == {(0, 0, 0, 0o644, "")}
    assert not any(m.pax_headers for m in members)


def test_the_same_seed_gives_the_same_bytes_and_another_seed_does_not(tmp_path: Path) -> None:
    contents = []
    for name, seed in (("first", 0), ("second", 0), ("other", 1)):
        make_world(tmp_path / name, seed=seed, num_pairs=120, samples_per_shard=60)
        paths = sorted(path for path in (tmp_path / name).rglob("*") if path.is_file())
        assert {path.stat().st_mtime for path in paths} == {FILE_TIME}
        contents.append({path.name: path.read_bytes() for path in paths})
    assert contents[0] == contents[1]
    assert all(contents[0][name] != contents[2][name] for name in ("00000.tar", "truth.parquet"))


def test_two_fifths_of_the_rows_are_junk_in_the_planned_shares(world: World) -> None:
    counts = world.num_rows_by_kind
    assert sum(counts.values()) == NUM_PAIRS
    assert {k: counts[k] for k in JUNK_SHARES} == {
        k: round(share * NUM_PAIRS) for k, share in JUNK_SHARES.items()
    }
    assert 0.38 < 1 - counts["good"] / NUM_PAIRS < 0.46


def test_duplicate_groups_have_one_good_original_and_a_heavy_tail() -> None:
    planned = plan_rows(0, 12_000)
    frame = pl.DataFrame(
        {"kind": [r.kind for r in planned], "group": [r.group for r in planned]}
    ).drop_nulls()
    sizes = (
        frame.filter(pl.col("group") > 0)
        .group_by("group")
        .agg(
            size=pl.len(),
            originals=(pl.col("kind") == "good").sum(),
            kinds=pl.col("kind").n_unique(),
        )
    )
    assert sizes["originals"].unique().to_list() == [1]
    assert sizes["kinds"].unique().to_list() == [2]
    assert sizes["size"].min() == 2
    assert 25 < float(sizes.select(pl.col("size").max()).item()) <= 40
    assert set(frame["kind"]) == {"good", "exact_copy", "near_duplicate", "placeholder"}


def test_exact_copies_share_their_originals_bytes_under_another_address(
    rows: pl.DataFrame, images: dict[str, bytes]
) -> None:
    groups = rows.filter(pl.col("kind") == "exact_copy")["group"].unique()
    for group in groups:
        members = rows.filter(pl.col("group") == group)
        assert members["sha256"].n_unique() == 1
        assert members["url"].n_unique() == len(members)
        assert len({images[key] for key in members["key"]}) == 1


def test_near_duplicates_differ_in_bytes_and_look_alike(
    rows: pl.DataFrame, images: dict[str, bytes]
) -> None:
    groups = rows.filter(pl.col("kind") == "near_duplicate")["group"].unique()
    for group in groups:
        members = rows.filter(pl.col("group") == group)
        assert members["sha256"].n_unique() == len(members)
        small = [
            np.asarray(opened(images[key]).resize((8, 8), Image.Resampling.BOX), dtype=float)
            for key in members["key"]
        ]
        assert max(np.abs(picture - small[0]).mean() for picture in small) < 45


def test_broken_files_do_not_decode_and_all_others_do(
    rows: pl.DataFrame, images: dict[str, bytes]
) -> None:
    broken = {key for kind in JUNK_SHARES if "broken" in kind for key in keys_of(rows, kind)}
    assert all(images[key] == b"" for key in keys_of(rows, "broken_empty_file"))
    for key, image in images.items():
        if key in broken:
            with pytest.raises(OSError):
                opened(image)
        else:
            opened(image)


def test_size_junk_has_the_size_it_claims(rows: pl.DataFrame, images: dict[str, bytes]) -> None:
    assert all(max(opened(images[key]).size) <= 16 for key in keys_of(rows, "tiny"))
    for key in keys_of(rows, "extreme_aspect"):
        size = opened(images[key]).size
        assert max(size) / min(size) >= 4
    good = [opened(images[key]).size for key in keys_of(rows, "good")]
    assert min(min(size) for size in good) >= 64
    assert max(max(size) / min(size) for size in good) < 1.2
    assert all(
        (row["width"], row["height"]) == opened(images[row["key"]]).size
        for row in rows.filter(pl.col("kind") == "good").iter_rows(named=True)
    )


def test_caption_junk_is_as_described(rows: pl.DataFrame) -> None:
    def captions(kind: str) -> list[str]:
        return rows.filter(pl.col("kind") == kind)["caption"].to_list()

    assert min(len(caption) for caption in captions("long_caption")) > 1500
    assert {len(caption.split()) for caption in captions("one_word")} == {1}
    assert set(captions("no_caption")) == {None}
    assert max(len(caption) for caption in captions("good")) < 200
    assert any(not caption.isascii() for caption in captions("good"))


def test_only_unsafe_and_watermarked_rows_score_high(rows: pl.DataFrame) -> None:
    downloaded = rows.filter(pl.col("status") == "success")
    assert set(downloaded.filter(pl.col("punsafe") > 0.45)["kind"]) == {"unsafe"}
    assert set(downloaded.filter(pl.col("pwatermark") > 0.8)["kind"]) == {"watermark"}


def test_empty_pictures_are_flat_and_noise_is_not(
    rows: pl.DataFrame, images: dict[str, bytes]
) -> None:
    def spread(kind: str) -> list[float]:
        return [
            float(np.asarray(opened(images[k])).std(axis=(0, 1)).max()) for k in keys_of(rows, kind)
        ]

    assert max(spread("empty")) < 1.5 < 40 < min(spread("noise"))
    assert min(spread("good")) > 1.5


def test_a_swapped_caption_names_nothing_that_is_in_the_picture(rows: pl.DataFrame) -> None:
    plain = rows.filter(
        (pl.col("kind") == "swapped_caption") & (pl.col("caption_style") == "short")
    )
    for row in plain.iter_rows(named=True):
        for shape, colour in zip(row["shapes"], row["colours"], strict=True):
            assert f"{colour} {shape}" not in row["caption"]


def test_short_captions_name_what_the_truth_says(rows: pl.DataFrame) -> None:
    honest = rows.filter(pl.col("kind").is_in(["good", "near_duplicate", "unsafe"]))
    short = honest.filter(pl.col("caption_style") == "short")
    assert len(short) > 20
    for row in short.iter_rows(named=True):
        for shape, colour in zip(row["shapes"], row["colours"], strict=True):
            assert f"{colour} {shape}" in row["caption"]


def test_relations_hold_between_the_things_coordinates() -> None:
    scenes = [make_scene(3, index) for index in range(300)]
    related = [scene for scene in scenes if scene.relation]
    assert len(related) > 30
    for scene in related:
        first, second = scene.things
        assert first.x < second.x if scene.relation == "left of" else first.y < second.y


TRUTH = pl.DataFrame(
    {
        "key": list("abcdefghij"),
        "kind": [
            *("good", "near_duplicate", "near_duplicate", "good", "placeholder"),
            *("placeholder", "placeholder", "tiny", "failed_download", "good"),
        ],
        "group": [1, 1, 1, None, 0, 0, 0, None, None, None],
        "layout": ["pair"] * 3 + ["digit"] + [None] * 3 + ["single", None, "pair"],
        "num_things": [2, 2, 2, 0, None, None, None, 1, None, 2],
        "digit": [None, None, None, 7, None, None, None, None, None, None],
        "caption_style": ["plain"] * 3 + ["wordy"] + ["plain"] * 5 + ["wordy"],
    }
)
FATES = pl.DataFrame(
    {
        "key": list("abcdefghj"),
        "kept": [False, True, False, True, True, True, False, False, False],
        "stage": ["dedup", "", "dedup", "", "", "", "dedup", "filter", "select"],
        "reason": ["", "", "", "", "", "", "", "", ""],
    }
)


def test_junk_table_counts_the_surplus_of_duplicates() -> None:
    table = {row["kind"]: row for row in junk_table(TRUTH, FATES).iter_rows(named=True)}
    assert {kind: (row["planted"], row["caught"]) for kind, row in table.items()} == {
        "failed_download": (1, 1),
        "near_duplicate": (2, 2),
        "placeholder": (2, 1),
        "tiny": (1, 1),
    }
    assert table["near_duplicate"]["where"] == [{"stage": "dedup", "rows": 2}]
    assert table["failed_download"]["where"] == [{"stage": NEVER_INGESTED, "rows": 1}]


def test_junk_table_leaves_out_the_row_that_came_furthest_when_none_is_kept() -> None:
    fates = FATES.with_columns(
        kept=pl.lit(value=False),
        stage=pl.when(pl.col("kept")).then(pl.lit("select")).otherwise(pl.col("stage")),
    )
    table = {row["kind"]: row for row in junk_table(TRUTH, fates).iter_rows(named=True)}
    assert table["near_duplicate"]["where"] == [{"stage": "dedup", "rows": 2}]
    assert table["placeholder"]["caught"] == 2
    assert table["placeholder"]["where"] == [
        {"stage": "dedup", "rows": 1},
        {"stage": "select", "rows": 1},
    ]


def test_good_table_counts_a_picture_as_alive_when_its_copy_is() -> None:
    table = good_table(TRUTH, FATES)
    counts = {(row[0], row[1]): (row[2], row[3]) for row in table.iter_rows()}
    assert counts[("all", "all")] == (3, 2)
    assert counts[("layout", "pair")] == (2, 1)
    assert counts[("digit", "7")] == (1, 1)
    assert counts[("shapes", "2")] == (2, 1)
    assert counts[("caption style", "wordy")] == (2, 1)


def test_the_shipped_model_is_small_and_tells_matched_from_swapped_but_falls_for_cheaters() -> None:
    from pipelines.demo.judge import auc, load_model

    assert sum(path.stat().st_size for path in MODEL_DIR.rglob("*")) <= 4_000_000
    see, read = load_model(MODEL_DIR)
    fresh = make_practice(31_337, range(500), text_share=0.0)
    images_ND, texts_ND = see(fresh.views), read([captions[0] for captions in fresh.captions])
    matched = (images_ND * texts_ND).sum(axis=1)
    swapped = (images_ND * np.roll(texts_ND, 1, axis=0)).sum(axis=1)
    assert auc(matched, swapped) >= 0.95
    written = make_practice(31_338, range(500), text_share=1.0)
    spelled_ND = read([captions[0] for captions in written.captions])
    assert auc((see(written.views) * spelled_ND).sum(axis=1), matched) > 0.5
    twins = (images_ND * see(fresh.twins)).sum(axis=1)
    assert float(np.mean(twins > 0.86)) > 0.9


def test_auc_counts_a_tie_as_half() -> None:
    from pipelines.demo.judge import auc

    assert auc(np.array([1.0, 2.0]), np.array([0.0, 1.0])) == pytest.approx(0.875)
    assert auc(np.array([0.0]), np.array([1.0])) == 0.0
