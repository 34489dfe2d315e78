"""What is looked at before a run's first step, so that it fails now rather than in the night.

- of some rows of each source, which share of tokens is trained, and which rows are dropped and why;
- the epoch's largest micro-batches, forward and backward: the memory that a run will need;
- the plan: its steps, padding and idle time.

It changes no result: gradients are let go, and random state is set anew before each step.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import torch

from manifests.errors import UserError
from train.data.batches import MicroBatch
from train.data.cuts import Ints
from train.data.index import Index
from train.data.plan import Plan, idle_share, naive_padding_share, padding_share
from train.data.samples import Batch, Row, RowMaker
from train.learn.measure import peak_memory
from train.learn.step import Learner
from train.text.template import IGNORED, Tokenized, preview

ROWS_PER_SOURCE = 32
PREVIEWS_PER_SOURCE = 2
_ADAM_BYTES = 8  # of two float32 moments for each number that trains


@dataclass(frozen=True)
class SourceSeen:
    """Rows of one source, as the model will read them. dropped: reason -> rows.

    tokens, trained: of the rows that are not dropped. previews: rows as text, see preview.
    """

    name: str
    rows: int
    tokens: int
    trained: int
    images: int
    dropped: dict[str, int]
    previews: tuple[str, ...]

    @property
    def trained_share(self) -> float:
        """Of all tokens, those that are trained."""
        return self.trained / max(self.tokens, 1)


@dataclass(frozen=True)
class PlanSeen:
    """An epoch's plan. Shares are of tokens that are computed, from 0 to 1.

    naive_padding: of random batches of the same mean size. idle: ranks that wait for the slowest.
    """

    steps: int
    samples: int
    micro_batches: int
    padding: float
    naive_padding: float
    idle: float

    @classmethod
    def of(cls, plan: Plan) -> PlanSeen:
        """Return what a plan comes to."""
        shares = padding_share(plan), naive_padding_share(plan), idle_share(plan)
        return cls(plan.num_steps, int(plan.step_starts[-1]), len(plan.starts), *shares)


@dataclass(frozen=True)
class LargestSeen:
    """The largest micro-batch, as it was tried.

    memory: the most bytes that were held, and what the optimizer will add at its first step.
    """

    rows: int
    padded_tokens: int
    images: int
    memory: int


@dataclass(frozen=True)
class Preflight:
    """All that was seen."""

    sources: tuple[SourceSeen, ...]
    plan: PlanSeen
    largest: LargestSeen | None = None

    def check(self) -> None:
        """Check that there is something to learn. Raises: UserError."""
        for one in self.sources:
            if one.rows and not one.trained:
                raise UserError(
                    f"Of {one.rows} rows of {one.name}, no token is trained.",
                    f"Dropped: {one.dropped}." if one.dropped else "Their labels are all ignored.",
                    "Look at the rows with this template and max_length, or leave the source out: "
                    f"plan.weights.{one.name}: 0.",
                )


def look_ahead(plan: Plan, index: Index, make_row: RowMaker, learner: Learner) -> Preflight:
    """Return what is seen of a run's first epoch. Every rank must call it.

    Raises: UserError for a source of which nothing is trained, or too little memory.
    """

    def look() -> Preflight:
        rows = plan.rows[: plan.step_starts[-1]]
        seen = Preflight(look_at_rows(index, rows, make_row), PlanSeen.of(plan))
        seen.check()
        return seen

    seen = learner.ranks.from_first(look)
    return replace(seen, largest=try_largest(plan, index, make_row, learner))


def look_at_rows(
    index: Index,
    rows: Ints,
    make_row: RowMaker,
    *,
    rows_per_source: int = ROWS_PER_SOURCE,
    previews_per_source: int = 0,
    colour: bool = False,
) -> tuple[SourceSeen, ...]:
    """Return what becomes of the first rows of each source among `rows`, in their order.

    rows: int64 [n] of the index, such as a plan's. Raises: SampleFailed for one that is not there.
    """
    found = []
    for at, name in enumerate(index.sources):
        chosen = rows[index.source[rows] == at][:rows_per_source]
        items = [make_row(index.sample(int(row))) for row in chosen]
        made = [one for one in items if isinstance(one, Row)]
        shown = (_preview(one, make_row, colour) for one in made[:previews_per_source])
        found.append(
            SourceSeen(
                name=name,
                rows=len(items),
                tokens=sum(len(one.ids) for one in made),
                trained=sum(int((one.labels[1:] != IGNORED).sum()) for one in made),
                images=sum(len(one.pixels) for one in made),
                dropped=dict(Counter(one for one in items if isinstance(one, str))),
                previews=tuple(shown),
            )
        )
    return tuple(found)


def try_largest(plan: Plan, index: Index, make_row: RowMaker, learner: Learner) -> LargestSeen:
    """Run the plan's largest micro-batches forward and backward, and leave no trace of them.

    They are the one of most padded tokens and, if that is another, the one of most images; any
    rank's. Every rank must call it. Raises: UserError in all of them when memory is too small.
    """
    images = np.append(0, np.cumsum(np.diff(index.image_starts)[plan.rows]))
    most_images = images[plan.stops] - images[plan.starts]
    largest = int(np.lexsort((most_images, plan.padded))[-1])
    tried = dict.fromkeys((largest, int(most_images.argmax())))
    seen: list[LargestSeen] = []
    devices = [learner.ranks.device] if learner.ranks.device.type == "cuda" else []

    def work() -> None:
        for at in tried:
            rows = plan.rows[plan.starts[at] : plan.stops[at]]
            with torch.random.fork_rng(devices), memory_errors_told(int(plan.padded[at])):
                seen.append(_forward_and_backward(rows, index, make_row, learner))

    try:
        learner.ranks.agree(work)
    finally:
        learner.optimizer.zero_grad()
    return seen[0]


@contextmanager
def memory_errors_told(padded_tokens: int) -> Iterator[None]:
    """Say what to do about too little memory. Raises: UserError in place of torch's error."""
    try:
        yield
    except (torch.OutOfMemoryError, RuntimeError) as error:
        if not isinstance(error, torch.OutOfMemoryError) and "allocate memory" not in str(error):
            raise
        raise UserError(
            f"The largest micro-batch, {padded_tokens} tokens padded, does not fit in memory.",
            str(error).splitlines()[0],
            "Lower plan.tokens_per_micro_batch, or set gradient_checkpointing: true.",
        ) from error


def _forward_and_backward(
    rows: Ints, index: Index, make_row: RowMaker, learner: Learner
) -> LargestSeen:
    items = [make_row(index.sample(int(row))) for row in rows]
    batch = learner.collated(MicroBatch(0, True, rows, items))
    device = learner.ranks.device
    adam = 0 if learner.optimizer.state else _ADAM_BYTES
    to_come = adam * sum(one.numel() for one in learner.trained.values())
    if not isinstance(batch, Batch):
        return LargestSeen(0, 0, 0, peak_memory(device) + to_come)
    losses, _ = learner.model.losses(*batch[:4])
    losses.sum().backward()  # type: ignore[no-untyped-call]
    memory = peak_memory(device) + to_come
    return LargestSeen(len(batch.index_rows), batch.ids.numel(), len(batch.pixels), memory)


def _preview(row: Row, make_row: RowMaker, colour: bool) -> str:
    shown = Tokenized(row.ids, row.labels, len(row.pixels), 0, 0)
    return preview(shown, make_row.tokenizer, colour=colour)
