"""Verdict tables: one row per input row and stage, and the counts that must add up."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from manifests.schemas import QUARANTINE, VERDICTS, conform

QUARANTINE_PREFIX = "quarantine:"
MENDED_PREFIX = "mended:"
"""Begins the reason of a row that is kept, but not as it came."""
FLAGGED_PREFIX = "flagged:"
"""Begins the reason of a row that is kept as it is, though a rule would have it dropped."""


@dataclass(frozen=True, slots=True)
class Tally:
    """Counts of one verdict table; `rows_in == kept + sum(dropped) + sum(quarantined)`."""

    rows_in: int = 0
    kept: int = 0
    dropped: Mapping[str, int] = field(default_factory=dict)
    quarantined: Mapping[str, int] = field(default_factory=dict)

    def __add__(self, other: Tally) -> Tally:
        """Return the counts of both."""
        return Tally(
            self.rows_in + other.rows_in,
            self.kept + other.kept,
            _added(self.dropped, other.dropped),
            _added(self.quarantined, other.quarantined),
        )

    @property
    def num_dropped(self) -> int:
        """Rows that a rule dropped."""
        return sum(self.dropped.values())

    @property
    def num_quarantined(self) -> int:
        """Rows that could not be judged."""
        return sum(self.quarantined.values())

    @property
    def adds_up(self) -> bool:
        """Whether no row was lost and none was counted twice."""
        return self.rows_in == self.kept + self.num_dropped + self.num_quarantined

    def as_json(self) -> dict[str, Any]:
        """Return the counts as plain JSON values."""
        return {
            "rows_in": self.rows_in,
            "kept": self.kept,
            "dropped": dict(sorted(self.dropped.items())),
            "quarantined": dict(sorted(self.quarantined.items())),
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Tally:
        """Return the counts that `as_json` wrote."""
        return cls(value["rows_in"], value["kept"], value["dropped"], value["quarantined"])


def tally(verdicts: pa.Table) -> Tally:
    """Count a VERDICTS table by fate and reason."""
    keep = verdicts.column("keep")
    kept = int(pc.sum(keep).as_py() or 0)
    lost = verdicts.filter(pc.invert(keep)).column("reason").combine_chunks()
    counts = {row["values"]: row["counts"] for row in pc.value_counts(lost).to_pylist()}
    bad = {k: n for k, n in counts.items() if k.startswith(QUARANTINE_PREFIX)}
    return Tally(
        verdicts.num_rows,
        kept,
        {k: n for k, n in counts.items() if k not in bad},
        {k.removeprefix(QUARANTINE_PREFIX): n for k, n in bad.items()},
    )


def verdicts(
    stage: str,
    uids: npt.NDArray[np.uint64],
    *,
    reasons: Sequence[str] | npt.NDArray[Any],
    scores: npt.NDArray[np.float64] | None = None,
    cutoffs: npt.NDArray[np.float64] | None = None,
    evidence: pa.Array | None = None,
) -> pa.Table:
    """Return a VERDICTS table; a row is kept when its reason is "", or says mended or flagged.

    Args: uids uint64 [n]; reasons [n]; scores and cutoffs float64 [n] or None, NaN means none;
    evidence uint64 [n] with nulls or None.
    """
    reason = pa.array(reasons, pa.string())
    is_noted = (pc.starts_with(reason, one) for one in (MENDED_PREFIX, FLAGGED_PREFIX))
    keep = reduce(pc.or_, is_noted, pc.equal(reason, ""))
    columns = {
        "uid": pa.array(uids, pa.uint64()),
        "stage": pa.array([stage] * len(uids), pa.string()),
        "keep": keep,
        "reason": reason,
        "score": _optional(scores, len(uids)),
        "cutoff": _optional(cutoffs, len(uids)),
        "evidence_uid": pa.nulls(len(uids), pa.uint64()) if evidence is None else evidence,
    }
    return conform(pa.table(columns), VERDICTS)


def quarantine(rows: Sequence[Mapping[str, Any]]) -> pa.Table:
    """Return a QUARANTINE table of {uid, key, shard, error, detail} rows."""
    return conform(pa.Table.from_pylist([dict(row) for row in rows], QUARANTINE), QUARANTINE)


def quarantine_reason(error: str) -> str:
    """Return the verdict reason of an error class."""
    return QUARANTINE_PREFIX + error


def kept_uids(table: pa.Table) -> npt.NDArray[np.uint64]:
    """Return the kept rows' uids of a VERDICTS table, uint64, in table order."""
    kept = table.filter(table.column("keep")).column("uid")
    return np.asarray(kept.to_numpy(), dtype=np.uint64)


def _optional(values: npt.NDArray[np.float64] | None, length: int) -> pa.Array:
    if values is None:
        return pa.nulls(length, pa.float64())
    return pa.array(values, pa.float64(), mask=np.isnan(values))


def _added(left: Mapping[str, int], right: Mapping[str, int]) -> dict[str, int]:
    return {key: left.get(key, 0) + right.get(key, 0) for key in left.keys() | right.keys()}
