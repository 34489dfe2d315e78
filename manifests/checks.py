"""The invariants of a run directory, checked by reading everything again.

    every file has the size and SHA-256 of its marker; each stage judged exactly the rows that the
    stage before kept, each once; the counts of the record are those of the tables; kept + dropped +
    quarantined = in; the coreset is the select stage's kept rows, sorted by uid.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from manifests import paths, store
from manifests.errors import PartDamaged
from manifests.ledger import Tally, kept_uids, tally
from manifests.schemas import TABLES
from manifests.work import StageDir, missing_files

CORESET = "coreset.parquet"


@dataclass(frozen=True, slots=True)
class Finding:
    """One invariant of one stage: whether it holds, and what was seen."""

    stage: str
    rule: str
    holds: bool
    detail: str


def check(out: str, chain: Mapping[str, StageDir]) -> list[Finding]:
    """Return the findings for every stage of a chain, in run order."""
    findings: list[Finding] = []
    kept_before: npt.NDArray[np.uint64] | None = None
    for directory in chain.values():
        record = directory.record()
        if record is None:
            findings.append(Finding(directory.stage, "finished", False, "no record.json"))
            break
        findings += _whole(directory)
        try:
            found, kept_before = _accounts(directory, record, kept_before)
        except PartDamaged as error:
            findings.append(Finding(directory.stage, "readable", False, str(error)))
            break
        findings += found
    if "select" in chain and kept_before is not None:
        findings += _coreset(out, chain["select"])
    return findings


def _whole(directory: StageDir) -> Iterator[Finding]:
    wrong = []
    num_files = 0
    for marker in directory.markers():
        wrong += missing_files(directory, marker)
        for one in marker["files"]:
            num_files += 1
            path = paths.join(directory.path, one["path"])
            if one["path"] not in wrong and store.sha256_of(path) != one["sha256"]:
                wrong.append(one["path"])
    detail = f"wrong: {', '.join(sorted(wrong)[:5])}" if wrong else f"{num_files} files"
    yield Finding(directory.stage, "files have their digests", not wrong, detail)


def _accounts(
    directory: StageDir,
    record: Mapping[str, Any],
    kept_before: npt.NDArray[np.uint64] | None,
) -> tuple[list[Finding], npt.NDArray[np.uint64]]:
    counts, judged, kept = Tally(), [np.zeros(0, np.uint64)], [np.zeros(0, np.uint64)]
    for path in directory.verdict_files():
        table = store.read_table(path)
        counts += tally(table)
        judged.append(table.column("uid").to_numpy())
        kept.append(kept_uids(table))
    uids = np.sort(np.concatenate(judged))
    add = partial(Finding, directory.stage)
    findings = [
        add("each row judged once", len(np.unique(uids)) == len(uids), f"{len(uids)} verdicts"),
        add("in = kept + dropped + quarantined", counts.adds_up, _shown(counts)),
        add("counts are the record's", counts == Tally.from_json(record), _shown(counts)),
    ]
    if kept_before is not None:
        same = np.array_equal(uids, kept_before)
        detail = f"{len(uids)} judged, {len(kept_before)} kept before"
        findings.append(add("judges what the stage before kept", same, detail))
    return findings, np.sort(np.concatenate(kept))


def _coreset(out: str, select: StageDir) -> Iterator[Finding]:
    made = store.read_table(paths.join(select.path, CORESET))
    kept = [kept_uids(store.read_table(path, ["uid", "keep"])) for path in select.verdict_files()]
    wanted = np.sort(np.concatenate([np.zeros(0, np.uint64), *kept]))
    same = np.array_equal(made.column("uid").to_numpy(), wanted)
    detail = f"{made.num_rows} rows"
    yield Finding("select", "coreset is the kept rows by uid", same, detail)
    is_schema = made.schema.equals(TABLES["CORESET"])
    yield Finding("select", "coreset has its schema", is_schema, f"{made.num_columns} columns")
    path = paths.join(out, CORESET)
    copied = paths.exists(path) and store.sha256_of(path) == store.sha256_of(
        paths.join(select.path, CORESET)
    )
    yield Finding("select", "top coreset.parquet is a copy", copied, CORESET)


def _shown(counts: Tally) -> str:
    return (
        f"{counts.rows_in} = {counts.kept} + {counts.num_dropped} + {counts.num_quarantined}"
    )
