"""The demo world on disk: image-text tars in img2dataset's layout, and the truth beside them.

    python -m pipelines.demo.world OUT_DIR

writes `OUT_DIR/shards/{00000.tar, 00000.parquet, 00000_stats.json, ...}` and, outside of the
shards, `OUT_DIR/truth.parquet`, which no stage reads. The same seed gives the same bytes of every
file, and the same file times.
Layout: img2dataset 1.47 with `disable_all_reencoding`, `caption_col` and LAION's columns kept.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import sys
import tarfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.demo.plan import PlannedRow, plan_rows
from pipelines.demo.rows import Sample, make_sample

FILE_TIME = 1_672_531_200
"""2023-01-01 00:00 UTC in seconds: the time of every file, since file times enter fingerprints."""

SHARD_SCHEMA = pa.schema(
    [
        ("similarity", pa.float64()),
        ("hash", pa.int64()),
        ("punsafe", pa.float32()),
        ("pwatermark", pa.float32()),
        ("caption", pa.string()),
        ("url", pa.string()),
        ("key", pa.string()),
        ("status", pa.string()),
        ("error_message", pa.string()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("original_width", pa.int32()),
        ("original_height", pa.int32()),
        ("exif", pa.string()),
        ("sha256", pa.string()),
    ]
)
TRUTH_SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("shard", pa.string()),
        ("kind", pa.string()),
        ("group", pa.int64()),
        ("caption_style", pa.string()),
        ("layout", pa.string()),
        ("num_things", pa.int32()),
        ("shapes", pa.list_(pa.string())),
        ("colours", pa.list_(pa.string())),
        ("places", pa.list_(pa.string())),
        ("relation", pa.string()),
        ("digit", pa.int32()),
        ("digit_colour", pa.string()),
        ("background", pa.string()),
        ("scene_json", pa.string()),
    ]
)


@dataclass(frozen=True, slots=True)
class World:
    """Where a made world lies and how many rows of each kind it holds."""

    shards_dir: Path
    truth_path: Path
    num_shards: int
    num_rows: int
    num_rows_by_kind: dict[str, int]


def make_world(
    out_dir: Path, *, seed: int = 0, num_pairs: int = 12_000, samples_per_shard: int = 1_000
) -> World:
    """Write a world of `num_pairs` rows under `out_dir` and return where it lies.

    Files that are there are written again with the same bytes. A row is one pair that was asked
    for: those whose download failed (2%) have a parquet row and no tar members, so that keys have
    gaps, as img2dataset leaves them.
    """
    rows = plan_rows(seed, num_pairs)
    shards_dir = out_dir / "shards"
    shards_dir.mkdir(parents=True, exist_ok=True)
    truth: list[dict[str, Any]] = []
    starts = range(0, num_pairs, samples_per_shard)
    for shard_index, start in enumerate(starts):
        planned = rows[start : start + samples_per_shard]
        keys = _keys(shard_index, len(planned), samples_per_shard)
        samples = [make_sample(seed, row, key) for key, row in zip(keys, planned, strict=True)]
        _write_shard(shards_dir, shard_index, samples)
        truth += [_truth_row(f"{shard_index:05d}", s) for s in samples]
    truth_path = out_dir / "truth.parquet"
    _write_parquet(truth_path, pa.Table.from_pylist(truth, schema=TRUTH_SCHEMA))
    return World(shards_dir, truth_path, len(starts), num_pairs, _num_rows_by_kind(rows))


def _num_rows_by_kind(rows: Sequence[PlannedRow]) -> dict[str, int]:
    return dict(sorted(Counter(row.kind for row in rows).items()))


def _keys(shard_index: int, num_rows: int, samples_per_shard: int) -> list[str]:
    """Return the keys of a shard: shard * 10^k + row, with k = ceil(log10(samples per shard))."""
    num_digits = len(str(samples_per_shard - 1)) if samples_per_shard > 1 else 0
    first = shard_index * 10**num_digits
    return [str(first + row).zfill(5 + num_digits) for row in range(num_rows)]


def _write_shard(shards_dir: Path, shard_index: int, samples: Sequence[Sample]) -> None:
    name = f"{shard_index:05d}"
    records = [_shard_record(sample) for sample in samples]
    _write_bytes(shards_dir / f"{name}.tar", _tar_bytes(samples, records))
    _write_parquet(
        shards_dir / f"{name}.parquet", pa.Table.from_pylist(records, schema=SHARD_SCHEMA)
    )
    _write_bytes(shards_dir / f"{name}_stats.json", _json_bytes(_stats(samples)))


def _shard_record(sample: Sample) -> dict[str, Any]:
    """Return the parquet row of a sample, which is its .json member too."""
    is_ok = sample.error_message is None
    url_and_caption = f"{sample.url}{sample.caption or ''}".encode()
    link_hash = hashlib.sha256(url_and_caption).digest()[:8]
    return {
        "similarity": sample.similarity,
        "hash": int.from_bytes(link_hash, "little", signed=True),
        "punsafe": sample.punsafe,
        "pwatermark": sample.pwatermark,
        "caption": sample.caption,
        "url": sample.url,
        "key": sample.key,
        "status": "success" if is_ok else "failed_to_download",
        "error_message": sample.error_message,
        "width": sample.width,
        "height": sample.height,
        "original_width": sample.width,
        "original_height": sample.height,
        "exif": "{}" if is_ok else None,
        "sha256": hashlib.sha256(sample.image).hexdigest() if is_ok else None,
    }


def _tar_bytes(samples: Sequence[Sample], records: Sequence[dict[str, Any]]) -> bytes:
    """Return the tar of the downloaded samples: plain USTAR, members sorted by name."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for sample, record in zip(samples, records, strict=True):
            if sample.error_message is not None:
                continue
            for extension, payload in _members(sample, record):
                member = tarfile.TarInfo(f"{sample.key}.{extension}")
                member.size = len(payload)
                tar.addfile(member, io.BytesIO(payload))
    return buffer.getvalue()


