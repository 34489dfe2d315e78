"""Checkpoints of before safetensors: torch.save files, of which nothing but tensors is loaded.

Some towers and language models, CLIP-L at 336 pixels among them, are published in no other form.
"""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import torch

from manifests.errors import UserError
from train.models.tensor_files import INDEX, WEIGHTS, LazyTensor, read_tensors

PICKLED = "pytorch_model.bin"


def model_tensors(path: Path) -> list[LazyTensor]:
    """Return a whole model's tensors, of safetensors files or, if there are none, pickled ones.

    Raises: UserError when there are neither, and as pickled_tensors does.
    """
    if (path / WEIGHTS).exists() or (path / INDEX).exists():
        return read_tensors(path)
    index = path / f"{PICKLED}.index.json"
    if index.exists():
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        return [one for name in names for one in pickled_tensors(path / name)]
    return pickled_tensors(path / PICKLED) if (path / PICKLED).exists() else read_tensors(path)


def pickled_tensors(path: Path) -> list[LazyTensor]:
    """Return the tensors of a torch.save file; its bytes are mapped, and read when they are used.

    Raises: UserError for a missing file, and for one that holds anything but tensors: a pickle
        can run code.
    """
    try:
        return held_tensors(torch.load(path, map_location="cpu", weights_only=True, mmap=True))
    except FileNotFoundError as error:
        raise UserError(
            f"{path.parent} has no {path.name}.",
            "A part of the model's weights is in that file.",
            "Download the whole repository.",
        ) from error
    except (pickle.UnpicklingError, RuntimeError) as error:
        raise UserError(
            f"{path} is damaged, or holds more than tensors.",
            "Anything else in a pickled file could run code, and is not loaded.",
            "Download it again, or save its tensors anew with torch.save.",
        ) from error


def held_tensors(values: dict[str, torch.Tensor]) -> list[LazyTensor]:
    """Return tensors that are in memory, or mapped into it."""
    return [_one(name, tensor) for name, tensor in values.items()]


def _one(name: str, tensor: torch.Tensor) -> LazyTensor:
    return LazyTensor(name, tuple(tensor.shape), tensor.dtype, lambda: tensor.detach())
