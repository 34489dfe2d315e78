"""What a URL list from the web holds, case by case, each with the status it must get.

`made(server, forbidden)` serves them all. To extend the table, add a Case: its `fetch` is what the
fetcher says, its `final` what is said in the end, once the image is looked at and decoded.
"""

from __future__ import annotations

import asyncio
import gzip
import random
import socket
import zlib
from collections.abc import Iterator
from typing import NamedTuple

import hostile_images as images
from hostile_server import HostileServer, Peer, Script, answer

from curate.download.content import ImageLimits
from curate.download.fetch_config import FetchConfig
from curate.download.netguard import is_public
from curate.download.resolver import Network
from curate.download.statuses import Status as S

CONFIG = FetchConfig(
    attempts=3,
    retry_wait_seconds=0.0,
    max_retry_wait_seconds=0.0,
    max_redirects=3,
    max_bytes=2**20,
    connect_timeout_seconds=30.0,
    total_timeout_seconds=30.0,
)
"""Patient: a busy machine must not turn another status into a timeout."""
HASTY = CONFIG.model_copy(update={"attempts": 1, "total_timeout_seconds": 0.5})
"""For the cases that never end by themselves."""
HASTY_TO_CONNECT = CONFIG.model_copy(update={"attempts": 1, "connect_timeout_seconds": 0.5})
"""For servers that take a connection and never finish its handshake."""
CUT_OFF = 6
"""How often a server that hangs up is asked: twice an attempt, as HTTP clients do (RFC 9112,
section 9.3.1), since a connection kept open may have ended just then."""
LIMITS = ImageLimits(min_side=8, max_aspect_ratio=4.0)


class Case(NamedTuple):
    """One URL. `final` is None where it is the same as `fetch`."""

    name: str
    url: str
    fetch: S
    final: S | None = None
    times_asked: int = 1  # requests that reach the server for its path; 0: none may

    @property
    def final_status(self) -> S:
        """Return the status in the end."""
        return self.final or self.fetch


def made(server: HostileServer, forbidden: HostileServer) -> list[Case]:
    """Serve all cases that end by themselves; `forbidden` is a server that none may reach."""
    groups = (_images, _bodies, _codes, _redirects, _robots, _encodings, _wire, _spellings)
    cases = [case for group in groups for case in group(server)]
    return [*cases, *_bad_urls(), *_forbidden(server, forbidden), *_hosts(server)]


def endless(server: HostileServer) -> list[Case]:
    """Serve the cases that only a deadline ends."""
    head = b"HTTP/1.1 200 OK\r\nContent-Type: image/jpeg\r\n"

    def dripping(start: bytes) -> Script:
        async def script(peer: Peer) -> None:
            await peer.send(start)
            while True:
                await peer.send(b"x")
                await asyncio.sleep(0.02)

        return script

    async def silent(peer: Peer) -> None:
        await asyncio.sleep(3600)

    async def redirecting(peer: Peer) -> None:
        await asyncio.sleep(0.2)
        await peer.send(answer(b"", [("Location", peer.request.path)], status="302 Found"))

    scripts = {
        "drip of the body": dripping(head + b"Content-Length: 5000\r\n\r\n"),
        "drip without length": dripping(head + b"\r\n"),
        "drip of headers": dripping(head + b"X-Drip: "),
        "drip of the status line": dripping(b"HTTP/1.1 200 "),
        "no answer": silent,
        "slow redirects": redirecting,
    }
    cases = []
    for number, (name, script) in enumerate(scripts.items()):
        url = server.serve(f"/endless/{number}", script)
        cases.append(Case(name, url, S.TIMEOUT_TOTAL))
    return cases


def large(server: HostileServer) -> list[Case]:
    """Serve files of up to and beyond the default limit of 32 MiB, 4 of each kind."""

    async def endless_body(peer: Peer) -> None:
        await peer.send(b"HTTP/1.1 200 OK\r\n\r\n")
        while True:
            await peer.send(bytes(2**19))

    full, over = (gzip.compress(bytes(size), 1) for size in (32 * 2**20, 200 * 2**20))
    packed = {"Content-Encoding": "gzip"}
    kinds = {
        "endless": (server.serve("/large/endless", endless_body), S.TOO_LARGE),
        "bomb": (server.serve_bytes("/large/bomb", over, packed), S.TOO_LARGE),
        "32 MiB": (server.serve_bytes("/large/full", bytes(32 * 2**20)), S.OK),
        "32 MiB, packed": (server.serve_bytes("/large/packed", full, packed), S.OK),
    }
    return [Case(f"large: {name}", *rest) for name, rest in kinds.items() for _ in range(4)]


