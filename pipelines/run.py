"""Run a recipe: each stage's items over an executor, accounts checked, record last.

Finished stages are reused by fingerprint, finished items by marker; nothing finished is
overwritten. A killed run goes on where it was when the same command is given again.
"""

from __future__ import annotations

import fcntl
import os
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from io import RawIOBase
from pathlib import Path
from typing import Any

import yaml

from manifests import paths, store
from manifests.errors import PartDamaged, StageFailed, UserError
from manifests.record import (
    build_record,
    check_accounts,
    git_commit,
    read_latest,
    total,
    write_latest,
    write_record,
)
from manifests.work import Item, StageDir, View, commit, finished, must_be_whole
from pipelines.chain import Link, build
from pipelines.executors import Executor, Failed, Resources
from pipelines.progress import Progress
from pipelines.recipe import Recipe
from pipelines.stages import STAGES, Phase

ITEMS = "items.json"
CORESET = "coreset.parquet"
_SHOWN_FAILURES = 3

Marker = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Worker:
    """Made on the driver, called on a worker: returns the function that does one item there."""

    stage_name: str
    phase: Phase
    view: View

    def __call__(self) -> Callable[[Item], Marker]:
        """Return the function from item to marker."""
        return self._do

    def _do(self, item: Item) -> Marker:
        started = time.perf_counter()
        output = STAGES[self.stage_name].work(self.phase, self.view, item)
        return commit(self.view, item, output, seconds=time.perf_counter() - started)


def run(
    recipe: Recipe,
    out: str,
    *,
    executor: Executor,
    progress: Progress,
    until: str | None = None,
) -> list[Link]:
    """Run the recipe's stages up to `until` and return the finished chain.

    Raises: UserError for input that a person must mend; StageFailed when items failed or accounts
    do not add up; PartDamaged when a finished stage has lost files.
    """
    out = paths.absolute(out)
    with _locked(out):
        links = build(recipe, out, until=until)
        resolved = yaml.safe_dump(recipe.as_mapping(), sort_keys=False, allow_unicode=True)
        store.remove_temporaries(out, depth=1)
        store.write(out, "recipe.yaml", resolved.encode())
        write_latest(out, list(read_latest(out).values()), planned=_directories(links))
        for at, link in enumerate(links):
            try:
                run_stage(link, links[:at], recipe, executor, progress)
                _publish(out, links, num_done=at + 1)
            except Exception as error:
                with suppress(UserError):  # a full disk must not hide why the stage failed
                    progress.stage_failed(link.stage.name, error)
                raise
    return links


def run_stage(
    link: Link, before: Sequence[Link], recipe: Recipe, executor: Executor, progress: Progress
) -> None:
    """Make one stage, or go on with it, unless it is finished. Raises: as `run` does."""
    warnings = link.stage.warn(link.view.config, recipe.sections)
    for text in warnings:
        progress.warned(link.stage.name, text)
    record = link.directory.record()
    if record is not None:
        if record["fingerprint"] != link.mark:
            raise PartDamaged(
                f"{link.directory.path} has the record of another fingerprint, "
                f"{record['fingerprint']}. Move that directory away and run again."
            )
        must_be_whole(link.directory, record)
        progress.stage_reused(link.stage.name, record)
        return
    started = time.time()
    store.remove_temporaries(link.directory.path)
    markers: list[Marker] = []
    planned: list[str] = []
    for phase in link.stage.phases_for(link.view.config):
        items = link.stage.plan(phase, link.view)
        if not items and planned:
            continue
        planned += [item.name for item in items]
        _note_planned(link.directory, planned)
        resources = _resources(link, recipe, executor)
        markers += _run_phase(link, phase, items, resources, executor, progress)
    store.remove_temporaries(link.directory.path)  # of workers that were killed meanwhile
    counts = total(markers)
    check_accounts(
        link.stage.name,
        counts,
        rows_in=_rows_in(before),
        max_quarantine=recipe.max_quarantine_fraction,
    )
    record = build_record(
        link.stage.name,
        link.mark,
        version=link.stage.version,
        config=link.config,
        inputs=link.inputs,
        markers=markers,
        run_facts={**_run_facts(executor, started), "warnings": warnings},
    )
    write_record(link.directory, record)
    progress.stage_done(link.stage.name, record)


def _note_planned(directory: StageDir, planned: list[str]) -> None:
    """Write the items' names, unless an earlier attempt noted these and perhaps later ones."""
    noted = store.read_json(paths.join(directory.path, ITEMS))
    if not isinstance(noted, dict) or not set(planned) <= set(noted["items"]):
        store.write_json(directory.path, ITEMS, {"items": planned})


