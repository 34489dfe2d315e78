"""Models by the name that they have on the model hub, or by their directory."""

from __future__ import annotations

import re
from pathlib import Path

from manifests import paths
from manifests.errors import UserError

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "*.bin"]


def local_directory(name: str) -> str:
    """Return a model's directory: as given, shipped with Warren, or a hub snapshot's.

    Args:
        name: a path, `warren:...`, or `owner/model`, which is downloaded unless it was before. With
            HF_HUB_OFFLINE=1 only what was downloaded before is taken.

    Raises: UserError when there is no such directory and none can be had.
    """
    path = paths.resolve_resource(name)
    if Path(path).is_dir():
        return path
    if not _HUB_NAME.fullmatch(name):
        raise UserError(
            f"{name!r} is no model directory.",
            "Neither does it look like a model's name on the hub, owner/model.",
            "Check the path.",
        )
    return _downloaded(name)


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
