"""The linear average of models of one shape, tensor by tensor: Bunny's released weights are some.

Of two runs from one base, e.g. 0.3 of recipe 1 and 0.7 of recipe 2; the shares are Bunny's choice
by trial (https://github.com/BAAI-DCAI/Bunny, README). Each sum is in float32, rounded once.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from manifests import store
from manifests.errors import UserError
from train.learn.checkpoint import differences
from train.models import model_card, provenance
from train.models.checkpoint_keys import published_keys
from train.models.compose import DTYPES, SHARD_BYTES, check_dtype, unfinished_directory
from train.models.export import config_in, text_files
from train.models.lora_merge import held_in
from train.models.tensor_files import LazyTensor, read_tensors, write_tensors

_SAYS_NOTHING = {"dtype", "torch_dtype", "transformers_version", "_name_or_path"}
_MOST_TOLD = 8
_MUST_BE_EQUAL = ("tokenizer.json", "chat_template.jinja", "processor_config.json")


@dataclass(frozen=True, slots=True)
class Averaged:
    """A written model. shares: of each directory, with a sum of 1."""

    path: str
    dtype: str
    shares: dict[str, float]


def average(
    first: str,
    second: str,
    share_of_second: float,
    out: str,
    *,
    dtype: str = "keep",
    shard_bytes: int = SHARD_BYTES,
) -> Averaged:
    """Write `out`, (1 - share) of the first model and the share of the second. See average_of."""
    shares = {first: 1 - share_of_second, second: share_of_second}
    return average_of(shares, out, dtype=dtype, shard_bytes=shard_bytes)


def average_of(
    shares: Mapping[str, float], out: str, *, dtype: str = "keep", shard_bytes: int = SHARD_BYTES
) -> Averaged:
    """Write `out`, the average of the weights of LLaVA directories.

    Args:
        shares: of each directory, two or more; none negative, and 1 together.
        out: directory to write; config.json comes last.
        dtype: of all weights; keep: as in the first directory.

    Raises: UserError for models that differ in more than their weights, with what differs; for
        shares that are none; for values that dtype cannot hold; and for a finished `out`.
    """
    path = unfinished_directory(out)
    check_dtype(dtype)
    _check_shares(shares)
    first, *others = (Path(one) for one in shares)
    _check_same_kind(first, others)
    models = [_by_name(Path(one)) for one in shares]
    weights, wanted = list(shares.values()), DTYPES.get(dtype)
    tensors = [
        _mean([model[name] for model in models], weights, wanted or one.dtype)
        for name, one in models[0].items()
    ]
    path.mkdir(parents=True, exist_ok=True)
    write_tensors(path, tensors, shard_bytes)
    for one in text_files(first):
        shutil.copyfile(one, path / one.name)
    training = provenance.of_average(shares, dtype)
    store.write_json(out, provenance.TRAINING, training)
    store.write(out, model_card.CARD, model_card.card(path.name, training, []).encode())
    store.write_json(out, "config.json", config_in(first, wanted))
    return Averaged(str(path), dtype, dict(shares))


def _check_shares(shares: Mapping[str, float]) -> None:
    values = list(shares.values())
    in_range = all(0 <= one <= 1 for one in values)
    if len(values) < 2 or not in_range or not math.isclose(sum(values), 1, abs_tol=1e-9):
        raise UserError(
            f"Shares {', '.join(f'{one:g}' for one in values)} make no average.",
            "Two or more models are averaged; each share is from 0 to 1, and their sum is 1.",
            "Give e.g. 0.7 as the share of the second of two different models.",
        )


def _by_name(path: Path) -> dict[str, LazyTensor]:
    tensors = read_tensors(path)
    names = published_keys(one.name for one in tensors)
    return {names[one.name]: replace(one, name=names[one.name]) for one in tensors}


def _mean(parts: Sequence[LazyTensor], weights: list[float], dtype: torch.dtype) -> LazyTensor:
    first = parts[0]

    def read() -> torch.Tensor:
        exact = torch.zeros(first.shape)
        for part, weight in zip(parts, weights, strict=True):
            exact += part.read().float() * weight  # one at a time in memory
        return held_in(first.name, exact, dtype)

    return LazyTensor(first.name, first.shape, dtype, read)


def _check_same_kind(first: Path, others: list[Path]) -> None:
    """Check that models differ in weights alone. Raises: UserError with all that differs."""
    for other in others:
        wrong = differences(_config(first), _config(other))
        wrong += differences(_shapes(first), _shapes(other))
        wrong += [name for name in _MUST_BE_EQUAL if _bytes(first / name) != _bytes(other / name)]
        if wrong:
            raise UserError(
                f"{first} and {other} are no models of one kind: {_first_of(wrong)}.",
                "Weights can be averaged only where each has the same place and meaning.",
                "Average runs that were trained from one base with one template.",
            )


def _first_of(wrong: list[str]) -> str:
    more = len(wrong) - _MOST_TOLD
    return "; ".join(wrong[:_MOST_TOLD]) + (f"; and {more} more differences" if more > 0 else "")


def _config(path: Path) -> dict[str, Any]:
    values = store.read_json(str(path / "config.json"))
    if values is None:
        raise UserError(
            f"{path} has no config.json.",
            "It is unfinished, or no model.",
            "Name directories that export wrote.",
        )
    return _telling(values)


def _telling(values: dict[str, Any]) -> dict[str, Any]:
    """Return a config without what does not change the model."""
    kept = {name: one for name, one in values.items() if name not in _SAYS_NOTHING}
    return {name: _telling(one) if isinstance(one, dict) else one for name, one in kept.items()}


def _shapes(path: Path) -> dict[str, Any]:
    return {name: list(one.shape) for name, one in _by_name(path).items()}


def _bytes(path: Path) -> bytes | None:
    return path.read_bytes() if path.exists() else None
