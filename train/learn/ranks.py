"""The processes of a run: this one alone, or those that torchrun or Ray started."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import distributed

from manifests.errors import UserError

T = TypeVar("T")

LONGEST_WAIT_S = 3600


@dataclass(frozen=True, slots=True)
class Ranks:
    """Which of `size` processes this is, and the device it computes on."""

    rank: int
    size: int
    device: torch.device

    @property
    def is_first(self) -> bool:
        """Whether this one writes."""
        return self.rank == 0

    def from_first(self, ask: Callable[[], T]) -> T:
        """Return what `ask` says in rank 0, in all of them.

        Raises: a UserError of rank 0, in all of them, so that none waits for it.
        """
        if self.size == 1:
            return ask()
        said: list[Any] = [None, None]
        if self.is_first:
            try:
                said[0] = ask()
            except UserError as error:
                said[1] = (error.what, error.why, error.fix)
        distributed.broadcast_object_list(said, src=0)
        answer, error_told = said
        if error_told is not None:
            raise UserError(*error_told)
        found: T = answer
        return found

    def from_all(self, own: T) -> list[T]:
        """Return each rank's own value, by rank, in all of them. Every rank must call it."""
        if self.size == 1:
            return [own]
        found: list[Any] = [None] * self.size
        distributed.all_gather_object(found, own)
        return found

    def summed(self, numbers: Sequence[float]) -> list[float]:
        """Return the sums over ranks, in float64. Every rank must call it."""
        if self.size == 1:
            return list(numbers)
        total = torch.tensor(numbers, dtype=torch.float64, device=self.device)
        distributed.all_reduce(total)
        found: list[float] = total.tolist()
        return found

    def agree(self, work: Callable[[], T]) -> T:
        """Return what `work` gives here. Raises: UserError in all ranks when it does so in one.

        Without it, the others would wait for one that has given up.
        """
        found, told = None, None
        try:
            found = work()
        except UserError as error:
            told = (error.what, error.why, error.fix)
        for one in self.from_all(told):
            if one is not None:
                raise UserError(*one)
        return found  # type: ignore[return-value]  # only None where an error was raised

    def wait(self) -> None:
        """Return when all ranks are here."""
        if self.size > 1:
            distributed.barrier()


@contextmanager
def joined_ranks() -> Iterator[Ranks]:
    """Give this process's rank by torchrun's environment, or a rank alone without it.

    GPUs talk by NCCL, CPUs by gloo. A process group that is there already is used and left, with
    the GPU that was chosen for it. A rank that waits longer than LONGEST_WAIT_S for another fails.
    """
    is_there = distributed.is_initialized()
    device = torch.device("cpu")
    if torch.cuda.is_available():
        local = torch.cuda.current_device() if is_there else int(os.environ.get("LOCAL_RANK", "0"))
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    begun = "RANK" in os.environ and not is_there
    if begun:
        on_gpu = device.type == "cuda"
        distributed.init_process_group(
            "nccl" if on_gpu else "gloo",
            timeout=timedelta(seconds=LONGEST_WAIT_S),
            device_id=device if on_gpu else None,
        )
    try:
        if distributed.is_initialized():
            yield Ranks(distributed.get_rank(), distributed.get_world_size(), device)
        else:
            yield Ranks(0, 1, device)
    finally:
        if begun:
            distributed.destroy_process_group()


def spare_workers(most: int = 4) -> int:
    """Return how many processes may read for this rank: its share of this machine's CPUs."""
    ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return min(most, max((os.cpu_count() or 1) // ranks_here, 1))
