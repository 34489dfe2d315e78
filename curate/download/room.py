"""Limits that URLs in flight share: connections to one host, and bytes held."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


class Deadline:
    """The time of one attempt. It stands still while we wait for ourselves, not for the server."""

    def __init__(self, timeout: asyncio.Timeout) -> None:
        self._timeout = timeout

    @asynccontextmanager
    async def standing_still(self) -> AsyncIterator[None]:
        """Stop the clock within the block."""
        now = asyncio.get_running_loop().time
        when = self._timeout.when()
        left = None if when is None else when - now()
        self._timeout.reschedule(None)
        try:
            yield
        finally:
            if left is not None and not self._timeout.expired():
                self._timeout.reschedule(now() + left)


class HostRoom:
    """At most so many connections to one host at once; the others wait in turn."""

    def __init__(self, connections_per_host: int) -> None:
        self._limit = connections_per_host
        self._hosts: dict[str, tuple[asyncio.Semaphore, list[None]]] = {}

    @asynccontextmanager
    async def connection(self, host: str, deadline: Deadline) -> AsyncIterator[None]:
        """Hold one of the host's connections within the block."""
        if host not in self._hosts:
            self._hosts[host] = asyncio.Semaphore(self._limit), []
        semaphore, users = self._hosts[host]
        users.append(None)
        try:
            if semaphore.locked():
                async with deadline.standing_still():
                    await semaphore.acquire()
            else:
                await semaphore.acquire()
            try:
                yield
            finally:
                semaphore.release()
        finally:
            users.pop()
            if not users:
                self._hosts.pop(host, None)


class RecentHosts:
    """Which hosts were asked lately: to those alone a connection is worth keeping open.

    A list of images from the web names ten thousand hosts once. Kept open for some seconds each,
    their connections would be more than a process may have.
    """

    def __init__(self, most: int = 256) -> None:
        self._most = most
        self._hosts: dict[str, None] = {}  # the oldest first

    def ask(self, host: str) -> bool:
        """Return whether the host is among the last ones asked; from now on it is."""
        was_asked = self._hosts.pop(host, True) is None
        self._hosts[host] = None
        if len(self._hosts) > self._most:
            del self._hosts[next(iter(self._hosts))]
        return was_asked


class ByteRoom:
    """Bytes held by all files in flight and not yet taken.

    Where they are more than the limit, reading waits, but for one file, until that is taken: files
    that are all half read would wait for each other.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._held = 0
        self._first: Holding | None = None
        self._freed = asyncio.Event()

    async def take(self, holding: Holding, num_bytes: int, deadline: Deadline) -> None:
        """Count bytes as held by a file, once there is room for them."""
        if not self._may_go_on(holding, num_bytes):
            async with deadline.standing_still():
                while not self._may_go_on(holding, num_bytes):
                    self._freed.clear()
                    await self._freed.wait()
        self._held += num_bytes
        holding.num_bytes += num_bytes

    def set(self, holding: Holding, num_bytes: int) -> None:
        """Count a file that is done as so many bytes; one that is taken or has failed as 0."""
        self._held += num_bytes - holding.num_bytes
        holding.num_bytes = num_bytes
        if self._first is holding and num_bytes == 0:
            self._first = None
        self._freed.set()

    def _may_go_on(self, holding: Holding, num_bytes: int) -> bool:
        if self._held + num_bytes <= self._limit or self._first is holding:
            return True
        if self._first is None:
            self._first = holding
            return True
        return False


class Holding:
    """What one file holds of the room."""

    __slots__ = ("num_bytes",)

    def __init__(self) -> None:
        self.num_bytes = 0
