"""The tar writer beside webdataset.TarWriter(mtime=0), the header scan beside tarfile.

    python tests/benchmarks/bench_tars.py [--quick] [--out DIR]

10000 samples of jpg + json + txt, 240 MB in a temporary folder, on one warm page cache.
"""

from __future__ import annotations

import json
import tarfile
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import report
from report import Options, Row

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
    from curate.media.tars import write_tar

    entries = (
        entry
        for key, jpg, meta, txt in samples
        for entry in ((f"{key}.jpg", jpg), (f"{key}.json", meta), (f"{key}.txt", txt))
    )
    with path.open("wb") as file:
        write_tar(file, entries)


def write_webdataset(path: Path, samples: list[Sample]) -> None:
    """Write the samples with webdataset's writer, at its faster and reproducible setting."""
    import webdataset

    with webdataset.TarWriter(str(path), mtime=0) as writer:
        for key, jpg, meta, txt in samples:
            writer.write({"__key__": key, "jpg": jpg, "json": meta, "txt": txt})


def scan_tarfile(path: Path) -> None:
    """List the members with the standard library."""
    with tarfile.open(path) as archive:
        archive.getmembers()


def compare(options: Options) -> Iterator[Row]:
    """Yield samples a second of the writers, and seconds of the scans."""
    if missing := report.skipped("tars", "webdataset"):
        yield from missing
        return
    from curate.media.tars import group_samples, scan_members

    num_samples = 100 if options.quick else 10_000
    samples = make_samples(num_samples)
    with tempfile.TemporaryDirectory() as folder:
        ours, theirs = Path(folder, "ours.tar"), Path(folder, "webdataset.tar")
        seconds = report.turns(
            options,
            {
                "write": partial(write_ours, ours, samples),
                "webdataset": partial(write_webdataset, theirs, samples),
                "scan": lambda: scan_members(str(ours)),
                "group": lambda: group_samples(scan_members(str(ours))),
                "tarfile": partial(scan_tarfile, ours),
            },
        )
    what = f"write {num_samples:,} samples / webdataset.TarWriter(mtime=0)"
    words = [f"{num_samples / seconds[name]:,.0f} samples/s" for name in ("write", "webdataset")]
    yield Row(what, *words, seconds["webdataset"] / seconds["write"])
    what = f"scan {3 * num_samples:,} members ({seconds['group']:.3f} s grouped) / tarfile"
    yield Row(what, **report.timed(seconds["scan"], seconds["tarfile"]))


if __name__ == "__main__":
    report.run(Path(__file__).stem, __doc__, compare)
