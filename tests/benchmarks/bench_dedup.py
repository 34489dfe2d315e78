"""Near-duplicate components against what others do, the forest against one threshold, and memory.

    python tests/benchmarks/bench_dedup.py [--quick] [--out DIR]

Rates count n^2 d operations: a multiplication and an addition for each entry of each pair once,
half of what a product of all rows with all rows costs. "Share of the product" divides that by the
rate of a plain product in one precision, measured just before and after.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import report
from alternatives import batch_bfs, upper_triangle_max
from report import Options, Row
from synthetic import DIM, World, placeholders

from curate.duplicates.components import components
from curate.duplicates.forest import Forest, spanning_forest
from curate.vectors.products import Precision, fastest_precision

ABOVE, FLOOR = 0.86, 0.80
LATER_CUTS = (0.80, 0.83, 0.86, 0.90, 0.95)
PRECISIONS: dict[str, dict[Precision, float]] = {
    "cpu": {"bf16": 30.0, "fp32": 15.0, "int8": 30.0, "auto": 30.0},
    "cuda": {"fp16": 30.0, "fp32": 15.0, "auto": 30.0},
}
"""Device -> precision -> least ratio to the batch BFS."""
SHARES: dict[str, tuple[tuple[Precision, str, float | None], ...]] = {
    "cpu": (("bf16", "bf16", 0.8), ("int8", "bf16", 0.8), ("int8", "int8", None)),
    "cuda": (("fp16", "fp16", 0.7),),
}
"""Device -> precision of the scan, of the plain product, and the least share of its rate."""
WARM_UP_ROWS = 500
SETS = ("usual", "90% copies of 3 pictures")
SCANS: dict[str, Callable[[Any], object]] = {
    "components": partial(components, similarity_above=ABOVE),
    "spanning_forest": partial(spanning_forest, floor=FLOOR),
}


@dataclass(frozen=True, slots=True)
class Sizes:
    """Rows of one cluster: beside the BFS, beside the chunked maximum, and for memory."""

    bfs: int = 10_000
    triangle: int = 50_000
    memory: int = 200_000
    dim: int = DIM
    memory_cases: tuple[tuple[str, str, float], ...] = (
        (SETS[0], "components", 1.0),
        (SETS[0], "spanning_forest", 1.0),
        (SETS[1], "components", 1.0),
        (SETS[1], "spanning_forest", 0.1),  # nearly all pairs are edges
    )
    """Set, scan, and how much of `memory` it is shown."""


QUICK = Sizes(400, 1200, 3000, 64, ((SETS[1], "components", 1.0),))


def compare(options: Options) -> Iterator[Row]:
    """Yield all rows."""
    sizes = QUICK if options.quick else Sizes()
    world = World.of(0, sizes.dim)
    yield from beside_bfs(options, world.cluster(sizes.bfs))
    rows = world.cluster(sizes.triangle)
    yield from beside_triangle(options, rows)
    yield from share_of_product(options, rows)
    yield from forest_beside_components(options, rows)
    yield from memory(sizes, world)


def beside_bfs(options: Options, rows: np.ndarray) -> Iterator[Row]:
    """Yield the ratio to the batch BFS in each precision, and how many rows it labels otherwise."""
    import torch

    found: dict[str, np.ndarray] = {}
    device, least = options.device, PRECISIONS[options.device]
    ways = {one: partial(components, rows, ABOVE, precision=one, device=device) for one in least}
    ways["bfs"] = partial(batch_bfs, torch.from_numpy(rows).float().to(device), ABOVE)
    work = {name: partial(_keep, found, name, way) for name, way in ways.items()}
    seconds = report.turns(options, work)
    otherwise = int((found["bfs"] != found["fp32"]).sum())  # fp32 is not exact
    for precision, at_least in least.items():
        assert np.array_equal(found[precision], found["fp32"]), "the components differ"
        name = f"auto = {fastest_precision(device)}" if precision == "auto" else precision
        what = f"{len(rows):,} rows, components ({name}) / batch BFS fp32 ({otherwise} differ)"
        yield Row(what, **report.timed(seconds[precision], seconds["bfs"]), at_least=at_least)


def _keep(found: dict[str, np.ndarray], name: str, way: Callable[[], np.ndarray]) -> None:
    found[name] = way()


def beside_triangle(options: Options, rows: np.ndarray) -> Iterator[Row]:
    """Yield the ratio to the chunked maximum of the upper triangle, in both of its readings."""
    import torch

    wide = torch.from_numpy(rows).float().to(options.device)
    stays = partial(upper_triangle_max, wide, ABOVE)
    results: list[torch.Tensor] = []
    work = {
        "ours": partial(components, rows, ABOVE, device=options.device),
        "earlier rows only": lambda: results.append(stays()),
        "all rows, later ones masked": lambda: results.append(stays(skips_later=False)),
    }
    seconds = report.turns(options, work, rounds=3)
    for name in list(work)[1:]:
        what = f"{len(rows):,} rows, components / chunked maximum fp32, {name}"
        yield Row(what, **report.timed(seconds["ours"], seconds[name]), at_least=6.0)
    kept, found = int(results[0].sum()), len(np.unique(components(rows, ABOVE)))
    what = f"{len(rows):,} rows: kept, one of each component / by the maximum"
    yield Row(what, f"{found:,}", f"{kept:,}", kept / found)


def share_of_product(options: Options, rows: np.ndarray) -> Iterator[Row]:
    """Yield the achieved rate of the scan as share of a plain product's."""
    useful = float(len(rows)) ** 2 * rows.shape[1]
    before = report.gemm_rates(options)
    shares = SHARES[options.device]
    scans: dict[str, Callable[[], object]] = {
        one: partial(components, rows, ABOVE, precision=one, device=options.device)
        for one, _, _ in shares
    }
    seconds = report.turns(options, scans, rounds=3)
    rates = {name: max(before[name], rate) for name, rate in report.gemm_rates(options).items()}
    for scan, plain, at_least in shares:
        rate = useful / seconds[scan]
        words = [f"{one / 1e9:,.0f} GF/s" for one in (rate, rates[plain])]
        what = f"{len(rows):,} rows, {scan} scan / plain {plain} product"
        yield Row(what, *words, rate / rates[plain], at_least=at_least)


