"""Models by the name that they have on the model hub, or by their directory."""

from __future__ import annotations

import re
from pathlib import Path

from manifests import paths
from manifests.errors import UserError

HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
"""What a model is called on the hub: owner/model."""
_SNAPSHOT = re.compile(r"models--([^/]+?)--([^/]+)/snapshots/[^/]+/?$")  # in the hub's own cache
_FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "*.bin"]


def local_directory(name: str) -> str:
    """Return a model's directory, or file: as given, shipped with Warren, or a hub snapshot's.

    Args:
        name: a path, `warren:...`, or `owner/model`, which is downloaded unless it was before. With
            HF_HUB_OFFLINE=1 only what was downloaded before is taken.

    Raises: UserError when there is no such directory and none can be had.
    """
    path = paths.resolve_resource(name)
    if Path(path).exists():
        return path
    if not HUB_NAME.fullmatch(name):
        raise UserError(
            f"{name!r} is no model directory.",
            "Neither does it look like a model's name on the hub, owner/model.",
            "Check the path.",
        )
    return _downloaded(name)


def is_at_hand(name: str) -> bool:
    """Return whether local_directory has a name's files without a download."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    if Path(paths.resolve_resource(name)).exists():
        return True
    try:
        return bool(HUB_NAME.fullmatch(name) and snapshot_download(name, local_files_only=True))
    except LocalEntryNotFoundError:
        return False


def hub_name_of(directory: str) -> str | None:
    """Return the hub name, owner/model, of a snapshot's directory; None for any other."""
    found = _SNAPSHOT.search(paths.absolute(directory))
    return f"{found[1]}/{found[2]}" if found else None


def _downloaded(name: str) -> str:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

    try:
        return snapshot_download(name, allow_patterns=_FILES)
    except (HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError) as error:
        raise UserError(
            f"The model {name!r} is neither a directory nor can it be downloaded.",
            str(error).strip().splitlines()[0],
            "Download it where there is a network and give its directory.",
        ) from error
