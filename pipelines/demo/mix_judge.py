"""A run over the demo's instruction mix, held against the truth: row by row, then what was written.

`judge_fates` compares the fate of every row, `judge_written` the conversations and images in the
shards. Both return what they counted; nothing here is sampled.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import polars as pl

from manifests.ledger import QUARANTINE_PREFIX
from manifests.work import StageDir
from pipelines.show import table_text
from train.data.index import TrainSample, read_index, read_sample

KEPT = "kept"
UNPLANNED = "not planted"
NEVER_SEEN = "not ingested"
_IMAGE = "<image>"
_ROW = ("source", "key")


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the comparison. found: fate -> rows."""

    kind: str
    planted: int
    expected: str
    found: Mapping[str, int]

    @property
    def is_right(self) -> bool:
        """Whether every planted row met the expected fate, and no other row."""
        return dict(self.found) == ({self.expected: self.planted} if self.planted else {})


def judge_fates(truth: pl.DataFrame, fates: pl.DataFrame) -> list[Finding]:
    """Return a finding per kind of row, the clean ones first.

    Args: truth: as `conversations.py` writes it; fates: source, key, fate of each row of a run, as
    `fates_of_mix` gives them. A row that only one of them has is counted as unplanned or never
    seen.
    """
    joined = truth.select(*_ROW, "kind", expected=_expected()).join(
        fates, on=_ROW, how="full", coalesce=True, maintain_order="left_right"
    )
    kind, expected, fate = (pl.col(name) for name in ("kind", "expected", "fate"))
    counts = (
        joined.with_columns(kind.fill_null(UNPLANNED), fate.fill_null(NEVER_SEEN))
        .with_columns(expected.fill_null(""))
        .group_by("kind", "expected", "fate")
        .agg(rows=pl.len())
        .sort("fate")
    )
    found: dict[tuple[str, str], dict[str, int]] = {}
    for row in counts.iter_rows(named=True):
        found.setdefault((row["kind"], row["expected"]), {})[row["fate"]] = row["rows"]
    findings = [
        Finding(kind, 0 if kind == UNPLANNED else sum(by_fate.values()), expected, by_fate)
        for (kind, expected), by_fate in found.items()
    ]
    return sorted(findings, key=lambda one: (one.expected != KEPT, -one.planted, one.kind))


def fates_of_mix(chain: Mapping[str, StageDir]) -> pl.DataFrame:
    """Return source, key, fate of every row that a run saw.

    fate: "kept", "clean: mended:<what>" for a row kept but not as it came, or "<stage>: <reason>"
    of its loss.
    """
    verdicts = [
        pl.read_parquet(path, columns=["uid", "keep", "stage", "reason"])
        for stage in chain.values()
        for path in stage.verdict_files()
    ]
    said = (
        pl.concat(verdicts)
        .filter(pl.col("reason") != "")
        .sort("keep")  # of a row that was mended and then lost, the loss counts
        .unique("uid", keep="first", maintain_order=True)
        .select("uid", fate=_fate())
    )
    return (
        _names_of(chain["ingest"])
        .join(said, on="uid", how="left")
        .select(*_ROW, pl.col("fate").fill_null(KEPT))
    )


def judge_written(truth: pl.DataFrame, chain: Mapping[str, StageDir]) -> list[Finding]:
    """Return a finding per thing that a row in the shards must have as the truth has it.

    These are: that it is there once and no other row is, its questions, its answers, its images'
    bytes and their suffixes. The shards are read as training reads them.
    """
    wanted = {(row["source"], row["key"]): row for row in truth.iter_rows(named=True)}
    names = {uid: (source, key) for uid, source, key in _names_of(chain["ingest"]).iter_rows()}
    directory = chain["mix"].path
    counts: dict[str, Counter[str]] = {name: Counter() for name in (_THERE, *_SEEN)}
    missing = {name for name, row in wanted.items() if row["is_kept"]}
    for entry in read_index(directory):
        name = names[entry["uid"]]
        counts[_THERE]["right" if name in missing else "wrong"] += 1
        missing.discard(name)
        sample = read_sample(directory, entry)
        for aspect, is_right in _compare(wanted.get(name), sample, entry):
            counts[aspect]["right" if is_right else "wrong"] += 1
    counts[_THERE]["missing"] += len(missing)
    num_kept = int(truth["is_kept"].sum())
    return [Finding(name, num_kept, "right", +found) for name, found in counts.items()]


def judgement_text(findings: list[Finding], title: str, first_head: str) -> str:
    """Return findings as a table."""
    rows = [
        (
            one.kind,
            f"{one.planted:,}",
            one.expected,
            ", ".join(f"{fate} {rows:,}" for fate, rows in one.found.items()),
            "" if one.is_right else "WRONG",
        )
        for one in findings
    ]
    return table_text(title, (first_head, "planted", "expected", "found", ""), rows)


def _expected() -> pl.Expr:
    told = pl.concat_str("stage", pl.lit(": "), "reason")
    return pl.when(pl.col("reason") == "").then(pl.lit(KEPT)).otherwise(told)


def _fate() -> pl.Expr:
    reason = pl.col("reason").str.strip_prefix(QUARANTINE_PREFIX)
    return pl.concat_str("stage", pl.lit(": "), reason)


def _names_of(ingest: StageDir) -> pl.DataFrame:
    """Return uid, source and key of every row, the quarantined ones too."""
    good = [pl.read_parquet(path, columns=["uid", "source", "key"]) for path in ingest.files()]
    bad = [
        pl.read_parquet(path, columns=["uid", "shard", "key"]).select(
            "uid", pl.col("shard").str.split("/").list.first().alias("source"), "key"
        )
        for path in ingest.files("quarantine")
    ]
    return pl.concat([*good, *bad])


_THERE = "rows"
_SEEN = ("questions", "answers", "image bytes", "image suffixes")


def _compare(
    wanted: Mapping[str, Any] | None, sample: TrainSample, entry: Mapping[str, Any]
) -> Iterator[tuple[str, bool]]:
    """Yield what was compared and whether it is as the truth has it."""
    if wanted is None:
        yield from ((name, False) for name in _SEEN)
        return
    said = [(turn["from"], turn["value"]) for turn in sample.row["conversations"]]
    asked = [_plain(text) for role, text in said if role == "human"]
    yield "questions", asked == [_plain(one["question"]) for one in wanted["rounds"]]
    answers = [text for role, text in said if role == "gpt"]
    yield "answers", answers == [one["answer"] for one in wanted["rounds"]]
    digests = [hashlib.sha256(image).digest() for image in sample.images]
    yield "image bytes", digests == wanted["image_sha256"]
    suffixes = [image["suffix"] for image in entry["images"]]
    yield "image suffixes", suffixes == wanted["suffixes"]


def _plain(text: str) -> str:
    """Return a question without placeholders, whatever blanks stood around them."""
    return " ".join(text.replace(_IMAGE, " ").split())
