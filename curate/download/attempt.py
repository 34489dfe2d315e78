"""One attempt at one URL: its redirects, each checked, and its bytes, counted as they come."""

from __future__ import annotations

import asyncio
import re
import ssl
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import TypeVar

import aiohttp
from yarl import URL

from curate.download.fetch_config import FetchConfig
from curate.download.inflate import BadBodyError, inflated
from curate.download.netguard import (
    RefusedURL,
    is_public,
    literal_address,
    redirected,
)
from curate.download.resolver import BlockedAddressError, GuardedResolver, Network, guarded_socket
from curate.download.robots import TDM_RESERVATION, opt_out
from curate.download.room import ByteRoom, Deadline, Holding, HostRoom, RecentHosts
from curate.download.statuses import Status

T = TypeVar("T", bound=BaseException)

_REDIRECTS = frozenset({301, 302, 303, 307, 308})
_MAX_HEADER_BYTES = 32 * 2**10  # of one header; some sites send long policies
_READ_BYTES = 2**17
_NAME_SECONDS = 300  # an address that was checked stays checked
_SECONDS = re.compile(r"\d{1,9}")


@dataclass(slots=True)
class Answer:
    """What one attempt has brought."""

    url: URL
    status: Status = Status.OK
    detail: str = ""
    data: bytes = b""
    http_code: int | None = None
    retry_after_seconds: float = 0.0


class Fetcher:
    """The sessions of one event loop: their connections, and the limits that all URLs share."""

    def __init__(self, config: FetchConfig, network: Network) -> None:
        self.bytes = ByteRoom(config.max_bytes_in_flight)
        self._config = config
        self._network = network
        self._hosts = HostRoom(config.connections_per_host)
        self._directives = frozenset(name.lower() for name in config.opt_out_directives)
        self._agents = frozenset(name.lower() for name in config.agent_names)
        self._resolver = GuardedResolver(network)
        self._recent = RecentHosts()
        self._once = _session(config, network, self._resolver, keep_open=False)
        self._again = _session(config, network, self._resolver, keep_open=True)

    async def close(self) -> None:
        """Close all connections."""
        await self._once.close()
        await self._again.close()
        await self._resolver.close()

    async def attempt(self, url: URL, holding: Holding) -> Answer:
        """Return what the URL has answered; never raises for what a server or name server does.

        The bytes read are counted in `holding`.
        """
        answer = Answer(url)
        try:
            async with asyncio.timeout(self._config.total_timeout_seconds) as timeout:
                await self._follow(answer, holding, Deadline(timeout))
        except (RefusedURL, BadBodyError) as error:
            answer.status, answer.detail = error.status, error.detail
        except (aiohttp.ClientError, OSError, ValueError) as error:  # TimeoutError is an OSError
            answer.status, answer.detail = _named(error)
        if answer.status is not Status.OK:
            answer.data = b""
            self.bytes.set(holding, 0)
        return answer

    async def _follow(self, answer: Answer, holding: Holding, deadline: Deadline) -> None:
        """Ask a URL and all that it redirects to."""
        for _ in range(self._config.max_redirects + 1):
            self._check_address(answer.url)
            host = answer.url.raw_host or ""
            session = self._again if self._recent.ask(host) else self._once
            async with (
                self._hosts.connection(host, deadline),
                session.get(answer.url, allow_redirects=False) as response,
            ):
                answer.http_code = response.status
                if response.status not in _REDIRECTS:
                    await self._read(response, answer, holding, deadline)
                    return
                location = response.headers.get("Location")
            if location is None:
                answer.status, answer.detail = Status.HTTP_OTHER, "a redirect to nowhere"
                return
            answer.url = redirected(answer.url, location, self._config.max_url_characters)
        answer.status = Status.TOO_MANY_REDIRECTS
        answer.detail = f"more than {self._config.max_redirects}"

    def _check_address(self, url: URL) -> None:
        """Check a host that is an address: it needs no resolver, so no resolver would check it."""
        address = literal_address(url)
        if address is not None and not self._network.is_allowed(address):
            raise RefusedURL(Status.BLOCKED_IP, _blocked(address))

    async def _read(
        self, response: aiohttp.ClientResponse, answer: Answer, holding: Holding, deadline: Deadline
    ) -> None:
        """Read the file of the last answer, or say why not."""
        answer.status, answer.detail = self._judged(response)
        if answer.status is not Status.OK:
            answer.retry_after_seconds = _retry_after(response)
            return
        body = await self._body(response, holding, deadline)
        encoding = response.headers.get("Content-Encoding")
        if encoding is not None and encoding.lower() != "identity":
            await self.bytes.take(holding, self._config.max_bytes, deadline)
            body = inflated(body, encoding, self._config.max_bytes)
        self.bytes.set(holding, len(body))
        answer.data = body
        if not body:
            answer.status, answer.detail = Status.EMPTY_BODY, "no bytes"

    def _judged(self, response: aiohttp.ClientResponse) -> tuple[Status, str]:
        """Return what the head of an answer says."""
        if response.status not in (200, 203):
            return _status_of(response.status), f"HTTP {response.status}"
        reason = opt_out(
            response.headers.getall("X-Robots-Tag", ()),
            response.headers.get(TDM_RESERVATION),
            self._directives,
            self._agents,
        )
        if reason is not None:
            return Status.OPT_OUT, reason
        if (response.content_length or 0) > self._config.max_bytes:
            return Status.TOO_LARGE, f"{response.content_length} bytes announced"
        return Status.OK, ""

    async def _body(
        self, response: aiohttp.ClientResponse, holding: Holding, deadline: Deadline
    ) -> bytes:
        """Return all bytes. Raises: BadBodyError, too_large, as soon as they are too many."""
        chunks = []
        async for chunk in response.content.iter_any():
            await self.bytes.take(holding, len(chunk), deadline)
            if holding.num_bytes > self._config.max_bytes:
                detail = f"more than {self._config.max_bytes} bytes"
                raise BadBodyError(Status.TOO_LARGE, detail)
            chunks.append(chunk)
        return chunks[0] if len(chunks) == 1 else b"".join(chunks)


