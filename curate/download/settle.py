"""Fetch what is not settled, look at it, encode it, note it: every row ends in the journal."""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pyarrow as pa

from curate.download import blocklists
from curate.download.blocklists import Blocklists
from curate.download.config import DownloadConfig
from curate.download.fetch import Fetched, Wanted, fetch
from curate.download.journal import Journal
from curate.download.reencode import Refused, Stored, prepare
from curate.download.statuses import TRANSIENT, Status
from curate.rows.foreign import without_surrogates

_FILES_AHEAD = 2
"""Files per thread that wait to be encoded."""

_ROWS_AT_ONCE = 1024
_WANTED = ("uid", "url", "published_md5", "published_sha256")
Prepared = Stored | Refused


def settle(samples: pa.Table, config: DownloadConfig, journal: Journal) -> None:
    """Note what becomes of every row that the journal has not settled.

    Args: samples: SAMPLES. Raises: UserError for a blocklist that is gone, or a full disk.
    """
    lists = blocklists.of(config)
    left: list[int] = []
    for position, one in enumerate(wanted_rows(samples)):
        if journal.is_settled(one.row):
            continue
        if lists.blocks_url(one.url):
            _note(journal, _not_fetched(one), Refused(Status.BLOCKLISTED, "its URL is on a list"))
        else:
            left.append(position)
    # the fetcher reads them in a thread of its own, so nothing here may touch the journal
    wanted = wanted_rows(samples.take(pa.array(left, pa.int64())))
    for found, prepared in _prepared(fetch(wanted, config), config, lists):
        _note(journal, found, prepared, as_it_came=config.keep_original_bytes)


def wanted_rows(samples: pa.Table) -> Iterator[Wanted]:
    """Yield what to fetch of each SAMPLES row; its number is the uid."""
    has = [name for name in _WANTED if name in samples.column_names]
    for first in range(0, samples.num_rows, _ROWS_AT_ONCE):
        for row in samples.select(has).slice(first, _ROWS_AT_ONCE).to_pylist():
            md5, sha256 = row.get("published_md5"), row.get("published_sha256")
            yield Wanted(row["uid"], row["url"] or "", md5, sha256)


def _not_fetched(wanted: Wanted) -> Fetched:
    return Fetched(wanted.row, Status.BLOCKLISTED, "", None, None, None, 0, None, None, "absent")


def _prepared(
    fetched: Iterable[Fetched], config: DownloadConfig, lists: Blocklists
) -> Iterator[tuple[Fetched, Prepared]]:
    """Yield each answer with the image that it gives, about in the order of the answers.

    Files are encoded by threads, which Pillow lets run side by side; as they came they are only
    looked at, which is not worth a thread.
    """
    pending: deque[tuple[Fetched, int, Future[Prepared]]] = deque()
    held = 0  # bytes of the files in it
    with ThreadPoolExecutor(config.resize_threads, thread_name_prefix="encode") as pool:
        try:
            for one in fetched:
                if config.keep_original_bytes or one.data is None:
                    yield one._replace(data=None), _judged(one, config, lists)
                    continue
                future = pool.submit(_judged, one, config, lists)
                pending.append((one._replace(data=None), len(one.data), future))
                held += len(one.data)
                while pending and (
                    len(pending) > _FILES_AHEAD * config.resize_threads
                    or held > config.max_bytes_in_flight
                    or pending[0][2].done()
                ):
                    first, num_bytes, future = pending.popleft()
                    held -= num_bytes
                    yield first, future.result()
            for first, _, future in pending:
                yield first, future.result()
        finally:
            for _, _, future in pending:
                future.cancel()


def _judged(one: Fetched, config: DownloadConfig, lists: Blocklists) -> Prepared:
    """Return the image to store of an answer, or why there is none."""
    if one.final_url is not None and lists.blocks_url(one.final_url):
        return Refused(Status.BLOCKLISTED, "its redirect leads to what is on a list")
    if one.data is None:
        return Refused(one.status, one.detail)
    if lists.blocks_image(one.data, sha256=one.sha256):
        return Refused(Status.BLOCKLISTED, "the hash of the image is on a list")
    return prepare(one.data, config)


def _note(journal: Journal, one: Fetched, prepared: Prepared, *, as_it_came: bool = False) -> None:
    row: dict[str, Any] = {
        "http_code": one.http_code,
        "final_url": None if one.final_url is None else without_surrogates(one.final_url),
        "num_attempts": one.num_attempts,
        "hash_check": str(one.hash_check),
        "sha256": _hex(one.sha256),
    }
    image = b""
    if isinstance(prepared, Refused):
        status = prepared.status
        row |= {"status": status.value, "detail": without_surrogates(prepared.detail)}
    else:
        status, image = Status.OK, prepared.data
        row |= {"status": status.value, "detail": "", "suffix": prepared.suffix}
        row |= {name: getattr(prepared, name) for name in _SIDES_AND_EXIF}
        row["stored_sha256"] = row["sha256"] if as_it_came else hashlib.sha256(image).hexdigest()
    journal.append(one.row, row, image, is_final=status not in TRANSIENT)


_SIDES_AND_EXIF = ("width", "height", "original_width", "original_height", "exif")


def _hex(digest: bytes | None) -> str | None:
    return None if digest is None else digest.hex()
