"""A command's wall seconds, and the largest memory of it and all processes that it starts.

Memory is PSS: what a process has of its own, and its share of what it shares (Linux, smaps_rollup).
A page in Ray's object store, or of a mapped file, is so counted once over all processes.
"""

from __future__ import annotations

import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

INTERVAL_SECONDS = 0.1
LARGEST_SHARE = 0.1  # of the time that may go into looking, so that looking slows nothing down
RAY_WORKER = "ray::"


@dataclass(frozen=True, slots=True)
class Cost:
    """seconds: wall. peak: bytes of all processes at once; own_peak: without Ray's daemons."""

    seconds: float
    peak: int
    own_peak: int


def measured(command: list[str], folder: Path, log: Path) -> Cost:
    """Run a command in a folder, its output into `log`.

    Ray's daemons are all processes below the first that are no workers (`ray::...`).
    Raises: SystemExit with the log's end when the command fails.
    """
    import psutil

    started, peak, own_peak = time.monotonic(), 0, 0
    with log.open("wb") as file:
        child = subprocess.Popen(command, cwd=folder, stdout=file, stderr=file)
        tree = psutil.Process(child.pid)
        while child.poll() is None:
            looked = time.monotonic()
            every, own = _memory(tree)
            peak, own_peak = max(peak, every), max(own_peak, own)
            took = time.monotonic() - looked
            _sleep(child, max(INTERVAL_SECONDS - took, took / LARGEST_SHARE))
    if child.returncode:
        raise SystemExit(f"{command} failed:\n{log.read_text(errors='replace')[-2000:]}")
    return Cost(time.monotonic() - started, peak, own_peak)


def _sleep(child: subprocess.Popen[bytes], seconds: float) -> None:
    try:
        child.wait(seconds)
    except subprocess.TimeoutExpired:
        return


def _memory(tree: Any) -> tuple[int, int]:
    """Return the bytes of (all processes, all but Ray's daemons) of a psutil process's tree."""
    import psutil

    try:
        children = tree.children(recursive=True)
    except psutil.NoSuchProcess:
        return 0, 0
    first = _pss(tree)
    sizes = [(_pss(one), _is_worker(one)) for one in children]
    workers = sum(size for size, is_worker in sizes if is_worker)
    has_ray = any(is_worker for _, is_worker in sizes)
    every = first + sum(size for size, _ in sizes)
    return every, first + workers if has_ray else every


def _pss(process: Any) -> int:
    import psutil

    try:
        size: int = process.memory_full_info().pss
    except psutil.NoSuchProcess:
        return 0
    return size


def _is_worker(process: Any) -> bool:
    import psutil

    try:
        return bool(process.cmdline()[:1]) and process.cmdline()[0].startswith(RAY_WORKER)
    except (psutil.NoSuchProcess, IndexError):
        return False
