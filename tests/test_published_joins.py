"""Published embeddings joined with published scores: by LAION's hash, which is computed, or by URL.

LAION's metadata beside its embeddings have no punsafe, so what a ceiling judges comes from a join.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from laion_tables import laion_hash
from small_inputs import (
    NOT_UTF8,
    ingest,
    recipe_for,
    record,
    rows_of,
    run_here,
    stages,
    text_array,
    unit_rows,
    write_embeddings,
)

from manifests.errors import UserError
from manifests.work import StageDir
from pipelines.cli import main

Pairs = list[tuple[str, bytes | str | None]]


def pairs_of(file: int, num_rows: int) -> Pairs:
    return [(f"https://e.org/{file}/{i}.jpg", f"a thing, no {i}") for i in range(num_rows)]


def write_published(folder: Path, number: int, pairs: Pairs, **columns: Any) -> Path:
    """Write random embeddings whose metadata have these URLs and captions, and no punsafe."""
    captions = [text.encode() if isinstance(text, str) else text for _, text in pairs]
    texts = text_array([text or b"" for text in captions])
    known = pa.array([text is not None for text in captions])
    table = {
        "image_path": [f"{number:05d}{row:04d}" for row in range(len(pairs))],
        "caption": pa.compute.if_else(known, texts, None),
        "url": [url for url, _ in pairs],
    }
    rows = unit_rows(len(pairs), seed=number)
    return write_embeddings(folder, number, rows, metadata=pa.table(table | columns))


def score_table(path: Path, **columns: Any) -> str:
    path.parent.mkdir(exist_ok=True)
    pq.write_table(pa.table(columns), path)
    return str(path)


def ingest_joined(folder: Path, *join: str, **options: Any) -> StageDir:
    return ingest(folder, "clip_retrieval", join=list(join), **options)


def test_a_ceiling_on_punsafe_drops_what_a_joined_table_says_and_no_other_row(
    tmp_path: Path,
) -> None:
    """Scores of every second row, shuffled over two tables; a third of these above 0.45."""
    pairs = {number: pairs_of(number, 60) for number in range(3)}
    pairs[1][6] = (pairs[1][6][0], NOT_UTF8)
    pairs[2][8] = (pairs[2][8][0], "  a caption with white space around it ")
    pairs[2][12] = (pairs[2][12][0], None)
    for number, rows in pairs.items():
        write_published(tmp_path / "in", number, rows)
    keyed = {f"{n:05d}{i:04d}": laion_hash(*row) for n in pairs for i, row in enumerate(pairs[n])}
    scored = {key: 0.46 if at % 3 == 0 else 0.45 for at, key in enumerate(list(keyed)[::2])}
    order = np.random.default_rng(0).permutation(list(scored))
    for at, listed in enumerate((order[:40], order[40:])):
        hashes = [*(keyed[key] for key in listed), 7 + at]
        values = [*(scored[key] for key in listed), 1.0]
        score_table(tmp_path / "scores" / f"{at}.parquet", hash=hashes, punsafe=values)
    recipe = recipe_for(tmp_path / "in", "clip_retrieval", filter={"drop_above_punsafe": 0.45})
    recipe["source"] |= {"join": [str(tmp_path / "scores")], "laion_hash": True}
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    out = str(tmp_path / "out")
    words = ["run", str(tmp_path / "recipe.yaml"), "--out", out, "--executor", "local"]
    result = CliRunner().invoke(main, [*words, "--to", "filter"])
    assert result.exit_code == 0, result.output
    assert "WARNING" not in result.stderr

    links = stages(run_here(recipe, out, until="filter"))  # all is reused
    rows = {row["uid"]: row for row in rows_of(links["ingest"])}
    assert {row["key"]: row["hash"] for row in rows.values()} == keyed
    assert {row["key"]: row["punsafe"] for row in rows.values()} == {
        key: scored.get(key) for key in keyed
    }
    dropped = {
        rows[one["uid"]]["key"]: one["reason"] for one in rows_of(links["filter"]) if one["reason"]
    }
    above = [key for key, value in scored.items() if value > 0.45]
    assert dropped == dict.fromkeys(above, "punsafe_above")
    notes = list(record(links["ingest"])["notes"].values())
    assert sum(one["hash_computed"] for one in notes) == 180
    assert [one["joined"] for one in notes] == [
        {"rows": 60, "matched": 30, "unmatched": 30, "filled": {"punsafe": 30}}
    ] * 3


def test_without_a_hash_tables_are_joined_by_url_and_fill_what_is_not_known(
    tmp_path: Path,
) -> None:
    pairs = pairs_of(0, 4)
    write_published(tmp_path / "in", 0, pairs, NSFW=["UNLIKELY", None, None, None])
    urls = [url for url, _ in pairs]
    tables = [
        score_table(
            tmp_path / "a.parquet",
            URL=[*urls[:2], urls[1], urls[2], "https://e.org/other"],
            NSFW=["NSFW", "UNLIKELY", "UNSURE", "UNLIKELY", "NSFW"],
            punsafe=[0.1, 0.2, 0.3, None, 0.9],
        ),
        score_table(tmp_path / "b.parquet", url=urls[:1], pwatermark=[0.7], AESTHETIC_SCORE=[5.5]),
    ]
    found = rows_of(ingest_joined(tmp_path / "in", *tables))
    assert [row["nsfw"] for row in found] == ["UNLIKELY", "UNSURE", "UNLIKELY", None]
    assert [row["punsafe"] for row in found] == [0.1, 0.3, None, None]
    assert [row["pwatermark"] for row in found] == [0.7, None, None, None]
    assert [row["aesthetic"] for row in found] == [5.5, None, None, None]
    assert [row["hash"] for row in found] == [None] * 4


def test_hashes_that_metadata_have_are_compared_and_stay(tmp_path: Path) -> None:
    pairs = pairs_of(0, 3)
    hashes = [laion_hash(*pair) for pair in pairs]
    write_published(tmp_path / "in", 0, pairs, hash=pa.array([hashes[0], 5, None]))
    table = score_table(tmp_path / "a.parquet", hash=[5, hashes[2]], punsafe=[0.5, 0.6])
    directory = ingest_joined(tmp_path / "in", table, laion_hash=True)
    found = rows_of(directory)
    assert [row["hash"] for row in found] == [hashes[0], 5, hashes[2]]
    assert [row["punsafe"] for row in found] == [None, 0.5, 0.6]
    (notes,) = record(directory)["notes"].values()
    assert (notes["hash_same"], notes["hash_differs"], notes["hash_computed"]) == (1, 1, 1)


def test_a_part_whose_rows_are_all_quarantined_joins_nothing(tmp_path: Path) -> None:
    pairs = pairs_of(0, 2)
    table = pa.table({"url": [url for url, _ in pairs], "caption": [text for _, text in pairs]})
    zeros = np.zeros((2, 16), np.float16)
    write_embeddings(tmp_path / "in", 0, zeros, metadata=table)
    scores = score_table(tmp_path / "a.parquet", hash=[laion_hash(*pairs[0])], punsafe=[0.5])
    directory = ingest_joined(tmp_path / "in", scores, laion_hash=True)
    assert rows_of(directory) == []
    (notes,) = record(directory)["notes"].values()
    assert notes["joined"] == {"rows": 0, "matched": 0, "unmatched": 0, "filled": {}}


def test_a_changed_score_table_is_another_input_of_embeddings_too(tmp_path: Path) -> None:
    (pair,) = pairs_of(0, 1)
    write_published(tmp_path / "in", 0, [pair])
    for value in (0.9, 0.2):
        table = score_table(tmp_path / "a.parquet", url=[pair[0]] * 2, punsafe=[value] * 2)
        (row,) = rows_of(ingest_joined(tmp_path / "in", table))
        assert row["punsafe"] == value


@pytest.mark.parametrize(
    ("brought", "ceiling", "warned"),
    [
        ("punsafe", 0.45, []),
        ("punsafe", None, ["drop_above_punsafe: 0.45"]),
        ("pwatermark", 0.45, ["judges nothing"]),
    ],
)
def test_what_is_warned_of_depends_on_what_is_joined(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    brought: str,
    ceiling: float | None,
    warned: list[str],
) -> None:
    write_published(tmp_path / "in", 0, pairs_of(0, 1))
    table = score_table(tmp_path / "a.parquet", **{"hash": [1], brought: [0.1]})
    sections = {"filter": {"drop_above_punsafe": ceiling}}
    recipe = recipe_for(tmp_path / "in", "clip_retrieval", **sections)
    recipe["source"] |= {"join": [table], "laion_hash": True}
    run_here(recipe, tmp_path / "out")
    stderr = capsys.readouterr().err
    assert stderr.count("WARNING: ingest: ") == len(warned)
    assert all(text in stderr for text in warned)


@pytest.mark.parametrize(
    ("columns", "key", "options", "what"),
    [
        (("url", "caption"), "hash", {}, "no column hash"),
        (("caption",), "hash", {"laion_hash": True}, "no column url"),
        (("url",), "hash", {"laion_hash": True}, "no column caption"),
        (("caption",), "url", {}, "no column url"),
        (("url", "caption"), "name", {}, "cannot be joined"),
    ],
)
def test_metadata_that_cannot_be_joined_are_refused_before_anything_is_read(
    tmp_path: Path, columns: tuple[str, ...], key: str, options: dict[str, Any], what: str
) -> None:
    write_published(tmp_path / "in", 0, pairs_of(0, 1))
    metadata = pa.table({name: ["a"] for name in columns})
    write_embeddings(tmp_path / "in", 1, unit_rows(1), metadata=metadata)
    values: dict[str, Any] = {key: [1] if key == "hash" else ["a"], "punsafe": [0.1]}
    table = score_table(tmp_path / "a.parquet", **values)
    with pytest.raises(UserError, match=what):
        ingest_joined(tmp_path / "in", table, **options)
