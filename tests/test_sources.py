"""Sources of every kind: files damaged at random, and paths and kinds that mean nothing."""

from __future__ import annotations

import random
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from small_inputs import pair, recipe_for, run_here, unit_rows, write_embeddings, write_tars

from curate.media import tar_source
from curate.source_config import SourceConfig
from curate.vectors import published
from manifests import ledger
from manifests.errors import UserError
from manifests.ledger import Tally
from manifests.work import Output
from pipelines.recipe import parse

# ---- random damage


def damaged(content: bytes, rng: random.Random) -> bytes:
    """Return the bytes with some changed, cut out or repeated."""
    data = bytearray(content)
    for _ in range(rng.randint(1, 8)):
        at, length = rng.randrange(len(data)), rng.randrange(1, 1500)
        kind = rng.choice(("change", "cut", "repeat"))
        if kind == "change":
            data[at] = rng.randrange(256)
        else:
            data[at : at + (length if kind == "cut" else 0)] = (
                b"" if kind == "cut" else data[at : at + length]
            )
    return bytes(data)


def check_output(output: Output) -> Tally:
    """Check that every row of an ingested part has exactly one fate; return the accounts."""
    (table,) = output.files.values()
    assert isinstance(table, pa.Table)
    assert output.verdicts is not None
    assert output.quarantine is not None
    counts = ledger.tally(output.verdicts)
    assert counts.adds_up
    table.validate(full=True)
    assert (table.num_rows, output.quarantine.num_rows) == (counts.kept, counts.num_quarantined)
    return counts


def test_tars_damaged_at_random_are_rows_or_user_errors(tmp_path: Path) -> None:
    rng = random.Random(0)
    members = [m for row in range(4) for m in pair(f"k{row}", url="u", width=8, n=[1, {"a": 2}])]
    folder = write_tars(tmp_path / "in", {"0.tar": members})
    pq.write_table(pa.table({"key": ["k0", "k1"], "url": ["u", "v"]}), folder / "0.parquet")
    whole, listing = (folder / "0.tar").read_bytes(), (folder / "0.parquet").read_bytes()
    source = SourceConfig(kind="webdataset", path=str(folder))
    seen, num_refused = Tally(), 0
    for attempt in range(150):
        (folder / "0.tar").write_bytes(damaged(whole, rng))
        (folder / "0.parquet").write_bytes(listing if attempt % 3 else damaged(listing, rng))
        try:
            seen += check_output(tar_source.ingest_part(source, str(folder), 0, [(0, "0.tar")]))
        except UserError:
            num_refused += 1
    assert seen.adds_up
    assert min(seen.kept, seen.num_quarantined, num_refused) > 0


def test_embedding_files_damaged_at_random_are_rows_or_user_errors(tmp_path: Path) -> None:
    rng = random.Random(0)
    columns = {
        "key": [f"k{row}" for row in range(20)],
        "width": range(20),
        "tags": [["a", "b"]] * 20,
        "kind": pa.array(["u", "v"] * 10).dictionary_encode(),
    }
    folder = write_embeddings(
        tmp_path / "in", 0, unit_rows(20), unit_rows(20, seed=1), pa.table(columns)
    )
    whole = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    source = SourceConfig(kind="clip_retrieval", path=str(folder))
    seen, num_refused = Tally(), 0
    for _ in range(150):
        for path, content in whole.items():
            path.write_bytes(damaged(content, rng) if rng.random() < 0.4 else content)
        published.forget_listing()
        try:
            root, names = published.shards(str(folder))
            published.check_files(root, names)
            seen += check_output(published.ingest_part(source, root, 0, [(0, names[0])]))
        except UserError:
            num_refused += 1
    assert seen.adds_up
    assert min(seen.kept, seen.num_quarantined, num_refused) > 0


# ---- where the source lies


def test_a_source_path_that_is_not_there_is_a_user_error_before_anything_is_made(
    tmp_path: Path,
) -> None:
    for kind in ("webdataset", "clip_retrieval"):
        with pytest.raises(UserError, match="fix:"):
            run_here(recipe_for(tmp_path / "none", kind), tmp_path / "out")
    assert not list((tmp_path / "out").glob("ingest-*"))


def test_a_source_kind_that_is_unknown_is_a_user_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"recipe\.source\.kind"):
        parse(recipe_for(tmp_path, "parquet"))