def forest_beside_components(options: Options, rows: np.ndarray) -> Iterator[Row]:
    """Yield what the forest costs beside one threshold, and a later cut beside the forest."""
    forests: list[Forest] = []
    seconds = report.turns(
        options,
        {
            "build": lambda: forests.append(spanning_forest(rows, FLOOR, device=options.device)),
            **{str(t): partial(components, rows, t, device=options.device) for t in (ABOVE, FLOOR)},
        },
        rounds=3,
    )
    for threshold in (ABOVE, FLOOR):
        once = seconds[str(threshold)]
        words = [f"{one:.4g} s" for one in (seconds["build"], once)]
        what = f"{len(rows):,} rows, forest above {FLOOR} / components above {threshold}"
        yield Row(what, *words, seconds["build"] / once, at_most=1.15)
    cuts = report.turns(options, {str(t): partial(forests[0].cut, t) for t in LATER_CUTS})
    for threshold in LATER_CUTS:
        direct = components(rows, threshold)
        assert np.array_equal(forests[0].cut(threshold), direct), "the components differ"
    words = [f"{one:.4g} s" for one in (max(cuts.values()), seconds["build"])]
    what = f"{len(rows):,} rows, slowest of {len(cuts)} cuts / forest (all equal to components)"
    yield Row(what, *words, max(cuts.values()) / seconds["build"], at_most=0.01)


def memory(sizes: Sizes, world: World) -> Iterator[Row]:
    """Yield the most private memory of scans of a mapped file, each in a process of its own."""
    if missing := report.skipped("extra memory of one cluster", "psutil"):
        yield from missing
        return
    make = dict(zip(SETS, (world.cluster, partial(placeholders, dim=sizes.dim)), strict=True))
    with tempfile.TemporaryDirectory() as folder:
        for name, scan, share in sizes.memory_cases:
            path, num_rows = Path(folder, f"{name}-{share}.npy"), int(share * sizes.memory)
            allowed = 200_000_000 + 16 * num_rows
            if not path.exists():
                np.save(path, make[name](num_rows))
            command = [sys.executable, __file__, "--child", scan, str(path)]
            extra = int(subprocess.check_output(command, text=True))
            what = f"{num_rows:,} rows ({name}), {scan}: extra memory / 200 MB + 16 B a row"
            words = [f"{size / 1e6:,.0f} MB" for size in (extra, allowed)]
            yield Row(what, *words, extra / allowed, at_most=1.0)


def print_extra_memory(scan: str, path: str) -> None:
    """Run one scan in this process and print by how much its private memory grew at most."""
    rows = np.load(path, mmap_mode="r")
    SCANS[scan](np.asarray(rows[:WARM_UP_ROWS]))  # libraries, thread pools, their buffers
    with peak_of_private_memory() as grown:
        SCANS[scan](rows)
    print(grown[-1])


@contextmanager
def peak_of_private_memory() -> Iterator[list[int]]:
    """Yield a list that ends as the bytes grown, by ascending peak, sampled 50 times a second."""
    import psutil

    process, done = psutil.Process(), threading.Event()
    before, grown = report.private_bytes(process), [0]

    def watch() -> None:
        while not done.wait(0.02):
            grown.append(max(grown[-1], report.private_bytes(process) - before))

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield grown
    finally:
        done.set()
        watcher.join()


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        print_extra_memory(*sys.argv[2:4])
    else:
        report.run(Path(__file__).stem, __doc__, compare, has_cuda=True)
