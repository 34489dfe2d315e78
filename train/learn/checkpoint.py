"""One file from which a run goes on as if it had never stopped.

It holds what trains, the optimizer's state, the step that comes next, and what the run is: its
config, plan, data and base model. No random state: each step's is made from seed, step and rank.

A run writes it beside training: tensors are copied to the host between two steps, and a thread
writes the copy. One file is enough, as it is replaced atomically.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor

from manifests import paths, store
from manifests.errors import UserError
from train.data.plan import Cursor

CHECKPOINT = "checkpoint.pt"
TRAINED = "trained.safetensors"
VERSION = 3


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """A run between two steps. identity: what decides its result, JSON-ready.

    trained: tensors by name, float32. optimizer: its state_dict. totals: what all steps so far add
    up to, by name, e.g. rows.
    """

    identity: Mapping[str, Any]
    cursor: Cursor
    steps_done: int
    trained: Mapping[str, Tensor]
    optimizer: Mapping[str, Any]
    totals: Mapping[str, int]

    def save(self, out: str) -> None:
        """Write it in place of an older one, atomically."""
        values = {
            "version": VERSION,
            "identity": dict(self.identity),
            "cursor": list(self.cursor),
            "steps_done": self.steps_done,
            "trained": {name: one.detach() for name, one in self.trained.items()},
            "optimizer": dict(self.optimizer),
            "totals": dict(self.totals),
        }
        store.write(out, CHECKPOINT, lambda file: torch.save(values, file))

    @classmethod
    def load(cls, out: str) -> Checkpoint | None:
        """Return the checkpoint of a run's folder, on the CPU; None where there is none.

        Only tensors and plain values are read, no code. Raises: UserError for another version.
        """
        path = paths.join(out, CHECKPOINT)
        if not paths.exists(path):
            return None
        fs, local = paths.filesystem(path)
        with fs.open(local, "rb") as file:
            values = torch.load(file, map_location="cpu", weights_only=True)
        if values.pop("version") != VERSION:
            raise UserError(
                f"{path} is of another version.",
                f"This one reads version {VERSION}.",
                "Train into a new folder.",
            )
        values["cursor"] = Cursor(*values["cursor"])
        return cls(**values)

    def check_same_run(self, identity: Mapping[str, Any], out: str) -> None:
        """Check that a run goes on as it began. Raises: UserError with all that changed."""
        changed = differences(self.identity, identity)
        if changed:
            raise UserError(
                f"{out} was begun with other settings: {'; '.join(changed)}.",
                "Going on would mix two runs.",
                "Restore them, or train into a new folder.",
            )


class CheckpointWriter:
    """Writes checkpoints in a thread of its own, one at a time.

    As a context, it waits at its end, also after an error, until the last one is written.
    stalled: seconds that training has waited for it, all together.
    """

    def __init__(self, out: str) -> None:
        self._out = out
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._in_flight: Future[None] | None = None
        self._copy: tuple[Any, Any] = (None, None)
        self.stalled = 0.0

    def put(self, checkpoint: Checkpoint) -> None:
        """Take a copy of a checkpoint and begin to write it; its tensors may change at once.

        Waits while an earlier one is being written. Raises: what writing that one raised.
        """
        started = time.perf_counter()
        self.wait()
        now = (checkpoint.trained, checkpoint.optimizer)
        self._copy = trained, optimizer = _on_host(now, self._copy)
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # copies from a GPU may still be under way
        copied = replace(checkpoint, trained=trained, optimizer=optimizer)
        self._in_flight = self._thread.submit(copied.save, self._out)
        self.stalled += time.perf_counter() - started

    def check(self) -> None:
        """Raise what writing raised, if it did by now."""
        if self._in_flight is not None and self._in_flight.done():
            self.wait()

    def wait(self) -> None:
        """Return when nothing is being written any more. Raises: what writing raised."""
        written, self._in_flight = self._in_flight, None
        if written is not None:
            written.result()

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        """Wait for the last one. An error of it does not hide the one that ended the run."""
        try:
            self.wait()
        except Exception as failed:
            if error is None:
                raise
            error.add_note(f"The last checkpoint was not written: {failed}")
        finally:
            self._thread.shutdown()


def _on_host(value: Any, into: Any) -> Any:
    """Return a copy on the host of tensors in dicts, lists and tuples.

    into: an earlier copy, whose tensors' memory is used again where they are of the same shape.
    """
    if isinstance(value, Tensor):
        if not isinstance(into, Tensor) or (into.shape, into.dtype) != (value.shape, value.dtype):
            into = torch.empty(value.shape, dtype=value.dtype, pin_memory=value.is_cuda)
        return into.copy_(value.detach(), non_blocking=True)
    if isinstance(value, Mapping):
        before = into if isinstance(into, Mapping) else {}
        return {key: _on_host(one, before.get(key)) for key, one in value.items()}
    if isinstance(value, list | tuple):
        old = into if isinstance(into, list | tuple) and len(into) == len(value) else None
        pairs = zip(value, old or [None] * len(value), strict=True)
        return type(value)([_on_host(one, other) for one, other in pairs])
    return value


def differences(before: Any, now: Any, name: str = "") -> list[str]:
    """Return what changed between two JSON-ready values, e.g. "config.seed: 0, now 1"."""
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        keys = sorted({*before, *now})
        inner = (differences(before.get(k), now.get(k), f"{name}.{k}".strip(".")) for k in keys)
        return [one for found in inner for one in found]
    return [] if before == now else [f"{name}: {_short(before)}, now {_short(now)}"]


def base_hash(model_dir: str) -> str:
    """Return the SHA-256 of a local model's config and weights, in hex."""
    files = sorted([*Path(model_dir).glob("*.safetensors"), Path(model_dir) / "config.json"])
    sums = {path.name: store.sha256_of(str(path)) for path in files}
    return hashlib.sha256(json.dumps(sums, sort_keys=True).encode()).hexdigest()


def tensors_hash(tensors: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 of named tensors, in hex."""
    from safetensors.torch import save

    return hashlib.sha256(save(dict(sorted(tensors.items())))).hexdigest()


def data_fingerprints(directories: list[str]) -> list[str | None]:
    """Return each stage directory's fingerprint from its record; None where it has no record."""
    records = [store.read_json(paths.join(one, "record.json")) for one in directories]
    return [one and one.get("fingerprint") for one in records]


def write_trained(out: str, trained: Mapping[str, Tensor]) -> None:
    """Write what trained, as safetensors, under its names in the model."""
    from safetensors.torch import save

    tensors = {name: one.detach().cpu().contiguous() for name, one in trained.items()}
    store.write(out, TRAINED, save(tensors))


def read_projector(path: str) -> dict[str, Tensor]:
    """Return a finished run's projector: tensors by name in it. path: its folder, or the file.

    Raises: UserError when there is none.
    """
    from safetensors.torch import load

    path = path if path.endswith(".safetensors") else paths.join(path, TRAINED)
    if not paths.exists(path):
        raise UserError(
            f"{path} is not there.",
            "A projector is taken from a finished run of stage projector.",
            "Train that first, or name its folder.",
        )
    found = load(store.read_bytes(path))
    prefix = "model.multi_modal_projector."
    return {
        name.removeprefix(prefix): one for name, one in found.items() if name.startswith(prefix)
    }


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 24 else text[:12] + "..."
