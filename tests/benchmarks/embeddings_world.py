"""Synthetic embeddings (see `synthetic`) in clip-retrieval's layout, a file at a time.

Seeded by (seed, part): the same arguments give the same bytes on one machine.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from synthetic import DIM, ROWS_PER_PART, World, unit


def write_world(
    folder: Path,
    *,
    num_rows: int,
    dim: int = DIM,
    rows_per_file: int = ROWS_PER_PART,
    seed: int = 0,
) -> None:
    """Write img_emb/, text_emb/ and metadata/ of `num_rows` rows below `folder`."""
    for kind in ("img_emb", "text_emb", "metadata"):
        (folder / kind).mkdir(parents=True, exist_ok=True)
    world = World.of(seed, dim)
    for part, first in enumerate(range(0, num_rows, rows_per_file)):
        images = world.rows(min(rows_per_file, num_rows - first), part=part)
        rng = np.random.default_rng((seed, part))
        texts = unit(0.5 * images + unit(rng.standard_normal(images.shape, np.float32)))
        np.save(folder / f"img_emb/img_emb_{part:04d}.npy", images)
        np.save(folder / f"text_emb/text_emb_{part:04d}.npy", texts.astype(np.float16))
        pq.write_table(
            _metadata(part, len(images)), folder / f"metadata/metadata_{part:04d}.parquet"
        )


def _metadata(part: int, size: int) -> pa.Table:
    keys = [f"{part:05d}{row:06d}" for row in range(size)]
    return pa.table(
        {
            "image_path": keys,
            "caption": [f"caption of {key}" for key in keys],
            "url": [f"https://img.example.com/{key}.jpg" for key in keys],
            "NSFW": ["UNLIKELY"] * size,
            "similarity": np.full(size, 0.3),
        }
    )
