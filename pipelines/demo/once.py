"""Makes a world unless this very one is there already."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from manifests import store


def make_once(world: Path, note: str, wanted: Mapping[str, Any], make: Callable[[], Any]) -> None:
    """Call `make` unless the file `note` in the world says that it was made so; note it then."""
    if store.read_json(str(world / note)) == dict(wanted):
        return
    make()
    store.write_json(str(world), note, dict(wanted))
