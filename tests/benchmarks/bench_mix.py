"""A mix of 700,000 instruction rows, 100,000 with an image: `warren run` beside the plain loop.

    python tests/benchmarks/bench_mix.py [--world DIR] [--rows N] [--images N] [--repeats N]
        [--executors local ray]

The plain loop (plain_mix.py) loads the JSON, shuffles it and writes 10,000 samples a shard with
webdataset. Warren does that too, checks each conversation and each image, drops copies, and leaves
a verdict for every row. Each run is a process of its own; they take turns, and the median counts.
A run ends when its files are on the disk: Warren writes through, the plain loop leaves them to the
system. Warren also writes all rows as one LLaVA list, which the plain loop does not.
Ray takes as many workers as the machine has CPUs, and its start is counted. Peak memory is that of
the whole process tree (tree_memory.py). Shards are removed after each run; the world stays.
"""

from __future__ import annotations

import os
import shutil
import statistics
import sys
import tarfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import report
from mix_world import write_world
from report import Options, Row
from tree_memory import Cost, measured

NEEDS = ("webdataset", "psutil", "orjson", "polars", "ray", "pydantic", "click")
ROWS, IMAGES, REPEATS = 700_000, 100_000, 3
QUICK_ROWS, QUICK_IMAGES = 20_000, 3_000
PLAIN = "plain loop"
EXECUTORS = ("local", "ray")
ROOT = Path(__file__).resolve().parents[2]
RECIPE = """\
seed: 0
source: {{kind: llava_json, files: {{rows: {world}/rows.json}}}}
clean: {{}}
resolve: {{roots: {{images: {world}/images}}}}
mix: {{samples_per_shard: 10000}}
"""


def commands(world: Path, out: Path, executors: Sequence[str]) -> dict[str, list[str]]:
    """Return name -> the command that mixes the world into the folder `out`."""
    recipe = world.parent / f"{world.name}.yaml"
    recipe.write_text(RECIPE.format(world=world))
    warren = [sys.executable, "-m", "pipelines.cli", "run", str(recipe), "--out", str(out)]
    plain = [sys.executable, str(Path(__file__).with_name("plain_mix.py")), str(world), str(out)]
    ours = {f"Warren, {name}": [*warren, "--executor", name] for name in executors}
    return {PLAIN: plain} | ours


def costs(
    world: Path, executors: Sequence[str], repeats: int, num_rows: int
) -> dict[str, list[Cost]]:
    """Run each in turn, `repeats` times. Raises: SystemExit when a run writes another number."""
    out, found = world.parent / "out", dict[str, list[Cost]]()
    log = world.parent / "log.txt"
    for _ in range(repeats):
        for name, command in commands(world, out, executors).items():
            shutil.rmtree(out, ignore_errors=True)
            os.sync()  # or this run would wait for what the one before has left to write
            started = time.monotonic()
            cost = measured(command, ROOT, log)
            os.sync()
            seconds = time.monotonic() - started
            found.setdefault(name, []).append(replace(cost, seconds=seconds))
            _check(out, num_rows)
            shutil.rmtree(out)
    return found


def _check(out: Path, num_rows: int) -> None:
    """Count the samples in the shards: all ways must write them all."""
    num_samples = 0
    for path in out.rglob("[0-9]*.tar"):
        with tarfile.open(path) as shard:
            num_samples += sum(member.name.endswith(".json") for member in shard)
    if num_samples != num_rows:
        raise SystemExit(f"{out} holds {num_samples} samples, the world {num_rows} rows")


def compare(
    options: Options, *, world: Path, rows: int, images: int, repeats: int, executors: Sequence[str]
) -> Iterator[Row]:
    """Yield seconds, rates and memory of each way to the mix, beside those of the plain loop."""
    if missing := report.skipped("instruction mix", *NEEDS):
        yield from missing
        return
    made = write_world(world.resolve(), num_rows=rows, num_images=images)
    size = (made / "rows.json").stat().st_size
    yield Row("world", f"{rows:,} rows, {size / 1e9:.2f} GB of JSON, {images:,} images")
    found = costs(made, executors, repeats, rows)
    plain = found.pop(PLAIN)
    for name, runs in found.items():
        yield from _beside(f"{rows:,} rows, {name}", runs, plain)


def _beside(name: str, ours: list[Cost], plain: list[Cost]) -> Iterator[Row]:
    seconds = [statistics.median(run.seconds for run in runs) for runs in (ours, plain)]
    yield Row(f"{name}: wall seconds", **report.timed(*seconds))
    num_rows = int(name.split()[0].replace(",", ""))
    words = [f"{num_rows / one:,.0f} rows/s" for one in seconds]
    spread = "; ".join(_all_seconds(runs) for runs in (ours, plain))
    yield Row(f"{name}: rate (all runs: {spread})", *words)
    for what, peaks in _peaks(ours, plain).items():
        words = [f"{peak / 2**20:,.0f} MiB" for peak in peaks]
        yield Row(f"{name}: {what}, plain / ours", *words, peaks[1] / peaks[0])


def _all_seconds(runs: list[Cost]) -> str:
    return " ".join(f"{run.seconds:.1f}" for run in runs) + " s"


def _peaks(ours: list[Cost], plain: list[Cost]) -> dict[str, tuple[int, int]]:
    """Return the largest memory over all runs, (ours, the plain loop's)."""
    found = {"peak memory": (max(run.peak for run in ours), max(run.peak for run in plain))}
    own = max(run.own_peak for run in ours)
    if own != found["peak memory"][0]:
        found["peak memory without Ray's daemons"] = (own, found["peak memory"][1])
    return found


def main(words: list[str] | None = None) -> None:
    """Read the options and run."""
    parser = report.parser(__doc__, num_threads=os.cpu_count() or 1)
    parser.set_defaults(device="cpu")
    parser.add_argument("--world", type=Path, help="folder that keeps the world; default: in --out")
    parser.add_argument("--rows", type=int, default=ROWS)
    parser.add_argument("--images", type=int, default=IMAGES)
    parser.add_argument("--repeats", type=int, default=REPEATS)
    parser.add_argument("--executors", nargs="+", choices=EXECUTORS, default=EXECUTORS)
    args = vars(parser.parse_args(words))
    extra = {name: args.pop(name) for name in ("world", "rows", "images", "repeats", "executors")}
    extra["world"] = extra["world"] or args["out"] / "mix"
    if args["quick"]:
        extra |= {"rows": QUICK_ROWS, "images": QUICK_IMAGES, "repeats": 1}
        extra["executors"] = ["local"]  # Ray's start alone takes longer than all the rest
    report.run_with(Path(__file__).stem, Options(**args), partial(compare, **extra))


if __name__ == "__main__":
    main()
