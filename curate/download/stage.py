"""The download stage: URLs -> images in img2dataset's layout, each URL with its fate.

    part-00000.parquet               SAMPLES of what was fetched: `shard` is one of those here
    shards/00012.tar .parquet _stats.json    of each input shard: see curate/download/layout.py
    verdicts/part-00000.parquet      every row: "" or the status that it failed with
    totals.json                      rows and bytes by status

Besides the fetcher's care (curate/download/fetch.py), which only asks http(s) at public addresses:
files are hashed, looked up in blocklists and judged by their header before a pixel is decoded.

While an item runs, each row that is settled is noted in _journal/ (of a stage on an object store,
in the machine's temporary folder). A run that was killed goes on from there and asks again only for
what was in flight and for failures that may pass. Once all rows are settled the journal is sealed,
and the shards are made from it: so two attempts at one item write the same bytes.

Other settings make another directory, for which every image is fetched anew.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from curate.download import blocklists, layout
from curate.download.config import DownloadConfig
from curate.download.journal import Journal, Span, sweep
from curate.download.settle import settle
from curate.download.shard import Shard, by_shard
from curate.download.statuses import TRANSIENT, Status
from curate.sources import source_of
from manifests import ledger, paths, store
from manifests.errors import StageFailed, UserError
from manifests.schemas import SAMPLES, empty
from manifests.work import MARKERS, Item, Output, View, missing_files, part_name

JOURNALS = "_journal"
TOTALS = "totals"
MIN_ROWS_OF_OUTAGE = 20
EMBEDDING_ROW_DIGITS = 8  # a uid has room for 2^24 rows of a shard

Rows = Sequence[Mapping[str, Any]]


def identity(config: DownloadConfig) -> Any:
    """Return the digests of the blocklists. Raises: UserError when one cannot be read."""
    blocklists.load.cache_clear()
    blocklists.of(config)  # a line that cannot be used is told before anything is fetched
    return [blocklists.identity(files) for files in blocklists.files_of(config)]


def plan(view: View) -> list[Item]:
    """One item per source part."""
    return [Item(part_name(one["part"]), {"part": one["part"]}) for one in view.parts()]


def work(view: View, item: Item) -> Output:
    """Fetch one part. Raises: StageFailed when too few rows of a shard could be fetched."""
    config = DownloadConfig.model_validate(view.config)
    _sweep(view)
    samples = view.samples(item.payload["part"]).sort_by("uid")
    if not samples.num_rows:
        return _output(item, [], [])
    with Journal(_journals(view) / item.name) as journal:
        if not journal.is_sealed:
            started = time.time()
            settle(samples, config, journal)
            _must_not_be_an_outage(samples, journal, config)
            journal.seal(Span(started, time.time()))
        return _output(item, samples.column("uid").to_numpy(), _shards(view, samples, journal))


def plan_totals(view: View) -> list[Item]:
    """One item: what is known of all shards."""
    return [Item(TOTALS)]


def work_totals(view: View, item: Item) -> Output:
    """Add up what the parts have noted. Raises: StageFailed when that is too little in all.

    Shards of few rows are no outage by themselves; a coreset may have few rows of every shard.
    """
    _sweep(view)
    rows: Counter[str] = Counter()
    num_bytes = 0
    for marker in view.own.markers():
        rows.update(marker["notes"].get("rows_by_status", {}))
        num_bytes += marker["notes"].get("image_bytes", 0)
    if _is_outage(rows, DownloadConfig.model_validate(view.config)):
        raise StageFailed(
            f"{rows[Status.OK]} of {rows.total()} URLs could be fetched, over all shards: "
            f"{dict(rows.most_common(4))}. That looks like an outage of the network. Delete "
            f"{view.path} and run again when it is over, or take it as it is with a lower "
            "download.min_success_share."
        )
    found = {"rows": rows.total(), "rows_by_status": dict(rows), "image_bytes": num_bytes}
    return Output(
        files={f"{TOTALS}.json": (json.dumps(found, indent=1, sort_keys=True) + "\n").encode()}
    )


def _shards(view: View, samples: pa.Table, journal: Journal) -> list[Shard]:
    source = layout.source_columns(samples)
    digits = _row_digits(view)
    return [
        Shard(number, samples.slice(at, num), source.slice(at, num), journal, digits)
        for number, at, num in by_shard(samples)
    ]


def _row_digits(view: View) -> int:
    source = source_of(view)
    if source.is_urls:
        return layout.row_digits(source.rows_per_shard)
    return EMBEDDING_ROW_DIGITS


def _output(item: Item, uids: Any, shards: Sequence[Shard]) -> Output:
    built = [shard.build() for shard in shards]
    files = {name: content for files, _, _ in built for name, content in files.items()}
    samples = pa.concat_tables([empty(SAMPLES), *(samples for _, samples, _ in built)])
    rows = [row for _, _, rows in built for row in rows]
    statuses = Counter(row["status"] for row in rows)
    sizes = samples.column("size").to_numpy()
    return Output(
        files={**files, f"{item.name}.parquet": samples},
        verdicts=_verdicts(np.asarray(uids, np.uint64), rows),
        notes={
            "rows_by_status": dict(sorted(statuses.items())),
            "image_bytes": int(sizes.sum(dtype=np.uint64)),
        },
    )


def _verdicts(uids: Any, rows: Rows) -> pa.Table:
    """Return a verdict per row; the score of an HTTP status is its code."""
    reasons = ["" if row["status"] == Status.OK else row["status"] for row in rows]
    codes = [
        row["http_code"] if one.startswith("http_") else np.nan
        for row, one in zip(rows, reasons, strict=True)
    ]
    scores = np.array(codes, np.float64)
    return ledger.verdicts("download", uids, reasons=reasons, scores=scores)


def _must_not_be_an_outage(samples: pa.Table, journal: Journal, config: DownloadConfig) -> None:
    """Check that enough rows of each shard were fetched. Raises: StageFailed."""
    for number, first, num in by_shard(samples):
        uids = samples.column("uid").slice(first, num).to_pylist()
        statuses = Counter(journal.row(uid)["status"] for uid in uids)
        if _is_outage(statuses, config):
            asked = num - statuses[Status.BLOCKLISTED]
            found = ", ".join(f"{name} {rows:,}" for name, rows in statuses.most_common(4))
            raise StageFailed(
                f"{layout.shard_name(number)}: {statuses[Status.OK]} of {asked} URLs could be "
                f"fetched, fewer than download.min_success_share {config.min_success_share:g} "
                f"allows: {found}. {_what_to_do(statuses, asked)}"
            )


def _is_outage(rows_by_status: Counter[str], config: DownloadConfig) -> bool:
    asked = rows_by_status.total() - rows_by_status[Status.BLOCKLISTED]
    share = rows_by_status[Status.OK] / max(1, asked)
    return asked >= MIN_ROWS_OF_OUTAGE and share < config.min_success_share


def _what_to_do(statuses: Counter[str], asked: int) -> str:
    """Return what a person can do about a shard of which next to nothing was fetched."""
    passing = sum(statuses[one] for one in TRANSIENT)
    if 2 * statuses[Status.BLOCKED_IP] > asked:
        return (
            "Most of these hosts have no public address, and such are not asked unless you say so: "
            "if they are servers of your own, set download.allow_private_addresses: true."
        )
    if 2 * passing > asked:
        return (
            "That looks like an outage, of the network here or of the server. Run again when it is "
            f"over: the {passing:,} that may pass are asked again, the others are settled."
        )
    return (
        "Little of that would pass with time. If the list is as old or as wrong as that, lower "
        "download.min_success_share and run again: what is settled is not asked again."
    )


def _journals(view: View) -> Path:
    """Return the folder of this stage's journals: on this machine, wherever the stage lies.

    Raises: UserError when the temporary folder belongs to someone else.
    """
    if paths.is_local(view.path):
        return Path(paths.filesystem(view.path)[1]) / JOURNALS
    own = Path(tempfile.gettempdir()) / f"warren-{os.getuid()}"
    own.mkdir(mode=0o700, exist_ok=True)
    if own.is_symlink() or own.stat().st_uid != os.getuid():
        raise UserError(
            f"{own} is not yours.", "What is fetched waits there.", "Set TMPDIR to another folder."
        )
    return own / paths.name_of(view.path)


def _sweep(view: View) -> None:
    """Remove the journals of items that are finished; an item's own goes when the next begins."""
    journals = _journals(view)
    with suppress(FileNotFoundError):  # there are none, or another worker sweeps at this moment
        sweep(journals, {one.name: _is_finished(view, one.name) for one in journals.iterdir()})


def _is_finished(view: View, name: str) -> bool:
    marker = store.read_json(paths.join(view.path, MARKERS, f"{name}.json"))
    return isinstance(marker, dict) and not missing_files(view.own, marker)
