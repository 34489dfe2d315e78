"""A real HTTP server on loopback that also does what no good server does, and counts what it sees.

    with HostileServer() as server:
        server.serve_bytes("/a.jpg", data, {"X-Robots-Tag": "noai"})
        server.redirect("/b.jpg", "/a.jpg")
        server.serve_raw("/junk", b"not HTTP")     # then the connection is closed
        server.serve("/drip", script)              # async def script(peer: Peer) -> None
        fetch(server.url("/a.jpg"))
    assert server.num_connections == 1
    assert server.paths == ["/a.jpg"]

All of 127.0.0.0/8 is this machine on Linux: a second server on 127.0.0.2 stands for a host that
must not be reached. Paths are as on the wire, with their query.
"""

from __future__ import annotations

import asyncio
import socket
import ssl
import struct
import threading
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID

_MAX_HEAD_BYTES = 2**17
_TLS_RECORD = b"\x16"  # the first byte of a handshake
_BROKEN = (ConnectionError, asyncio.IncompleteReadError, asyncio.LimitOverrunError, ssl.SSLError)


class Request(NamedTuple):
    """One request as it came."""

    method: str
    path: str
    headers: dict[str, str]  # names in lower case


class Peer:
    """The other side, for a script: it writes what it likes and may return or cut at any time."""

    def __init__(self, request: Request, number: int, writer: asyncio.StreamWriter) -> None:
        self.request = request
        self.number = number  # how many times this path was asked before
        self._writer = writer

    async def send(self, data: bytes) -> None:
        """Write and wait until the other side takes it."""
        self._writer.write(data)
        await self._writer.drain()

    def reset(self) -> None:
        """Cut the connection with RST."""
        opened = self._writer.get_extra_info("socket")
        opened.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._writer.transport.abort()


Script = Callable[[Peer], Awaitable[None]]


class HostileServer:
    """Serves from a thread until the block ends. A path that nobody serves is 404."""

    def __init__(
        self, host: str = "127.0.0.1", *, port: int = 0, tls: ssl.SSLContext | None = None
    ) -> None:
        self.host = host
        self.port = port  # 0 until the block begins: any that is free
        self.num_connections = 0
        self.most_open = 0  # connections open at once
        self.requests: list[Request] = []
        self.times_asked: Counter[str] = Counter()
        self._tls = tls
        self._scripts: dict[str, tuple[Script, bool]] = {}
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._peers: set[asyncio.Task[None]] = set()

    def __enter__(self) -> Self:
        self._thread.start()
        self._call(self._start())
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._call(self._stop())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    @property
    def paths(self) -> list[str]:
        """The paths asked, in order."""
        return [request.path for request in self.requests]

    def url(self, path: str = "/") -> str:
        """Return the URL of a path."""
        return f"{'https' if self._tls else 'http'}://{self.host}:{self.port}{path}"

    def serve_bytes(
        self,
        path: str,
        data: bytes,
        headers: Mapping[str, str] | list[tuple[str, str]] | None = None,
        *,
        status: str = "200 OK",
        type: str = "image/jpeg",
    ) -> str:
        """Serve a whole answer with its Content-Length; return its URL."""
        pairs = list(headers.items() if isinstance(headers, Mapping) else headers or [])
        whole = answer(data, pairs, status=status, type=type)

        async def script(peer: Peer) -> None:
            await peer.send(whole)

        return self.serve(path, script, keep_open=True)

    def redirect(self, path: str, location: str, status: str = "302 Found") -> str:
        """Redirect a path; return its URL."""
        return self.serve_bytes(path, b"", {"Location": location}, status=status)

    def serve_raw(self, path: str, *parts: bytes) -> str:
        """Write exactly these bytes and close the connection; return the URL."""

        async def script(peer: Peer) -> None:
            for part in parts:
                await peer.send(part)

        return self.serve(path, script)

    def serve(self, path: str, script: Script, *, keep_open: bool = False) -> str:
        """Let a script answer a path; return its URL."""
        self._scripts[path] = script, keep_open
        return self.url(path)

    async def _start(self) -> None:
        self._server = await asyncio.start_server(
            self._connected, self.host, self.port, ssl=self._tls, limit=_MAX_HEAD_BYTES, backlog=512
        )
        self.port: int = self._server.sockets[0].getsockname()[1]

    async def _stop(self) -> None:
        self._server.close()
        for peer in self._peers:
            peer.cancel()
        await asyncio.gather(*self._peers, return_exceptions=True)

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.num_connections += 1
        task = asyncio.current_task()
        assert task is not None
        self._peers.add(task)
        self.most_open = max(self.most_open, len(self._peers))
        try:
            with suppress(*_BROKEN):
                while await self._answered(reader, writer):
                    pass
        except asyncio.CancelledError:
            return  # the server is closing
        finally:
            self._peers.discard(task)
            writer.close()

    async def _answered(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        """Answer one request. Return whether another may follow."""
        first = await reader.readexactly(1)
        if first == _TLS_RECORD:  # said to a server without TLS
            writer.write(answer(b"", status="400 Bad Request"))
            return False
        head = first + await reader.readuntil(b"\r\n\r\n")
        lines = head.decode("latin-1").split("\r\n")
        method, path, _ = lines[0].split(" ")
        pairs = (line.partition(":") for line in lines[1:] if line)
        request = Request(method, path, {name.lower(): text.strip() for name, _, text in pairs})
        number = self.times_asked[path]
        self.times_asked[path] += 1
        self.requests.append(request)
        script, keep_open = self._scripts.get(path, (_not_found, True))
        await script(Peer(request, number, writer))
        return keep_open

    def _call(self, work: Awaitable[None]) -> None:
        async def awaited() -> None:
            await work

        asyncio.run_coroutine_threadsafe(awaited(), self._loop).result()


def answer(
    data: bytes,
    headers: list[tuple[str, str]] | None = None,
    *,
    status: str = "200 OK",
    type: str = "image/jpeg",
) -> bytes:
    """Return a whole HTTP/1.1 answer; headers are sent as UTF-8 (a surrogate as its byte)."""
    pairs = [("Content-Type", type)] if type else []
    if not status.startswith(("1", "204", "304")):
        pairs.append(("Content-Length", str(len(data))))
    lines = [f"{name}: {text}" for name, text in [*pairs, *(headers or [])]]
    return (
        "\r\n".join([f"HTTP/1.1 {status}", *lines, "", ""]).encode(errors="surrogateescape") + data
    )


async def _not_found(peer: Peer) -> None:
    await peer.send(answer(b"not here", status="404 Not Found", type="text/plain"))


def self_signed(folder: Path) -> ssl.SSLContext:
    """Return the TLS of a server for 127.0.0.1 that no authority vouches for."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "127.0.0.1")])
    address = x509.SubjectAlternativeName([x509.IPAddress(ip_address("127.0.0.1"))])
    now = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(address, critical=False)
        .sign(key, hashes.SHA256())
    )
    private = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    path = folder / "server.pem"
    path.write_bytes(private + certificate.public_bytes(Encoding.PEM))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(path)
    return context
