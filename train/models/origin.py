"""What a composed or imported model was made of: directories, hub names and hashes, kept in it."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from manifests import paths, store
from train.models.hub import hub_name_of

ORIGIN = "origin.json"
_READ = (".safetensors", ".json", ".model", ".txt", ".jinja")
_PICKLED = (".bin", ".pt", ".pth")


def write_origin(out: str, made_by: str, **parts: str | None) -> None:
    """Write origin.json of a model directory.

    Args:
        made_by: compose or import_bunny.
        parts: what it was made of: its role in that, e.g. vision_tower, and its directory or file;
            None for a role that nothing had.
    """
    told = {role: _told(one) for role, one in parts.items() if one is not None}
    store.write_json(out, ORIGIN, {"made_by": made_by, "parts": told})


def read_origin(model_dir: str) -> dict[str, Any] | None:
    """Return what write_origin wrote: made_by, and parts with directory, hub_name and hash."""
    found: dict[str, Any] | None = store.read_json(paths.join(model_dir, ORIGIN))
    return found


def files_hash(path: str) -> str:
    """Return the SHA-256, in hex, of the files that a model is read from: weights, configs, texts.

    Pickled weights count only where there are no others, as they are read only there.
    """
    found = [Path(path)] if Path(path).is_file() else sorted(Path(path).glob("*"))
    read = [one for one in found if one.suffix in _READ]
    if not any(one.suffix == ".safetensors" for one in read):
        read += [one for one in found if one.suffix in _PICKLED]
    sums = {one.name: store.sha256_of(str(one)) for one in read if one.is_file()}
    return hashlib.sha256(json.dumps(sums, sort_keys=True).encode()).hexdigest()


def _told(path: str) -> dict[str, str | None]:
    return {
        "directory": paths.absolute(path),
        "hub_name": hub_name_of(path),
        "hash": files_hash(path),
    }
