"""URLs -> bytes, safely: bounded in time, bytes, addresses and memory, each with a named fate."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable, Iterator

from curate.download.fetch_config import FetchConfig
from curate.download.fetched import Fetched, HashCheck, Wanted

__all__ = ["FetchConfig", "Fetched", "HashCheck", "Wanted", "fetch", "fetch_all"]


def fetch_all(wanted: Iterable[Wanted], config: FetchConfig) -> AsyncIterator[Fetched]:
    """Yield what became of each URL, in the order of completion."""
    raise NotImplementedError


def fetch(wanted: Iterable[Wanted], config: FetchConfig) -> Iterator[Fetched]:
    """Yield what became of each URL, in the order of completion; the loop runs in a thread."""
    raise NotImplementedError
