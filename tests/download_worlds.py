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
from small_inputs import recipe_for, unit_rows, write_embeddings

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


def embeddings_of(folder: Path, urls: Sequence[Sequence[str]], **columns: list[Any]) -> Path:
    """Write published embeddings whose metadata name URLs, a file for each list of them."""
    for number, some in enumerate(urls):
        table = pa.table(
            {
                "image_path": [f"{number}-{row}" for row in range(len(some))],
                "caption": [f"caption {row} of {number}" for row in range(len(some))],
                "url": list(some),
            }
            | {name: values[: len(some)] for name, values in columns.items()}
        )
        rows = unit_rows(len(some), seed=number)
        write_embeddings(folder, number, rows, metadata=table)
    return folder


def download_recipe(folder: Path, **settings: Any) -> dict[str, Any]:
    """Return a recipe that fetches the URLs of published embeddings."""
    return recipe_for(folder, "clip_retrieval", download=PATIENT | settings)


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
