"""Checks: every planted corruption of a finished run is found."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from small_inputs import chain_with_losses, embeddings, recipe_for, run_here, stages

from manifests import checks, store
from manifests.schemas import CORESET
from manifests.work import StageDir


@pytest.fixture
def chain(tmp_path: Path) -> dict[str, StageDir]:
    return chain_with_losses(tmp_path)


Corruption = Callable[[dict[str, StageDir]], None]


def flip_a_byte(chain: dict[str, StageDir]) -> None:
    path = Path(chain["filter"].files()[0])
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def remove_a_part(chain: dict[str, StageDir]) -> None:
    Path(chain["filter"].files()[1]).unlink()


def replace_a_part_by_junk(chain: dict[str, StageDir]) -> None:
    Path(chain["filter"].files()[0]).write_bytes(b"junk")


def remove_a_part_and_its_marker(chain: dict[str, StageDir]) -> None:
    remove_a_part(chain)
    (Path(chain["filter"].path) / "_done" / "part-00001.json").unlink()


def forge(directory: StageDir, path: str, table: pa.Table, *, also_record: bool) -> None:
    """Write another table in a part's place, with a marker (and record) that agree with it."""
    name = path.removeprefix(directory.path + "/")
    written = store.write(directory.path, name, table)
    new = {
        "path": name,
        "bytes": written.num_bytes,
        "sha256": written.sha256,
        "rows": table.num_rows,
    }
    item = Path(name).stem
    marker = next(one for one in directory.markers() if one["item"] == item)
    marker["files"] = [new if one["path"] == name else one for one in marker["files"]]
    store.write_json(directory.path, f"_done/{item}.json", marker)
    kept = directory.record()
    assert kept is not None
    for part in kept["parts"]:
        if part["item"] == item and also_record:
            part["files"] = marker["files"]
    store.write_json(directory.path, "record.json", kept)


def remove_a_verdict_and_forge_the_marker(chain: dict[str, StageDir]) -> None:
    path = chain["filter"].files()[0]
    forge(chain["filter"], path, store.read_table(path).slice(1), also_record=False)


def remove_a_verdict_and_forge_everything(chain: dict[str, StageDir]) -> None:
    path = chain["filter"].files()[0]
    forge(chain["filter"], path, store.read_table(path).slice(1), also_record=True)
    change_record(chain["filter"], lambda r: r.update(rows_in=r["rows_in"] - 1, kept=r["kept"] - 1))


def judge_a_row_twice(chain: dict[str, StageDir]) -> None:
    path = chain["filter"].files()[0]
    table = store.read_table(path)
    forge(chain["filter"], path, pa.concat_tables([table, table.slice(0, 1)]), also_record=True)


def remove_a_sample(chain: dict[str, StageDir]) -> None:
    path = chain["ingest"].files()[0]
    forge(chain["ingest"], path, store.read_table(path).slice(1), also_record=True)


def remove_a_quarantine_row(chain: dict[str, StageDir]) -> None:
    path = chain["ingest"].files("quarantine")[0]
    forge_quarantine = store.read_table(path).slice(1)
    forge(chain["ingest"], path, forge_quarantine, also_record=True)


def change_record(directory: StageDir, change: Callable[[dict[str, Any]], None]) -> None:
    kept = directory.record()
    assert kept is not None
    change(kept)
    store.write_json(directory.path, "record.json", kept)


CORRUPTIONS: dict[str, tuple[Corruption, str, str]] = {
    "a flipped byte": (flip_a_byte, "filter", "files have their digests"),
    "a part removed": (remove_a_part, "filter", "files have their digests"),
    "a part and its marker removed": (
        remove_a_part_and_its_marker,
        "filter",
        "files have their digests",
    ),
    "a verdict removed, marker forged": (
        remove_a_verdict_and_forge_the_marker,
        "filter",
        "markers are the record's",
    ),
    "a verdict removed, all forged": (
        remove_a_verdict_and_forge_everything,
        "filter",
        "judges what the stage before kept",
    ),
    "a row judged twice": (judge_a_row_twice, "filter", "each row judged once"),
    "a sample removed": (remove_a_sample, "ingest", "samples are the kept rows"),
    "a quarantine row removed": (
        remove_a_quarantine_row,
        "ingest",
        "quarantine tables are complete",
    ),
    "counts forged": (
        lambda chain: change_record(chain["filter"], lambda r: r.update(kept=0, rows_in=0)),
        "filter",
        "counts are the record's",
    ),
    "made from another stage": (
        lambda chain: change_record(chain["filter"], lambda r: r["inputs"].update(ingest="0" * 64)),
        "filter",
        "made from the stages before",
    ),
    "another fingerprint": (
        lambda chain: change_record(chain["filter"], lambda r: r.update(fingerprint="0" * 64)),
        "filter",
        "directory has its fingerprint",
    ),
    "no record": (
        lambda chain: (Path(chain["filter"].path) / "record.json").unlink(),
        "filter",
        "finished",
    ),
    "a part that is no parquet": (
        replace_a_part_by_junk,
        "filter",
        "readable",
    ),
}


def broken(tmp_path: Path, chain: dict[str, StageDir]) -> set[tuple[str, str]]:
    findings = checks.check(str(tmp_path / "out"), chain)
    return {(one.stage, one.rule) for one in findings if not one.holds}


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_check_finds_the_planted_corruption(
    tmp_path: Path, chain: dict[str, StageDir], name: str
) -> None:
    assert broken(tmp_path, chain) == set()
    corrupt, stage, rule = CORRUPTIONS[name]
    corrupt(chain)
    assert (stage, rule) in broken(tmp_path, chain)


@pytest.fixture
def selected(tmp_path: Path) -> dict[str, StageDir]:
    """A run up to select, on embeddings."""
    recipe = recipe_for(
        embeddings(tmp_path / "in"),
        "clip_retrieval",
        cluster={"num_clusters": 4, "min_rows_per_centroid": 1},
        dedup={},
        select={"clip_band": [0.1, 0.9], "centroid_band": [0.1, 0.9], "num_samples": 20},
    )
    return stages(run_here(recipe, tmp_path / "out"))


def test_check_finds_a_changed_coreset(tmp_path: Path, selected: dict[str, StageDir]) -> None:
    assert broken(tmp_path, selected) == set()
    top = tmp_path / "out" / "coreset.parquet"
    table = pq.read_table(top)
    assert table.schema.equals(CORESET)
    assert table.num_rows == 20
    pq.write_table(table.slice(1), top)
    assert broken(tmp_path, selected) == {("select", "top coreset.parquet is a copy")}
    top.unlink()
    assert broken(tmp_path, selected) == {("select", "top coreset.parquet is a copy")}
    inner = Path(selected["select"].path) / "coreset.parquet"
    pq.write_table(table.take(pa.array(range(20)[::-1])), inner)
    assert ("select", "coreset is the kept rows by uid") in broken(tmp_path, selected)
    inner.unlink()
    assert ("select", "readable") in broken(tmp_path, selected)
