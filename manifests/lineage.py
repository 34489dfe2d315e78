"""One sample's whole story, read from the tables alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import polars as pl

from manifests import paths
from manifests.errors import PartDamaged, UserError
from manifests.ledger import QUARANTINE_PREFIX
from manifests.work import StageDir

_MAX_UID = 2**64
_WRITES_SHARDS = ("assemble", "mix")
_OF_DOWNLOAD = (  # columns of its shards' parquets
    *("error_message", "http_code", "final_url", "num_attempts", "hash_check"),
    *("original_width", "original_height"),
)


@dataclass(frozen=True, slots=True)
class Step:
    """What one stage said of the sample: its verdict, and figures of its own tables."""

    stage: str
    fate: str
    reason: str
    facts: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Story:
    """A sample and its steps, in run order."""

    uid: int
    key: str
    sample: Mapping[str, Any]
    steps: tuple[Step, ...]

    @property
    def fate(self) -> str:
        """Where it ended: "kept" or the last step's fate and reason."""
        last = self.steps[-1] if self.steps else None
        if last is None or last.fate == "kept":
            return "kept"
        return f"{last.fate} by {last.stage}: {last.reason}"

    def as_json(self) -> dict[str, Any]:
        """Return plain values."""
        steps = [
            {"stage": s.stage, "fate": s.fate, "reason": s.reason, **s.facts} for s in self.steps
        ]
        return {
            "uid": self.uid,
            "key": self.key,
            "fate": self.fate,
            "sample": dict(self.sample),
            "steps": steps,
        }


def why(chain: Mapping[str, StageDir], name: str) -> list[Story]:
    """Return the story of every sample with this key, or of the one with this uid.

    Args: chain: stage -> directory, in run order; name: a key, a uid in decimal, the key that the
    sample has in the written shards, or its URL; the first of these that is found.
    Raises: UserError when no row has it.
    """
    uids = (
        _uids_of_key(chain, name)
        or _uid_if_known(chain, name)
        or _uids_of_member(chain, name)
        or _uids_of_url(chain, name)
    )
    if not uids:
        raise UserError(
            f"No sample has the key, uid or URL {name!r}.",
            "Neither the ingested samples nor the quarantined rows hold it.",
            f"Look at the keys in ingest-*/part-*.parquet{_first_key(chain)}.",
        )
    return [_story(chain, uid) for uid in uids]


def fates(chain: Mapping[str, StageDir]) -> pl.DataFrame:
    """Return one row per ingested row: uid, key, kept, stage and reason of its loss ("" when kept).

    Holds every row of the run in memory: meant for looking, not for billions of rows.
    """
    ingest = chain["ingest"]
    keys = pl.concat(
        [
            pl.DataFrame(schema={"uid": pl.UInt64, "key": pl.String}),
            *(
                _collected(path, _scan(path).select("uid", "key"))
                for path in [*ingest.files(), *ingest.files("quarantine")]
            ),
        ]
    )
    lost = pl.concat(
        [
            _collected(path, _scan(path).filter(~pl.col("keep")).select("uid", "stage", "reason"))
            for directory in chain.values()
            for path in directory.verdict_files()
        ]
    )
    return keys.join(lost, on="uid", how="left").with_columns(
        kept=pl.col("stage").is_null(),
        stage=pl.col("stage").fill_null(""),
        reason=pl.col("reason").fill_null(""),
    )


def find(files: list[str], uid: int) -> dict[str, Any] | None:
    """Return the row with this uid in some parquet parts, or None."""
    for path in files:
        found = _collected(path, _scan(path).filter(pl.col("uid") == pl.lit(uid, pl.UInt64)))
        if found.height:
            return found.row(0, named=True)
    return None


def key_of(chain: Mapping[str, StageDir], uid: int) -> str:
    """Return a uid's key, or "" when it has none."""
    row = _ingested(chain, uid)
    return str(row["key"]) if row else ""


def _story(chain: Mapping[str, StageDir], uid: int) -> Story:
    row = _ingested(chain, uid) or {}
    steps = []
    for directory in chain.values():
        verdict = find(directory.verdict_files(), uid)
        if verdict is None:
            continue
        steps.append(_step(chain, directory, verdict))
    return Story(uid, str(row.get("key", "")), _plain(row), tuple(steps))


def _step(chain: Mapping[str, StageDir], directory: StageDir, verdict: dict[str, Any]) -> Step:
    reason = str(verdict["reason"])
    is_bad = reason.startswith(QUARANTINE_PREFIX)
    fate = "kept" if verdict["keep"] else "quarantined" if is_bad else "dropped"
    facts = {k: verdict[k] for k in ("score", "cutoff", "evidence_uid") if verdict[k] is not None}
    if "evidence_uid" in facts:
        facts["evidence_key"] = key_of(chain, int(facts["evidence_uid"]))
    facts |= _own_facts(directory, int(verdict["uid"]))
    return Step(directory.stage, fate, reason.removeprefix(QUARANTINE_PREFIX), facts)


