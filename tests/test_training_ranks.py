"""Training on several processes of this machine: their result, their errors, and their end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file
from small_training import directories, make_world

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_world(tmp_path_factory.mktemp("ranks"))


def started(world: Path, out: str, ranks: int, *changes: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "pipelines.cli", "train", str(world / "recipe.yaml")]
    command += ["--out", str(world / out), "--to", "pretrain"]
    for change in (f"launch.ranks={ranks}", *changes):
        command += ["--set", change]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True)


@pytest.mark.parametrize("on", ["here", "ray"])
def test_two_processes_train_as_one_does(world: Path, on: str) -> None:
    trained = []
    for ranks, where in ((1, "here"), (2, on)):
        run = started(world, f"{on}{ranks}", ranks, f"launch.on={where}")
        _, said = run.communicate()
        assert run.returncode == 0, said
        path = directories(world / f"{on}{ranks}")["pretrain"] / "trained.safetensors"
        trained.append(load_file(path))
    one, two = trained
    assert one.keys() == two.keys()
    for name, values in one.items():
        assert bool((values - two[name]).abs().max() < 1e-4), name


def test_a_ranks_error_is_told_in_three_sentences_and_no_traceback(world: Path) -> None:
    run = started(world, "refused", 2, "pretrain.template=minicpm")
    _, said = run.communicate()
    assert run.returncode == 2, said
    assert said.count("error: The tokenizer has no special token '</s>'") == 1
    assert "fix: Choose the template of this language model." in said
    assert "Traceback" not in said
    assert "torch" not in said


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGTERM, 1), (signal.SIGKILL, -9)])
def test_no_rank_outlives_its_command_and_the_run_goes_on(
    world: Path, sent: signal.Signals, code: int
) -> None:
    changes = ("pretrain.epochs=60", "pretrain.checkpoint_every_steps=5")
    run = started(world, f"killed{code}", 2, *changes)
    assert run.stderr is not None
    seen = ""
    while "step " not in seen:
        line = run.stderr.readline()
        assert line, seen
        seen += line
    ranks = children(run.pid)
    assert len(ranks) == 2
    run.send_signal(sent)
    _, said = run.communicate(timeout=60)
    assert run.returncode == code
    if sent == signal.SIGTERM:
        assert said.endswith("The same command goes on from the last checkpoint.\n")
        assert "Traceback" not in said
    wait_for_end(ranks)
    again = started(world, f"killed{code}", 2, *changes)
    _, said = again.communicate()
    assert again.returncode == 0, said


def children(pid: int) -> list[int]:
    """Return the processes that a process started (Linux)."""
    text = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    return list(map(int, text.split()))


def wait_for_end(pids: list[int], seconds: float = 30) -> None:
    until = time.monotonic() + seconds
    while any(is_running(pid) for pid in pids):
        assert time.monotonic() < until, "a rank goes on"
        time.sleep(0.1)


def is_running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        os.kill(pid, 0)
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"
