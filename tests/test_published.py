"""Published embeddings: uids, scores, quarantined rows, and files that hold none."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from small_inputs import (
    DIM,
    bad_rows,
    embeddings,
    ingest,
    recipe_for,
    rows_of,
    run_here,
    unit_rows,
    write_embeddings,
)

from manifests.errors import UserError
from manifests.schemas import MAX_ROWS_PER_SHARD
from manifests.work import StageDir


def ingest_embeddings(folder: Path, **options: Any) -> StageDir:
    return ingest(folder, "clip_retrieval", **options)


def test_embedding_rows_get_uids_by_file_and_row_whatever_the_gaps_and_padding(
    tmp_path: Path,
) -> None:
    folder = tmp_path / "in"
    for name in ("9", "0010", "0200"):
        write_embeddings(folder, name, unit_rows(3))
    rows = rows_of(ingest_embeddings(folder))
    assert [row["uid"] for row in rows] == [n << 24 | i for n in range(3) for i in range(3)]
    assert [row["key"] for row in rows[::3]] == ["9-0", "0010-0", "0200-0"]
    assert rows[3]["shard"] == "img_emb/img_emb_0010.npy"
    before = rows
    write_embeddings(folder, "0300", unit_rows(1))
    after = rows_of(ingest_embeddings(folder))
    assert after[:9] == before
    assert after[9]["uid"] == 3 << 24


def test_files_of_one_number_are_paired_under_different_padding(tmp_path: Path) -> None:
    folder = write_embeddings(tmp_path / "in", 7, unit_rows(2))
    (folder / "text_emb" / "text_emb_0007.npy").rename(folder / "text_emb" / "text_emb_07.npy")
    assert len(rows_of(ingest_embeddings(folder))) == 2


def test_clip_score_is_the_exact_dot_of_the_two_rows(tmp_path: Path) -> None:
    images, texts = unit_rows(20, seed=1), unit_rows(20, seed=2)
    rows = rows_of(ingest_embeddings(write_embeddings(tmp_path / "in", 0, images, texts)))
    exact = (images.astype(np.float64) * texts.astype(np.float64)).sum(axis=1)
    assert [row["clip_score"] for row in rows] == exact.tolist()


def test_rows_that_cannot_be_compared_are_quarantined(tmp_path: Path) -> None:
    images, texts = unit_rows(7), unit_rows(7, seed=1)
    images[1, 3], images[2], images[3, 0] = np.nan, 0, np.inf
    texts[4], texts[5, 0] = 0, -np.inf
    images[6] *= np.float16(20)
    directory = ingest_embeddings(write_embeddings(tmp_path / "in", 0, images, texts))
    assert [row["key"] for row in rows_of(directory)] == ["0000-0"]
    assert bad_rows(directory) == [
        ("0000-1", "non_finite_embedding"),
        ("0000-2", "zero_embedding"),
        ("0000-3", "non_finite_embedding"),
        ("0000-4", "zero_embedding"),
        ("0000-5", "non_finite_embedding"),
        ("0000-6", "embedding_norm_too_large"),
    ]


def test_float32_rows_are_rounded_to_float16_and_too_large_ones_quarantined(tmp_path: Path) -> None:
    images = unit_rows(3).astype(np.float32) + np.float32(1e-6)
    texts = unit_rows(3, seed=1).astype(np.float32)
    images[2, 0] = 1e6
    directory = ingest_embeddings(write_embeddings(tmp_path / "in", 0, images, texts))
    rounded = [one.astype(np.float16).astype(np.float64) for one in (images[:2], texts[:2])]
    scores = [row["clip_score"] for row in rows_of(directory)]
    assert scores == (rounded[0] * rounded[1]).sum(axis=1).tolist()
    assert bad_rows(directory) == [("0000-2", "non_finite_embedding")]


def test_an_empty_part_is_no_rows_and_no_error(tmp_path: Path) -> None:
    folder = write_embeddings(tmp_path / "in", 0, unit_rows(2))
    write_embeddings(folder, 1, np.zeros((0, DIM), np.float16))
    write_embeddings(folder, 2, unit_rows(1))
    assert [row["uid"] >> 24 for row in rows_of(ingest_embeddings(folder))] == [0, 0, 2]


def npz_bytes() -> bytes:
    file = io.BytesIO()
    np.savez(file, unit_rows(4))
    return file.getvalue()


def zip_bytes() -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("a", "b")
    return file.getvalue()


def npy_bytes(array: np.ndarray, *, allow_pickle: bool = False) -> bytes:
    file = io.BytesIO()
    np.save(file, array, allow_pickle=allow_pickle)
    return file.getvalue()


NOT_EMBEDDINGS: dict[str, tuple[bytes, str]] = {
    "python objects": (npy_bytes(np.array([{}] * 4, object), allow_pickle=True), "plain npy"),
    "one dimension": (npy_bytes(np.zeros(4, np.float16)), r"shape \(4,\)"),
    "three dimensions": (npy_bytes(np.zeros((4, 2, 2), np.float16)), "shape"),
    "float64": (npy_bytes(np.zeros((4, DIM))), "float64"),
    "integers": (npy_bytes(np.zeros((4, DIM), np.int8)), "int8"),
    "big-endian": (npy_bytes(np.zeros((4, DIM), ">f2")), "float16"),
    "empty file": (b"", "plain npy"),
    "cut short": (npy_bytes(unit_rows(4))[:-5], "plain npy"),
    "only a header": (npy_bytes(unit_rows(4))[:128], "plain npy"),
    "a pickle": (b"\x80\x04N.", "plain npy"),
    "text": (b"<html>", "plain npy"),
    "an npz": (npz_bytes(), "plain npy"),
    "a zip": (zip_bytes(), "plain npy"),
    "a cut zip": (zip_bytes()[:20], "plain npy"),
}


@pytest.mark.parametrize("kind", ["img_emb", "text_emb"])
@pytest.mark.parametrize("name", NOT_EMBEDDINGS)
def test_a_file_that_holds_no_embeddings_is_a_user_error_that_names_it(
    tmp_path: Path, name: str, kind: str
) -> None:
    content, expected = NOT_EMBEDDINGS[name]
    folder = write_embeddings(tmp_path / "in", 0, unit_rows(4))
    (folder / kind / f"{kind}_0000.npy").write_bytes(content)
    with pytest.raises(UserError, match=expected) as caught:
        ingest_embeddings(folder)
    assert f"{kind}_0000.npy" in str(caught.value)


@pytest.mark.parametrize(
    ("images", "texts", "rows"), [(4, 3, 4), (3, 4, 4), (4, 4, 3), (4, 4, 5), (4, 4, 0)]
)
def test_row_counts_that_differ_are_a_user_error(
    tmp_path: Path, images: int, texts: int, rows: int
) -> None:
    table = pa.table({"key": [str(row) for row in range(rows)]})
    write_embeddings(tmp_path / "in", 3, unit_rows(images), unit_rows(texts), table)
    with pytest.raises(UserError, match=f"{images} image rows, {texts} text rows, {rows} metadata"):
        ingest_embeddings(tmp_path / "in")


@pytest.mark.parametrize("where", ["img_emb", "text_emb", "other file"])
def test_another_dimension_is_a_user_error(tmp_path: Path, where: str) -> None:
    folder = write_embeddings(tmp_path / "in", 0, unit_rows(2))
    wide = unit_rows(2, dim=DIM * 2)
    if where == "other file":
        write_embeddings(folder, 1, wide)
    else:
        np.save(folder / where / f"{where}_0000.npy", wide)
    with pytest.raises(UserError, match="columns, the first file has"):
        ingest_embeddings(folder)


@pytest.mark.parametrize("kind", ["img_emb", "text_emb", "metadata"])
def test_a_number_that_lacks_one_of_its_files_is_a_user_error(tmp_path: Path, kind: str) -> None:
    folder = embeddings(tmp_path / "in")
    next((folder / kind).glob("*_0001.*")).unlink()
    with pytest.raises(UserError, match=f"{kind}/ has no file number 1"):
        ingest_embeddings(folder)


def test_a_folder_in_another_layout_is_a_user_error(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    with pytest.raises(UserError, match="holds no img_emb"):
        ingest_embeddings(tmp_path / "in")
    write_embeddings(tmp_path / "in", 1, unit_rows(1))
    write_embeddings(tmp_path / "in", "01", unit_rows(1))
    with pytest.raises(UserError, match="two files number 1"):
        ingest_embeddings(tmp_path / "in")
    write_embeddings(tmp_path / "named", "all", unit_rows(1))
    with pytest.raises(UserError, match="has no number"):
        ingest_embeddings(tmp_path / "named")


@pytest.mark.parametrize(
    "content",
    [b"", b"junk" * 50, b"PAR1" + bytes(40) + b"PAR1"],
    ids=["empty", "junk", "only its ends"],
)
def test_metadata_that_are_no_parquet_are_a_user_error(tmp_path: Path, content: bytes) -> None:
    folder = write_embeddings(tmp_path / "in", 0, unit_rows(2))
    (folder / "metadata" / "metadata_0000.parquet").write_bytes(content)
    with pytest.raises(UserError, match="not a readable parquet file"):
        ingest_embeddings(folder)


def test_a_damaged_page_of_the_metadata_is_a_user_error(tmp_path: Path) -> None:
    folder = write_embeddings(tmp_path / "in", 0, unit_rows(2000))
    path = folder / "metadata" / "metadata_0000.parquet"
    content = bytearray(path.read_bytes())
    content[4:400] = bytes(396)
    path.write_bytes(content)
    with pytest.raises(UserError, match="not a readable parquet file"):
        ingest_embeddings(folder)


def test_two_metadata_columns_of_one_name_are_a_user_error(tmp_path: Path) -> None:
    table = pa.table([pa.array(["a"]), pa.array(["b"])], names=["key", "key"])
    write_embeddings(tmp_path / "in", 0, unit_rows(1), None, table)
    with pytest.raises(UserError, match="two columns 'key'"):
        ingest_embeddings(tmp_path / "in")


def test_a_file_of_more_rows_than_a_uid_can_number_is_refused(tmp_path: Path) -> None:
    folder = write_embeddings(tmp_path / "in", 0, unit_rows(1))
    path = folder / "img_emb" / "img_emb_0000.npy"
    np.lib.format.open_memmap(path, mode="w+", dtype=np.float16, shape=(MAX_ROWS_PER_SHARD + 1, 1))
    with pytest.raises(UserError, match=r"more than 2\^24 rows"):
        ingest_embeddings(folder)


@pytest.mark.parametrize(
    ("columns", "ceiling", "warned"),
    [
        (("NSFW", "similarity", "LICENSE"), None, ["Re-LAION"]),
        (("NSFW", "similarity", "LICENSE"), 0.45, ["Re-LAION", "judges nothing"]),
        (("punsafe",), None, ["drop_above_punsafe: 0.45"]),
        (("punsafe",), 0.45, []),
        ((), None, []),
    ],
)
def test_published_embeddings_are_warned_of_as_tables_are(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    columns: tuple[str, ...],
    ceiling: float | None,
    warned: list[str],
) -> None:
    given = {"url": ["u"], "caption": ["c"]} | {name: [None] for name in columns}
    folder = write_embeddings(tmp_path / "in", 0, unit_rows(1), metadata=pa.table(given))
    sections = {"filter": {"drop_above_punsafe": ceiling}}
    run_here(recipe_for(folder, "clip_retrieval", **sections), tmp_path / "out")
    stderr = capsys.readouterr().err
    assert stderr.count("WARNING: ingest: ") == len(warned)
    assert all(text in stderr for text in warned)


def test_settings_that_a_kind_of_source_has_not_are_refused(tmp_path: Path) -> None:
    """A join that were passed over would leave every row's punsafe unknown."""
    for settings in ({"join": ["scores"]}, {"laion_hash": True}):
        with pytest.raises(UserError, match="takes no join and no laion_hash"):
            ingest(tmp_path / "in", "webdataset", **settings)


@pytest.mark.parametrize(
    ("names", "sections", "is_warned"),
    [
        (("image_path", "caption"), {"download": {}}, True),
        (("image_path", "URL"), {"download": {}}, False),
        (("image_path", "caption"), {}, False),
    ],
)
def test_before_a_long_selection_it_is_said_that_nothing_could_be_fetched(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    names: tuple[str, ...],
    sections: dict[str, Any],
    is_warned: bool,
) -> None:
    metadata = pa.table({name: ["a", "b"] for name in names})
    folder = write_embeddings(tmp_path / "in", 0, unit_rows(2), metadata=metadata)
    run_here(recipe_for(folder, "clip_retrieval", **sections), tmp_path / "out", until="ingest")
    told = "metadata/metadata_0000.parquet has no column of URLs" in capsys.readouterr().err
    assert told == is_warned
