"""The training loop: micro-batches of a plan, one step of the optimizer for each global batch.

Before each step the random state is set from seed, step and rank, so a run goes on from a
checkpoint bit by bit: weights, losses and the order of data.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch

from manifests import paths, store
from manifests.errors import StageFailed, UserError
from train.config import TrainConfig
from train.data.batches import MicroBatch, batches
from train.data.plan import START, Cursor, Plan
from train.data.planning import PlannedRows
from train.data.samples import RowMaker
from train.learn.checkpoint import (
    Checkpoint,
    CheckpointWriter,
    base_hash,
    data_fingerprints,
    read_projector,
    tensors_hash,
    write_trained,
)
from train.learn.dropped import cut_dropped, remove_dropped_lines, write_dropped
from train.learn.lines import cut_lines
from train.learn.log import LOG, Entry, RunLog, Say
from train.learn.measure import MeasuredSteps
from train.learn.model import TrainedLlava
from train.learn.preflight import look_ahead
from train.learn.preflight_text import lines_of
from train.learn.ranks import Ranks, joined_ranks, spare_workers
from train.learn.step import Learner

DONE = "done.json"
INPUTS = "inputs.json"
_ADDED_UP = ("rows", "dropped", "images", "tokens", "labels")


def train(
    config: TrainConfig,
    model_dir: str,
    data_dirs: list[str],
    out: str,
    *,
    subset: str | None = None,
    projector: str | None = None,
    num_workers: int | None = 0,
    on_step: Callable[[Entry], None] | None = None,
    say: Say | None = None,
    preflight: bool = True,
) -> TrainedLlava:
    """Train one stage and write `out`; go on where a stopped run of the same settings was.

    Args:
        model_dir: a local LLaVA directory that compose wrote.
        data_dirs: directories of assemble or mix stages.
        out: folder of log.jsonl, checkpoint.pt and, at the end, trained.safetensors,
            dropped.parquet and done.json. All ranks read and write it.
        subset: a parquet file or folder whose uids are trained on, see read_subset; None for all.
        projector: folder of a finished run whose projector replaces the model's.
        num_workers: processes that read and decode, for each rank; None: up to four, as there are
            CPUs for the ranks of this machine.
        on_step: is called by rank 0 with each line of the log.
        say: is called by rank 0 with lines for people, one about every ten seconds.
        preflight: whether to look at rows and at the largest micro-batch before the first step.

    Under torchrun (RANK and WORLD_SIZE are set) the ranks share the work; with another number of
    them the result differs by rounding and by dropout's draws.
    Returns: the trained model.
    Raises: UserError for a finished `out`, other settings than those it was begun with, a source
        or a step without labels, too little memory, or a loss or gradient that is no number.
    """
    if paths.exists(paths.join(out, DONE)):
        raise UserError(
            f"{out} holds a finished run.",
            "Nothing finished is overwritten.",
            "Name another folder, or remove this one.",
        )
    inputs = {
        "model_dir": paths.absolute(model_dir),
        "data_dirs": [paths.absolute(one) for one in data_dirs],
        "subset": subset and paths.absolute(subset),
        "projector": projector and paths.absolute(projector),
    }
    if num_workers is None:
        num_workers = spare_workers()
    with joined_ranks() as ranks:
        run = _begin(config, inputs, out, ranks, num_workers)
        run.restore(inputs)
        if preflight and not run.steps_done:
            seen = look_ahead(run.plan(0), run.rows.index, run.make_row, run.learner)
            if say is not None and ranks.is_first:
                say("\n".join(lines_of(seen)))
        run.go_on(num_workers, on_step, say)
        return run.learner.model


@dataclass(eq=False)
class _Run:
    """A run between two steps. identity: what decides its result; cursor: the step to come.

    totals: what all steps so far add up to.
    """

    config: TrainConfig
    out: str
    identity: Mapping[str, Any]
    learner: Learner
    rows: PlannedRows
    make_row: RowMaker
    cursor: Cursor = START
    steps_done: int = 0
    totals: Counter[str] = field(default_factory=Counter)

    @property
    def ranks(self) -> Ranks:
        """Return the processes that share the work."""
        return self.learner.ranks

    def plan(self, epoch: int) -> Plan:
        """Return an epoch's plan."""
        return self.rows.plan(self.config, epoch=epoch, world_size=self.ranks.size)

    def restore(self, inputs: Mapping[str, Any]) -> None:
        """Take up the last checkpoint, if there is one, and cut what was written after it."""
        found = Checkpoint.load(self.out)
        if found is not None:
            found.check_same_run(self.identity, self.out)
            with torch.no_grad():
                for name, one in self.learner.trained.items():
                    one.copy_(found.trained[name])
            self.learner.optimizer.load_state_dict(dict(found.optimizer))
            self.cursor, self.steps_done = found.cursor, found.steps_done
            self.totals = Counter(found.totals)
        self.ranks.wait()  # all have read before the first writes
        if self.ranks.is_first:
            store.write_json(self.out, "config.json", self.config.model_dump(mode="json"))
            store.write_json(self.out, INPUTS, inputs)
            cut_lines(self.out, LOG, self.steps_done)
            cut_dropped(self.out, self.steps_done)
        self.ranks.wait()  # and it has cut what others add to

    def go_on(
        self, num_workers: int, on_step: Callable[[Entry], None] | None, say: Say | None
    ) -> None:
        """Take all steps that are left, and write the result."""
        total = self.rows.num_steps(self.config)
        steps = MeasuredSteps(self.config, self.learner, self.rows.index, self.out, total)
        with ExitStack() as opened:
            recorder = _Recorder(self, total, on_step, say, opened) if self.ranks.is_first else None
            for here, batch_size, read in self._steps(num_workers):
                entry = steps.take(self.steps_done, here.epoch, batch_size, read)
                self.cursor, self.steps_done = here._replace(step=here.step + 1), entry["step"] + 1
                self.totals.update({name: entry[name] for name in _ADDED_UP})
                if recorder is not None:
                    recorder.add(entry)
        self.ranks.from_first(self._finish)

    def _steps(self, num_workers: int) -> Iterator[tuple[Cursor, int, Iterator[MicroBatch]]]:
        """Yield each step's cursor, its number of samples and this rank's micro-batches to come."""
        start = self.cursor
        for epoch in range(start.epoch, self.config.epochs):
            plan, rank = self.plan(epoch), self.ranks.rank
            first = start.step if epoch == start.epoch else 0
            read = batches(plan, rank, self.rows.index, self.make_row, num_workers, start=first)
            for step in range(first, plan.num_steps):
                yield Cursor(epoch, step), len(plan.batch(step)), read

    def _finish(self) -> None:
        """Write what was trained and what was not. Raises: StageFailed when a row is neither."""
        write_trained(self.out, self.learner.trained)
        refused = self.rows.refused
        num_dropped = write_dropped(self.out, self.rows.chosen, refused) - len(refused)
        counts = {name: self.totals[name] for name in _ADDED_UP}
        if num_dropped != counts["dropped"]:
            raise StageFailed(
                f"{counts['dropped']} rows were dropped, and {self.out} tells of {num_dropped}."
            )
        done = {"steps": self.steps_done, **counts, "identity": self.identity}
        store.write_json(self.out, DONE, done)
        remove_dropped_lines(self.out)


