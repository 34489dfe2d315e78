"""Embeddings against open_clip's own, bad images and captions, and batches that do not fit."""

from __future__ import annotations

import threading
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image
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
from small_models import (
    BATCH,
    arrays,
    config_of,
    embedded,
    save_model,
    small_model,  # noqa: F401 - a fixture
)

from curate.media.images import decode
from curate.vectors import clip_model, embed
from curate.vectors.embed import ahead
from curate.vectors.halving import Halving
from manifests.errors import UserError
from manifests.schemas import VECTORS
from manifests.work import Item, Output, StageDir, View
from pipelines.chain import build
from pipelines.recipe import parse


def tars(folder: Path) -> Path:
    """Write three shards of 6, 5 and 4 different pairs: wide and tall, JPEG and PNG."""

    def shard(number: int, num_pairs: int) -> list[tuple[str, bytes]]:
        members = []
        for row in range(num_pairs):
            key, suffix = f"{number}{row:03d}", ("jpg", "png")[row % 2]
            kind = {"jpg": "JPEG", "png": "PNG"}[suffix]
            sides = (40 + 9 * row, 64) if row % 3 else (90, 33 + row)
            data = picture(*sides, kind=kind, shade=20 * row + 30 * number)
            members += [
                (f"{key}.{suffix}", data),
                (f"{key}.txt", f"shade {row} of {number}".encode()),
            ]
        return members

    return write_tars(folder, {f"{n:05d}.tar": shard(n, 6 - n) for n in range(3)})


def digests(directory: StageDir) -> dict[str, str]:
    return {one["path"]: one["sha256"] for m in directory.markers() for one in m["files"]}


def vectors_of(directory: StageDir) -> list[dict[str, Any]]:
    """Return all VECTORS rows."""
    tables = [pq.read_table(p) for p in directory.files("metadata", prefix="metadata_")]
    assert all(table.schema.equals(VECTORS) for table in tables)
    return [row for table in tables for row in table.to_pylist()]


# ---- what comes out


def test_rows_are_bit_for_bit_those_of_open_clip(tmp_path: Path, model: Path) -> None:
    import open_clip
    import torch

    folder = tars(tmp_path / "in")
    directory = embedded(folder, model, num_threads=1)
    network, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{model}")
    network.eval()
    tokenizer = open_clip.get_tokenizer(f"local-dir:{model}")
    for part, rows in enumerate(ingested(tmp_path)):
        expected: list[list[Any]] = [[], []]
        for batch in (rows[at : at + BATCH] for at in range(0, len(rows), BATCH)):
            pixels = torch.stack([preprocess(image_of(folder, row)) for row in batch])
            tokens = tokenizer([row["caption"] for row in batch])
            with torch.inference_mode(), clip_model.pinned_threads(1):
                expected[0].append(network.encode_image(pixels, normalize=True))
                expected[1].append(network.encode_text(tokens, normalize=True))
        for theirs, ours in zip(expected, arrays(directory, part), strict=True):
            assert ours.dtype == np.float16
            assert np.array_equal(ours, torch.cat(theirs).half().numpy())


def test_metadata_name_each_row_and_its_exact_clip_score(tmp_path: Path, model: Path) -> None:
    directory = embedded(tars(tmp_path / "in"), model)
    found = vectors_of(directory)
    samples = [row for rows in ingested(tmp_path) for row in rows]
    assert [(row["uid"], row["key"], row["caption"]) for row in found] == [
        (row["uid"], row["key"], row["caption"]) for row in samples
    ]
    for row in found:
        images, texts = arrays(directory, row["uid"] >> 24)
        image, text = (rows[row["row"]].tolist() for rows in (images, texts))
        exact = sum(Fraction(a) * Fraction(b) for a, b in zip(image, text, strict=True))
        assert Fraction(row["clip_score"]) == exact
        assert abs(np.linalg.norm(image) - 1) < 1e-3
    assert len({row["clip_score"] for row in found}) == len(found)  # the model tells them apart


def test_the_same_bytes_come_out_whoever_decodes(tmp_path: Path, model: Path) -> None:
    folder = tars(tmp_path / "in")
    first = embedded(folder, model, out="a", decode_threads=1)
    second = embedded(folder, model, out="b", decode_threads=7)
    assert digests(first) == digests(second)
    assert Path(first.path).name == Path(second.path).name  # decode_threads is in no fingerprint


def test_a_filtered_row_is_not_embedded(tmp_path: Path, model: Path) -> None:
    folder = tars(tmp_path / "in")
    values = recipe_for(folder, "webdataset", filter={"min_side": 50}, embed=config_of(model))
    chain = stages(run_here(values, tmp_path / "out"))
    kept = [row["uid"] for row in rows_of(chain["filter"]) if row["keep"]]
    assert 0 < len(kept) < 15
    assert [row["uid"] for row in vectors_of(chain["embed"])] == kept