def _members(sample: Sample, record: dict[str, Any]) -> list[tuple[str, bytes]]:
    members = [("jpg", sample.image), ("json", _json_bytes(record))]
    if not sample.lacks_txt:
        members.append(("txt", (sample.caption or "").encode()))
    return members


def _stats(samples: Sequence[Sample]) -> dict[str, Any]:
    status = Counter(sample.error_message or "success" for sample in samples)
    return {
        "count": len(samples),
        "successes": status["success"],
        "failed_to_download": len(samples) - status["success"],
        "failed_to_resize": 0,
        "duration": 1.0,
        "start_time": float(FILE_TIME - 1),
        "end_time": float(FILE_TIME),
        "status_dict": dict(sorted(status.items())),
    }


def _truth_row(shard: str, sample: Sample) -> dict[str, Any]:
    row, scene = sample.row, sample.scene
    things = scene.things if scene else ()
    return {
        "key": sample.key,
        "shard": shard,
        "kind": row.kind,
        "group": row.group,
        "caption_style": sample.caption_style,
        "layout": scene.layout if scene else None,
        "num_things": len(things) if scene else None,
        "shapes": [thing.shape for thing in things],
        "colours": [thing.colour for thing in things],
        "places": [thing.place for thing in things],
        "relation": scene.relation if scene else None,
        "digit": scene.digit if scene else None,
        "digit_colour": scene.digit_colour if scene else None,
        "background": scene.background if scene else None,
        "scene_json": json.dumps(scene.to_dict(), sort_keys=True) if scene else None,
    }


def _json_bytes(value: dict[str, Any]) -> bytes:
    return json.dumps(value, indent=4).encode()


def _write_parquet(path: Path, table: pa.Table) -> None:
    pq.write_table(table, path, compression="zstd")
    os.utime(path, (FILE_TIME, FILE_TIME))


def _write_bytes(path: Path, payload: bytes) -> None:
    path.write_bytes(payload)
    os.utime(path, (FILE_TIME, FILE_TIME))


if __name__ == "__main__":
    make_world(Path(sys.argv[1]))
