"""Safetensors checkpoints read and written one tensor at a time: an 8B model needs no 8B of memory.

Format: https://github.com/huggingface/safetensors#format (8 bytes of header length, little endian;
a JSON header with dtype, shape and offsets; the tensors' bytes, without gaps).
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import BinaryIO

import torch
from safetensors import safe_open

from manifests import store
from manifests.errors import UserError

WEIGHTS = "model.safetensors"
INDEX = f"{WEIGHTS}.index.json"
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_CODES = {dtype: code for code, dtype in _DTYPES.items()}


@dataclass(frozen=True, slots=True)
class LazyTensor:
    """A tensor that is known by its header and read, or made, when it is written."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], torch.Tensor]

    @property
    def num_bytes(self) -> int:
        """Size of the values."""
        return math.prod(self.shape) * self.dtype.itemsize

    def cast(self, dtype: torch.dtype) -> LazyTensor:
        """Return the same tensor in another floating dtype; integers stay what they are."""
        if dtype == self.dtype or not self.dtype.is_floating_point:
            return self
        return LazyTensor(self.name, self.shape, dtype, lambda: self.read().to(dtype))


def read_tensors(directory: Path) -> list[LazyTensor]:
    """Return the tensors of a `save_pretrained` directory, sharded or not, in order of name.

    Raises: UserError when there is no safetensors file, or a shard that the index names is missing.
    """
    tensors = [one for path in _weight_files(directory) for one in file_tensors(path)]
    return sorted(tensors, key=lambda one: one.name)


def _weight_files(directory: Path) -> list[Path]:
    index = directory / INDEX
    names = [WEIGHTS]
    if index.exists():
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    for name in names:
        if not (directory / name).exists():
            raise UserError(
                f"{directory} has no {name}.",
                "Weights are read from safetensors files only; pickled ones can run code.",
                "Download the whole repository, or load and save_pretrained it once.",
            )
    return [directory / name for name in names]


def file_tensors(path: Path) -> Iterator[LazyTensor]:
    """Yield the tensors of one safetensors file. Raises: UserError for quantised ones."""
    with safe_open(path, "pt") as file:
        for name in file.keys():  # noqa: SIM118 - a file of tensors is not iterable
            header = file.get_slice(name)
            code = header.get_dtype()
            if code not in _DTYPES:
                raise UserError(
                    f"{path}: {name} is stored as {code}.",
                    "Quantised weights can be neither trained nor rewritten exactly.",
                    "Use the model's unquantised weights.",
                )
            yield LazyTensor(name, tuple(header.get_shape()), _DTYPES[code], _reader(path, name))


def _reader(path: Path, name: str) -> Callable[[], torch.Tensor]:
    def read() -> torch.Tensor:
        with safe_open(path, "pt") as file:
            values: torch.Tensor = file.get_tensor(name)
            return values

    return read


def write_tensors(directory: Path, tensors: list[LazyTensor], shard_bytes: int) -> None:
    """Write model.safetensors, or shards and their index, as `save_pretrained` names them.

    Files of an earlier, unfinished attempt are replaced.

    Args:
        shard_bytes: most bytes of values in a file; a larger tensor has a file of its own.
    """
    for old in [*directory.glob("model*.safetensors"), directory / INDEX]:
        old.unlink(missing_ok=True)
    shards = _shards(tensors, shard_bytes)
    if len(shards) == 1:
        write_file(directory / WEIGHTS, shards[0])
        return
    names = [f"model-{n + 1:05d}-of-{len(shards):05d}.safetensors" for n in range(len(shards))]
    for name, shard in zip(names, shards, strict=True):
        write_file(directory / name, shard)
    placed = {one.name: name for name, shard in zip(names, shards, strict=True) for one in shard}
    total = {"total_size": sum(one.num_bytes for one in tensors)}
    store.write_json(str(directory), INDEX, {"metadata": total, "weight_map": placed})


def write_file(path: Path, tensors: list[LazyTensor]) -> None:
    """Write one safetensors file, atomically; one tensor is in memory at a time."""
    store.write(str(path.parent), path.name, partial(_fill, tensors))


def _shards(tensors: list[LazyTensor], shard_bytes: int) -> list[list[LazyTensor]]:
    shards: list[list[LazyTensor]] = [[]]
    used = 0
    for one in tensors:
        if shards[-1] and used + one.num_bytes > shard_bytes:
            shards.append([])
            used = 0
        shards[-1].append(one)
        used += one.num_bytes
    return shards


def _fill(tensors: list[LazyTensor], file: BinaryIO) -> None:
    header = _header(tensors)
    file.write(len(header).to_bytes(8, "little") + header)
    for one in tensors:
        file.write(_bytes_of(one))  # freed before the next is read


def _bytes_of(tensor: LazyTensor) -> memoryview:
    values = tensor.read().contiguous()
    if (tuple(values.shape), values.dtype) != (tensor.shape, tensor.dtype):
        raise ValueError(f"{tensor.name}: {values.shape} {values.dtype}, not as announced")
    return values.reshape(-1).view(torch.uint8).numpy().data


def _header(tensors: list[LazyTensor]) -> bytes:
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    start = 0
    for one in tensors:
        end = start + one.num_bytes
        code = _CODES[one.dtype]
        entries[one.name] = {"dtype": code, "shape": one.shape, "data_offsets": [start, end]}
        start = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    return text + b" " * (-len(text) % 8)  # values begin at a multiple of 8
