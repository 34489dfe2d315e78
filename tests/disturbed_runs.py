"""Starts the command line, waits for a moment inside a phase, and kills processes there."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ray_env import ray_env

HERE = Path(__file__).parent
POLL_SECONDS = 0.005
PHASE_SECONDS = 120.0
RUN_SECONDS = 300.0
GONE_SECONDS = 100.0
"""Ray's workers end within a second of their driver, its two agents try for a minute to report."""
ROWS_PER_BUCKET = 24

# Found by every Python process of a run, workers too: a disk that takes its time over each marker,
# so that there is a moment between an item's data and its marker, and one between two items.
SLOW_DISK = """
import os, time
_replace = os.replace
def _slow(source, target, **options):
    if "/_done/" in str(target):
        time.sleep(0.2)
    _replace(source, target, **options)
os.replace = _slow
"""

# The command line, with dedup's small world cut into several items.
WARREN = f"""
from curate.duplicates import forest_stage
forest_stage.ROWS_PER_BUCKET = {ROWS_PER_BUCKET}
from pipelines.cli import main
main()
"""


@dataclass(frozen=True, slots=True)
class Moment:
    """A phase of a stage, while some of its items are done and some are not.

    A phase of one item has no such moment: its start stands for it.
    """

    stage: str
    phase: int = 0


@dataclass(frozen=True, slots=True)
class Command:
    """`warren run RECIPE --out OUT --executor EXECUTOR`."""

    recipe_path: Path
    out: Path
    executor: str

    def run(self) -> str:
        """Run it to its end, undisturbed, and return what it said."""
        with self.started() as one:
            return one.finish()

    @contextmanager
    def started(self) -> Iterator[Started]:
        """Start it in a process group of its own; a driver that still runs at the end is killed."""
        log = self.out / "events.jsonl"
        offset = log.stat().st_size if log.exists() else 0
        words = ["run", str(self.recipe_path), "--out", str(self.out), "--executor", self.executor]
        with subprocess.Popen(
            [sys.executable, "-c", WARREN, *words],
            env=os.environ | ray_env() | {"PYTHONPATH": f"{self._slow_disk()}:{HERE.parent}"},
            start_new_session=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        ) as process:
            one = Started(process, self.out, offset)
            try:
                yield one
            finally:
                if process.poll() is None:
                    one.kill_driver()

    def _slow_disk(self) -> Path:
        folder = self.recipe_path.parent / "slow_disk"
        folder.mkdir(exist_ok=True)
        (folder / "sitecustomize.py").write_text(SLOW_DISK)
        return folder


@dataclass(slots=True)
class Started:
    """A running command. offset: length of the event log when it started."""

    process: subprocess.Popen[str]
    out: Path
    offset: int

    def wait_for(self, moment: Moment) -> None:
        """Wait until the run is in the middle of a phase."""
        reached = until(
            lambda: self._is_in(moment) or self.process.poll() is not None, seconds=PHASE_SECONDS
        )
        if self.process.poll() is not None:
            raise AssertionError(f"over before {moment}: {self.process.communicate()[0]}")
        assert reached, f"{moment} was not met"

    def kill_driver(self) -> list[int]:
        """Kill the first process; return the ids of those it started, which end by themselves."""
        family = descendants(self.process.pid)
        self.process.kill()
        self.process.wait()
        return family

    def kill_worker(self) -> int:
        """Kill one Ray worker that is at work and return its id."""
        found: list[int] = []
        assert until(lambda: bool(found.extend(self._workers_at_work()) or found))
        os.kill(found[0], signal.SIGKILL)
        return found[0]

    def finish(self) -> str:
        """Return what it said when it has ended well."""
        said = self.process.communicate(timeout=RUN_SECONDS)[0]
        assert self.process.returncode == 0, said
        return said

    def _is_in(self, moment: Moment) -> bool:
        sizes = [one["items"] for one in self._events("phase_started", moment.stage)]
        if len(sizes) <= moment.phase:
            return False
        markers = list(self.out.glob(f"{moment.stage}-*/_done/*.json"))
        num_done = len(markers) - sum(sizes[: moment.phase])
        num_items = sizes[moment.phase]
        return num_done < num_items and (num_done > 0 or num_items == 1)

    def _events(self, event: str, stage: str) -> list[dict[str, Any]]:
        path = self.out / "events.jsonl"
        lines = path.read_bytes()[self.offset :].splitlines(keepends=True) if path.exists() else []
        found = [json.loads(line) for line in lines if line.endswith(b"\n")]
        return [one for one in found if (one["event"], one["stage"]) == (event, stage)]

    def _workers_at_work(self) -> list[int]:
        family = descendants(self.process.pid)
        return [pid for pid in family if b"ray::WorkerProcess.do" in _proc(pid, "cmdline")]


def until(condition: Callable[[], bool], *, seconds: float = 60.0) -> bool:
    """Wait for a condition and return whether it came."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(POLL_SECONDS)
    return True


def descendants(pid: int) -> list[int]:
    """Return the ids of a process's children, their children and so on."""
    children: dict[int, list[int]] = {}
    for path in Path("/proc").glob("[0-9]*"):
        child = int(path.name)
        fields = _proc(child, "stat").rpartition(b")")[2].split()
        if fields:
            children.setdefault(int(fields[1]), []).append(child)
    found = list(children.get(pid, []))
    for one in found:  # grows while it is read
        found += children.get(one, [])
    return found


def all_gone(pids: Iterable[int]) -> bool:
    """Wait for processes to end and return whether all did."""
    return until(lambda: not any(map(is_alive, pids)), seconds=GONE_SECONDS)


def is_alive(pid: int) -> bool:
    """Tell whether a process runs; one that has ended but was not waited for does not."""
    return _proc(pid, "stat").rpartition(b")")[2].split()[:1] not in ([], [b"Z"])


def _proc(pid: int, name: str) -> bytes:
    try:
        return Path(f"/proc/{pid}/{name}").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return b""
