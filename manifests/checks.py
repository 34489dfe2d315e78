"""The invariants of a run directory, checked by reading everything again.

every file has the size and SHA-256 of its marker, and the record says the same; each stage was
made from the stages before it and judged exactly the rows that the last of them kept, each once;
the counts of the record are those of the tables; kept + dropped + quarantined = in; the samples of
ingest and download are their kept rows, and the quarantine tables each stage's quarantined ones;
the coreset is the select stage's kept rows, sorted by uid.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow.compute as pc

from manifests import paths, store
from manifests.errors import PartDamaged
from manifests.ledger import QUARANTINE_PREFIX, Tally, kept_uids, tally
from manifests.record import DIRECTORY_DIGITS
from manifests.schemas import TABLES
from manifests.work import StageDir, missing_files

CORESET = "coreset.parquet"
Uids = npt.NDArray[np.uint64]
_NONE = np.zeros(0, np.uint64)


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
    kept_before: Uids | None = None
    made_from: dict[str, str] = {}
    for directory in chain.values():
        record = directory.record()
        if record is None:
            findings.append(Finding(directory.stage, "finished", False, "no record.json"))
            break
        findings += _whole(directory, record)
        findings += _origin(directory, record, made_from)
        made_from[directory.stage] = record["fingerprint"]
        try:
            found, kept_before = _accounts(directory, record, kept_before)
            findings += found
            if directory.stage == "select":
                findings += _coreset(out, directory)
        except PartDamaged as error:
            findings.append(Finding(directory.stage, "readable", False, str(error)))
            break
    return findings


def _whole(directory: StageDir, record: Mapping[str, Any]) -> Iterator[Finding]:
    wrong: list[str] = []
    files = [one for part in record["parts"] for one in part["files"]]
    for part in record["parts"]:
        wrong += missing_files(directory, part)
    for one in files:
        path = paths.join(directory.path, one["path"])
        if one["path"] not in wrong and store.sha256_of(path) != one["sha256"]:
            wrong.append(one["path"])
    detail = f"wrong: {', '.join(sorted(wrong)[:5])}" if wrong else f"{len(files)} files"
    yield Finding(directory.stage, "files have their digests", not wrong, detail)
    marked = {marker["item"]: marker["files"] for marker in directory.markers()}
    same = marked == {part["item"]: part["files"] for part in record["parts"]}
    detail = f"{len(marked)} markers, {len(record['parts'])} items in the record"
    yield Finding(directory.stage, "markers are the record's", same, detail)


def _origin(
    directory: StageDir, record: Mapping[str, Any], made_from: Mapping[str, str]
) -> Iterator[Finding]:
    mark = record["fingerprint"]
    is_named = paths.name_of(directory.path) == f"{directory.stage}-{mark[:DIRECTORY_DIGITS]}"
    yield Finding(directory.stage, "directory has its fingerprint", is_named, mark[:16])
    same = record["inputs"] == made_from
    detail = ", ".join(record["inputs"]) or "the source"
    yield Finding(directory.stage, "made from the stages before", same, detail)


def _accounts(
    directory: StageDir,
    record: Mapping[str, Any],
    kept_before: Uids | None,
) -> tuple[list[Finding], Uids]:
    counts, judged, kept, bad = Tally(), [_NONE], [_NONE], [_NONE]
    for path in directory.verdict_files():
        table = store.read_table(path)
        counts += tally(table)
        judged.append(table.column("uid").to_numpy())
        kept.append(kept_uids(table))
        is_bad = pc.starts_with(table.column("reason"), QUARANTINE_PREFIX)
        bad.append(table.filter(is_bad).column("uid").to_numpy())
    uids = np.sort(np.concatenate(judged))
    all_kept = np.sort(np.concatenate(kept))
    add = partial(Finding, directory.stage)
    findings = [
        add("each row judged once", len(np.unique(uids)) == len(uids), f"{len(uids)} verdicts"),
        add("in = kept + dropped + quarantined", counts.adds_up, _shown(counts)),
        add("counts are the record's", counts == Tally.from_json(record), _shown(counts)),
    ]
    explained = _uids_in(directory.files("quarantine"))
    same = np.array_equal(explained, np.sort(np.concatenate(bad)))
    findings.append(add("quarantine tables are complete", same, f"{len(explained)} rows"))
    if kept_before is None or directory.stage == "download":
        samples = _uids_in(directory.files())
        same = np.array_equal(samples, all_kept)
        findings.append(add("samples are the kept rows", same, f"{len(samples)} samples"))
    if kept_before is not None:
        same = np.array_equal(uids, kept_before)
        detail = f"{len(uids)} judged, {len(kept_before)} kept before"
        findings.append(add("judges what the stage before kept", same, detail))
    return findings, all_kept


def _uids_in(files: list[str]) -> Uids:
    found = [store.read_table(path, ["uid"]).column("uid").to_numpy() for path in files]
    return np.sort(np.concatenate([_NONE, *found]))


def _coreset(out: str, select: StageDir) -> Iterator[Finding]:
    made = store.read_table(paths.join(select.path, CORESET))
    kept = [kept_uids(store.read_table(path, ["uid", "keep"])) for path in select.verdict_files()]
    wanted = np.sort(np.concatenate([_NONE, *kept]))
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
    return f"{counts.rows_in} = {counts.kept} + {counts.num_dropped} + {counts.num_quarantined}"
