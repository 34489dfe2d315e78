"""Small inputs for tests: image tars made with the standard library, published embeddings, runs.

And what such runs left: their rows, records, events and files.
"""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from manifests.work import StageDir
from pipelines.chain import Link
from pipelines.executors import LocalExecutor
from pipelines.progress import Progress
from pipelines.recipe import parse
from pipelines.run import run

DIM = 16
Entries = Iterable[tuple[str, bytes]]
NOT_UTF8 = b"caf\xe9 noir"


def picture(width: int = 8, height: int = 6, *, kind: str = "JPEG", shade: int = 90) -> bytes:
    """Return an image file: a gradient, so that it is not empty."""
    ramp = np.linspace(shade, 255, width, dtype=np.uint8)
    pixels = np.repeat(np.tile(ramp, (height, 1))[:, :, None], 3, axis=2)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format=kind)
    return file.getvalue()


def tar_of(entries: Entries) -> bytes:
    """Return a plain tar of (member name, content)."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for name, data in entries:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return file.getvalue()


def pair(key: str, caption: str | None = None, **values: Any) -> list[tuple[str, bytes]]:
    """Return the members of one good pair; `values` make a key.json."""
    members = [(f"{key}.jpg", picture())]
    if values:
        members.append((f"{key}.json", json.dumps(values).encode()))
    return [*members, (f"{key}.txt", (caption or f"the caption of {key}").encode())]


def write_tars(folder: Path, shards: Mapping[str, Entries | bytes]) -> Path:
    """Write shards by name; bytes are written as they are."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, entries in shards.items():
        content = entries if isinstance(entries, bytes) else tar_of(entries)
        (folder / name).write_bytes(content)
    return folder


def good_tars(folder: Path, *, num_shards: int = 3, num_pairs: int = 4) -> Path:
    """Write shards 00000.tar ... of pairs with keys "<shard><row>"."""
    shards = {
        f"{shard:05d}.tar": [
            member for row in range(num_pairs) for member in pair(f"{shard:05d}{row:04d}")
        ]
        for shard in range(num_shards)
    }
    return write_tars(folder, shards)


def unit_rows(num_rows: int, *, dim: int = DIM, seed: int = 0) -> npt.NDArray[np.float16]:
    """Return random unit rows."""
    rows = np.random.default_rng(seed).normal(size=(num_rows, dim))
    unit: npt.NDArray[np.float16] = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    return unit.astype(np.float16)


def write_embeddings(
    folder: Path,
    number: int | str,
    images: npt.NDArray[Any],
    texts: npt.NDArray[Any] | None = None,
    metadata: pa.Table | None = None,
) -> Path:
    """Write the three files of one number; metadata default to a key and a caption."""
    name = number if isinstance(number, str) else f"{number:04d}"
    if metadata is None:
        keys = [f"{name}-{row}" for row in range(len(images))]
        captions = [f"a caption of {key}" for key in keys]
        metadata = pa.table({"image_path": keys, "caption": captions})
    for kind in ("img_emb", "text_emb", "metadata"):
        (folder / kind).mkdir(parents=True, exist_ok=True)
    np.save(folder / "img_emb" / f"img_emb_{name}.npy", images)
    np.save(folder / "text_emb" / f"text_emb_{name}.npy", images if texts is None else texts)
    pq.write_table(metadata, folder / "metadata" / f"metadata_{name}.parquet")
    return folder


def embeddings(folder: Path, *, num_parts: int = 3, num_rows: int = 40) -> Path:
    """Write a published data set of random rows, with a near-duplicate pair in each part."""
    for part in range(num_parts):
        images = unit_rows(num_rows, seed=part)
        images[1] = images[0]
        write_embeddings(folder, part, images, unit_rows(num_rows, seed=100 + part))
    return folder


def recipe_for(path: Path | str, kind: str, **sections: Any) -> dict[str, Any]:
    """Return the mapping of a recipe."""
    return {"source": {"kind": kind, "path": str(path)}, **sections}


