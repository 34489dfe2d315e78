"""Ingest to coreset on synthetic embeddings: rows per second of each stage, and peak memory.

    python tests/benchmarks/bench_baseline.py --rows 1000000 --clusters 1000 --out DIR

Prints a markdown table. The run is `warren run` in a child process, as a user starts it; peak
memory is the largest private resident set of that process and its workers, sampled at 10 Hz.
The limit of `cluster` and `dedup` is the matrix product: their useful flops per second stand beside
the rate of a plain float32 torch.mm measured just before.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import polars as pl
import psutil
from embeddings_world import write_world

DIM = 768

RECIPE = """\
seed: 0
source: {{kind: clip_retrieval, path: {path}}}
cluster: {{num_clusters: {clusters}}}
dedup: {{similarity_above: 0.86, keep: middle}}
select: {{clip_band: [0.40, 0.60], centroid_band: [0.15, 0.35], num_samples: {samples}}}
"""


def main() -> None:
    """Make the embeddings unless they are there, run, and print the table."""
    words = argparse.ArgumentParser(description=__doc__)
    words.add_argument("--rows", type=int, default=100_000)
    words.add_argument("--clusters", type=int, default=100)
    words.add_argument("--executor", default="local")
    words.add_argument("--out", type=Path, default=Path(tempfile.gettempdir()) / "warren-bench")
    args = words.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    world = args.out / f"embeddings-{args.rows}"
    if not (world / "made").exists():
        write_world(world, num_rows=args.rows, dim=DIM)
        (world / "made").touch()
    run_dir = args.out / f"run-{args.rows}-{args.executor}-{time.strftime('%H%M%S')}"
    recipe = args.out / "recipe.yaml"
    recipe.write_text(RECIPE.format(path=world, clusters=args.clusters, samples=args.rows // 1000))
    gemm = _gemm_flops_per_second()
    seconds, peak = _run(recipe, run_dir, args.executor)
    _print_table(run_dir, args.rows, seconds, peak)
    _print_limits(run_dir, gemm)


def _run(recipe: Path, run_dir: Path, executor: str) -> tuple[float, int]:
    """Return (wall seconds, peak resident bytes of the process tree)."""
    command = [sys.executable, "-m", "pipelines.cli", "run", str(recipe), "--out", str(run_dir)]
    started, peak = time.monotonic(), 0
    with subprocess.Popen([*command, "--executor", executor]) as child:
        tree = psutil.Process(child.pid)
        while child.poll() is None:
            peak = max(peak, _resident(tree))
            time.sleep(0.1)
    if child.returncode:
        raise SystemExit(child.returncode)
    return time.monotonic() - started, peak


def _resident(tree: psutil.Process) -> int:
    """Return the private resident bytes of the tree, without shared pages of mapped files."""
    total = 0
    try:
        for process in [tree, *tree.children(recursive=True)]:
            memory = process.memory_info()
            total += memory.rss - getattr(memory, "shared", 0)
    except psutil.NoSuchProcess:
        return total
    return total


def _print_table(run_dir: Path, rows: int, seconds: float, peak: int) -> None:
    names = json.loads((run_dir / "latest.json").read_text())["stages"]
    records = [json.loads((run_dir / name / "record.json").read_text()) for name in names]
    print(f"{rows:,} rows, {platform.processor() or platform.machine()}, {psutil.cpu_count()} CPUs")
    print("| stage | rows in | kept | seconds | rows/s |\n|---|---|---|---|---|")
    for record in records:
        rate = record["rows_in"] / max(record["seconds"], 1e-9)
        cells = [f"{record['rows_in']:,}", f"{record['kept']:,}", f"{record['seconds']:.1f}"]
        print(f"| {record['stage']} | {' | '.join(cells)} | {rate:,.0f} |")
    print(f"| all | {rows:,} | {records[-1]['kept']:,} | {seconds:.1f} | {rows / seconds:,.0f} |")
    print(f"peak private memory of all processes: {peak / 2**20:,.0f} MiB")


def _gemm_flops_per_second() -> float:
    """Return the rate of a float32 product of the shapes that the stages use, on all threads."""
    import torch

    left, right = torch.randn(4096, DIM), torch.randn(DIM, 4096)
    torch.mm(left, right)
    started = time.perf_counter()
    for _ in range(20):
        torch.mm(left, right)
    return 20 * 2 * 4096 * 4096 * DIM / (time.perf_counter() - started)


def _print_limits(run_dir: Path, gemm: float) -> None:
    """Print the useful flops of training, assignment and dedup per second, and as share of mm."""
    cluster, dedup = (_record(run_dir, stage) for stage in ("cluster", "dedup"))
    parts = [str(path) for path in run_dir.glob("cluster-*/part-*.parquet")]
    sizes = pl.read_parquet(parts, columns=["cluster"])["cluster"].value_counts()["count"]
    num_clusters = cluster["notes"]["centroids"]["clusters"]
    training = 2.0 * cluster["notes"]["centroids"]["training_rows"] * num_clusters * DIM
    flops = {
        "training": training * cluster["config"]["iterations"],
        "assignment": 2.0 * cluster["rows_in"] * num_clusters * DIM,
        "dedup": float((sizes.cast(pl.Float64) ** 2).sum()) * DIM,
    }
    seconds = {
        "training": sum(p["seconds"] for p in cluster["parts"] if p["item"] == "centroids"),
        "assignment": sum(p["seconds"] for p in cluster["parts"] if p["item"] != "centroids"),
        "dedup": dedup["item_seconds"],
    }
    print(f"plain float32 torch.mm: {gemm / 1e9:,.0f} GF/s")
    for name, count in flops.items():
        rate = count / max(seconds[name], 1e-9)
        print(f"{name}: {count / 1e12:.2f} Tflop, {rate / 1e9:,.0f} GF/s, {rate / gemm:.0%} of mm")


def _record(run_dir: Path, stage: str) -> Any:
    (path,) = run_dir.glob(f"{stage}-*/record.json")
    return json.loads(path.read_text())


if __name__ == "__main__":
    main()
