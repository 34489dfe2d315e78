"""What a run trained, put into its base model: adapters merged, whole tensors in place of old ones.

Merges and sums are in float32 and rounded once. A run's tensors are named as in
LlavaForConditionalGeneration, a base's as its files have them; plain_key makes both the same.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from manifests.errors import UserError
from train.models.checkpoint_keys import plain_key, published_key, published_keys
from train.models.finished_run import FinishedRun
from train.models.lora_merge import Adapter, rounded_once
from train.models.tensor_files import LazyTensor, file_tensors

_LORA_A, _LORA_B = ".lora_A.default.weight", ".lora_B.default.weight"


def is_lora(name: str) -> bool:
    """Tell whether a trained tensor is a factor of an adapter, by its name in the model."""
    return name.endswith((_LORA_A, _LORA_B))


@dataclass(frozen=True)
class TrainedTensors:
    """A run's result. adapter: of all its LoRA factors; whole: tensors by their plain_key.

    `noise` is filled as written tensors are read: |rounding| / |change|, Frobenius norms.
    """

    adapter: Adapter
    whole: dict[str, LazyTensor]
    noise: dict[str, float] = field(default_factory=dict)

    @classmethod
    def of(cls, run: FinishedRun) -> TrainedTensors:
        """Return what a run trained; values are read when they are used."""
        tensors = {one.name: one for one in file_tensors(Path(run.trained))}
        lora, noise = run.config.lora, dict[str, float]()
        factors = {}
        for name in [name for name in tensors if name.endswith(_LORA_A)]:
            stem = name.removesuffix(_LORA_A)
            pair = (tensors.pop(name), tensors.pop(stem + _LORA_B))
            factors[published_key(f"{stem}.weight")] = pair
        whole = {plain_key(one.name): one for one in tensors.values()}
        return cls(Adapter(lora.alpha / lora.rank, factors, noise), whole, noise)

    def applied(self, base: list[LazyTensor], dtype: torch.dtype | None) -> list[LazyTensor]:
        """Return the trained model's tensors by published name, in the order of the base's.

        Args:
            base: all tensors of the model that was trained.
            dtype: of the result; None: each tensor's own.

        Raises: UserError for trained tensors that the base lacks, or has in another shape; and,
            when a tensor is read, for values that `dtype` cannot hold.
        """
        names = published_keys(one.name for one in base)
        named = [replace(one, name=names[one.name]) for one in base]
        self._check_fits({plain_key(one.name): one for one in named})
        return [self._made(one, dtype or one.dtype) for one in named]

    def _made(self, one: LazyTensor, dtype: torch.dtype) -> LazyTensor:
        if plain_key(one.name) not in self.whole:
            return self.adapter.merged(one, dtype)
        return LazyTensor(one.name, one.shape, dtype, self._replacing(one, dtype))

    def _replacing(self, old: LazyTensor, dtype: torch.dtype) -> Callable[[], torch.Tensor]:
        new = self.whole[plain_key(old.name)]

        def read() -> torch.Tensor:
            exact = new.read().float()
            return rounded_once(old.name, exact, dtype, exact - old.read().float(), self.noise)

        return read

    def _check_fits(self, base: dict[str, LazyTensor]) -> None:
        shapes = {name: one.shape for name, one in self.whole.items()}
        factors = self.adapter.factors.items()
        shapes |= {plain_key(n): (b.shape[0], a.shape[1]) for n, (a, b) in factors}
        foreign = sorted(n for n, s in shapes.items() if n not in base or base[n].shape != s)
        if foreign:
            raise UserError(
                f"The base model lacks tensors that were trained, or has them in other shapes: "
                f"{', '.join(foreign)}.",
                "Leaving them out would change the model.",
                "Name the directory that the run was trained on.",
            )
