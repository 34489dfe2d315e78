"""Between the fetcher and the journal: what waits to be encoded, and how much of it."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest

from curate.download import settle
from curate.download.blocklists import Blocklists, Hashes
from curate.download.config import DownloadConfig
from curate.download.fetch import Fetched
from curate.download.reencode import Refused
from curate.download.statuses import Status

FILE_BYTES = 1000


def test_files_that_wait_to_be_encoded_are_bounded_in_bytes_too(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Four threads may hold nine files; of files so large, as many as two and a half hold."""
    held, most, lock = 0, 0, threading.Lock()

    def fetched() -> Iterator[Fetched]:
        nonlocal held, most
        for row in range(40):
            with lock:
                held += FILE_BYTES
                most = max(most, held)
            yield Fetched(
                row, Status.OK, "", bytes(FILE_BYTES), 200, "http://a/", 1, None, None, "absent"
            )

    def judged(one: Fetched, *_: object) -> Refused:
        nonlocal held
        time.sleep(0.002)
        with lock:
            held -= len(one.data or b"")
        return Refused(Status.TOO_SMALL, str(one.row))

    monkeypatch.setattr(settle, "_judged", judged)
    config = DownloadConfig(max_bytes_in_flight=5 * FILE_BYTES // 2, resize_threads=4)
    lists = Blocklists(Hashes(), frozenset(), Hashes())
    found = list(settle._prepared(fetched(), config, lists))
    assert sorted(one.row for one, _ in found) == list(range(40))
    assert all(
        isinstance(prepared, Refused) and prepared.detail == str(one.row) for one, prepared in found
    )
    assert most <= 3 * FILE_BYTES
