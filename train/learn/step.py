"""One optimizer step: sums of losses, added up over ranks and divided by the number of labels.

The gradient is that of the mean over all labels of the global batch, however it is cut. Hugging
Face's and LLaVA's mean of means is another one where micro-batches have unequal numbers of labels;
it is there to compare with (loss_normalisation). Sums stay on the device until a step's end, so
that a GPU is asked once a step.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, distributed, nn

from train.config import TrainConfig
from train.data.batches import MicroBatch
from train.data.samples import Batch, collate
from train.learn.model import TrainedLlava, moved
from train.learn.ranks import Ranks

_COUNTED = ("rows", "images", "tokens", "padded", "dropped", "micro_batches")
_MOST_AT_ONCE = 2**26  # numbers in a message between ranks: 256 MiB


@dataclass(eq=False)
class Tally:
    """What a step adds up. by_source: float64 [sources, (sum of losses, labels)].

    counts: rows, images, tokens (without padding), padded (with it), dropped rows, and the
    micro_batches that have labels. reasons: why rows were dropped, on this rank. sum_of_means: of
    the mean losses of micro-batches. weighs_micro_batches: all alike, or else labels all alike.
    """

    by_source: NDArray[np.float64]
    weighs_micro_batches: bool = False
    sum_of_means: float = 0.0
    counts: Counter[str] = field(default_factory=Counter)
    reasons: Counter[str] = field(default_factory=Counter)

    @property
    def num_labels(self) -> int:
        """Tokens that were trained."""
        return int(self.by_source[:, 1].sum())

    @property
    def num_terms(self) -> int:
        """What the sums of gradients and losses are divided by: labels, or micro-batches."""
        return self.counts["micro_batches"] if self.weighs_micro_batches else self.num_labels

    def numbers(self) -> list[float]:
        """Return all that ranks add up."""
        counts = (self.counts[name] for name in _COUNTED)
        return [*self.by_source.reshape(-1), self.sum_of_means, *counts]

    def take(self, numbers: list[float]) -> None:
        """Replace them by their sum over ranks."""
        size = self.by_source.size
        self.by_source = np.array(numbers[:size]).reshape(-1, 2)
        self.sum_of_means, *counts = numbers[size:]
        self.counts = Counter(dict(zip(_COUNTED, map(int, counts), strict=True)))

    def measured(self, sources: tuple[str, ...], seconds: float) -> dict[str, Any]:
        """Return what the log says of the step, JSON-ready; rates are of all ranks together."""
        losses, labels = self.by_source.T
        counts = self.counts
        total = self.sum_of_means if self.weighs_micro_batches else losses.sum()
        return {
            "loss": total / self.num_terms,
            "loss_by_source": {
                name: losses[at] / labels[at] for at, name in enumerate(sources) if labels[at]
            },
            "labels": self.num_labels,
            **{name: counts[name] for name in _COUNTED if name != "padded"},
            "dropped_reasons": dict(self.reasons),
            "padding_share": 1 - counts["tokens"] / counts["padded"],
            "seconds": seconds,
            "tokens_per_s": counts["tokens"] / seconds,
            "images_per_s": counts["images"] / seconds,
        }


class Learner:
    """A model and its optimizer."""

    def __init__(self, model: TrainedLlava, config: TrainConfig, ranks: Ranks) -> None:
        self.model = model
        self.ranks = ranks
        self.trained = model.trainables()
        self.groups = model.groups()
        self._config = config
        rates = {
            "projector": config.projector_lr,
            "adapter": config.adapter_lr,
            "language_model": config.language_model_lr,
            "tower": config.tower_lr,
        }
        if ranks.device.type == "cuda":
            torch.set_float32_matmul_precision("high")  # as Bunny's `tf32`
        if config.plan.packing:
            model.check_packing()
        self.optimizer = torch.optim.AdamW(
            [
                {"params": part, "name": name, "lr": rates[name], "initial_lr": rates[name], **more}
                for name, group in self.groups.items()
                for part, more in _by_decay(group, config.weight_decay)
            ],
            betas=config.betas,
            eps=config.eps,
            fused=True,
        )

    def step(
        self, micros: Iterable[MicroBatch], source: NDArray[np.integer[Any]], num_sources: int
    ) -> Tally:
        """Leave this step's mean gradient in what trains, and return its sums over all ranks.

        source: of each row of the index. Every rank must call it, also without a micro-batch.
        """
        self.optimizer.zero_grad()
        by_mean = self._config.loss_normalisation == "micro_batch_mean"
        tally = Tally(np.zeros((num_sources, 2)), by_mean)
        sums = torch.zeros(num_sources + 1, dtype=torch.float64, device=self.ranks.device)
        for micro in micros:
            self._learn(micro, source, tally, sums)
        tally.by_source[:, 0] = sums[:-1].cpu().numpy()
        tally.sum_of_means = float(sums[-1])
        self._add_ranks(tally)
        return tally

    def update(self, share: float) -> dict[str, float]:
        """Move what trains, at this share of the learning rates.

        Returns: each group's gradient norm, before all are cut to max_grad_norm.
        """
        norms = self._clip()
        for group in self.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * share
        self.optimizer.step()
        return norms

    def rates(self) -> dict[str, float]:
        """Return the learning rate of each group in the last update."""
        return {group["name"]: group["lr"] for group in self.optimizer.param_groups}

    def collated(self, micro: MicroBatch) -> Batch | Counter[str]:
        """Return a micro-batch as the config lays it out, see collate."""
        image_id = self.model.llava.config.image_token_id
        return collate(
            micro,
            padding_id=0 if image_id else 1,
            packing=self._config.plan.packing,
            dummy_images=self._config.dummy_images,
        )

    def _learn(
        self, micro: MicroBatch, source: NDArray[np.integer[Any]], tally: Tally, sums: Tensor
    ) -> None:
        """Add a micro-batch's gradients and counts. sums: losses by source, then of means."""
        batch = self.collated(micro)
        dropped = batch.dropped if isinstance(batch, Batch) else batch
        tally.reasons.update(dropped)
        tally.counts["dropped"] += dropped.total()
        if not isinstance(batch, Batch):
            return
        losses, samples = self.model.losses(*batch[:4])
        mean = losses.sum() / max(len(losses), 1)
        whole = mean if tally.weighs_micro_batches else losses.sum()
        whole.backward()  # type: ignore[no-untyped-call]
        of = source[batch.index_rows[samples.numpy()]]
        found = torch.zeros_like(sums)
        by_token = moved(torch.from_numpy(of).long(), sums.device)
        found.index_add_(0, by_token, losses.detach().double())
        found[-1] = mean.detach()
        sums += found
        tally.by_source[:, 1] += np.bincount(of, minlength=len(tally.by_source))
        tally.counts.update(
            rows=len(batch.index_rows),
            images=batch.num_images,
            tokens=batch.num_tokens,
            padded=batch.ids.numel(),
            micro_batches=bool(len(of)),
        )

    def _add_ranks(self, tally: Tally) -> None:
        """Make gradients and counts those of all ranks; then gradients means."""
        for one in self.trained.values():
            one.grad = torch.zeros_like(one) if one.grad is None else one.grad
        grads = [one.grad for one in self.trained.values() if one.grad is not None]
        if self.ranks.size > 1:
            _add_up(grads)
            tally.take(self.ranks.summed(tally.numbers()))
        torch._foreach_div_(grads, max(tally.num_terms, 1))

    def _clip(self) -> dict[str, float]:
        norms = torch.stack([_norm(group) for group in self.groups.values()])
        if self._config.max_grad_norm is not None:
            most, trained = self._config.max_grad_norm, list(self.trained.values())
            nn.utils.clip_grads_with_norm_(trained, most, norms.norm())
        return dict(zip(self.groups, norms.tolist(), strict=True))


