"""What the benchmarks share: options, clocks, rates of the matrix product, and one table of all.

Every file yields `Row`s; `run` prints each, and puts them beside those of the files that ran before
in <out>/bench.json and <out>/bench.md. Importing this module also puts the repository on the path,
for machines on which Warren is not installed.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

ENOUGH_SECONDS = 10.0
"""A candidate that has run this long in all is not run again."""
PACKAGES = ("torch", "numpy", "scipy", "faiss-cpu", "faiss-gpu-cu12", "pyarrow", "polars", "ray")
RATIO = "Ratio: how often ours is faster; where the target is an upper limit, ours / the other."
INSTRUCTIONS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8")


@dataclass(frozen=True, slots=True)
class Options:
    """How a benchmark runs. threads 1: CPU seconds of one thread; more, or CUDA: wall seconds."""

    quick: bool
    out: Path
    device: str
    threads: int

    def clock(self) -> float:
        """Return seconds on the clock that these options go by."""
        if self.device == "cuda":
            import torch

            torch.cuda.synchronize()
        return time.process_time() if self.clock_name == "CPU seconds" else time.perf_counter()

    @property
    def clock_name(self) -> str:
        """Return which seconds are counted."""
        return "CPU seconds" if self.device == "cpu" and self.threads == 1 else "wall seconds"

    @property
    def mode(self) -> str:
        """Return device, threads and size in words: what must agree for figures to be compared."""
        size = ", quick" if self.quick else ""
        return f"{self.device}, {self.threads} thread(s), {self.clock_name}{size}"

    def seconds(self, work: Callable[[], object]) -> float:
        """Return how long the work takes, once."""
        started = self.clock()
        work()
        return self.clock() - started


@dataclass(frozen=True, slots=True)
class Row:
    """One comparison: what, the two sides in words, and the figure that a target is about."""

    what: str
    ours: str
    alternative: str = ""
    ratio: float | None = None
    at_least: float | None = None
    at_most: float | None = None

    @property
    def target(self) -> str:
        """Return the target in words, if there is one."""
        ends = ((">=", self.at_least), ("<=", self.at_most))
        return ", ".join(f"{sign} {end:g}" for sign, end in ends if end is not None)

    @property
    def met(self) -> bool | None:
        """Return whether the target is met; None without one, or where nothing was measured."""
        if self.ratio is None or not self.target:
            return None
        above = self.at_least is None or self.ratio >= self.at_least
        return above and (self.at_most is None or self.ratio <= self.at_most)

    def cells(self) -> list[str]:
        """Return the cells of a table."""
        ratio = "" if self.ratio is None else f"{self.ratio:.3g}"
        met = {True: "yes", False: "NO", None: ""}[self.met]
        return [self.what, self.ours, self.alternative, ratio, self.target, met]


def skipped(what: str, *packages: str) -> list[Row]:
    """Return a row that names the packages of these that are missing; none if all are there."""
    missing = [name for name in packages if find_spec(name) is None]
    return [Row(what, f"skipped: needs {', '.join(missing)}")] if missing else []


def timed(ours: float, alternative: float) -> dict[str, Any]:
    """Return the fields of a row of seconds: the ratio says how often we are faster."""
    return {
        "ours": f"{ours:.4g} s",
        "alternative": f"{alternative:.4g} s",
        "ratio": alternative / ours,
    }


def turns(
    options: Options, candidates: dict[str, Callable[[], object]], rounds: int = 5
) -> dict[str, float]:
    """Return the median seconds of each candidate; they take turns, so a slow spell hits all."""
    found: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(1 if options.quick else rounds):
        for name, work in candidates.items():
            if sum(found[name]) < ENOUGH_SECONDS:
                found[name].append(options.seconds(work))
    return {name: statistics.median(all_of_it) for name, all_of_it in found.items()}


def gemm_rates(options: Options) -> dict[str, float]:
    """Return multiply-adds counted as two, per second, of one large product in each precision."""
    import torch

    side, dim = (256 if options.quick else 4096), 768
    rows = torch.randint(-100, 100, (side, dim), device=options.device).to(torch.int8)
    kinds = {"fp32": torch.float32, "bf16": torch.bfloat16, "int8": torch.int8}
    kinds |= {"fp16": torch.float16} if options.device == "cuda" else {}
    rates = {}
    for name, kind in kinds.items():
        few, multiply = rows.to(kind), torch._int_mm if name == "int8" else torch.mm
        out = multiply(few, few.T)
        work = [lambda m=multiply, x=few, out=out: m(x, x.T, out=out)] * 2
        best = min(options.seconds(lambda work=work: [one() for one in work]) for _ in range(3))
        rates[name] = 2 * 2.0 * side * side * dim / max(best, 1e-9)
    return rates


def private_bytes(*processes: Any) -> int:
    """Return the resident memory of psutil processes, without the pages of mapped files."""
    import psutil

    total = 0
    for process in processes:
        try:
            memory = process.memory_info()
        except psutil.NoSuchProcess:
            continue
        total += memory.rss - getattr(memory, "shared", 0)
    return total


def run(
    name: str,
    doc: str | None,
    compare: Callable[[Options], Iterator[Row]],
    words: list[str] | None = None,
    *,
    has_cuda: bool = False,
) -> None:
    """Run one file's comparisons: read the options, print each row, and save after each.

    Args: has_cuda: what is compared has a CUDA form; otherwise it runs on the CPU everywhere.
    """
    options = Options(**vars(parser(doc).parse_args(words)))
    run_with(name, options if has_cuda else replace(options, device="cpu"), compare)


def run_with(name: str, options: Options, compare: Callable[[Options], Iterator[Row]]) -> None:
    """Run one file's comparisons with options that are read already. --quick has no targets."""
    rows: list[Row] = []
    with threads(options.threads):
        gemm = gemm_rates(options) if find_spec("torch") else {}
        print(f"== {name} ({options.mode})", *map(_rate, gemm.items()), sep="\n   ")
        for row in compare(options):
            shown = replace(row, at_least=None, at_most=None) if options.quick else row
            rows.append(shown)
            print("|", " | ".join(shown.cells()), "|", flush=True)
            save(options, f"{name}: {options.mode}", gemm, rows)


