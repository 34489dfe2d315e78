"""The CONVERSATIONS tables that ingest leaves beside SAMPLES, part by part, with the same rows."""

from __future__ import annotations

from collections.abc import Sequence

import pyarrow as pa

from manifests import paths, store
from manifests.work import StageDir, part_name

FOLDER = "conversations"


def name_of(part: int) -> str:
    """Return a part's path in ingest's directory."""
    return f"{FOLDER}/{part_name(part)}.parquet"


def read_conversations(
    ingest: StageDir, part: int, columns: Sequence[str] | None = None
) -> pa.Table:
    """Return CONVERSATIONS of one part, or the named columns of it. Raises: PartDamaged."""
    return store.read_table(paths.join(ingest.path, name_of(part)), columns)
