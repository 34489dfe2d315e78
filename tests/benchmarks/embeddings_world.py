"""Synthetic embeddings with known near-duplicates, written in clip-retrieval's layout.

Random directions with a power-law spectrum; a share of the rows are near copies of earlier ones, in
groups with a heavy tail. Seeded by (seed, part): the same arguments give the same bytes.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

Rows = npt.NDArray[np.float32]

DUPLICATE_SHARE = 0.5
"""Of the rows, about what LAION-2B loses at 0.86 (arXiv 2402.11530: 46.4% stay)."""
COPY_NOISE = 0.25
"""Length of a copy's noise: its similarity to the original is 1 / sqrt(1 + 0.25^2) = 0.97."""


def write_world(
    folder: Path, *, num_rows: int, dim: int = 768, rows_per_file: int = 100_000, seed: int = 0
) -> None:
    """Write img_emb/, text_emb/ and metadata/ of `num_rows` rows below `folder`."""
    for kind in ("img_emb", "text_emb", "metadata"):
        (folder / kind).mkdir(parents=True, exist_ok=True)
    for part, first in enumerate(range(0, num_rows, rows_per_file)):
        size = min(rows_per_file, num_rows - first)
        rng = np.random.default_rng((seed, part))
        images = _images(rng, size, dim)
        texts = _unit(0.5 * images + _unit(rng.standard_normal((size, dim), np.float32)))
        np.save(folder / f"img_emb/img_emb_{part:04d}.npy", images.astype(np.float16))
        np.save(folder / f"text_emb/text_emb_{part:04d}.npy", texts.astype(np.float16))
        pq.write_table(_metadata(part, size), folder / f"metadata/metadata_{part:04d}.parquet")


def _images(rng: np.random.Generator, size: int, dim: int) -> Rows:
    spectrum = (np.arange(1, dim + 1) ** -0.25).astype(np.float32)
    num_originals = int(size * (1 - DUPLICATE_SHARE))
    originals = _unit(rng.standard_normal((num_originals, dim), np.float32) * spectrum)
    group = (num_originals * rng.random(size - num_originals) ** 3).astype(np.int64)
    noise = _unit(rng.standard_normal((size - num_originals, dim), np.float32))
    copies = _unit(originals[group] + COPY_NOISE * noise)
    rows = np.concatenate([originals, copies])
    return rows[rng.permutation(size)]


def _unit(rows: Rows) -> Rows:
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


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
