"""What other settings would keep: dedup and select done over in a temporary directory.

Only stages that read no embedding are done; everything before them must be there, which is what the
forest is for. A decontaminate stage between the two is done over as well, and takes the time that
it takes: it looks at the images of the rows that dedup would keep.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from manifests import paths, store
from manifests.errors import UserError
from manifests.ledger import Tally, kept_uids
from manifests.record import read_latest
from manifests.work import StageDir
from pipelines.ask import recipe_of
from pipelines.chain import Link, build
from pipelines.executors import LocalExecutor
from pipelines.progress import Progress
from pipelines.recipe import Recipe, load
from pipelines.run import run_stage

CHEAP = ("dedup", "select")
_DONE_OVER = (*CHEAP, "decontaminate")


def whatif(out: str, overrides: Sequence[str]) -> list[dict[str, Any]]:
    """Return per stage what it keeps now, what it would keep, and how many rows are in both.

    Raises: UserError when a stage that needs embeddings or images would have to run first.
    """
    recipe_of(out)  # says what is wrong with a folder that is no run
    out = paths.absolute(out)
    recipe = load(paths.join(out, "recipe.yaml"), overrides)
    last = [name for name in recipe.configs if name in CHEAP]
    links = build(recipe, out, until=last[-1] if last else None)
    now = read_latest(out)
    with TemporaryDirectory(prefix="warren-whatif-") as folder:
        return [_row(link, now) for link in _all_made(links, recipe, folder)]


def _all_made(links: Sequence[Link], recipe: Recipe, folder: str) -> list[Link]:
    """Return the links, those that are not finished made in a folder."""
    found: list[Link] = []
    for link in links:
        if link.directory.record() is None:
            link = _elsewhere(link, found, folder)
            run_stage(link, found, recipe, LocalExecutor(), _Silent(folder))
        found.append(link)
    return found


def _elsewhere(link: Link, before: Sequence[Link], folder: str) -> Link:
    if link.stage.name not in _DONE_OVER:
        raise UserError(
            f"The {link.stage.name} stage of these settings is not there.",
            f"Only {' and '.join(CHEAP)} can be tried: the others read embeddings or images.",
            "Change less, or make it with `warren run`; dedup.floor says how low a similarity may "
            "be tried.",
        )
    path = paths.join(folder, paths.name_of(link.directory.path))
    view = replace(link.view, path=path, before={one.stage.name: one.directory for one in before})
    return replace(link, view=view)


def _row(link: Link, now: dict[str, StageDir]) -> dict[str, Any]:
    record = link.directory.record() or {}
    current = now.get(link.stage.name)
    is_finished = current is not None and current.path == link.directory.path
    kept_now = (current.record() or {}).get("kept") if current else None
    both = None
    if link.stage.name in _DONE_OVER and current is not None:
        both = len(np.intersect1d(_kept(link.directory), _kept(current), assume_unique=True))
    return {
        "stage": link.stage.name,
        **Tally.from_json(record).as_json(),
        "kept_now": kept_now,
        "shared": both,
        "is_finished": is_finished,
        "seconds": record["seconds"],
    }


def _kept(directory: StageDir) -> np.ndarray:
    files = directory.verdict_files()
    found = [kept_uids(store.read_table(path, ["uid", "keep"])) for path in files]
    return np.concatenate([np.zeros(0, np.uint64), *found])


class _Silent(Progress):
    """Says nothing: the answer is the table."""

    def _say(self, line: str) -> None:
        pass
