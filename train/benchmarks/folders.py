"""Which JSON files of a folder are a benchmark's questions: answers may lie there too."""

from __future__ import annotations

from pathlib import Path

NUM_CHARACTERS = 1 << 16


def json_files(folder: Path, field: str) -> list[Path]:
    """Return a folder's JSON and JSON-lines files, by name, that have a field near their start."""
    listed = sorted([*folder.glob("*.json"), *folder.glob("*.jsonl")])
    return [one for one in listed if has_field(one, field)]


def has_field(path: Path, field: str) -> bool:
    """Return whether a JSON file has a field near its start."""
    with path.open(encoding="utf-8-sig", errors="replace") as file:
        return f'"{field}"' in file.read(NUM_CHARACTERS)