class _Recorder:
    """What rank 0 keeps of the steps: log and checkpoints. Both end with `opened`."""

    def __init__(
        self,
        run: _Run,
        total: int,
        on_step: Callable[[Entry], None] | None,
        say: Say | None,
        opened: ExitStack,
    ) -> None:
        self._run = run
        self._on_step = on_step
        self._log = opened.enter_context(RunLog(run.out, total, steps_done=run.steps_done, say=say))
        self._checkpoints = opened.enter_context(CheckpointWriter(run.out))
        self._saved_at = time.monotonic()
        self._stalled = 0.0

    def add(self, entry: Entry) -> None:
        """Write a step's line, and a checkpoint where one is due."""
        stalled = self._checkpoints.stalled
        entry["checkpoint_seconds"] = stalled - self._stalled
        self._stalled = stalled
        self._log.add(entry)
        self._checkpoints.check()
        if self._is_due():
            self._log.flush()
            self._checkpoints.put(self._checkpoint())
            self._saved_at = time.monotonic()
        if self._on_step is not None:
            self._on_step(entry)

    def _is_due(self) -> bool:
        config = self._run.config
        seconds = config.checkpoint_every_seconds
        is_late = seconds is not None and time.monotonic() - self._saved_at >= seconds
        return is_late or self._run.steps_done % config.checkpoint_every_steps == 0

    def _checkpoint(self) -> Checkpoint:
        run = self._run
        return Checkpoint(
            identity=run.identity,
            cursor=run.cursor,
            steps_done=run.steps_done,
            trained=run.learner.trained,
            optimizer=run.learner.optimizer.state_dict(),
            totals=run.totals,
        )


