"""Earlier stages' tables for tests of the resolve stage, and what it makes of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from small_inputs import rows_of

from curate.media.image_places import read_images
from curate.media.resolve import ResolveConfig
from curate.source_config import SourceConfig
from manifests import ledger
from manifests.schemas import CLEANED, CONVERSATIONS, RESOLVED, SAMPLES, VERDICTS, conform
from manifests.work import Item, Output, StageDir, View, commit
from pipelines.stages import STAGES

SOURCE = SourceConfig(kind="llava_json", files={"svit": "svit.json"})
Rows = Sequence[tuple[str, list[str]]]


def earlier_stages(folder: Path, parts: Sequence[Rows], dropped: Sequence[str] = ()) -> View:
    """Write what ingest and clean leave of rows (key, images), and return what resolve sees."""
    ingest = View("ingest", SOURCE, SOURCE, 0, str(folder / "ingest-1"))
    clean = View("clean", SOURCE, SOURCE, 0, str(folder / "clean-1"))
    for part, rows in enumerate(parts):
        uids = np.arange(len(rows), dtype=np.uint64) + 1000 * part
        item = Item(f"part-{part:05d}", {"part": part})
        commit(ingest, item, _ingested(item, uids, rows), seconds=0)
        reasons = ["empty" if key in dropped else "" for key, _ in rows]
        verdicts = ledger.verdicts("clean", uids, reasons=reasons)
        files = {f"{item.name}.parquet": CLEANED.empty_table()}
        commit(clean, item, Output(files=files, verdicts=verdicts), seconds=0)
    before = {"ingest": ingest.own, "clean": clean.own}
    return View("resolve", SOURCE, SOURCE, 0, str(folder / "resolve-1"), before)


def _ingested(item: Item, uids: Any, rows: Rows) -> Output:
    samples = [
        {"uid": uid, "key": key, "source": "svit", "shard": "svit/svit.json", "caption": "why?"}
        | {"offset": 0, "size": 1}
        for uid, (key, _) in zip(uids, rows, strict=True)
    ]
    turns = [{"role": "human", "text": "why?"}, {"role": "gpt", "text": "so"}]
    talks = [
        {"uid": uid, "images": images, "turns": turns}
        for uid, (_, images) in zip(uids, rows, strict=True)
    ]
    files = {
        f"{item.name}.parquet": conform(pa.Table.from_pylist(samples, SAMPLES), SAMPLES),
        f"conversations/{item.name}.parquet": pa.Table.from_pylist(talks, CONVERSATIONS),
    }
    return Output(files=files, verdicts=ledger.verdicts("ingest", uids, reasons=[""] * len(uids)))


def resolve(
    folder: Path, rows: Rows, dropped: Sequence[str] = (), parts: int = 1, **config: Any
) -> StageDir:
    """Resolve rows of some parts, phase by phase, as a run does, and check the accounts."""
    size = -(-len(rows) // parts)
    cut = [rows[at : at + size] for at in range(0, len(rows), size)]
    view = earlier_stages(folder, cut, dropped)
    found = ResolveConfig.load(config, where="recipe.resolve").located()
    view = View("resolve", found, SOURCE, 0, view.path, view.before)
    stage = STAGES["resolve"]
    for phase in stage.phases:
        for item in stage.plan(phase, view):
            commit(view, item, stage.work(phase, view, item), seconds=0)
    verdicts = [pq.read_table(path) for path in view.own.verdict_files()]
    assert all(table.schema.equals(VERDICTS) for table in verdicts)
    judged = [uid for table in verdicts for uid in table["uid"].to_pylist()]
    kept_by_clean = [row["uid"] for row in rows_of(view.before["clean"], "verdicts") if row["keep"]]
    assert judged == kept_by_clean
    assert [pq.read_table(path).schema.equals(RESOLVED) for path in view.own.files()] == [True] * (
        len(cut)
    )
    return view.own


def write_files(folder: Path, files: Mapping[str, bytes]) -> Path:
    for name, data in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return folder


def places(directory: StageDir) -> list[tuple[str, int, str]]:
    return [(row["root"], row["choice"], row["file"]) for row in rows_of(directory)]


def bytes_of(directory: StageDir, roots: Mapping[str, Any]) -> list[bytes]:
    """Return the bytes of all resolved images, as the mix stage reads them."""
    columns = ("root", "choice", "file", "offset", "size")
    return list(read_images(roots, [tuple(r[c] for c in columns) for r in rows_of(directory)]))


def detail_of(directory: StageDir) -> str:
    (row,) = rows_of(directory, "quarantine")
    return str(row["detail"])
