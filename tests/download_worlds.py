"""Published lists of URLs over a server on loopback, and what the download stage made of them."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from hostile_server import HostileServer
from PIL import Image
from small_inputs import recipe_for, rows_of, run_here, stages

from manifests.work import StageDir

PATIENT: dict[str, Any] = {
    "allow_private_addresses": True,
    "attempts": 2,
    "retry_wait_seconds": 0.0,
    "max_retry_wait_seconds": 0.0,
    "concurrency": 8,
}
"""Loopback is no public address; a busy machine must not turn an answer into a timeout."""


def photo(number: int, width: int = 40, height: int = 30, *, kind: str = "JPEG") -> bytes:
    """Return an image file of random colours, a different one for each number."""
    rng = np.random.default_rng(number)
    small = Image.fromarray(rng.integers(0, 256, (4, 5, 3), dtype=np.uint8))
    file = io.BytesIO()
    small.resize((width, height), Image.Resampling.BICUBIC).save(file, kind)
    return file.getvalue()


def serve_photos(server: HostileServer, num: int, **size: int) -> list[str]:
    """Serve photos and return their URLs."""
    return [server.serve_bytes(f"/photo/{n}.jpg", photo(n, **size)) for n in range(num)]


def table_of(folder: Path, urls: Sequence[str | None], **columns: Sequence[Any]) -> Path:
    """Write a table of URLs and captions, as LAION publishes it, and return it."""
    folder.mkdir(parents=True, exist_ok=True)
    captions = [f"caption {row}, ☀" for row in range(len(urls))]
    given = {name: list(values) for name, values in columns.items()}
    table = pa.table({"URL": list(urls), "TEXT": captions} | given)
    pq.write_table(table, folder / "urls.parquet")
    return folder / "urls.parquet"


def download_recipe(table: Path, *, rows_per_shard: int = 10, **settings: Any) -> dict[str, Any]:
    """Return a recipe that fetches a table's URLs."""
    recipe = recipe_for(table, "url_table", download=PATIENT | settings)
    recipe["source"]["rows_per_shard"] = rows_per_shard
    return recipe


def downloaded(table: Path, out: Path, **settings: Any) -> StageDir:
    """Run a recipe that fetches a table's URLs and return the stage."""
    return stages(run_here(download_recipe(table, **settings), out))["download"]


def fates(stage: StageDir) -> dict[int, str]:
    """Return row -> reason, by position in a table of 10 rows a shard; kept rows have ""."""
    found = rows_of(stage, "verdicts")
    uids = [one["uid"] for one in found]
    return {(u >> 24) * 10 + (u & 0xFFFFFF): r["reason"] for u, r in zip(uids, found, strict=True)}


def listing(path: Path | str) -> list[dict[str, Any]]:
    """Return the rows of a shard's parquet."""
    return pq.read_table(path).to_pylist()


def tar_members(path: Path | str) -> dict[str, bytes]:
    """Return the members of a tar, in its order."""
    with tarfile.open(path) as archive:
        return {one.name: archive.extractfile(one).read() for one in archive}  # type: ignore[union-attr]


def shard_bytes(stage: Path | str) -> dict[str, bytes]:
    """Return name -> content of the shards' tars and parquets."""
    files = sorted(Path(stage, "shards").iterdir())
    return {one.name: one.read_bytes() for one in files if not one.name.endswith("_stats.json")}


def stats(stage: Path | str, shard: int = 0) -> Mapping[str, Any]:
    """Return a shard's _stats.json."""
    found: Mapping[str, Any] = json.loads(Path(stage, f"shards/{shard:05d}_stats.json").read_text())
    return found