def damaged(num_answers: int, seed: int) -> list[bytes]:
    """Return answers with bytes changed, cut, repeated and put in, from the same seed the same."""
    choose = random.Random(seed)
    jpeg = images.jpeg()[:400]
    dates = [("Retry-After", "Wed, 21 Oct 2031 07:28:00 GMT")]
    dates += [("Date", "Wed, 21 Oct 2031 07:27:00 GMT")]
    whole = [
        answer(jpeg, [("X-Robots-Tag", "max-image-preview:large, all")]),
        answer(jpeg, dates, status="503 Busy"),
        answer(b"", [("Location", "http://127.0.0.1:1/%zz?a#b")], status="302 Found"),
        answer(gzip.compress(jpeg), [("Content-Encoding", "gzip"), ("Set-Cookie", "a=b; Path=/")]),
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nabcde\r\n0\r\nX-T: a\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nConnection: Upgrade\r\nUpgrade: h2c\r\nLink: <a>; rel=b\r\n\r\nabc",
    ]
    put_in = [b"\r\n", b"\0", b"\xff", b":", b"-1", b"9" * 20, b"chunked", b"http://["]
    put_in += [b"Content-Length: 3\r\n", b"Content-Encoding: deflate\r\n", b"\xed\xa0\x80"]
    return [_damaged(bytearray(choose.choice(whole)), put_in, choose) for _ in range(num_answers)]


def _damaged(data: bytearray, put_in: list[bytes], choose: random.Random) -> bytes:
    for _ in range(choose.randint(1, 4)):
        at = choose.randrange(min(len(data), 160) + 1)
        match choose.randrange(4):
            case 0:
                data[at:at] = choose.choice(put_in)
            case 1:
                del data[at : at + choose.randint(1, 9)]
            case 2:
                data[at : at + 1] = bytes([choose.randrange(256)])
            case 3:
                data[at:at] = data[at : at + choose.randint(1, 40)]
    return bytes(data)


def network(forbidden_name: str = "intranet.test") -> Network:
    """Return names that all lead to loopback; only 127.0.0.1 counts as public there."""
    names = {
        "images.test": ["127.0.0.1"],
        "xn--bcher-kva.test": ["127.0.0.1"],
        "rebinding.test": ["127.0.0.2", "10.0.0.1", "::1", "127.0.0.1"],
        forbidden_name: ["127.0.0.2"],
        "metadata.test": ["169.254.169.254", "fd00:ec2::254"],
    }

    async def look_up(host: str, port: int) -> list[str]:
        if host.startswith("once-"):
            return ["127.0.0.1"]
        if host not in names:
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return names[host]

    return Network(look_up, lambda address: address == "127.0.0.1" or is_public(address))


def _images(server: HostileServer) -> Iterator[Case]:
    """Images that can be used, in every odd form."""
    jpeg = images.jpeg()
    files = {
        "jpeg": jpeg,
        "progressive": images.jpeg(progressive=True),
        "grayscale": images.encoded(images.picture("L"), "JPEG"),
        "cmyk": images.encoded(images.picture("CMYK"), "JPEG"),
        "exif orientation": images.rotated_jpeg(),
        "16-bit png": images.sixteen_bit_png(),
        "rgba png": images.encoded(images.picture("RGBA"), "PNG"),
        "palette png": images.encoded(images.picture("P"), "PNG"),
        "gray and alpha png": images.encoded(images.picture("LA"), "PNG"),
        "webp": images.encoded(images.picture(), "WEBP"),
        "bmp": images.encoded(images.picture(), "BMP"),
        "animated gif": images.animated("GIF"),
        "animated webp": images.animated("WEBP"),
        "bytes after the end": jpeg + b"junk" * 9,
    }
    for name, data in files.items():
        yield Case(name, server.serve_bytes(_path("image", name), data), S.OK)
    for kind in ("text/html", "", "application/octet-stream", "image/png; charset=x"):
        url = server.serve_bytes(_path("type", kind), jpeg, type=kind)
        yield Case(f"content type {kind!r}", url, S.OK)


