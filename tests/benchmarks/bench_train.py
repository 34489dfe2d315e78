"""Training a LLaVA: Warren's loop beside Hugging Face's Trainer on the same model and rows.

    python tests/benchmarks/bench_train.py [--size tiny 100M 3B] [--stage projector adapter]
        [--rows N] [--steps N] [--rounds N] [--workers N] [--threads N] [--device cuda]

Each run is a process of its own (one_training.py); they take turns, ours and the Trainer's, and the
median counts. Tokens a second are those of rows, without padding. Memory is the most that a
process held: on a GPU what torch allocated, on a CPU what was resident, Python and torch included.
Loading is not timed. The Trainer takes random micro-batches of a fixed number of rows; ours are cut
by length, at the same number of rows on average.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import report
from report import Options, Row
from training_world import SIZES, Size, write_model, write_shards

NEEDS = ("torch", "transformers", "peft", "accelerate", "psutil")
SIDES = ("trainer", "ours")


@dataclass(frozen=True, slots=True)
class Case:
    """What is trained. rows_each: of the Trainer's micro-batches; batch: of a step."""

    size: str
    stage: str
    rows: int
    steps: int
    batch: int
    rows_each: int
    rounds: int
    workers: int
    checkpointing: bool = False


CPU = {"tiny": (2000, 60, 32, 8), "100M": (96, 3, 32, 8), "quick": (32, 2, 16, 4)}
"""Size -> rows, steps, rows of a step, rows of the Trainer's micro-batch."""
GPU = {"3B": (4096, 6, 128, 8)}


def main(words: list[str] | None = None) -> None:
    """Read the options, compare, and fill the table."""
    parser = report.parser(__doc__, num_threads=2)
    parser.add_argument("--size", nargs="*", choices=[*SIZES])
    parser.add_argument("--stage", nargs="*", default=["projector", "adapter"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--checkpointing", action="store_true")
    read = parser.parse_args(words)
    options = Options(read.quick, read.out, read.device, read.threads)
    known = GPU if read.device == "cuda" else CPU
    sizes = ["quick"] if read.quick else read.size or [name for name in known if name != "quick"]
    rounds = 1 if read.quick else read.rounds
    cases = []
    for size in sizes:
        rows, steps, batch, each = (known | CPU)[size]
        more = (rounds, read.workers, read.checkpointing)
        cases += [
            Case(size, stage, rows, read.steps or steps, batch, each, *more) for stage in read.stage
        ]

    def compare(options: Options) -> Iterator[Row]:
        missing = report.skipped("training", *NEEDS)
        yield from missing
        for case in [] if missing else cases:
            yield from compared(case, options)

    report.run_with("bench_train", options, compare)


def compared(case: Case, options: Options) -> Iterator[Row]:
    """Yield the rows of one case: speed, memory, and what was reached."""
    with tempfile.TemporaryDirectory(dir=os.environ.get("WARREN_BENCH_DIR")) as folder:
        found = costs(case, options, Path(folder))
    rate = {side: statistics.median(_rates(found[side])) for side in SIDES}
    peak = {side: statistics.median(one["peak"] for one in found[side]) for side in SIDES}
    what = f"{case.size}, stage {case.stage}, {case.batch} rows a step"
    told = f" ({found['ours'][0]['steps']} steps)"
    mfu = [one["flops"] for one in found["ours"] if one.get("flops")]
    reached = f", MFU {statistics.median(mfu):.1%}" if mfu else ""
    yield Row(
        f"tokens/s, {what}{told}",
        f"{rate['ours']:,.0f}{reached}",
        f"Trainer {rate['trainer']:,.0f}",
        rate["ours"] / rate["trainer"],
        at_least=2.0,
    )
    yield Row(
        f"peak memory, {what}",
        f"{peak['ours'] / 2**20:,.0f} MiB",
        f"Trainer {peak['trainer'] / 2**20:,.0f} MiB",
        peak["ours"] / peak["trainer"],
        at_most=0.6,
    )


def _rates(runs: list[dict[str, Any]]) -> list[float]:
    return [one["tokens"] / one["seconds"] for one in runs]


def costs(case: Case, options: Options, folder: Path) -> dict[str, list[dict[str, Any]]]:
    """Return what each side's runs cost; they take turns."""
    size = SIZES[case.size]
    model = _model(folder, size, options)
    is_first = case.stage == "projector"
    data = write_shards(folder / "data", case.rows, side=size.side, captions=is_first)
    found: dict[str, list[dict[str, Any]]] = {side: [] for side in SIDES}
    for at in range(case.rounds):
        for side in SIDES:
            spec = {
                "side": side,
                "model": model,
                "data": data,
                "out": str(folder / f"{side}-{at}"),
                "config": config_of(case, size, options),
                "steps": case.steps,
                "rows_each": case.rows_each,
                "workers": case.workers,
                "device": options.device,
                "threads": options.threads,
            }
            found[side].append(one_run(spec, folder))
    return found


def _model(folder: Path, size: Size, options: Options) -> str:
    if options.device == "cpu":
        from curate.media.torchvision_ops import ensure_torchvision_importable

        ensure_torchvision_importable()
    dtype = "bfloat16" if options.device == "cuda" else "float32"
    return write_model(folder / "model", size, dtype=dtype, device=options.device)


def config_of(case: Case, size: Size, options: Options) -> dict[str, Any]:
    """Return the settings: Bunny's but for the batch; micro-batches as large as the Trainer's."""
    is_first = case.stage == "projector"
    typical = size.tokens_per_image + (50 if is_first else 250)
    return {
        "stage": case.stage,
        "template": "plain" if is_first else "bunny",
        "image_mode": "square" if is_first else "pad",
        "projector_lr": 1e-4,
        "lora": {"rank": 128 if case.size in ("3B", "100M") else 16, "dropout": 0.05},
        "dtype": "bfloat16" if options.device == "cuda" else "keep",
        "gradient_checkpointing": case.checkpointing,
        "checkpoint_every_steps": 10_000,
        "plan": {
            "global_batch_size": case.batch,
            "tokens_per_micro_batch": case.rows_each * typical,
            "tokens_per_image": size.tokens_per_image,
        },
    }


def one_run(spec: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Run one side in a process of its own."""
    (folder / "spec.json").write_text(json.dumps(spec))
    command = [sys.executable, str(Path(__file__).with_name("one_training.py"))]
    done = subprocess.run(
        [*command, str(folder / "spec.json")], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(f"{spec['side']} failed:\n{done.stderr[-3000:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


if __name__ == "__main__":
    main()
