"""Names -> addresses that may be connected to, and sockets to no others."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from aiohttp import AddrInfoType
from aiohttp.abc import AbstractResolver, ResolveResult

from curate.download.netguard import AddressRule, is_public

LookUp = Callable[[str, int], Awaitable[list[str]]]
"""Returns all addresses of a host, as text, or raises OSError (socket.gaierror)."""

_MAX_LOOK_UPS = 512
"""Each holds a thread, also when its URL has timed out: the system asks a silent name server for up
to 30 s. With as many threads as URLs in flight, one name in a hundred that is not answered would
keep all others waiting until they have timed out too."""


class BlockedAddressError(OSError):
    """The host has no address that may be connected to."""


class Network(NamedTuple):
    """How names are resolved and which addresses are allowed."""

    look_up: LookUp
    is_allowed: AddressRule


def system_network(*, allow_private_addresses: bool) -> Network:
    """Return the machine's own resolver, with all addresses allowed or only public ones."""
    look_up = _SystemLookUp()
    return Network(look_up, _any_address if allow_private_addresses else is_public)


class GuardedResolver(AbstractResolver):
    """Resolves a name once and gives only its allowed addresses.

    The connection then goes to what was checked: a name that changes its address between check
    and use changes nothing.
    """

    def __init__(self, network: Network) -> None:
        self._network = network

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> list[ResolveResult]:
        """Return the allowed addresses. Raises: OSError; BlockedAddressError if there is none."""
        try:
            addresses = await self._network.look_up(host, port)
        except UnicodeError as error:  # an empty label, or one of more than 63 characters
            raise socket.gaierror(socket.EAI_NONAME, f"no host name: {error}") from error
        allowed = [address for address in addresses if self._network.is_allowed(address)]
        if not allowed:
            raise BlockedAddressError(f"{host} is {', '.join(addresses[:4]) or 'nowhere'}")
        return [_result(host, address, port) for address in allowed]

    async def close(self) -> None:
        """End the threads of a look-up that has any."""
        if isinstance(self._network.look_up, _SystemLookUp):
            self._network.look_up.close()


def guarded_socket(network: Network) -> Callable[[AddrInfoType], socket.socket]:
    """Return what opens the sockets: the last check, whatever has chosen the address."""

    def opened(address: AddrInfoType) -> socket.socket:
        family, kind, protocol, _, where = address
        if not network.is_allowed(str(where[0])):
            raise BlockedAddressError(f"{where[0]} is not a public address")
        return socket.socket(family, kind, protocol)

    return opened


class _SystemLookUp:
    """getaddrinfo, in threads of its own: the loop's few would wait for one slow name server."""

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(_MAX_LOOK_UPS, thread_name_prefix="look-up")

    async def __call__(self, host: str, port: int) -> list[str]:
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._threads, _addresses, host, port)

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)


def _addresses(host: str, port: int) -> list[str]:
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_ADDRCONFIG)
    return list(dict.fromkeys(str(where[0]) for *_, where in found))


def _any_address(address: str) -> bool:
    return True


def _result(host: str, address: str, port: int) -> ResolveResult:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    flags = socket.AI_NUMERICHOST | socket.AI_NUMERICSERV
    return ResolveResult(
        hostname=host, host=address, port=port, family=family, proto=0, flags=flags
    )
