"""Pure logic: tables, arrays and a config in, tables and arrays out.

The engine as a library, on numpy arrays and memory maps:

    from curate import assign, band, components, spanning_forest

Each is imported when it is first asked for.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from curate.duplicates.components import components
    from curate.duplicates.forest import spanning_forest
    from curate.rows.select import band
    from curate.vectors.assign import assign

__all__ = ["assign", "band", "components", "spanning_forest"]

_HOME = {
    "assign": "curate.vectors.assign",
    "band": "curate.rows.select",
    "components": "curate.duplicates.components",
    "spanning_forest": "curate.duplicates.forest",
}


def __getattr__(name: str) -> Any:
    """Return a function of the library. Raises: AttributeError for another name."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)