def run_here(values: Mapping[str, Any], out: Path | str, until: str | None = None) -> list[Link]:
    """Run a recipe with the local executor."""
    recipe, folder = parse(values), str(out)
    return run(recipe, folder, executor=LocalExecutor(), progress=Progress(folder), until=until)


def stages(links: Sequence[Link]) -> dict[str, StageDir]:
    """Return stage -> finished directory."""
    return {link.stage.name: link.directory for link in links}


def rows_of(directory: StageDir, folder: str = "") -> list[dict[str, Any]]:
    """Return all rows of a stage's tables, in part order."""
    tables = (pq.read_table(path) for path in directory.files(folder))
    return [row for table in tables for row in table.to_pylist()]


def bad_rows(directory: StageDir) -> list[tuple[str, str]]:
    """Return the (key, error class) of all quarantined rows; the verdicts must say the same."""
    found = rows_of(directory, "quarantine")
    verdicts = rows_of(directory, "verdicts") or rows_of(directory)
    reasons = {row["uid"]: row["reason"] for row in verdicts if row["reason"]}
    assert reasons == {row["uid"]: f"quarantine:{row['error']}" for row in found}
    return [(row["key"], row["error"]) for row in found]


def text_array(values: list[bytes]) -> pa.Array:
    """Return a string array of any bytes, UTF-8 or not, as parquet files may hold."""
    return pa.Array.from_buffers(pa.string(), len(values), pa.array(values, pa.binary()).buffers())


def record(directory: StageDir) -> dict[str, Any]:
    """Return the record of a finished stage."""
    found = directory.record()
    assert found is not None
    return found


def chain_with_losses(folder: Path) -> dict[str, StageDir]:
    """Run over a kept, a filtered and a quarantined pair, and a key that two shards have."""
    shards = {
        "00000.tar": [*pair("long", "five words in this caption"), *pair("short", "one")],
        "00001.tar": [("broken.jpg", b""), ("broken.txt", b"x"), *pair("twice", "two words")],
        "00002.tar": [*pair("twice", "two words"), *pair("3", "a key of digits")],
    }
    tars = write_tars(folder / "in", shards)
    recipe = recipe_for(tars, "webdataset", filter={"min_caption_words": 2})
    return stages(run_here(recipe | {"max_quarantine_fraction": 0.5}, folder / "out"))


def ingest(folder: Path, kind: str = "webdataset", **options: Any) -> StageDir:
    """Ingest a folder however bad it is, check the accounts and return the stage."""
    values = recipe_for(folder, kind, max_quarantine_fraction=1.0)
    values["source"] |= options
    directory = stages(run_here(values, folder.parent / "out"))["ingest"]
    counts = record(directory)
    kept, bad = rows_of(directory), rows_of(directory, "quarantine")
    assert (counts["rows_in"], counts["kept"]) == (len(kept) + len(bad), len(kept))
    uids = sorted(row["uid"] for row in kept + bad)
    assert uids == sorted(row["uid"] for row in rows_of(directory, "verdicts"))
    assert len(set(uids)) == len(uids)
    return directory


def ingest_members(tmp_path: Path, *members: tuple[str, bytes], good: int = 0) -> StageDir:
    """Ingest one shard of these members, after `good` good pairs."""
    before = [member for row in range(good) for member in pair(f"good{row}")]
    return ingest(write_tars(tmp_path / "in", {"00000.tar": [*before, *members]}))


def only_sample(directory: StageDir) -> dict[str, Any]:
    """Return the one sample of a stage that quarantined nothing."""
    (row,) = rows_of(directory)
    assert bad_rows(directory) == []
    return row


def names_below(folder: Path) -> list[str]:
    """Return the paths of all files of a folder, in order."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def snapshot(folder: Path) -> dict[str, int]:
    """Return path -> modification time of every file in the stages' directories."""
    files = (path for path in folder.glob("*-*/**/*") if path.is_file())
    return {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in files}


def contents(folder: Path) -> dict[str, bytes]:
    """Return path -> bytes of every table of a run."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*.parquet")}


def events(out: Path) -> list[dict[str, Any]]:
    """Return the events of a run, in order."""
    return [json.loads(line) for line in (out / "events.jsonl").read_text().splitlines()]
