"""A file of JSON lines that a run goes on writing after it was stopped.

Every line says its `step`, so what was written after the last checkpoint can be cut off again.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from manifests import paths, store

Line = dict[str, Any]


class Lines:
    """JSON lines in a run's folder, in the order in which they were added.

    A local file grows at once. An object store cannot append: there, flush writes all lines anew.
    """

    def __init__(self, out: str, name: str) -> None:
        self._out = out
        self._name = name
        self._path = paths.join(out, name)
        self._grows = paths.is_local(self._path)
        self._kept = [] if self._grows else [json.dumps(one) for one in read_lines(self._path)]

    def add(self, lines: Sequence[Mapping[str, Any]]) -> None:
        """Add lines, each with its `step`. Raises: UserError as manifests.store.append_line."""
        texts = [json.dumps(one, allow_nan=False) for one in lines]
        if not self._grows:
            self._kept += texts
        elif texts:
            store.append_line(self._path, "\n".join(texts))

    def flush(self) -> None:
        """Put all lines where others can read them. Raises: UserError as manifests.store.write."""
        if not self._grows:
            store.write(self._out, self._name, _text(self._kept))


def read_lines(path: str) -> list[Line]:
    """Return the lines of a file, [] where it is missing; one that a kill cut short is left out."""
    texts = store.read_bytes(path).splitlines() if paths.exists(path) else []
    found = []
    for text in texts:
        try:
            found.append(json.loads(text))
        except ValueError:
            continue
    return found


def cut_lines(out: str, name: str, steps_done: int) -> None:
    """Leave only the lines of these first steps: those after the checkpoint come again."""
    path = paths.join(out, name)
    if paths.exists(path):
        kept = [json.dumps(one) for one in read_lines(path) if one["step"] < steps_done]
        store.write(out, name, _text(kept))


def _text(lines: Sequence[str]) -> bytes:
    return "".join(line + "\n" for line in lines).encode()