def _begin(
    config: TrainConfig, inputs: Mapping[str, Any], out: str, ranks: Ranks, num_workers: int
) -> _Run:
    """Return a run before its first step. inputs: those of inputs.json. Raises: UserError."""
    model_dir, data_dirs = inputs["model_dir"], inputs["data_dirs"]
    model = TrainedLlava.load(model_dir, config)
    _check_image_tokens(config, model.tokens_per_image)
    taken = _take_projector(model, inputs["projector"])
    model.llava.to(ranks.device)
    image_id = model.llava.config.image_token_id
    make_row = RowMaker.load(model_dir, config, image_token_id=image_id)
    rows = _planned(inputs, make_row, config, out, ranks, num_workers)
    identity = {
        "config": config.deciding(),
        "base": ranks.from_first(lambda: base_hash(model_dir)),
        "projector": taken,
        "plan": rows.plan_hash(config),
        "data": data_fingerprints(data_dirs),
        "subset": rows.subset,
    }
    return _Run(config, out, identity, Learner(model, config, ranks), rows, make_row)


def _planned(
    inputs: Mapping[str, Any],
    make_row: RowMaker,
    config: TrainConfig,
    out: str,
    ranks: Ranks,
    num_workers: int,
) -> PlannedRows:
    """Return what is trained on; the first rank measures the rows, the others read its figures."""

    def read(workers: int = 0) -> PlannedRows:
        data_dirs, subset = inputs["data_dirs"], inputs["subset"]
        return PlannedRows.read(data_dirs, subset, make_row, config, out, num_workers=workers)

    found = ranks.agree(lambda: read(num_workers) if ranks.is_first else None)
    return found or read()


def _check_image_tokens(config: TrainConfig, tokens_per_image: int) -> None:
    if config.plan.tokens_per_image != tokens_per_image:
        raise UserError(
            f"plan.tokens_per_image is {config.plan.tokens_per_image}.",
            f"This model reads an image as {tokens_per_image} tokens.",
            f"Set it to {tokens_per_image}.",
        )


def _take_projector(model: TrainedLlava, folder: str | None) -> str | None:
    """Put a finished run's projector into the model; return its SHA-256, in hex."""
    if folder is None:
        return None
    tensors = read_projector(folder)
    try:
        model.llava.model.multi_modal_projector.load_state_dict(tensors)
    except RuntimeError as error:
        raise UserError(
            f"The projector of {folder} does not fit the model.",
            str(error).splitlines()[-1].strip(),
            "Take one that was trained between the same tower and language model.",
        ) from error
    return tensors_hash(tensors)
