"""The benchmarks by name. Each is imported when it is asked for."""

from __future__ import annotations

from importlib import import_module

from manifests.errors import UserError
from train.benchmarks.contract import Benchmark

MODULES = {
    "mme": "train.benchmarks.mme",
    "pope": "train.benchmarks.pope",
    "gqa": "train.benchmarks.gqa",
    "vqav2": "train.benchmarks.vqav2",
    "scienceqa": "train.benchmarks.scienceqa",
    "mmmu": "train.benchmarks.mmmu",
    "seed": "train.benchmarks.seed",
    "mmbench": "train.benchmarks.mmbench",
    "mmvet": "train.benchmarks.mmvet",
    "demo": "train.benchmarks.demo",
}


def benchmark(name: str) -> Benchmark:
    """Return a benchmark by its name. Raises: UserError when there is none of that name."""
    if name not in MODULES:
        raise UserError(
            f"There is no benchmark {name!r}.", f"Known: {', '.join(MODULES)}.", "Name one of them."
        )
    found: Benchmark = import_module(MODULES[name]).BENCHMARK
    return found