def _own_facts(directory: StageDir, uid: int) -> dict[str, Any]:
    """Return the row's figures in the stage's own tables: assignment, clip score, shard, error."""
    found: dict[str, Any] = {}
    quarantined = find(directory.files("quarantine"), uid)
    if quarantined:
        found["detail"] = quarantined["detail"]
    if directory.stage == "download":
        answer = find(directory.files("shards", prefix=""), uid) or {}
        found |= {name: answer[name] for name in _OF_DOWNLOAD if answer.get(name) is not None}
    if directory.stage == "cluster":
        assigned = find(directory.files(), uid) or {}
        found |= {name: one for name, one in assigned.items() if one is not None}
    if directory.stage == "embed":
        row = find(directory.files("metadata", prefix="metadata_"), uid)
        found |= {"clip_score": row["clip_score"]} if row else {}
    if directory.stage == "clean":
        row = find(directory.files(), uid) or {}
        found |= {name: row[name] for name in ("rounds", "token_estimate") if name in row}
    if directory.stage == "decontaminate":
        items = _all_of(directory.files("evidence"), uid)
        found |= {"evidence": items} if items else {}
    if directory.stage in _WRITES_SHARDS:
        row = find(directory.files(), uid)
        found |= {"shard": row["shard"], "member": row["key"]} if row else {}
    found.pop("uid", None)
    return found


def _all_of(files: list[str], uid: int) -> list[dict[str, Any]]:
    """Return all rows with this uid in some parquet parts, without it and without nulls."""
    rows = []
    for path in files:
        of_uid = _scan(path).filter(pl.col("uid") == pl.lit(uid, pl.UInt64))
        rows += _collected(path, of_uid.drop("uid")).to_dicts()
    return [{name: one for name, one in row.items() if one is not None} for row in rows]


def _ingested(chain: Mapping[str, StageDir], uid: int) -> dict[str, Any] | None:
    ingest = chain["ingest"]
    return find(ingest.files(), uid) or find(ingest.files("quarantine"), uid)


def _uids_of_key(chain: Mapping[str, StageDir], key: str) -> list[int]:
    ingest = chain["ingest"]
    found: set[int] = set()
    for path in [*ingest.files(), *ingest.files("quarantine")]:
        rows = _collected(path, _scan(path).filter(pl.col("key") == key))
        found |= set(rows["uid"].to_list())
    return sorted(found)


def _uids_of_member(chain: Mapping[str, StageDir], key: str) -> list[int]:
    """Return the uids of the samples with this key in the written shards."""
    files = [one for stage in _WRITES_SHARDS if stage in chain for one in chain[stage].files()]
    rows = [_collected(path, _scan(path).filter(pl.col("key") == key)) for path in files]
    return sorted({uid for found in rows for uid in found["uid"].to_list()})


def _uids_of_url(chain: Mapping[str, StageDir], url: str) -> list[int]:
    """Return the uids of the samples with this URL; quarantined rows have none."""
    if "://" not in url:
        return []
    rows = [
        _collected(path, _scan(path).filter(pl.col("url") == url).select("uid"))
        for path in chain["ingest"].files()
    ]
    return sorted({uid for found in rows for uid in found["uid"].to_list()})


def _first_key(chain: Mapping[str, StageDir]) -> str:
    """Return an example of the keys that the samples have, as the end of a sentence."""
    for path in chain["ingest"].files():
        found = _collected(path, _scan(path).select("key").head(1))
        if found.height:
            return f", such as {found.item()!r}"
    return ""


def _uid_if_known(chain: Mapping[str, StageDir], name: str) -> list[int]:
    if not name.isascii() or not name.isdigit() or int(name) >= _MAX_UID:
        return []
    if name != str(int(name)):  # 000000005 is how shards number their samples
        return []
    return [int(name)] if _ingested(chain, int(name)) else []


def _scan(path: str) -> pl.LazyFrame:
    fs, local = paths.filesystem(path)
    # without glob=False a folder with brackets in its name would be a pattern
    if paths.is_local(path):
        return pl.scan_parquet(local, glob=False)
    return pl.read_parquet(fs.open(local)).lazy()


def _collected(path: str, frame: pl.LazyFrame) -> pl.DataFrame:
    try:
        return frame.collect()
    except (pl.exceptions.PolarsError, OSError) as error:
        raise PartDamaged(f"{path} cannot be read: {error}") from error


def _plain(row: Mapping[str, Any]) -> dict[str, Any]:
    shown = {k: v.hex() if isinstance(v, bytes) else v for k, v in row.items()}
    return {k: v for k, v in shown.items() if v is not None and k not in ("uid", "key")}