# ---- bad images


def test_bad_images_are_quarantined_and_their_neighbours_are_not(
    tmp_path: Path, model: Path
) -> None:
    whole = picture(64, 64, kind="PNG")
    images = {
        "a": picture(64, 64),
        "broken": b"\xff\xd8\xff" + bytes(500),
        "b": picture(50, 70),
        "cut": whole[: len(whole) // 2],
        "huge": picture(400, 400),
        "ribbon": picture(60_000, 1, kind="PNG"),
        "text": b"no image at all",
    }
    members = [
        m for key, data in images.items() for m in [(f"{key}.jpg", data), (f"{key}.txt", b"words")]
    ]
    folder = write_tars(tmp_path / "in", {"0.tar": members, "1.tar": pair("alone")})
    directory = embedded(folder, model, max_pixels=100_000)
    assert dict(bad_rows(directory)) == {
        "broken": "truncated_image",
        "cut": "truncated_image",
        "huge": "too_many_pixels",
        "ribbon": "too_many_pixels",
        "text": "unknown_format",
    }
    assert [row["key"] for row in vectors_of(directory)] == ["a", "b", "alone"]
    assert [len(arrays(directory, part)[0]) for part in (0, 1)] == [2, 1]
    good = write_tars(
        tmp_path / "good" / "in",
        {
            "0.tar": [m for m in members if m[0][0] in "ab" and m[0][1] == "."],
            "1.tar": pair("alone"),
        },
    )
    alone = arrays(embedded(good, model), 0)
    for ours, theirs in zip(arrays(directory, 0), alone, strict=True):
        assert np.allclose(ours.astype(np.float32), theirs.astype(np.float32), atol=1e-3)


def test_a_part_of_bad_images_only_leaves_a_gap_that_later_stages_cross(
    tmp_path: Path, model: Path
) -> None:
    bad = [("x.jpg", b"nothing"), ("x.txt", b"words")]
    folder = write_tars(
        tmp_path / "in", {"0.tar": pair("a") + pair("b", "two"), "1.tar": bad, "2.tar": pair("c")}
    )
    values = recipe_for(
        folder,
        "webdataset",
        embed=config_of(model),
        cluster={"num_clusters": 1, "min_rows_per_centroid": 1},
        max_quarantine_fraction=0.5,
    )
    chain = stages(run_here(values, tmp_path / "out"))
    written = sorted(path.name for path in Path(chain["embed"].path).rglob("*.npy"))
    assert written == [f"{kind}_emb_000{n}.npy" for kind in ("img", "text") for n in (0, 2)]
    assert len(rows_of(chain["cluster"])) == 3


def test_rows_that_the_model_spoils_are_quarantined(tmp_path: Path) -> None:
    def spoil(network: Any) -> None:
        network.visual.proj[:] = float("nan")

    spoilt = save_model(tmp_path / "model", change=spoil)
    folder = write_tars(tmp_path / "in", {"0.tar": pair("a")})
    directory = embedded(folder, spoilt)
    assert bad_rows(directory) == [("a", "non_finite_embedding")]
    assert not list(Path(directory.path).rglob("*.npy"))


def test_rows_of_zeros_are_quarantined(tmp_path: Path) -> None:
    def blank(network: Any) -> None:
        network.text_projection[:] = 0

    blanked = save_model(tmp_path / "model", change=blank)
    folder = write_tars(tmp_path / "in", {"0.tar": pair("a")})
    assert bad_rows(embedded(folder, blanked)) == [("a", "zero_embedding")]


@pytest.mark.parametrize("hash_images", [False, True])
def test_a_shard_that_changed_after_ingest_is_noticed(
    tmp_path: Path, model: Path, hash_images: bool
) -> None:
    shard = write_tars(tmp_path / "in", {"0.tar": pair("a") + pair("b")}) / "0.tar"
    values = recipe_for(shard, "webdataset", embed=config_of(model))
    values["source"]["hash_images"] = hash_images
    run_here(values, tmp_path / "out", until="ingest")
    view, item = embed_item(values, tmp_path / "out")
    if hash_images:
        content = bytearray(shard.read_bytes())
        content[512 + 400] ^= 1  # in the first image's compressed pixels
        shard.write_bytes(content)
        assert fates(embed.work(view, item)) == ["quarantine:unreadable_bytes", ""]
    shard.write_bytes(shard.read_bytes()[:2000])
    assert fates(embed.work(view, item))[1] == "quarantine:unreadable_bytes"
    shard.unlink()
    with pytest.raises(UserError, match="is gone"):
        embed.work(view, item)


def test_an_endless_caption_costs_little_and_is_cut_by_the_tokenizer(
    tmp_path: Path, model: Path
) -> None:
    words = "a red circle " * 40
    captions = {"a": words + "and more", "b": words + "z" * 1_000_000, "c": "z" * 1_000_000}
    members = [m for key, caption in captions.items() for m in pair(key, caption)]
    directory = embedded(write_tars(tmp_path / "in", {"0.tar": members}), model)
    _, texts = arrays(directory, 0)
    assert np.array_equal(texts[0], texts[1])
    assert [len(row["caption"]) for row in vectors_of(directory)][1:] == [1_000_520, 1_000_000]


def test_embeddings_cannot_be_embedded(tmp_path: Path, model: Path) -> None:
    values = recipe_for(embeddings(tmp_path / "in"), "clip_retrieval", embed=config_of(model))
    with pytest.raises(UserError, match="embed needs images"):
        run_here(values, tmp_path / "out")


# ---- memory and look-ahead


def needs_memory(num_rows_that_fit: int) -> Callable[[slice], list[int]]:
    """Return a forward pass that really runs out of memory above a number of rows."""
    import torch

    def forward(piece: slice) -> list[int]:
        num_rows = piece.stop - piece.start
        torch.empty(1 if num_rows <= num_rows_that_fit else 1 << 55)
        return list(range(piece.start, piece.stop))

    return forward


def test_a_batch_is_halved_until_it_fits_and_no_row_is_lost() -> None:
    halving = Halving(64)
    pieces = halving.run(needs_memory(9), 64)
    assert [row for piece in pieces for row in piece] == list(range(64))
    assert {len(piece) for piece in pieces} == {8}
    assert (halving.num_rows, halving.num_halvings) == (8, 3)
    again = halving.run(needs_memory(9), 13)  # what did not fit once is not tried again
    assert [len(piece) for piece in again] == [8, 5]
    assert halving.num_halvings == 3


def test_a_row_that_never_fits_is_a_clear_error_and_other_errors_pass() -> None:
    with pytest.raises(UserError, match="a single image"):
        Halving(4).run(needs_memory(0), 4)

    def broken(piece: slice) -> None:
        raise RuntimeError("shapes differ")

    with pytest.raises(RuntimeError, match="shapes differ"):
        Halving(4).run(broken, 4)


def test_halved_batches_are_noted(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = clip_model.encode

    def hungry(clip: Any, pixels: Any, captions: Any) -> Any:
        needs_memory(2)(slice(0, len(pixels)))
        return plain(clip, pixels, captions)

    folder = tars(tmp_path / "in")
    whole = arrays(embedded(folder, model, out="whole"), 0)
    monkeypatch.setattr(clip_model, "encode", hungry)
    directory = embedded(folder, model, out="halved")
    notes = directory.markers()[0]["notes"]
    assert (notes["batch_halvings"], notes["batch_size_reached"]) == (1, 2)
    for ours, theirs in zip(arrays(directory, 0), whole, strict=True):
        assert np.allclose(ours.astype(np.float32), theirs.astype(np.float32), atol=1e-3)


def test_values_are_made_ahead_in_order_and_not_too_far() -> None:
    made: list[int] = []
    third = threading.Event()

    def make(value: int) -> int:
        made.append(value)
        if value == 3:
            third.set()
        return value * value

    results = ahead(make, iter(range(50)), num_threads=2, depth=3)
    assert next(results) == 0
    assert third.wait(10)  # made while nobody asked for it
    assert max(made) <= 3
    assert [next(results) for _ in range(5)] == [1, 4, 9, 16, 25]
    assert list(results)[-1] == 49 * 49


def test_leaving_early_stops_the_threads() -> None:
    results = ahead(lambda value: value, iter(range(10**9)), num_threads=2, depth=8)
    assert next(results) == 0
    results.close()
    assert not [t for t in threading.enumerate() if t.name.startswith("decode")]


# ---- helpers that look into a run


def ingested(tmp_path: Path) -> list[list[dict[str, Any]]]:
    """Return the SAMPLES rows of each part of the run in `out`."""
    directory = StageDir("ingest", str(next((tmp_path / "out").glob("ingest-*"))))
    return [pq.read_table(path).to_pylist() for path in directory.files()]


def image_of(folder: Path, row: dict[str, Any]) -> Image.Image:
    data = (folder / row["shard"]).read_bytes()
    return decode(data[row["offset"] : row["offset"] + row["size"]], max_pixels=10**6)


def embed_item(values: dict[str, Any], out: Path) -> tuple[View, Item]:
    """Return the embed stage's view and first item in a run whose ingest is done."""
    view = build(parse(values), str(out))[-1].view
    return view, embed.plan(view)[0]


def fates(output: Output) -> list[str]:
    assert output.verdicts is not None
    return list(output.verdicts.column("reason").to_pylist())
