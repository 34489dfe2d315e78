"""Answers in one JSON mapping of id to text, as uploads for MMMU and MM-Vet are, or of grades."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from manifests.errors import UserError


def mapped_rows(path: str | Path) -> list[dict[str, Any]] | None:
    """Return a mapping's answers as rows, or None when the file is no mapping of id to text.

    {"v1_0": "a cat"} -> [{"question_id": "v1_0", "text": "a cat"}]. An entry that is a mapping
    itself (a judge's grades) becomes its JSON. Raises: UserError for an id that is there twice.
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
        found = json.loads(text, object_pairs_hook=_unique) if text.lstrip()[:1] == "{" else None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError):  # rows, or an error of theirs
        return None
    except _Twice as error:
        raise UserError(
            f"{path} answers {error} twice.",
            "Which one counts cannot be known.",
            "Keep one answer per question.",
        ) from error
    if not isinstance(found, dict) or {"question_id", "text"} & set(found):  # a row, alone
        return None
    return [{"question_id": name, "text": _text(value)} for name, value in found.items()]


class _Twice(ValueError):
    """A key that a JSON object has twice."""


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise _Twice(name)
        found[name] = value
    return found


def _text(value: Any) -> Any:
    return json.dumps(value) if isinstance(value, dict) else value
