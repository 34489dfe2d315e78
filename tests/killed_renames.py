"""Runs a recipe in child processes that kill themselves just before one of their renames.

    python tests/killed_renames.py RECIPE OUT every      once per rename, each run then repeated
    python tests/killed_renames.py RECIPE OUT again      over and over in one directory

Every file appears by `os.replace`, so between two renames nothing else changes on disk but
temporary files and lines of the event log: these are all the states that a kill can leave.
The first run, undisturbed, says what must come out. Prints the number of renames it had, of
runs killed and of rows in the coreset, as JSON. Children are forked from a process that has
imported everything and computed nothing, so that one costs a fraction of a second.
"""

from __future__ import annotations

import importlib
import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from proof_worlds import results, temporaries

from manifests.checks import check
from pipelines import ask
from pipelines.executors import LocalExecutor
from pipelines.progress import Progress
from pipelines.recipe import Recipe, load
from pipelines.run import run
from pipelines.stages import STAGES

RENAMES_PER_LIFE = 24
"""For "again": more than one item's files and those before the last phase's first item: recipe and
plan, one per finished stage, one per phase."""
MAX_LIVES = 200


def main(recipe_path: str, out_path: str, how: str) -> None:
    """Prove it or exit with 1."""
    recipe, base = load(recipe_path), Path(out_path)
    _import_all(recipe)
    wanted = base / "undisturbed.json"
    whole = base / "undisturbed"
    base.mkdir(parents=True, exist_ok=True)
    _must_end_well(lambda: _note(wanted, _run(recipe, whole, counting=True)))
    num_renames = json.loads(wanted.read_text())["renames"]
    if how == "every":
        num_killed = _kill_at_each(recipe, base, wanted, num_renames)
    else:
        num_killed = _kill_again_and_again(recipe, base, wanted)
    print(json.dumps({"renames": num_renames, "killed": num_killed}))  # noqa: T201 - its result


def _kill_at_each(recipe: Recipe, base: Path, wanted: Path, num_renames: int) -> int:
    for number in range(1, num_renames + 1):
        out = base / f"killed-{number}"
        assert _killed(_child(lambda: _run(recipe, out, kill_at=number))), f"{number} was survived"  # noqa: B023
        _must_end_well(lambda: _compare(_run(recipe, out), wanted))  # noqa: B023
        shutil.rmtree(out)
    return num_renames


def _kill_again_and_again(recipe: Recipe, base: Path, wanted: Path) -> int:
    out = base / "again"
    for life in range(MAX_LIVES):
        if not _killed(_child(lambda: _run(recipe, out, kill_at=RENAMES_PER_LIFE))):
            _must_end_well(lambda: _compare(_run(recipe, out), wanted))
            return life
    raise AssertionError("the run does not get ahead")


def _run(
    recipe: Recipe, out: Path, *, kill_at: int | None = None, counting: bool = False
) -> dict[str, Any]:
    """Run the recipe in this process and return what came out."""
    renames = _Renames(kill_at)
    os.replace = renames  # type: ignore[assignment]
    run(recipe, str(out), executor=LocalExecutor(), progress=Progress(str(out)))
    findings = check(str(out), ask.chain_of(str(out)))
    assert all(one.holds for one in findings), findings
    assert ask.adds_up(ask.funnel(ask.chain_of(str(out))))
    assert temporaries(out) == []
    return {"renames": renames.num_done if counting else None, "results": results(out)}


class _Renames:
    """Stands for os.replace; at its n-th call it kills the process first."""

    def __init__(self, kill_at: int | None) -> None:
        self._replace, self._kill_at, self.num_done = os.replace, kill_at, 0

    def __call__(self, source: str, target: str) -> None:
        self.num_done += 1
        if self.num_done == self._kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        self._replace(source, target)


def _note(path: Path, found: dict[str, Any]) -> None:
    path.write_text(json.dumps(found))


def _compare(found: dict[str, Any], wanted: Path) -> None:
    expected = json.loads(wanted.read_text())["results"]
    differing = {name for name, _ in found["results"].items() ^ expected.items()}
    assert not differing, sorted(differing)


def _child(work: Callable[[], Any]) -> int:
    """Do the work in a forked process and return its wait status; its output goes to stderr."""
    sys.stdout.flush()
    pid = os.fork()
    if pid:
        return os.waitpid(pid, 0)[1]
    status = 1
    try:
        work()
        status = 0
    except BaseException:
        sys.excepthook(*sys.exc_info())  # type: ignore[arg-type]
        raise
    finally:
        sys.stderr.flush()
        os._exit(status)


def _must_end_well(work: Callable[[], Any]) -> None:
    if (status := _child(work)) != 0:
        raise SystemExit(f"a run ended with status {status}")


def _killed(status: int) -> bool:
    assert status == 0 or (os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL)
    return status != 0


def _import_all(recipe: Recipe) -> None:
    for name in recipe.configs:
        importlib.import_module(STAGES[name].module)
    if "embed" in recipe.configs:
        from curate.media.torchvision_ops import ensure_torchvision_importable

        ensure_torchvision_importable()
        importlib.import_module("open_clip")
    importlib.import_module("faiss")


if __name__ == "__main__":
    main(*sys.argv[1:])
