"""The training loop: micro-batches of a plan, one step of the optimizer for each global batch.

Before each step the random state is set from seed, step and rank, so a run goes on from a
checkpoint bit by bit: weights, losses and the order of data.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from manifests import paths, store
from manifests.errors import UserError
from train.config import TrainConfig
from train.data.batches import MicroBatch, batches
from train.data.index import Index
from train.data.lengths import exact_columns
from train.data.plan import START, Columns, Cursor, make_plan, num_steps, plan_hash
from train.data.samples import RowMaker
from train.learn.checkpoint import (
    Checkpoint,
    base_hash,
    data_fingerprints,
    read_projector,
    tensors_hash,
    write_trained,
)
from train.learn.model import TrainedLlava
from train.learn.ranks import Ranks, joined_ranks
from train.learn.step import Learner, learning_rate_share

LOG = "log.jsonl"
DONE = "done.json"
Entry = dict[str, Any]


def train(
    config: TrainConfig,
    model_dir: str,
    data_dirs: list[str],
    out: str,
    *,
    projector: str | None = None,
    num_workers: int = 0,
    on_step: Callable[[Entry], None] | None = None,
) -> TrainedLlava:
    """Train one stage and write `out`; go on where a stopped run of the same settings was.

    Args:
        model_dir: a local LLaVA directory that compose wrote.
        data_dirs: directories of assemble or mix stages.
        out: folder of log.jsonl, checkpoint.pt and, at the end, trained.safetensors and done.json.
        projector: folder of a finished run whose projector replaces the model's.
        num_workers: processes that read and decode, for each rank.
        on_step: is called by rank 0 with each line of the log.

    Under torchrun (RANK and WORLD_SIZE are set) the ranks share the work; with another number of
    them the result differs by rounding and by dropout's draws.
    Returns: the trained model.
    Raises: UserError for a finished `out`, other settings than those it was begun with, or a step
        without labels.
    """
    if paths.exists(paths.join(out, DONE)):
        raise UserError(
            f"{out} holds a finished run.",
            "Nothing finished is overwritten.",
            "Name another folder, or remove this one.",
        )
    with joined_ranks() as ranks:
        model = TrainedLlava.load(model_dir, config)
        _check_image_tokens(config, model.tokens_per_image)
        taken = _take_projector(model, projector)
        model.llava.to(ranks.device)
        image_id = model.llava.config.image_token_id
        make_row = RowMaker.load(model_dir, config, image_token_id=image_id)
        index = Index.load(data_dirs)
        index, columns = _planned(index, make_row, config, out, ranks, num_workers)
        identity = {
            "config": config.deciding(),
            "base": ranks.from_first(lambda: base_hash(model_dir)),
            "projector": taken,
            "plan": plan_hash(columns, seed=config.seed, config=config.plan),
            "data": data_fingerprints(data_dirs),
        }
        learner = Learner(model, config, ranks)
        run = _Run(config, out, identity, learner, index, columns, make_row)
        run.restore()
        run.go_on(num_workers, on_step)
        return model


@dataclass(eq=False)
class _Run:
    """A run between two steps. identity: what decides its result; cursor: the step to come."""

    config: TrainConfig
    out: str
    identity: Mapping[str, Any]
    learner: Learner
    index: Index
    columns: Columns
    make_row: RowMaker
    cursor: Cursor = START
    steps_done: int = 0

    @property
    def ranks(self) -> Ranks:
        """Return the processes that share the work."""
        return self.learner.ranks

    def restore(self) -> None:
        """Take up the last checkpoint, if there is one, and cut the log to it."""
        found = Checkpoint.load(self.out)
        if found is not None:
            found.check_same_run(self.identity, self.out)
            with torch.no_grad():
                for name, one in self.learner.trained.items():
                    one.copy_(found.trained[name])
            self.learner.optimizer.load_state_dict(dict(found.optimizer))
            self.cursor, self.steps_done = found.cursor, found.steps_done
        self.ranks.wait()  # all have read before the first writes
        if self.ranks.is_first:
            store.write_json(self.out, "config.json", self.config.model_dump(mode="json"))
            _cut_log(self.out, self.steps_done)

    def go_on(self, num_workers: int, on_step: Callable[[Entry], None] | None) -> None:
        """Take all steps that are left, and write the result."""
        total = self._num_steps()
        for here, then, micros in self._steps(num_workers):
            share = learning_rate_share(self.steps_done, total, self.config.warmup_share)
            entry = {"step": self.steps_done, "epoch": here.epoch, **self._step(micros, share)}
            self.cursor, self.steps_done = then, self.steps_done + 1
            if self.ranks.is_first:
                self._write(entry, on_step)
        if self.ranks.is_first:
            write_trained(self.out, self.learner.trained)
            done = {"steps": self.steps_done, "identity": self.identity}
            store.write_json(self.out, DONE, done)
        self.ranks.wait()

    def _num_steps(self) -> int:
        seed, plan = self.config.seed, self.config.plan
        epochs = range(self.config.epochs)
        return sum(num_steps(self.columns, seed=seed, epoch=one, config=plan) for one in epochs)

    def _steps(self, num_workers: int) -> Iterator[tuple[Cursor, Cursor, Iterator[MicroBatch]]]:
        """Yield each step's cursor, the next one and this rank's micro-batches, read on demand."""
        start = self.cursor
        for epoch in range(start.epoch, self.config.epochs):
            plan = make_plan(
                self.columns,
                seed=self.config.seed,
                epoch=epoch,
                config=self.config.plan,
                world_size=self.ranks.size,
            )
            first = start.step if epoch == start.epoch else 0
            rank = self.ranks.rank
            read = batches(plan, rank, self.index, self.make_row, num_workers, start=first)
            for step in range(first, plan.num_steps):
                yield Cursor(epoch, step), Cursor(epoch, step + 1), _until_last(read)

    def _step(self, micros: Iterator[MicroBatch], share: float) -> Entry:
        """Learn from a global batch; return what the log says of it."""
        started = time.perf_counter()
        torch.manual_seed(_step_seed(self.config.seed, self.steps_done, self.ranks.rank))
        sources = self.columns.sources
        tally = self.learner.step(micros, self.columns.source, len(sources))
        if not tally.num_labels:
            raise UserError(
                f"Step {self.steps_done} has no label to learn.",
                f"{tally.counts['dropped']} of its rows were dropped: {dict(tally.reasons)}.",
                "Look at the data with the template that the run uses.",
            )
        norms = self.learner.update(share)
        measured = tally.measured(sources, time.perf_counter() - started)
        return {"lr": self.learner.rates(), "grad_norm": norms, **measured}

    def _write(self, entry: Entry, on_step: Callable[[Entry], None] | None) -> None:
        """Write a step's line, and a checkpoint where one is due."""
        store.append_line(paths.join(self.out, LOG), json.dumps(entry))
        if self.steps_done % self.config.checkpoint_every_steps == 0:
            Checkpoint(
                identity=self.identity,
                cursor=self.cursor,
                steps_done=self.steps_done,
                trained=self.learner.trained,
                optimizer=self.learner.optimizer.state_dict(),
            ).save(self.out)
        if on_step is not None:
            on_step(entry)


def _planned(
    index: Index, make_row: RowMaker, config: TrainConfig, out: str, ranks: Ranks, num_workers: int
) -> tuple[Index, Columns]:
    """Return the rows to train on and what is planned by; lengths are kept in `out`."""
    if config.plan.lengths == "estimate":
        return index, index.columns()
    key = make_row.measures_by
    if ranks.is_first:  # the others read what it wrote
        exact_columns(index, make_row.measure, out, key=key, num_workers=num_workers)
    ranks.wait()
    measured = exact_columns(index, make_row.measure, out, key=key)
    return measured.rows, measured.columns


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


def _until_last(read: Iterator[MicroBatch]) -> Iterator[MicroBatch]:
    """Yield a step's micro-batches."""
    for micro in read:
        yield micro
        if micro.is_last:
            return


def _step_seed(seed: int, step: int, rank: int) -> int:
    digest = hashlib.sha256(json.dumps([seed, "step", step, rank]).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def _cut_log(out: str, steps_done: int) -> None:
    """Leave only the lines of these first steps: those after the checkpoint come again."""
    path = paths.join(out, LOG)
    lines = store.read_bytes(path).splitlines(keepends=True) if paths.exists(path) else []
    store.write(out, LOG, b"".join(lines[:steps_done]))
