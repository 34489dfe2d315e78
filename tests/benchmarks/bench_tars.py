"""Time the tar writer against webdataset.TarWriter(mtime=0), the header scan against tarfile.

Run: python tests/benchmarks/bench_tars.py [NUM_SAMPLES]     (10000 samples of jpg + json + txt, 240
MB in /tmp by default) Each figure is the best of five rounds; the rounds of the candidates
alternate, on one warm page cache.
"""

from __future__ import annotations

import json
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import webdataset

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from curate.media.tars import group_samples, scan_members, write_tar

NUM_ROUNDS = 5
MEAN_JPEG_BYTES = 22_000  # as in the img2dataset shards of 256 px images
Sample = tuple[str, bytes, bytes, bytes]


def make_samples(num_samples: int) -> list[Sample]:
    """Return seeded (key, jpg, json, txt) with payloads of realistic sizes; the bytes are noise."""
    generator = np.random.default_rng(0)
    noise = generator.bytes(4 * MEAN_JPEG_BYTES)
    sizes = generator.integers(MEAN_JPEG_BYTES // 2, MEAN_JPEG_BYTES * 3 // 2, num_samples)
    record = json.dumps({"url": "http://example.org/" + "x" * 300, "width": 256, "height": 256})
    return [
        (f"{row:09d}", noise[row % 997 :][:size], record.encode(), f"a caption {row}".encode())
        for row, size in enumerate(sizes.tolist())
    ]


def write_ours(path: Path, samples: list[Sample]) -> None:
    """Write the samples with write_tar."""
    entries = (
        entry
        for key, jpg, meta, txt in samples
        for entry in ((f"{key}.jpg", jpg), (f"{key}.json", meta), (f"{key}.txt", txt))
    )
    with path.open("wb") as file:
        write_tar(file, entries)


def write_webdataset(path: Path, samples: list[Sample]) -> None:
    """Write the samples with webdataset's writer, at its faster and reproducible setting."""
    with webdataset.TarWriter(str(path), mtime=0) as writer:
        for key, jpg, meta, txt in samples:
            writer.write({"__key__": key, "jpg": jpg, "json": meta, "txt": txt})


def scan_tarfile(path: Path) -> None:
    """List the members with the standard library."""
    with tarfile.open(path) as archive:
        archive.getmembers()


def best_seconds(*candidates: Callable[[], object]) -> list[float]:
    """Return each candidate's fastest round; the rounds take turns."""
    best = [float("inf")] * len(candidates)
    for _ in range(NUM_ROUNDS):
        for place, candidate in enumerate(candidates):
            start = time.perf_counter()
            candidate()
            best[place] = min(best[place], time.perf_counter() - start)
    return best


def main() -> None:
    """Print samples a second of the writers, seconds of the scans, and both ratios."""
    num_samples = int(sys.argv[1]) if len(sys.argv) > 1 else 10_000
    samples = make_samples(num_samples)
    with tempfile.TemporaryDirectory() as folder:
        ours, theirs = Path(folder, "ours.tar"), Path(folder, "webdataset.tar")
        ours_s, theirs_s = best_seconds(
            lambda: write_ours(ours, samples), lambda: write_webdataset(theirs, samples)
        )
        scan_s, group_s, tarfile_s = best_seconds(
            lambda: scan_members(str(ours)),
            lambda: group_samples(scan_members(str(ours))),
            lambda: scan_tarfile(ours),
        )
    print(f"write {num_samples} samples: {num_samples / ours_s:,.0f} samples/s ours,", end=" ")
    print(f"{num_samples / theirs_s:,.0f} webdataset.TarWriter(mtime=0): {theirs_s / ours_s:.1f}x")
    print(
        f"scan {3 * num_samples} members: {scan_s:.3f} s ours ({group_s:.3f} s grouped), ", end=""
    )
    print(f"{tarfile_s:.3f} s tarfile.getmembers: {tarfile_s / scan_s:.1f}x")


if __name__ == "__main__":
    main()
