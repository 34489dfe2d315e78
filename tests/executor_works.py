"""Works for executors that leave a file per call, and what their answers come to."""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipelines.executors import Done, Failed, Resources

Work = Callable[[int], Any]
ONE = Resources()


@dataclass(frozen=True)
class Worker:
    """A factory that leaves a file in `folder` per call, for a work that gets the folder too."""

    folder: Path
    work: Callable[[Path, int], Any]

    def __call__(self) -> Work:
        note(self.folder, "factory")
        return lambda item: self.work(self.folder, item)


def note(folder: Path, event: str) -> None:
    (folder / f"{event}-{os.getpid()}-{uuid.uuid4().hex}").touch()


def count(folder: Path, event: str) -> int:
    return len(list(folder.glob(f"{event}-*")))


def pids(folder: Path, event: str) -> list[int]:
    return [int(path.name.split("-")[1]) for path in folder.glob(f"{event}-*")]


def results(answers: Sequence[Done[int, Any] | Failed[int]]) -> dict[int, Any]:
    return {one.item: one.result for one in answers if isinstance(one, Done)}


def failures(answers: Sequence[Done[int, Any] | Failed[int]]) -> dict[int, Failed[int]]:
    return {one.item: one for one in answers if isinstance(one, Failed)}


def until(condition: Callable[[], bool], *, seconds: float = 20) -> bool:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.02)
    return condition()


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def square(folder: Path, item: int) -> int:
    note(folder, "run")
    return item * item


def slow_square(folder: Path, item: int) -> int:
    time.sleep(0.05)
    return square(folder, item)
