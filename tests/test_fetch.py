"""The fetcher against a server that does everything wrong."""

from __future__ import annotations

from collections.abc import Iterator

import hostile_cases
import pytest
from hostile_cases import CONFIG, HASTY, LIMITS, Case
from hostile_server import HostileServer

from curate.download.content import look, status_of
from curate.download.fetch import FetchConfig, Fetched, Wanted, fetch
from curate.download.statuses import Status
from curate.media.images import ImageError, decode


def test_every_case_has_its_status() -> None:
    with HostileServer() as server, HostileServer("127.0.0.2") as forbidden:
        cases = hostile_cases.made(server, forbidden)
        found = fetched_all([case.url for case in cases], CONFIG)
        wrong = [
            f"{case.name}: {one.status}, not {case.fetch} ({one.detail})"
            for case, one in zip(cases, found, strict=True)
            if one.status is not case.fetch
        ]
        print(len(cases))
        assert not wrong, "\n".join(wrong)


def fetched_all(urls: list[str], config: FetchConfig) -> list[Fetched]:
    wanted = (Wanted(row, url) for row, url in enumerate(urls))
    found = {one.row: one for one in fetch(wanted, config, network=hostile_cases.network())}
    return [found[row] for row in range(len(urls))]