def parser(doc: str | None, *, num_threads: int = 1) -> argparse.ArgumentParser:
    """Return a parser of what all benchmarks understand."""
    words = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    folder = Path(tempfile.gettempdir()) / "warren-bench"
    words.add_argument("--quick", action="store_true", help="tiny sizes: only shows that it runs")
    words.add_argument("--out", type=Path, default=folder, help="folder of bench.md and bench.json")
    words.add_argument("--device", choices=["cpu", "cuda"], default=_best_device())
    words.add_argument("--threads", type=int, default=num_threads, help="1: seconds of CPU")
    return words


def _best_device() -> str:
    if not find_spec("torch"):
        return "cpu"
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Let torch, faiss and Warren's engine use so many threads."""
    before = os.environ.get("WARREN_THREADS")
    os.environ["WARREN_THREADS"] = str(count)
    libraries = _thread_setters()
    old = [get() for get, _ in libraries]
    for _, put in libraries:
        put(count)
    try:
        yield
    finally:
        for (_, put), value in zip(libraries, old, strict=True):
            put(value)
        os.environ.pop("WARREN_THREADS")
        os.environ.update({} if before is None else {"WARREN_THREADS": before})


def _thread_setters() -> list[tuple[Callable[[], int], Callable[[int], object]]]:
    found: list[tuple[Callable[[], int], Callable[[int], object]]] = []
    if find_spec("torch"):
        import torch

        found.append((torch.get_num_threads, torch.set_num_threads))
    if find_spec("faiss"):
        import faiss

        found.append((faiss.omp_get_max_threads, faiss.omp_set_num_threads))
    return found


def save(options: Options, section: str, gemm: dict[str, float], rows: list[Row]) -> None:
    """Put the rows beside the other sections; figures of another machine are thrown away."""
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "bench.json"
    facts = {"machine": machine(), "versions": versions()}
    table = json.loads(path.read_text()) if path.exists() else {}
    if {key: table.get(key) for key in facts} != facts:
        table = {**facts, "sections": {}}
    full = [asdict(row) | {"target": row.target, "met": row.met} for row in rows]
    table["sections"][section] = {"gemm_flops_per_second": gemm, "rows": full}
    path.write_text(json.dumps(table, indent=1))
    (options.out / "bench.md").write_text(_markdown(table))


def machine() -> dict[str, Any]:
    """Return what the figures depend on: CPU, its useful instructions, cores, memory, GPU."""
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    names = [line.partition(":")[2].strip() for line in info.splitlines() if "model name" in line]
    page = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "cpu": (names or [platform.processor() or platform.machine()])[0],
        "instructions": " ".join(name for name in INSTRUCTIONS if f" {name}" in info),
        "cores": os.cpu_count(),
        "memory_gib": round(page / 2**30),
        "gpu": _gpu_name(),
    }


def _gpu_name() -> str | None:
    if _best_device() == "cpu":
        return None
    import torch

    return torch.cuda.get_device_name()


def versions() -> dict[str, str]:
    """Return the versions of what does the work."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _markdown(table: dict[str, Any]) -> str:
    """Return the table: what the figures were measured on, then one section per file and mode."""
    lines = ["# Benchmarks", "", RATIO, ""]
    for group in ("machine", "versions"):
        facts = (f"{key} {value}" for key, value in table[group].items() if value)
        lines += [f"{group}: {', '.join(facts)}", ""]
    head = "| what | ours | alternative | ratio | target | met |\n|---|---|---|---|---|---|"
    for name, section in table["sections"].items():
        rates = "; ".join(map(_rate, section["gemm_flops_per_second"].items()))
        lines += [f"## {name}", "", f"Matrix product: {rates}.", "", head]
        for row in section["rows"]:
            fields = {key: value for key, value in row.items() if key not in ("target", "met")}
            lines.append(f"| {' | '.join(Row(**fields).cells())} |")
        lines.append("")
    return "\n".join(lines)


def _rate(named: tuple[str, float]) -> str:
    return f"{named[0]} {named[1] / 1e9:,.0f} GF/s"
