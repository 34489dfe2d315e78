"""Tars of different pictures with captions of several scripts, and runs that assemble them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from small_inputs import picture, recipe_for, rows_of, run_here, stages, write_tars

from manifests.work import StageDir

PER_SHARD = 4


def originals(num_shards: int = 3, num_pairs: int = 5) -> dict[str, dict[str, bytes]]:
    """Return shard -> member -> content: different pictures, captions of several scripts."""

    def members(shard: int) -> dict[str, bytes]:
        found = {}
        for row in range(num_pairs):
            key = f"{shard:05d}{row:04d}"
            found[f"{key}.jpg"] = picture(20 + row, 16 + shard, shade=10 * row + 50 * shard)
            found[f"{key}.txt"] = f"número {row}, 絵 <{shard}> & ☀".encode()
        return found

    return {f"{shard:05d}.tar": members(shard) for shard in range(num_shards)}


def written(folder: Path, shards: dict[str, dict[str, bytes]] | None = None) -> Path:
    return write_tars(folder, {n: list(m.items()) for n, m in (shards or originals()).items()})


def recipe(folder: Path, **sections: Any) -> dict[str, Any]:
    config = {"samples_per_shard": PER_SHARD}
    values = recipe_for(folder, "webdataset", assemble=config, max_quarantine_fraction=1.0)
    return {**values, **sections}


def assembled(folder: Path, out: str = "out", **sections: Any) -> StageDir:
    """Run ingest and assemble, or the given sections, over a folder of tars."""
    return stages(run_here(recipe(folder, **sections), folder.parent / out))["assemble"]


def plain_keys(directory: StageDir) -> list[str]:
    return [row["key"] for row in rows_of(directory)]
