"""Ingest to coreset at several sizes, and whether one size foretells the others.

    python tests/benchmarks/bench_scale.py [--sizes 400000 100000] [--all] [--out DIR]

A cluster for every thousand rows. The model is seconds = start + a * flops + b * bytes of rows
read: start is what the steps of a run of START_ROWS rows take, a and b fit the steps of the first
size. Worlds stay in the folder for the next time.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import report
from bench_baseline import NEEDS, Finished, Work, finished_run, stage_rows, work_of
from report import Options, Row
from synthetic import DIM

SIZES, ALL_SIZES = (400_000, 100_000), (4_000_000, 100_000, 400_000, 1_000_000)
"""The first is the one that the model is fitted to."""
ROWS_PER_CLUSTER = 1000
START_ROWS, START_CLUSTERS = 2000, 10


def fitted(steps: list[Work], start: list[float]) -> tuple[float, float]:
    """Return seconds per flop and per byte, neither below 0, that fit these steps best."""
    from scipy.optimize import nnls

    work = np.array([[step.flops, step.bytes] for step in steps])
    scale = np.maximum(work.max(axis=0), 1.0)  # of 1e12 and 1e9: nnls wants like sizes
    seconds = np.array([step.seconds for step in steps]) - start
    found = nnls(work / scale, seconds)[0] / scale
    return float(found[0]), float(found[1])


def compare(options: Options, *, sizes: list[int]) -> Iterator[Row]:
    """Yield the stages of every size, and measured seconds over the first size's model."""
    if missing := report.skipped("ingest to coreset by size", *NEEDS):
        yield from missing
        return
    options.out.mkdir(parents=True, exist_ok=True)
    a = b = 0.0
    dim = 64 if options.quick else DIM
    small = finished_run(options.out.resolve(), START_ROWS, START_CLUSTERS, "local", dim)
    start = [step.seconds for step in work_of(small).values()]
    yield Row(f"start: all steps with {START_ROWS:,} rows", f"{sum(start):.1f} s")
    for place, rows in enumerate(sizes):
        clusters = max(1, rows // ROWS_PER_CLUSTER)
        run = finished_run(options.out.resolve(), rows, clusters, "local", dim)
        yield from stage_rows(run)
        steps = list(work_of(run).values())
        if not place:
            a, b = fitted(steps, start)
            yield Row(f"model of {rows:,} rows", f"{a * 1e9:.3g} s/Gflop, {b * 1e9:.3g} s/GB")
        model = sum(start) + sum(a * step.flops + b * step.bytes for step in steps)
        yield _beside_model(run, steps, model, is_fitted=not place)


def _beside_model(run: Finished, steps: list[Work], model: float, *, is_fitted: bool) -> Row:
    measured = sum(step.seconds for step in steps)
    limits = {} if is_fitted else {"at_least": 0.8, "at_most": 1.2}
    words = [f"{one:.1f} s" for one in (measured, model)]
    return Row(f"{run.rows:,} rows: measured / model", *words, measured / model, **limits)


def main(words: list[str] | None = None) -> None:
    """Read the options and run."""
    parser = report.parser(__doc__, num_threads=os.cpu_count() or 1)
    parser.set_defaults(device="cpu")
    parser.add_argument("--sizes", type=int, nargs="+", default=list(SIZES))
    parser.add_argument("--all", action="store_true", help="4M, which the model then fits, and 1M")
    args = vars(parser.parse_args(words))
    sizes = list(ALL_SIZES) if args.pop("all") else args["sizes"]
    sizes = [1000] if args["quick"] else sizes
    del args["sizes"]
    report.run_with(Path(__file__).stem, Options(**args), partial(compare, sizes=sizes))


if __name__ == "__main__":
    main()
