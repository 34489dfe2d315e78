"""Start a run with an executor and a progress display, and clean both up."""

from __future__ import annotations

from typing import Literal, cast

from manifests.work import StageDir
from pipelines.executors import make_executor
from pipelines.progress import make_progress
from pipelines.recipe import Recipe
from pipelines.run import run


def run_recipe(
    recipe: Recipe, out: str, *, executor: str, until: str | None = None
) -> dict[str, StageDir]:
    """Run a recipe with progress on stderr and return stage -> finished directory, in run order."""
    workers = make_executor(cast(Literal["local", "ray"], executor))
    progress = make_progress(out)
    try:
        links = run(recipe, out, executor=workers, progress=progress, until=until)
    finally:
        progress.close()
        workers.close()
    return {link.stage.name: link.directory for link in links}
