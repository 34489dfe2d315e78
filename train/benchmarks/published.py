"""The columns of the paper's table, and the rows that are published in them, with their sources."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

COLUMNS = (
    *("MME-P", "MME-C", "MMB-T", "MMB-D", "SEED", "SEED-IMG"),
    *("MMMU-V", "MMMU-T", "VQAv2", "GQA", "SQA-I", "POPE"),
)
"""SEED is of images and videos, as the first releases printed it; SEED-IMG of images alone."""
FILE = Path(__file__).with_name("published.json")


@dataclass(frozen=True, slots=True)
class Published:
    """A row: a model, its value in each column that was printed, and where that was read."""

    model: str
    values: Mapping[str, float]
    source: str


def published() -> list[Published]:
    """Return the rows of published.json, in its order."""
    found = json.loads(FILE.read_text(encoding="utf-8"))
    sources = found["sources"]
    return [Published(one["model"], one["values"], sources[one["source"]]) for one in found["rows"]]
