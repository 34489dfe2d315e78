"""URLs -> bytes, safely: bounded in time, bytes, addresses and memory, each with a named fate.

Three checks keep a request away from the machine and its network: the URL (netguard.normalised, on
every hop), the addresses of its name (resolver.GuardedResolver), and the socket itself
(resolver.guarded_socket). Nothing is decoded here but gzip and deflate, up to max_bytes.
"""

from __future__ import annotations

import asyncio
import hashlib
import threading
from collections import deque
from collections.abc import AsyncIterator, Coroutine, Iterable, Iterator
from typing import Any, NamedTuple, TypeVar

from curate.download.attempt import Answer, Fetcher
from curate.download.fetch_config import FetchConfig
from curate.download.fetched import Fetched, HashCheck, Wanted, shown
from curate.download.netguard import RefusedURL, normalised
from curate.download.resolver import Network, system_network
from curate.download.room import Holding
from curate.download.statuses import TRANSIENT, Status

__all__ = ["FetchConfig", "Fetched", "HashCheck", "Wanted", "fetch", "fetch_all"]

T = TypeVar("T")

_MAX_TAKEN_BYTES = 4 * 2**20  # handed over at once; one file may be more
_CLOSE_SECONDS = 30.0


async def fetch_all(
    wanted: Iterable[Wanted], config: FetchConfig, *, network: Network | None = None
) -> AsyncIterator[Fetched]:
    """Yield what became of each URL, in the order of completion.

    Args:
        wanted: read a few at a time, as there is room, in the event loop's thread.
        config: see there; at most `concurrency` URLs are in flight, and no new one is begun while
            as many results wait to be taken.
        network: how names are resolved and which addresses are allowed; None: as the config says.
    Raises: what `wanted` raises; nothing for what a server does.
    """
    flight = Flight(wanted, config, network)
    try:
        while batch := await flight.take():
            for fetched in batch:
                yield fetched
    finally:
        await flight.close()


def fetch(
    wanted: Iterable[Wanted], config: FetchConfig, *, network: Network | None = None
) -> Iterator[Fetched]:
    """Yield what `fetch_all` does, from a thread of its own: fetching goes on while you work.

    Closing the generator ends what is in flight. `wanted` is read in that thread.
    """
    with _LoopThread() as loop:
        flight = loop.call(_begun(wanted, config, network))
        try:
            while batch := loop.call(flight.take()):
                yield from batch
        finally:
            loop.call(flight.close())


class _Landed(NamedTuple):
    fetched: Fetched
    holding: Holding


class Flight:
    """All URLs of one call: those in flight, and the results not yet taken."""

    def __init__(
        self, wanted: Iterable[Wanted], config: FetchConfig, network: Network | None
    ) -> None:
        """Begin. Must be called in a running event loop."""
        private = config.allow_private_addresses
        self._fetcher = Fetcher(config, network or system_network(allow_private_addresses=private))
        self._config = config
        self._wanted = iter(wanted)
        self._landed: deque[_Landed] = deque()
        self._news = asyncio.Event()
        self._room = asyncio.Semaphore(2 * config.concurrency)
        self._workers = [asyncio.create_task(self._work()) for _ in range(config.concurrency)]
        for worker in self._workers:
            worker.add_done_callback(lambda _: self._news.set())

    async def take(self) -> list[Fetched]:
        """Return some results, at least one; none when all are taken."""
        while not self._landed:
            ended = [worker for worker in self._workers if worker.done()]
            for worker in ended:
                worker.result()  # raises what `wanted` has raised
            if len(ended) == len(self._workers):
                return []
            self._news.clear()
            await self._news.wait()
        return self._taken()

    async def close(self) -> None:
        """End what is in flight and close all connections."""
        for worker in self._workers:
            worker.cancel()
        await asyncio.gather(*self._workers, return_exceptions=True)
        await self._fetcher.close()

    def _taken(self) -> list[Fetched]:
        batch: list[Fetched] = []
        num_bytes = 0
        while self._landed and num_bytes < _MAX_TAKEN_BYTES:
            fetched, holding = self._landed.popleft()
            num_bytes += holding.num_bytes
            self._fetcher.bytes.set(holding, 0)
            self._room.release()
            batch.append(fetched)
        return batch

    async def _work(self) -> None:
        """Fetch one URL after the other, until there are none."""
        while True:
            await self._room.acquire()
            one = next(self._wanted, None)
            if one is None:
                self._room.release()
                return
            holding = Holding()
            self._landed.append(_Landed(await self._one(one, holding), holding))
            self._news.set()

    async def _one(self, one: Wanted, holding: Holding) -> Fetched:
        try:
            url = normalised(one.url, self._config.max_url_characters)
        except RefusedURL as error:
            return _failed(one, error.status, error.detail)
        for attempt in range(1, self._config.attempts + 1):
            answer = await self._fetcher.attempt(url, holding)
            if answer.status not in TRANSIENT or attempt == self._config.attempts:
                break
            await asyncio.sleep(self._wait_seconds(attempt, answer.retry_after_seconds))
        fetched = _checked(one, answer, attempt, self._config)
        if fetched.data is None:
            self._fetcher.bytes.set(holding, 0)
        return fetched

    def _wait_seconds(self, attempt: int, asked: float) -> float:
        wait = self._config.retry_wait_seconds * float(1 << (attempt - 1))
        return min(max(wait, asked), self._config.max_retry_wait_seconds)


async def _begun(wanted: Iterable[Wanted], config: FetchConfig, network: Network | None) -> Flight:
    return Flight(wanted, config, network)


def _failed(one: Wanted, status: Status, detail: str) -> Fetched:
    return Fetched(one.row, status, shown(detail), None, None, None, 0, None, None, "absent")


def _checked(one: Wanted, answer: Answer, attempt: int, config: FetchConfig) -> Fetched:
    """Return the answer with its hashes computed, and compared with those wanted."""
    status, detail, code, url = (
        answer.status,
        shown(answer.detail),
        answer.http_code,
        str(answer.url),
    )
    if status is not Status.OK:
        return Fetched(one.row, status, detail, None, code, url, attempt, None, None, "absent")
    data: bytes | None = answer.data
    sha256 = hashlib.sha256(answer.data).digest()
    md5 = None
    if one.md5 is not None:
        md5 = hashlib.md5(answer.data, usedforsecurity=False).digest()
    check = _hash_check(one, sha256, md5)
    if check == "mismatch" and config.on_hash_mismatch == "drop":
        status, detail, data = Status.HASH_MISMATCH, f"sha256 is {sha256.hex()}", None
    return Fetched(one.row, status, detail, data, code, url, attempt, sha256, md5, check)


def _hash_check(one: Wanted, sha256: bytes, md5: bytes | None) -> HashCheck:
    if one.sha256 is None and one.md5 is None:
        return "absent"
    return "match" if one.sha256 in (None, sha256) and one.md5 in (None, md5) else "mismatch"


class _LoopThread:
    """An event loop in a thread."""

    def __enter__(self) -> _LoopThread:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="fetch", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(_CLOSE_SECONDS)
        self._loop.close()

    def call(self, work: Coroutine[Any, Any, T]) -> T:
        """Return the result of a coroutine that runs in the loop."""
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()
