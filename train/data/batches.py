"""What a plan deals to a rank, read and prepared by worker processes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from train.data.cuts import Ints
from train.data.index import Index, TrainSample, named
from train.data.plan import Plan


@dataclass(frozen=True, eq=False)
class MicroBatch:
    """What a rank reads at once. rows: int64 [n], of the index; items: what was made of each.

    Each step ends with one that is_last; it is empty where the rank has none in this step.
    """

    step: int
    is_last: bool
    rows: Ints
    items: list[Any]


def batches(
    plan: Plan,
    rank: int,
    index: Index,
    make_row: Callable[[TrainSample], Any],
    num_workers: int,
    *,
    start: int = 0,
    prefetch: int = 2,
) -> Iterator[MicroBatch]:
    """Yield a rank's micro-batches from step `start` on, in the plan's order for any `num_workers`.

    Worker processes call `make_row` and keep `prefetch` micro-batches each ahead; with 0 workers it
    runs here. Torch's global random state is left as it is.
    Raises: SampleFailed, with the sample's key and shard, for what a read or make_row raises.
    """
    from torch import Generator
    from torch.utils.data import DataLoader

    loader: Any = DataLoader
    yield from loader(
        _Prepared(index, make_row),
        sampler=_Dealt(plan, rank, start),
        batch_size=None,
        collate_fn=_as_it_is,
        num_workers=num_workers,
        prefetch_factor=prefetch if num_workers else None,
        generator=Generator(),  # it draws a seed for its workers, or else from the global state
    )


@dataclass(frozen=True)
class _Dealt:
    """A rank's micro-batches: (step, is_last, rows)."""

    plan: Plan
    rank: int
    start: int

    def __iter__(self) -> Iterator[tuple[int, bool, Ints]]:
        for step in range(self.start, self.plan.num_steps):
            micros = self.plan.micro_batches(step, self.rank) or [np.empty(0, np.int64)]
            for at, rows in enumerate(micros, 1):
                yield step, at == len(micros), rows


@dataclass(frozen=True)
class _Prepared:
    """A micro-batch by what _Dealt yields; torch calls this a dataset."""

    index: Index
    make_row: Callable[[TrainSample], Any]

    def __getitem__(self, dealt: tuple[int, bool, Ints]) -> MicroBatch:
        step, is_last, rows = dealt
        return MicroBatch(step, is_last, rows, [self._item(int(row)) for row in rows])

    def _item(self, row: int) -> Any:
        sample = self.index.sample(row)
        with named(self.index, row, "prepared"):
            return self.make_row(sample)


def _as_it_is(batch: MicroBatch) -> MicroBatch:
    """Return the batch: torch would make tensors of some items."""
    return batch
