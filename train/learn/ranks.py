"""The processes of a run: this one alone, or those that torchrun started."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import distributed

T = TypeVar("T")


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
        """Return what `ask` says in rank 0, in all of them."""
        said: list[T | None] = [ask() if self.is_first else None]
        if self.size > 1:
            distributed.broadcast_object_list(said, src=0)
        found = said[0]
        assert found is not None
        return found

    def wait(self) -> None:
        """Return when all ranks are here."""
        if self.size > 1:
            distributed.barrier()


@contextmanager
def joined_ranks() -> Iterator[Ranks]:
    """Give this process's rank by torchrun's environment, or a rank alone without it.

    GPUs talk by NCCL, CPUs by gloo. A process group that is there already is used and left.
    """
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    begun = "RANK" in os.environ and not distributed.is_initialized()
    if begun:
        distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        if distributed.is_initialized():
            yield Ranks(distributed.get_rank(), distributed.get_world_size(), device)
        else:
            yield Ranks(0, 1, device)
    finally:
        if begun:
            distributed.destroy_process_group()
