"""One file from which a run goes on as if it had never stopped.

It holds what trains, the optimizer's state, the step that comes next, and what the run is: its
config, plan, data and base model. No random state: each step's is made from seed, step and rank.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from manifests import paths, store
from manifests.errors import UserError
from train.data.plan import Cursor

CHECKPOINT = "checkpoint.pt"
TRAINED = "trained.safetensors"
VERSION = 1


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """A run between two steps. identity: what decides its result, JSON-ready.

    trained: tensors by name, float32. optimizer: its state_dict.
    """

    identity: Mapping[str, Any]
    cursor: Cursor
    steps_done: int
    trained: Mapping[str, Tensor]
    optimizer: Mapping[str, Any]

    def save(self, out: str) -> None:
        """Write it in place of an older one, atomically."""
        values = {
            "version": VERSION,
            "identity": dict(self.identity),
            "cursor": list(self.cursor),
            "steps_done": self.steps_done,
            "trained": {name: one.detach() for name, one in self.trained.items()},
            "optimizer": dict(self.optimizer),
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
        file = io.BytesIO(store.read_bytes(path))
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