def learning_rate_share(step: int, num_steps: int, warmup_share: float) -> float:
    """Return the share of the highest learning rate at a step, from 0: a rise, then a cosine.

    The same as transformers' get_cosine_schedule_with_warmup: its first step is at 0.
    """
    warmup = math.ceil(num_steps * warmup_share)
    if step < warmup:
        return step / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(num_steps - warmup, 1)))


def _by_decay(
    group: list[nn.Parameter], weight_decay: float
) -> Iterator[tuple[list[nn.Parameter], dict[str, float]]]:
    """Yield the parameters that decay and those that do not: biases, norms, and other vectors."""
    for decay, is_vector in ((weight_decay, False), (0.0, True)):
        part = [one for one in group if (one.ndim < 2) == is_vector]
        if part:
            yield part, {"weight_decay": decay}


def _add_up(grads: list[Tensor]) -> None:
    """Replace gradients by their sums over ranks."""
    for group in _messages(grads):
        if len(group) == 1 and group[0].is_contiguous():  # a large one needs no copy
            distributed.all_reduce(group[0])
            continue
        flat = torch.cat([one.reshape(-1) for one in group])
        distributed.all_reduce(flat)
        pieces = torch.split(flat, [one.numel() for one in group])
        for one, piece in zip(group, pieces, strict=True):
            one.copy_(piece.view_as(one))


def _messages(tensors: list[Tensor]) -> Iterator[list[Tensor]]:
    """Yield the tensors in groups of a bounded size: their copy takes memory of its own."""
    group: list[Tensor] = []
    for one in tensors:
        if group and sum(map(Tensor.numel, group)) + one.numel() > _MOST_AT_ONCE:
            yield group
            group = []
        group.append(one)
    yield group


def _norm(group: list[nn.Parameter]) -> Tensor:
    return nn.utils.get_total_norm(one.grad for one in group if one.grad is not None)
