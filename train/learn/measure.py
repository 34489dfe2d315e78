"""Steps of a run, taken and measured: what was learnt from, what was dropped, what it cost.

Before each step the random state is set from seed, step and rank.
"""

from __future__ import annotations

import hashlib
import json
import math
import resource
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch

from manifests.errors import StageFailed, UserError
from train.config import TrainConfig
from train.data.batches import MicroBatch
from train.data.index import Index
from train.data.samples import Row
from train.learn.dropped import DroppedRows
from train.learn.flops import ModelFlops, counts_of, peak_flops
from train.learn.log import Entry
from train.learn.ranks import Ranks
from train.learn.step import Learner, Tally, learning_rate_share

_KIB = 1024


class MeasuredSteps:
    """Takes a run's steps on this rank. total: the number of steps of the whole run."""

    def __init__(
        self, config: TrainConfig, learner: Learner, index: Index, out: str, total: int
    ) -> None:
        self._config = config
        self._learner = learner
        self._ranks = learner.ranks
        self._columns = index.columns()
        self._total = total
        self._flops = ModelFlops.of(learner.model, config)
        self._peak = peak_flops(self._ranks.device) * self._ranks.size
        self._dropped = DroppedRows(out, self._ranks.rank, index)

    def take(self, step: int, epoch: int, batch_size: int, read: Iterator[MicroBatch]) -> Entry:
        """Learn from a global batch of so many samples; return what the log says of it.

        read: this rank's micro-batches from this step on. Every rank must call it.
        Raises: UserError for a step without labels, or whose loss or gradients are no numbers;
            StageFailed when a sample was neither trained on nor dropped.
        """
        learner, sources, started = self._learner, self._columns.sources, time.perf_counter()
        torch.manual_seed(_step_seed(self._config.seed, step, self._ranks.rank))
        passed = Passed(self._flops, self._config)
        micros = self._passing(passed, read, epoch, step)
        tally = learner.step(micros, self._columns.source, len(sources))
        reasons = _all_reasons(tally, self._ranks)
        _check_labels(tally, reasons, step)
        _check_all_counted(tally, batch_size, step)
        share = learning_rate_share(step, self._total, self._config.warmup_share)
        norms = learner.update(share)
        _check_finite(tally, norms, step)
        needed, computed = self._ranks.summed([passed.needed, passed.computed])
        seconds = time.perf_counter() - started
        return {
            "step": step,
            "epoch": epoch,
            "lr": learner.rates(),
            "grad_norm": norms,
            **tally.measured(sources, seconds),
            "dropped_reasons": reasons,
            "flops": needed,
            "mfu": needed / seconds / self._peak,
            "hfu": computed / seconds / self._peak,
            "data_seconds": passed.seconds,
            "memory_bytes": peak_memory(self._ranks.device),
        }

    def _passing(
        self, passed: Passed, read: Iterator[MicroBatch], epoch: int, step: int
    ) -> Iterator[MicroBatch]:
        """Yield a step's micro-batches, and write down what they drop."""
        yield from passed.until_last(read)
        self._dropped.add(passed.dropped, epoch=epoch, step=step)


@dataclass(eq=False)
class Passed:
    """One step's micro-batches of one rank.

    dropped: (row of the index, reason). needed: FLOPs of the model; computed: with padding and what
    is computed again. seconds: of waiting for rows.
    """

    flops: ModelFlops
    config: TrainConfig
    dropped: list[tuple[int, str]] = field(default_factory=list)
    needed: float = 0.0
    computed: float = 0.0
    seconds: float = 0.0

    def until_last(self, read: Iterator[MicroBatch]) -> Iterator[MicroBatch]:
        """Yield a step's micro-batches, and leave the next step's in `read`."""
        while True:
            started = time.perf_counter()
            micro = next(read)
            self.seconds += time.perf_counter() - started
            self._see(micro)
            yield micro
            if micro.is_last:
                return

    def _see(self, micro: MicroBatch) -> None:
        pairs = zip(micro.rows.tolist(), micro.items, strict=True)
        self.dropped += [(row, item) for row, item in pairs if isinstance(item, str)]
        rows = [item for item in micro.items if isinstance(item, Row)]
        laid = {"packing": self.config.plan.packing, "dummy_images": self.config.dummy_images}
        own, padded = counts_of(rows, **laid)
        self.needed += self.flops.needed(own)
        self.computed += self.flops.computed(padded)


def peak_memory(device: torch.device) -> int:
    """Return the most memory that this process has held, in bytes: of a GPU, else of the host."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _KIB


def _all_reasons(tally: Tally, ranks: Ranks) -> dict[str, int]:
    """Return why rows of a step were dropped, on all ranks; they talk only when some were."""
    if not tally.counts["dropped"]:
        return {}
    found = sum(ranks.from_all(tally.reasons), Counter())
    return dict(sorted(found.items()))


def _check_labels(tally: Tally, reasons: Mapping[str, int], step: int) -> None:
    if not tally.num_labels:
        raise UserError(
            f"Step {step} has no label to learn.",
            f"{tally.counts['dropped']} of its rows were dropped: {dict(reasons)}.",
            "Look at the data with the template that the run uses.",
        )


def _check_all_counted(tally: Tally, batch_size: int, step: int) -> None:
    """Check that each sample of a global batch was trained on or dropped. Raises: StageFailed."""
    counts = tally.counts
    if counts["rows"] + counts["dropped"] != batch_size:
        raise StageFailed(
            f"Step {step} has {batch_size} samples, of which {counts['rows']} were trained on and "
            f"{counts['dropped']} dropped."
        )


def _check_finite(tally: Tally, norms: Mapping[str, float], step: int) -> None:
    """Check losses and gradients before anything is kept of a step. Raises: UserError."""
    values = {"loss": float(tally.by_source[:, 0].sum()), **norms}
    if not all(map(math.isfinite, values.values())):
        raise UserError(
            f"Step {step} gave numbers that are none: {values} (loss, and gradients by group).",
            "All later weights would be nan; the last checkpoint is from before.",
            "Lower the learning rates, set max_grad_norm, or train with dtype bfloat16 or float32.",
        )


def _step_seed(seed: int, step: int, rank: int) -> int:
    digest = hashlib.sha256(json.dumps([seed, "step", step, rank]).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1
