"""The cuts of a selection, streamed, beside a sort of all rows in memory: seconds and memory.

    python tests/benchmarks/bench_cuts.py --rows 10000000

Rows are synthetic, made when they are read: clip scores that tie (2^12 values), cosines that do
not. Prints CPU seconds of one thread and the peak of traced memory, each of its own pass over the
work, as tracing slows it down. The streamed way makes the rows again for each pass; what that takes
stands beside, and is no part of the seconds. Both ways must keep the same rows.
"""

from __future__ import annotations

import argparse
import time
import tracemalloc
from collections.abc import Callable
from functools import partial
from typing import TypeVar

import numpy as np

from curate.rows.cuts import Cuts, Steps, find_cuts, judge
from curate.rows.select import Selectable, select

PART_ROWS = 1 << 20
CLIP_BAND, CENTROID_BAND = ("0.40", "0.60"), ("0.15", "0.35")

Found = TypeVar("Found")


class Parts:
    """Makes parts when they are loaded; adds up the seconds that takes."""

    def __init__(self, num_rows: int) -> None:
        self.num_rows = num_rows
        self.num_parts = -(-num_rows // PART_ROWS)
        self.num_loaded = 0
        self.seconds = 0.0

    def load(self, number: int) -> Selectable:
        """Return the rows of one part."""
        started = time.process_time()
        rows = part(number, self.num_rows)
        self.seconds += time.process_time() - started
        self.num_loaded += 1
        return rows


def main() -> None:
    """Find the cuts both ways and print a markdown table."""
    words = argparse.ArgumentParser(description=__doc__)
    words.add_argument("--rows", type=int, default=10_000_000)
    num_rows = words.parse_args().rows
    print(f"{num_rows:,} rows\n\n| way | CPU s | making rows, s | passes | peak MB |")
    print("|---|---:|---:|---:|---:|")
    cuts = _measure("streamed cuts", _streamed, num_rows)
    keep = _measure("np.lexsort of all rows", _in_memory, num_rows)
    _must_agree(cuts, keep, num_rows)


def _measure(name: str, work: Callable[[Parts], Found], num_rows: int) -> Found:
    parts = Parts(num_rows)
    started = time.process_time()
    found = work(parts)
    seconds = time.process_time() - started - parts.seconds
    num_passes = parts.num_loaded // parts.num_parts
    peak = _peak_megabytes(partial(work, Parts(num_rows)))
    print(f"| {name} | {seconds:.2f} | {parts.seconds:.2f} | {num_passes} | {peak:.0f} |")
    return found


def part(number: int, num_rows: int) -> Selectable:
    """Return the rows of one part."""
    first = number * PART_ROWS
    size = min(PART_ROWS, num_rows - first)
    rng = np.random.default_rng(number)
    clip = np.rint(rng.normal(0.28, 0.06, size) * 4096) / 4096
    uids = np.arange(first, first + size, dtype=np.uint64)
    return Selectable(uids, clip, rng.beta(8, 3, size), np.zeros(size, np.uint32))


def _streamed(parts: Parts) -> Cuts:
    loads = [partial(parts.load, number) for number in range(parts.num_parts)]
    steps = Steps(CLIP_BAND, CENTROID_BAND, parts.num_rows // 1000, seed=0)
    return find_cuts(loads, steps, num_rows=parts.num_rows)[0]


def _in_memory(parts: Parts) -> np.ndarray:
    """Return which rows are kept."""
    made = [parts.load(number) for number in range(parts.num_parts)]
    names = ("uid", "clip_score", "centroid_cosine", "cluster")
    fate = select(
        Selectable(*(np.concatenate([getattr(one, name) for one in made]) for name in names)),
        clip_band=CLIP_BAND,
        centroid_band=CENTROID_BAND,
        num_samples=parts.num_rows // 1000,
        seed=0,
    )
    return fate.keep


def _must_agree(cuts: Cuts, keep: np.ndarray, num_rows: int) -> None:
    for number in range(Parts(num_rows).num_parts):
        at = number * PART_ROWS
        alone = judge(part(number, num_rows), cuts).keep
        assert (alone == keep[at : at + len(alone)]).all(), number


def _peak_megabytes(work: Callable[[], object]) -> float:
    tracemalloc.start()
    work()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak / 1e6


if __name__ == "__main__":
    main()