def _run_phase(
    link: Link,
    phase: Phase,
    items: Sequence[Item],
    resources: Resources,
    executor: Executor,
    progress: Progress,
) -> list[Marker]:
    """Do the items that have no marker yet and return all markers in item order."""
    assert len({item.name for item in items}) == len(items), "two items of one name"
    done = {item.name: marker for item in items if (marker := finished(link.directory, item))}
    todo = sorted((i for i in items if i.name not in done), key=lambda i: (-i.cost, i.name))
    progress.phase_started(link.stage.name, num_items=len(items), num_done=len(done))
    failures: list[Failed[Item]] = []
    worker = Worker(link.stage.name, phase, link.view)
    for outcome in executor.map(worker, todo, resources):
        if isinstance(outcome, Failed):
            failures.append(outcome)
            progress.item_failed(link.stage.name, outcome)
        else:
            done[outcome.item.name] = outcome.result
            progress.item_done(link.stage.name, outcome.result)
    if failures:
        raise _failed(link.stage.name, failures, len(items))
    return [done[item.name] for item in items]


def _failed(stage: str, failures: Sequence[Failed[Item]], num_items: int) -> StageFailed:
    shown = [
        f"  {one.item.name}: {one.error_class}: {one.message} (tried {one.attempts} times)"
        for one in failures[:_SHOWN_FAILURES]
    ]
    more = len(failures) - len(shown)
    shown += [f"  and {more} more; every traceback is in events.jsonl"] if more else []
    head = (
        f"{stage}: {len(failures)} of {num_items} items failed; the others are finished and kept."
    )
    return StageFailed("\n".join([head, *shown]))


def _resources(link: Link, recipe: Recipe, executor: Executor) -> Resources:
    return Resources(
        num_gpus=executor.gpus_per_worker() if link.stage.wants_gpu else 0,
        timeout_seconds=recipe.item_timeout_seconds,
        kept_for=link.stage.name if link.stage.caches_model else "",
    )


def _rows_in(before: Sequence[Link]) -> int | None:
    if not before:
        return None
    record = before[-1].directory.record()
    if record is None:
        raise PartDamaged(f"{before[-1].directory.path} has lost its record during the run.")
    return int(record["kept"])


def _run_facts(executor: Executor, started: float) -> Mapping[str, Any]:
    return {
        "executor": executor.name,
        "seconds": round(time.time() - started, 3),
        "finished_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "git_commit": git_commit(),
        "cpus": os.cpu_count(),
    }


def _publish(out: str, links: Sequence[Link], *, num_done: int) -> None:
    """Name the newest directories; copy the coreset to the top when this chain made it.

    Later stages of an older run stay named only if they were made from this very chain and this
    run is not about to make others in their place.
    """
    chain = [link.directory for link in links[:num_done]]
    made_from = {link.stage.name: link.mark for link in links[:num_done]}
    planned = {link.stage.name: link.directory.path for link in links}
    for name, directory in read_latest(out).items():
        if name in made_from:
            continue
        record = directory.record()
        is_replaced = planned.get(name, directory.path) != directory.path
        if record is None or record["inputs"] != made_from or is_replaced:
            break
        chain.append(directory)
        made_from[name] = record["fingerprint"]
    write_latest(out, chain, planned=_directories(links))
    newest = links[num_done - 1]
    if newest.stage.name == "select":
        content = store.read_bytes(paths.join(newest.directory.path, CORESET))
        store.write(out, CORESET, content)


def _directories(links: Sequence[Link]) -> list[StageDir]:
    return [link.directory for link in links]


@contextmanager
def _locked(out: str) -> Iterator[None]:
    """Keep a second run out of a local run directory; the lock dies with the process."""
    if not paths.is_local(out):
        yield
        return
    folder = Path(paths.filesystem(out)[1])
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / ".lock").open("a+b", buffering=0)
    except OSError as error:
        raise UserError(f"--out {out!r} cannot be used.", f"{error}.", "Choose another.") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            raise UserError(
                f"Another run is writing to {out!r}.",
                f"It is {file.read().decode() or 'unknown'}.",
                "Wait for it, or choose another --out.",
            ) from error
        _sign(file)
        yield


def _sign(file: RawIOBase) -> None:
    """Write who holds the lock into it; without space the lock holds all the same."""
    with suppress(OSError):
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}".encode())
