"""The plain way to a mix: load the JSON, shuffle it, write a shard of 10,000 after the other.

    python tests/benchmarks/plain_mix.py WORLD OUT

WORLD is what mix_world writes. The whole file is in memory, and one process does everything.
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path
from typing import Any

import webdataset

SAMPLES_PER_SHARD = 10_000


def mix(world: Path, out: Path, *, seed: int = 0) -> int:
    """Write <out>/00000.tar ... and return how many samples they hold."""
    with (world / "rows.json").open(encoding="utf-8") as file:
        rows: list[dict[str, Any]] = json.load(file)
    random.Random(seed).shuffle(rows)
    out.mkdir(parents=True)
    with webdataset.ShardWriter(f"{out}/%05d.tar", maxcount=SAMPLES_PER_SHARD, verbose=0) as shards:
        for number, row in enumerate(rows):
            sample: dict[str, Any] = {"__key__": f"{number:09d}", "json": row}
            if "image" in row:
                sample["jpg"] = (world / row["image"]).read_bytes()
            shards.write(sample)
    return len(rows)


if __name__ == "__main__":
    mix(Path(sys.argv[1]), Path(sys.argv[2]))