def _bodies(server: HostileServer) -> Iterator[Case]:
    """Whole answers that are no usable image."""
    jpeg, png = images.jpeg(), images.encoded(images.picture(), "PNG")
    webp = images.encoded(images.picture(), "WEBP")
    bodies = {
        "html as jpg": (b"<!DOCTYPE html><html>not found</html>", S.NOT_AN_IMAGE),
        "svg": (b'<svg xmlns="http://www.w3.org/2000/svg"/>', S.NOT_AN_IMAGE),
        "svg after a prolog": (b'<?xml version="1.0"?>\n<svg/>', S.NOT_AN_IMAGE),
        "text": (b"GIF? no", S.NOT_AN_IMAGE),
        "pdf": (b"%PDF-1.7\n", S.NOT_AN_IMAGE),
        "tiff": (images.encoded(images.picture(), "TIFF"), S.NOT_AN_IMAGE),
        "avif": (b"\0\0\0\x1cftypavif" + bytes(40), S.NOT_AN_IMAGE),
        "truncated jpeg": (jpeg[: len(jpeg) // 2], S.TRUNCATED_IMAGE),
        "truncated png": (png[: len(png) // 2], S.TRUNCATED_IMAGE),
        "truncated webp": (webp[:25], S.TRUNCATED_IMAGE),
        "header only": (jpeg[:3], S.TRUNCATED_IMAGE),
        "damaged png": (png[:60] + bytes(40) + png[100:], S.DECODE_ERROR),
        "bomb of 12000 x 12000": (images.plain_png(12000, 12000), S.TOO_MANY_PIXELS),
        "gif of 65535 x 65535": (images.gif(65535, 65535), S.TOO_MANY_PIXELS),
        "gif of 1 x 1": (images.gif(1, 1), S.TOO_SMALL),
        "4000 x 3": (images.plain_png(4000, 3), S.TOO_SMALL),
        "4000 x 8": (images.plain_png(4000, 8), S.ASPECT_RATIO),
        "no width": (images.plain_png(0, 5), S.DECODE_ERROR),
    }
    for name, (data, final) in bodies.items():
        yield Case(name, server.serve_bytes(_path("body", name), data), S.OK, final)
    yield Case("empty", server.serve_bytes("/empty", b""), S.EMPTY_BODY)
    yield Case("empty, closed", server.serve_raw("/none", b"HTTP/1.1 200 OK\r\n\r\n"), S.EMPTY_BODY)


def _codes(server: HostileServer) -> Iterator[Case]:
    """Answers other than 200."""
    jpeg = images.jpeg()
    codes = {
        **dict.fromkeys((400, 401, 403, 404, 406, 410, 418, 451), S.HTTP_4XX),
        **dict.fromkeys((201, 204, 206, 300, 304, 305, 600, 999), S.HTTP_OTHER),
    }
    for code, status in codes.items():
        body = b"" if code in (204, 304) else jpeg  # these two have none
        url = server.serve_bytes(f"/code/{code}", body, status=f"{code} Odd")
        yield Case(f"HTTP {code}", url, status)
    for code, status in {429: S.HTTP_429, 500: S.HTTP_5XX, 503: S.HTTP_5XX}.items():
        url = server.serve_bytes(f"/code/{code}", b"", status=f"{code} Busy")
        yield Case(f"HTTP {code} always", url, status, times_asked=3)
        busy = answer(b"", [("Retry-After", "0")], status=f"{code} Busy")
        url = server.serve(f"/then/{code}", in_turn(busy, answer(jpeg)), keep_open=True)
        yield Case(f"HTTP {code}, then the image", url, S.OK, times_asked=2)
    never = [("Retry-After", f"Wed, 21 Oct {'9' * 20} 07:28:00 GMT"), ("Date", "x")]
    url = server.serve_bytes("/never", b"", never, status="503 Busy")
    yield Case("a date that never comes", url, S.HTTP_5XX, times_asked=3)
    yield Case("HTTP 203", server.serve_bytes("/203", jpeg, status="203 Other"), S.OK)
    early = b"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n" + answer(jpeg)
    yield Case("early hints", server.serve_raw("/103", early), S.OK)


def _redirects(server: HostileServer) -> Iterator[Case]:
    """Redirects. Those to where nothing may be sent are in _forbidden."""
    server.serve_bytes("/to/image.jpg", images.jpeg())
    server.serve_bytes("/to/b%C3%BCcher.jpg", images.jpeg())
    good = {
        "relative": "image.jpg",
        "from the root": "/to/image.jpg",
        "with dots": "../to/./image.jpg",
        "absolute": server.url("/to/image.jpg"),
        "without scheme": server.url("/to/image.jpg").removeprefix("http:"),
        "with fragment": "/to/image.jpg#top",
        "in UTF-8": "/to/bücher.jpg",
        "twice": "/to/relative",
        "three times": "/to/twice",
    }
    for name, where in good.items():
        yield Case(f"redirect {name}", server.redirect(_path("to", name), where), S.OK)
    for code in (301, 303, 307, 308):
        url = server.redirect(f"/to/{code}", "/to/image.jpg", f"{code} Moved")
        yield Case(f"redirect by {code}", url, S.OK)
    bad = {
        "four times": ("/to/three%20times", S.TOO_MANY_REDIRECTS),
        "to itself": ("/to/to%20itself", S.TOO_MANY_REDIRECTS),
        "to a file": ("file:///etc/passwd", S.BLOCKED_SCHEME),
        "to data": ("data:image/gif;base64,R0lGODlhAQABAAAAACw=", S.BLOCKED_SCHEME),
        "to ftp": ("ftp://127.0.0.1/a.jpg", S.BLOCKED_SCHEME),
        "to a script": ("javascript:alert(1)", S.BLOCKED_SCHEME),
        "to 13,000 characters": ("/" + "a" * 13000, S.BAD_URL),
        "to a bad port": ("http://127.0.0.1:99999/", S.BAD_URL),
        "to a password": ("http://user:secret@127.0.0.1/a.jpg", S.BAD_URL),
        "to 404": ("/nowhere", S.HTTP_4XX),
        "to odd bytes": ("http://127.0.0.1:\udcff/", S.BAD_URL),
        "to no name": ("http://no.invalid/a.jpg", S.DNS),
    }
    for name, (where, status) in bad.items():
        times = {"to itself": 4, "to no name": 3}.get(name, 1)
        url = server.redirect(_path("to", name), where)
        yield Case(f"redirect {name}", url, status, times_asked=times)
    yield Case(
        "redirect without location",
        server.serve_bytes("/to", b"", status="302 Found"),
        S.HTTP_OTHER,
    )


def _robots(server: HostileServer) -> Iterator[Case]:
    """Sites that ask not to be used, and sites that ask something else."""
    opted_out = ["noai", "NoImageAI", "noindex", "noimageindex", "noml", "none", "nofollow, noai"]
    opted_out += ["max-image-preview:large, noai", "warren: noai", "*: noai", "noai; noimageai"]
    opted_out += ["unavailable_after: Wed, 25 Jun 2031 15:00:00 GMT, noai"]
    opted_out += ["otherbot: nofollow, Warren: noindex"]
    others = ["all", "nofollow", "otherbot: noai", "otherbot: noai, noindex", "noarchive", ""]
    others += ["max-image-preview:large", "warren: nofollow, otherbot: noai", "noainoai"]
    for values, status in ((opted_out, S.OPT_OUT), (others, S.OK)):
        for value in values:
            path = _path(f"robots/{status}", value)
            url = server.serve_bytes(path, images.jpeg(), {"X-Robots-Tag": value})
            yield Case(f"robots {value!r}", url, status)
    two = [("X-Robots-Tag", "otherbot: all"), ("x-robots-tag", "noai")]
    yield Case("robots twice", server.serve_bytes("/2robots", images.jpeg(), two), S.OPT_OUT)
    for value, status in {"1": S.OPT_OUT, "0": S.OK}.items():
        headers = {"TDM-Reservation": value}
        url = server.serve_bytes(f"/tdm/{value}", images.jpeg(), headers)
        yield Case(f"tdm-reservation {value}", url, status)


def _encodings(server: HostileServer) -> Iterator[Case]:
    """Encoded bodies, which nobody asked for."""
    jpeg = images.jpeg()
    packed = gzip.compress(jpeg)
    raw = zlib.compressobj(wbits=-15)
    bomb = gzip.compress(bytes(50 * 2**20))
    bodies = {
        "gzip": ("gzip", packed, S.OK),
        "GZIP": ("GZIP", packed, S.OK),
        "identity": ("identity", jpeg, S.OK),
        "deflate": ("deflate", zlib.compress(jpeg), S.OK),
        "deflate without header": ("deflate", raw.compress(jpeg) + raw.flush(), S.OK),
        "gzip bomb": ("gzip", bomb, S.TOO_LARGE),
        "gzip that is none": ("gzip", jpeg, S.BAD_RESPONSE),
        "deflate that is none": ("deflate", jpeg, S.BAD_RESPONSE),
        "gzip cut": ("gzip", packed[:-30], S.TRUNCATED),
        "brotli": ("br", b"\x0b\x02\x80\x00", S.BAD_RESPONSE),
        "gzip twice": ("gzip, gzip", gzip.compress(packed), S.BAD_RESPONSE),
    }
    for name, (encoding, body, status) in bodies.items():
        url = server.serve_bytes(_path("encoding", name), body, {"Content-Encoding": encoding})
        times = 3 if status is S.TRUNCATED else 1
        yield Case(f"encoded: {name}", url, status, times_asked=times)


def _wire(server: HostileServer) -> Iterator[Case]:
    """What is no good HTTP, or too much of it."""
    jpeg, ok = images.jpeg(), b"HTTP/1.1 200 OK\r\n"
    chunk = f"{len(jpeg):x}\r\n".encode() + jpeg + b"\r\n"
    chunked, length = ok + b"Transfer-Encoding: chunked\r\n\r\n", f"{len(jpeg)}\r\n\r\n".encode()
    raw = {
        "chunked": (chunked + chunk + b"0\r\n\r\n", S.OK),
        "no length": (ok + b"\r\n" + jpeg, S.OK),
        "HTTP/1.0": (b"HTTP/1.0 200 OK\r\n\r\n" + jpeg, S.OK),
        "16 kB header": (ok + b"X-Policy: " + b"a" * 2**14 + b"\r\n\r\n" + jpeg, S.OK),
        "length too long": (ok + b"Content-Length: 9999\r\n\r\n" + jpeg, S.TRUNCATED),
        "chunk cut": (chunked + chunk[:-20], S.TRUNCATED),
        "last chunk missing": (chunked + chunk, S.TRUNCATED),
        "chunk size that is none": (chunked + b"zz\r\n" + jpeg, S.BAD_RESPONSE),
        "closed without an answer": (b"", S.CONNECTION),
        "half a status line": (b"HTTP/1.1 2", S.CONNECTION),
        "HTTP/0.9": (jpeg, S.BAD_RESPONSE),
        "SSH": (b"SSH-2.0-OpenSSH_9.6\r\n", S.BAD_RESPONSE),
        "no status": (b"HTTP/1.1 OK\r\n\r\n", S.BAD_RESPONSE),
        "length that is none": (ok + b"Content-Length: many\r\n\r\n" + jpeg, S.BAD_RESPONSE),
        "length below 0": (ok + b"Content-Length: -5\r\n\r\n" + jpeg, S.BAD_RESPONSE),
        "two lengths": (ok + b"Content-Length: 5\r\nContent-Length: " + length, S.BAD_RESPONSE),
        "1 MB header": (ok + b"X-Bomb: " + b"a" * 2**20 + b"\r\n\r\n", S.BAD_RESPONSE),
        "100,000 headers": (ok + b"X-Bomb: a\r\n" * 100_000 + b"\r\n", S.BAD_RESPONSE),
        "5 MB announced": (ok + b"Content-Length: 5000000\r\n\r\n", S.TOO_LARGE),
    }
    for name, (data, status) in raw.items():
        times = {S.TRUNCATED: 3, S.CONNECTION: CUT_OFF}.get(status, 1)
        url = server.serve_raw(_path("wire", name), data)
        yield Case(f"wire: {name}", url, status, times_asked=times)

    async def reset(peer: Peer) -> None:
        peer.reset()

    async def endless_body(peer: Peer) -> None:
        await peer.send(ok + b"\r\n")
        while True:
            await peer.send(bytes(2**19))

    async def cut(peer: Peer) -> None:
        await peer.send(ok + b"Content-Length: 9999\r\n\r\nabc")
        await asyncio.sleep(0.05)
        peer.reset()

    yield Case("reset", server.serve("/reset", reset), S.CONNECTION, times_asked=CUT_OFF)
    yield Case("reset in the body", server.serve("/cut", cut), S.TRUNCATED, times_asked=3)
    yield Case("endless body", server.serve("/endless", endless_body), S.TOO_LARGE)


def _spellings(server: HostileServer) -> Iterator[Case]:
    """URLs that are not as they should be, and yet mean something."""
    spelled = {  # what is written: what is asked for
        "": "/",
        "?a=ü b": "/?a=%C3%BC%20b",
        "/a/frag.jpg#top": "/a/frag.jpg",
        "/a/two words.jpg": "/a/two%20words.jpg",
        "/a/bücher.jpg": "/a/b%C3%BCcher.jpg",
        "/a/图片.jpg?名=1": "/a/%E5%9B%BE%E7%89%87.jpg?%E5%90%8D=1",
        "/a/signed.jpg?s=a%2Fb%7Ec+d%20e&t=": "/a/signed.jpg?s=a%2Fb%7Ec+d%20e&t=",
        "/a/ta\tb\r\n.jpg ": "/a/tab.jpg",
        "/a/%zz.jpg": "/a/%zz.jpg",
        "/a/x%41.jpg": "/a/x%41.jpg",
        "/a/{2}|.jpg": "/a/%7B2%7D%7C.jpg",
    }
    for written, asked in spelled.items():
        server.serve_bytes(asked, images.jpeg())
        yield Case(f"spelled {written!r}", server.url().removesuffix("/") + written, S.OK)
    server.serve_bytes("/b", images.jpeg())
    yield Case("spelled HTTP", " HTTP" + server.url("/b").removeprefix("http"), S.OK)


def _bad_urls() -> Iterator[Case]:
    """URLs that are refused before anything is sent."""
    urls = {
        S.BLOCKED_SCHEME: [
            *(
                "file:///etc/passwd",
                "FILE:///etc/passwd",
                "ftp://127.0.0.1/a",
                "gopher://127.0.0.1",
            ),
            *("data:image/gif;base64,R0lGODlhAQABAAAAACw=", "data:," + "a" * 100_000),
            *("javascript:alert(1)", "\x01 java\tscript:alert(1)", "blob:http://127.0.0.1/a"),
        ],
        S.BAD_URL: [
            *("", "  ", "a.jpg", "//127.0.0.1/a.jpg", "http:", "http://", "http:///a.jpg"),
            *(
                "http://127.0.0.1/" + "a" * 13_000,
                "http://user:secret@127.0.0.1/",
                "http://@a.test/",
            ),
            *("http://127.0.0.1:99999/", "http://127.0.0.1:0/", "http://127.0.0.1:a/"),
            *("http://[::1", "http://127.0.0.256/", "http://1.2.3.4.5/", "http://0x100000000/"),
            *("http://127.0.0.1/\ud800.jpg", "http://a%00b.test/", "http://a b.test/"),
        ],
    }
    for status, written in urls.items():
        for url in written:
            yield Case(f"{ascii(url[:40])}", url, status, times_asked=0)


def _forbidden(server: HostileServer, forbidden: HostileServer) -> Iterator[Case]:
    """Every way to name a server that must not be reached; 127.0.0.2 where a number stands."""
    port = forbidden.port
    hosts = {
        *("127.0.0.2", "2130706434", "0x7f000002", "0177.0.0.2", "127.2", "0x7f.2", "127.0.0.2."),
        *("127.0.0.２", "[::1]", "[::ffff:127.0.0.2]", "[64:ff9b::7f00:2]", "[2002:7f00:2::]"),
        *("0.0.0.0", "10.0.0.1", "169.254.169.254", "100.64.0.1", "intranet.test"),  # noqa: S104
        *("metadata.test",),
    }
    for host in sorted(hosts):
        url = f"http://{host}:{port}/secret"
        yield Case(f"host {host}", url, S.BLOCKED_IP, times_asked=0)
        first = server.redirect(_path("inward", host.replace("２", "two")), url)
        yield Case(f"redirect to {host}", first, S.BLOCKED_IP)


def _hosts(server: HostileServer) -> Iterator[Case]:
    """Names, and hosts that do not answer."""
    server.serve_bytes("/named", images.jpeg())
    for host in ("images.test", "IMAGES.test", "bücher.test", "rebinding.test"):
        yield Case(f"host {host}", f"http://{host}:{server.port}/named", S.OK)
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    yield Case("closed port", f"http://127.0.0.1:{port}/", S.CONNECTION, times_asked=0)
    for host in ("no.invalid", "a..b", "a" * 64 + ".test"):
        yield Case(f"host {host[:20]}", f"http://{host}/", S.DNS, times_asked=0)
    yield Case("TLS that is none", f"https://127.0.0.1:{server.port}/", S.TLS, times_asked=0)


def in_turn(*answers: bytes) -> Script:
    """Return what gives one answer after the other; the last one from then on."""

    async def script(peer: Peer) -> None:
        await peer.send(answers[min(peer.number, len(answers) - 1)])

    return script


def _path(group: str, name: str) -> str:
    return f"/{group}/{''.join(c if c.isalnum() else f'%{ord(c):02X}' for c in name)}"
