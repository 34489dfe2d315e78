"""Ingest to coreset on synthetic embeddings: rows per second of each stage, and peak memory.

    python tests/benchmarks/bench_baseline.py --rows 1000000 --clusters 1000 --out DIR

The run is `warren run` in a child process, as a user starts it; peak memory is the largest private
resident set of that process and its workers, sampled at 10 Hz. The limit of `cluster` and `dedup`
is the matrix product: their useful flops per second stand beside those of a plain float32 product.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import report
from embeddings_world import write_world
from report import Options, Row
from synthetic import DIM

NEEDS = ("psutil", "polars", "ray", "pydantic", "click")
RECIPE = """\
seed: 0
source: {{kind: clip_retrieval, path: {path}}}
cluster: {{num_clusters: {clusters}}}
dedup: {{similarity_above: 0.86, keep: middle}}
select: {{clip_band: [0.40, 0.60], centroid_band: [0.15, 0.35], num_samples: {samples}}}
"""


@dataclass(frozen=True, slots=True)
class Finished:
    """A finished run: where it is, what its stages recorded, wall seconds, and peak bytes."""

    rows: int
    dim: int
    folder: Path
    records: dict[str, Any]
    seconds: float
    peak: int


@dataclass(frozen=True, slots=True)
class Work:
    """What one step of a run did: operations of its products, bytes of rows read, and seconds."""

    flops: float
    bytes: float
    seconds: float


def finished_run(out: Path, rows: int, clusters: int, executor: str, dim: int = DIM) -> Finished:
    """Make the embeddings unless they are there, and run."""
    world = out / f"embeddings-{rows}-{dim}"
    if not (world / "made").exists():
        write_world(world, num_rows=rows, dim=dim)
        (world / "made").touch()
    folder = out / f"run-{rows}-{executor}-{time.strftime('%H%M%S')}"
    recipe = out / "recipe.yaml"
    samples = max(1, rows // 1000)
    recipe.write_text(RECIPE.format(path=world, clusters=clusters, samples=samples))
    seconds, peak = _run(recipe, folder, executor)
    names = json.loads((folder / "latest.json").read_text())["stages"]
    records = [json.loads((folder / name / "record.json").read_text()) for name in names]
    return Finished(rows, dim, folder, {one["stage"]: one for one in records}, seconds, peak)


def _run(recipe: Path, folder: Path, executor: str) -> tuple[float, int]:
    """Return (wall seconds, peak private bytes of the process tree)."""
    import psutil

    command = [sys.executable, "-m", "pipelines.cli", "run", str(recipe), "--out", str(folder)]
    root = str(Path(__file__).resolve().parents[2])
    started, peak = time.monotonic(), 0
    with subprocess.Popen([*command, "--executor", executor], cwd=root) as child:
        tree = psutil.Process(child.pid)
        while child.poll() is None:
            children = []
            if tree.is_running() and tree.status() != psutil.STATUS_ZOMBIE:
                children = tree.children(recursive=True)
            peak = max(peak, report.private_bytes(tree, *children))
            time.sleep(0.1)
    if child.returncode:
        raise SystemExit(child.returncode)
    return time.monotonic() - started, peak


def work_of(run: Finished) -> dict[str, Work]:
    """Return the work of each step: the forest counts a product of two rows for each pair once."""
    import polars as pl

    cluster, trained = run.records["cluster"], run.records["centroids"]
    parts = [str(path) for path in run.folder.glob("cluster-*/part-*.parquet")]
    sizes = pl.read_parquet(parts, columns=["cluster"])["cluster"].value_counts()["count"]
    notes = trained["notes"]["centroids"]
    per_row, all_rows = 2.0 * notes["clusters"] * run.dim, 2.0 * run.rows * run.dim
    training = notes["training_rows"]
    dim_bytes = 2.0 * run.dim
    return {
        "ingest": Work(0.0, 2 * all_rows, run.records["ingest"]["seconds"]),
        "training": Work(
            training * per_row * notes["iterations"],
            dim_bytes * (run.rows + training * notes["iterations"]),
            trained["seconds"],
        ),
        "assignment, rows by cluster": Work(run.rows * per_row, 2 * all_rows, cluster["seconds"]),
        "forest": Work(
            float((sizes.cast(pl.Float64) ** 2).sum()) * run.dim,
            all_rows,
            run.records["forest"]["seconds"],
        ),
    }


def stage_rows(run: Finished) -> Iterator[Row]:
    """Yield a row for every stage, one for the run, and one for its memory."""
    for record in run.records.values():
        rate = record["rows_in"] / max(record["seconds"], 1e-9)
        what = f"{run.rows:,} rows, {record['stage']}: {record['kept']:,} of {record['rows_in']:,}"
        yield Row(what, f"{record['seconds']:.1f} s, {rate:,.0f} rows/s")
    words = f"{run.seconds:.1f} s, {run.rows / run.seconds:,.0f} rows/s"
    yield Row(f"{run.rows:,} rows, all", words)
    yield Row(f"{run.rows:,} rows, peak private memory", f"{run.peak / 2**20:,.0f} MiB")


def compare(options: Options, *, rows: int, clusters: int, executor: str) -> Iterator[Row]:
    """Yield the stages, and their rates beside that of a plain float32 product."""
    if missing := report.skipped("ingest to coreset", *NEEDS):
        yield from missing
        return
    plain = report.gemm_rates(options)["fp32"]
    options.out.mkdir(parents=True, exist_ok=True)
    run = finished_run(options.out.resolve(), rows, clusters, executor)
    yield from stage_rows(run)
    for name, work in work_of(run).items():
        if work.flops:
            rate = work.flops / max(work.seconds, 1e-9)
            words = [f"{one / 1e9:,.0f} GF/s" for one in (rate, plain)]
            yield Row(f"{rows:,} rows, {name} / plain fp32 product", *words, rate / plain)


def main(words: list[str] | None = None) -> None:
    """Read the options and run."""
    parser = report.parser(__doc__, num_threads=os.cpu_count() or 1)
    parser.set_defaults(device="cpu")
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--clusters", type=int)
    parser.add_argument("--executor", default="local")
    args = vars(parser.parse_args(words))
    rows = 2000 if args["quick"] else args.pop("rows")
    extra = {name: args.pop(name, None) for name in ("rows", "clusters", "executor")}
    extra |= {"rows": rows, "clusters": extra["clusters"] or max(1, rows // 1000)}
    report.run_with(Path(__file__).stem, Options(**args), partial(compare, **extra))


if __name__ == "__main__":
    main()
