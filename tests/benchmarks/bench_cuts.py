"""The cuts of a selection, streamed, beside a sort of all rows in memory: seconds and memory.

    python tests/benchmarks/bench_cuts.py [--quick] [--out DIR]

Rows are synthetic, made when they are read: clip scores that tie (2^12 values), cosines that do
not. Memory is the peak of traced memory, of a pass of its own, as tracing slows it down. The
streamed way makes the rows again for each pass; what that takes is no part of the seconds.
"""

from __future__ import annotations

import time
import tracemalloc
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import report
from report import Options, Row

from curate.rows.cuts import Cuts, Steps, find_cuts, judge
from curate.rows.select import Selectable, select

PART_ROWS = 1 << 20
CLIP_BAND, CENTROID_BAND = ("0.40", "0.60"), ("0.15", "0.35")


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


def compare(options: Options) -> Iterator[Row]:
    """Yield seconds and memory of both ways, which must keep the same rows."""
    num_rows = 5000 if options.quick else 10_000_000
    found: list[Any] = []
    ways = {"streamed": _streamed, "np.lexsort of all rows": _in_memory}
    times: dict[str, float] = {}
    for name, work in ways.items():
        parts = Parts(num_rows)
        used = options.seconds(lambda work=work, parts=parts: found.append(work(parts)))
        times[name] = used - parts.seconds
    _must_agree(*found, num_rows)
    what = f"{num_rows:,} rows, bands and sample: streamed / np.lexsort of all rows"
    yield Row(f"{what}, seconds", **report.timed(*times.values()))
    peaks = [_peak_megabytes(partial(work, Parts(num_rows))) for work in ways.values()]
    words = [f"{peak:,.0f} MB" for peak in peaks]
    yield Row(f"{what}, memory", *words, peaks[0] / peaks[1])


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
    report.run(Path(__file__).stem, __doc__, compare)
