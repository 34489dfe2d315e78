"""What training the demo's models has in common: the command line, phases, and the loop."""

from __future__ import annotations

import argparse
import logging
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)

LOG_EVERY_STEPS = 25
_LONGEST_GRADIENT = 1.0


@dataclass(frozen=True, slots=True)
class Options:
    """What to train. phases: their numbers. begun: directory of a model to go on with.

    num_threads: of the CPU, part of the result. share: of all steps, for a quick try.
    """

    out: Path
    phases: range
    begun: Path | None = None
    num_threads: int = 1
    share: float = 1.0

    def num_steps(self, of_phase: int) -> int:
        """Return how many steps of a phase to take."""
        return max(round(of_phase * self.share), 2)


def read_options(doc: str | None, arguments: list[str], *, num_phases: int) -> Options:
    """Return what a command line asks for, and log with times from now on."""
    parser = argparse.ArgumentParser(description=(doc or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="directory of the model")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads, part of the result")
    parser.add_argument("--begun", type=Path, help="directory of a model after the first phase")
    parser.add_argument("--first-only", action="store_true", help="stop after the first phase")
    parser.add_argument("--share", type=float, default=1.0, help="of all steps, for a quick try")
    parsed = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    phases = range(parsed.begun is not None, 1 if parsed.first_only else num_phases)
    return Options(parsed.out, phases, parsed.begun, parsed.threads, parsed.share)


def fit(
    parameters: Sequence[torch.nn.Parameter],
    batches: Iterable[Any],
    losses_of: Callable[[int, Any], dict[str, torch.Tensor]],
    *,
    num_steps: int,
    peak_lr: float,
    warmup_share: float,
) -> None:
    """Train on the sum of the losses of each batch: AdamW, one cycle, clipped gradients.

    losses_of: (step from 1, batch) -> losses by name.
    """
    import torch

    optimizer = torch.optim.AdamW(parameters, lr=peak_lr, weight_decay=0.02, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, peak_lr, total_steps=num_steps, pct_start=warmup_share
    )
    started = time.monotonic()
    for step, batch in enumerate(batches, start=1):
        losses = losses_of(step, batch)
        optimizer.zero_grad()
        sum(losses.values()).backward()  # type: ignore[union-attr]
        torch.nn.utils.clip_grad_norm_(parameters, _LONGEST_GRADIENT)
        optimizer.step()
        schedule.step()
        if step % LOG_EVERY_STEPS == 0:
            left = (num_steps - step) * (time.monotonic() - started) / step
            said = "  ".join(f"{name} {value.item():.3f}" for name, value in losses.items())
            log.info("step %d/%d  %s  %.0f s left", step, num_steps, said, left)
