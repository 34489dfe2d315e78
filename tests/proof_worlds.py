"""What the proofs share: two small worlds with their recipes, and what a finished run holds."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from small_inputs import recipe_for, unit_rows, write_embeddings

from pipelines.demo.world import make_world

DIM = 32
NOT_RESULTS = {"events.jsonl", ".lock"}
TIMES = {"seconds", "item_seconds", "finished_at"}
"""What a record or marker says of the clock; no two runs agree in it."""
CIRCUMSTANCES = {"executor", "git_commit"}


def tar_recipe(
    folder: Path, *, num_pairs: int = 300, samples_per_shard: int = 60
) -> dict[str, Any]:
    """Make a demo world in `folder` and return a recipe of all stages for it."""
    world = make_world(folder, num_pairs=num_pairs, samples_per_shard=samples_per_shard)
    return recipe_for(
        world.shards_dir,
        "img2dataset",
        seed=3,
        max_quarantine_fraction=0.2,
        filter={"min_side": 32, "max_aspect_ratio": 3.0, "min_caption_words": 2},
        embed={"model": "warren:demo/model", "batch_size": 16},
        cluster={"num_clusters": 12, "iterations": 3, "min_rows_per_centroid": 1},
        dedup={"similarity_above": 0.86},
        select={"clip_band": [0.1, 0.9], "num_samples": 100},
        assemble={"samples_per_shard": 16},
    )


def embeddings_recipe(folder: Path, *, num_parts: int = 8, num_rows: int = 150) -> dict[str, Any]:
    """Write published embeddings with planted near-duplicates and return a recipe for them."""
    for part in range(num_parts):
        images = unit_rows(num_rows, dim=DIM, seed=part)
        texts = unit_rows(num_rows, dim=DIM, seed=1000 + part)
        images[: num_rows // 3] = _near(unit_rows(num_rows // 3, dim=DIM, seed=77), seed=part)
        write_embeddings(folder, part, images, texts)
    return recipe_for(
        folder,
        "clip_retrieval",
        seed=5,
        filter={"min_caption_chars": 3},
        cluster={"num_clusters": 24, "iterations": 3, "min_rows_per_centroid": 1},
        dedup={"similarity_above": 0.9},
        select={"clip_band": [0.2, 0.9], "centroid_band": [0.05, 0.95], "num_samples": 200},
    )


def _near(rows: np.ndarray, *, seed: int) -> np.ndarray:
    moved = rows + np.random.default_rng(seed).normal(scale=0.03, size=rows.shape)
    return (moved / np.linalg.norm(moved, axis=1, keepdims=True)).astype(np.float16)


def results(out: Path | str) -> dict[str, str]:
    """Return path -> SHA-256 of everything in a run directory, the clock and the place aside.

    Markers and records count too, without the seconds that they name.
    """
    files = sorted(path for path in Path(out).rglob("*") if path.is_file())
    named = {path.relative_to(out).as_posix(): path for path in files}
    return {name: _digest(path) for name, path in named.items() if path.name not in NOT_RESULTS}


def _digest(path: Path) -> str:
    content = path.read_bytes()
    if path.name == "record.json" or path.parent.name == "_done":
        content = json.dumps(_timeless(json.loads(content)), sort_keys=True).encode()
    return hashlib.sha256(content).hexdigest()


def _timeless(value: Any) -> Any:
    if isinstance(value, Mapping):
        kept = {name: one for name, one in value.items() if name not in TIMES | CIRCUMSTANCES}
        return {name: _timeless(one) for name, one in kept.items()}
    return [_timeless(one) for one in value] if isinstance(value, list) else value


def temporaries(out: Path | str) -> list[str]:
    """Return the files that killed writers left."""
    return sorted(str(path) for path in Path(out).rglob(".*.tmp"))
