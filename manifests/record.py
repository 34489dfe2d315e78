"""Fingerprints and records: what made a stage directory, and what came out of it.

The record is written last. A directory without one is unfinished and never an input.
"""

from __future__ import annotations

import hashlib
import json
import platform
import subprocess
from collections.abc import Mapping, Sequence
from functools import reduce
from importlib import metadata
from operator import add
from pathlib import Path
from typing import Any, Literal

from manifests import paths, store
from manifests.errors import StageFailed
from manifests.ledger import Tally
from manifests.schemas import SCHEMA_VERSION
from manifests.work import RECORD, StageDir

DIRECTORY_DIGITS = 8
LATEST = "latest.json"
_LIBRARIES = (
    "numpy",
    "pyarrow",
    "polars",
    "torch",
    "faiss-cpu",
    "faiss-gpu-cu12",
    "open-clip-torch",
    "pillow",
    "ray",
)


def canonical_json(value: Any) -> str:
    """Return the one JSON text of a value: sorted keys, no spaces, no NaN."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def fingerprint(
    stage: str,
    version: int,
    *,
    config: Mapping[str, Any],
    identity: Any,
    inputs: Mapping[str, str],
) -> str:
    """Return the SHA-256 that names a stage's result, in hexadecimal.

    Args: config: canonical config of this stage alone; identity: what outside files it reads
    (names, sizes, times or digests); inputs: stage -> fingerprint of each stage before it.
    """
    what = [SCHEMA_VERSION, stage, version, config, identity, inputs]
    return hashlib.sha256(canonical_json(what).encode()).hexdigest()


def directory_name(stage: str, mark: str) -> str:
    """Return a stage's directory name. Example: ("embed", "9f3a01bc77...") -> "embed-9f3a01bc"."""
    return f"{stage}-{mark[:DIRECTORY_DIGITS]}"


def total(markers: Sequence[Mapping[str, Any]]) -> Tally:
    """Return the summed counts of all items."""
    return reduce(add, (Tally.from_json(marker["counts"]) for marker in markers), Tally())


def check_accounts(
    stage: str, counts: Tally, *, rows_in: int | None, max_quarantine: float
) -> None:
    """Check that every input row has one fate, and that few enough were bad.

    Args: rows_in: rows that the stage before kept, or None for the first stage;
    max_quarantine: largest fraction of quarantined rows.
    Raises: StageFailed.
    """
    if not counts.adds_up or (rows_in is not None and counts.rows_in != rows_in):
        raise StageFailed(
            f"{stage}: the accounts do not add up: {rows_in} rows expected, {counts.rows_in} "
            f"judged = {counts.kept} kept + {counts.num_dropped} dropped + "
            f"{counts.num_quarantined} quarantined."
        )
    if counts.num_quarantined > max_quarantine * counts.rows_in:
        raise StageFailed(
            f"{stage}: {counts.num_quarantined} of {counts.rows_in} rows are quarantined, above "
            f"max_quarantine_fraction {max_quarantine}: "
            f"{dict(sorted(counts.quarantined.items()))}. "
            "Look at the quarantine tables; if these losses are acceptable, raise "
            "max_quarantine_fraction in the recipe and run again: finished parts are kept."
        )


def build_record(
    stage: str,
    mark: str,
    *,
    version: int,
    config: Mapping[str, Any],
    inputs: Mapping[str, str],
    markers: Sequence[Mapping[str, Any]],
    run_facts: Mapping[str, Any],
) -> dict[str, Any]:
    """Return the record of a finished stage, ready to be written as JSON."""
    return {
        "stage": stage,
        "version": version,
        "schema_version": SCHEMA_VERSION,
        "fingerprint": mark,
        "config": dict(config),
        "inputs": dict(inputs),
        **total(markers).as_json(),
        "notes": {m["item"]: m["notes"] for m in markers if m["notes"]},
        "parts": [
            {"item": m["item"], "files": m["files"], "seconds": m["seconds"]} for m in markers
        ],
        "item_seconds": round(sum(m["seconds"] for m in markers), 3),
        "versions": versions(),
        **run_facts,
    }


def write_record(directory: StageDir, record: Mapping[str, Any]) -> None:
    """Write record.json: from now on the stage is finished."""
    store.write_json(directory.path, RECORD, record)


def read_latest(out: str, which: Literal["stages", "planned"] = "stages") -> dict[str, StageDir]:
    """Return the newest chain of stages of a run directory, in run order.

    Args: which: "stages" are the finished ones, "planned" those that the last run set out to make.
    """
    found = store.read_json(paths.join(out, LATEST))
    names = found[which] if isinstance(found, dict) else []
    return {n.rsplit("-", 1)[0]: StageDir(n.rsplit("-", 1)[0], paths.join(out, n)) for n in names}


def write_latest(out: str, chain: Sequence[StageDir], *, planned: Sequence[StageDir]) -> None:
    """Write latest.json: the newest finished directories and the last run's, in run order."""
    named = {"stages": chain, "planned": planned}
    value = {key: [paths.name_of(stage.path) for stage in found] for key, found in named.items()}
    store.write_json(out, LATEST, value)


def versions() -> dict[str, str]:
    """Return the versions of Python and of the libraries that the result depends on."""
    found = {"python": platform.python_version(), "machine": platform.machine()}
    for name in ("warren", *_LIBRARIES):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def git_commit() -> str | None:
    """Return the commit of the code that runs, with "+" when it has changes; None outside git."""
    here = Path(__file__).resolve().parent
    if _git(here, "ls-files", "--error-unmatch", Path(__file__).name) is None:
        return None  # installed code inside somebody else's checkout
    head = _git(here, "rev-parse", "HEAD")
    return head and head + ("+" if _git(here, "status", "--porcelain", "-uno", ".") else "")


def _git(folder: Path, *words: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "--no-optional-locks", "-C", str(folder), *words],
            capture_output=True,
            text=True,
            check=False,
            timeout=20,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