def _session(
    config: FetchConfig, network: Network, resolver: GuardedResolver, *, keep_open: bool
) -> aiohttp.ClientSession:
    connector = aiohttp.TCPConnector(
        limit=0,  # both limits are ours: waiting in aiohttp's would count as the server's time
        limit_per_host=0,
        resolver=resolver,
        ssl=config.verify_tls,
        socket_factory=guarded_socket(network),
        force_close=not keep_open,
        ttl_dns_cache=_NAME_SECONDS,
    )
    headers = {"User-Agent": config.user_agent, "Accept": "image/*, */*;q=0.5"}
    return aiohttp.ClientSession(
        connector=connector,
        headers=headers | {"Accept-Encoding": "identity"},
        cookie_jar=aiohttp.DummyCookieJar(),
        timeout=aiohttp.ClientTimeout(total=None, connect=config.connect_timeout_seconds),
        trust_env=False,
        auto_decompress=False,
        read_bufsize=_READ_BYTES,
        max_line_size=_MAX_HEADER_BYTES,
        max_field_size=_MAX_HEADER_BYTES,
    )


def _status_of(code: int) -> Status:
    if code == 429:
        return Status.HTTP_429
    if 400 <= code < 500:
        return Status.HTTP_4XX
    return Status.HTTP_5XX if 500 <= code < 600 else Status.HTTP_OTHER


def _retry_after(response: aiohttp.ClientResponse) -> float:
    """Return the seconds that an answer asks us to wait; a date counts from the answer's own."""
    value = response.headers.get("Retry-After", "").strip()
    if _SECONDS.fullmatch(value):
        return float(value)
    try:
        until = parsedate_to_datetime(value)
        said = parsedate_to_datetime(response.headers.get("Date", ""))
        return max(0.0, (until - said).total_seconds())
    except (ValueError, OverflowError, TypeError):  # TypeError: only one of them has a time zone
        return 0.0


def _named(error: Exception) -> tuple[Status, str]:
    """Return status and words of what a connection or answer has failed with."""
    blocked = _cause(error, BlockedAddressError)
    if blocked is not None:
        return Status.BLOCKED_IP, str(blocked)
    return _kind(error), str(error) or type(error).__name__


def _kind(error: Exception) -> Status:
    match error:
        case aiohttp.ServerTimeoutError():
            return Status.TIMEOUT_CONNECT
        case TimeoutError():
            return Status.TIMEOUT_TOTAL
        case aiohttp.ClientSSLError() | aiohttp.ServerFingerprintMismatch() | ssl.SSLError():
            return Status.TLS
        case aiohttp.ClientConnectorDNSError():
            return Status.DNS
        case aiohttp.ClientPayloadError():
            return Status.TRUNCATED
        case aiohttp.InvalidURL():
            return Status.BAD_URL
        case aiohttp.ClientConnectionError() | OSError():
            return Status.CONNECTION
    return Status.BAD_RESPONSE


def _cause(error: BaseException | None, kind: type[T]) -> T | None:
    """Return the first error of a kind among an error and its causes."""
    while error is not None and not isinstance(error, kind):
        error = error.__cause__ or error.__context__
    return error


def _blocked(address: str) -> str:
    return address if is_public(address) else f"{address} is not a public address"
