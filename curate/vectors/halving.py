"""Smaller pieces of a batch when memory runs out."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from manifests.errors import UserError

Result = TypeVar("Result")


class Halving:
    """Runs a batch in pieces that are halved whenever memory runs out, down to one row.

    `num_rows` is the largest piece that fitted so far; `num_halvings` counts how often it shrank.
    """

    def __init__(self, num_rows: int) -> None:
        self.num_rows = num_rows
        self.num_halvings = 0

    def run(self, function: Callable[[slice], Result], num_rows: int) -> list[Result]:
        """Return the function's results for consecutive slices of `num_rows` rows.

        Raises: UserError when memory does not even hold one row.
        """
        results: list[Result] = []
        done = 0
        while done < num_rows:
            piece = slice(done, min(done + self.num_rows, num_rows))
            fitted, result = _tried(function, piece)
            if fitted is not None:
                results.append(fitted[0])
                done = piece.stop
            else:
                self._halve(piece.stop - piece.start, result)
        return results

    def _halve(self, num_rows: int, why: str) -> None:
        if num_rows == 1:
            raise UserError(
                "Memory does not hold the model's forward pass of a single image.",
                why,
                "Take a smaller model, or free memory on the worker.",
            )
        self.num_rows = num_rows // 2
        self.num_halvings += 1
        _give_back_cached_memory()


def _tried(function: Callable[[slice], Result], piece: slice) -> tuple[tuple[Result] | None, str]:
    """Return ((result,), "") or, when memory ran out, (None, why).

    The error is not kept: its traceback would hold on to the tensors that filled the memory.
    """
    try:
        return (function(piece),), ""
    except RuntimeError as error:
        if not _is_out_of_memory(error):
            raise
        return None, str(error).splitlines()[0]


def _is_out_of_memory(error: RuntimeError) -> bool:
    import torch

    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)


def _give_back_cached_memory() -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.empty_cache()
