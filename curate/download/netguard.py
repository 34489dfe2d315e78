"""Which URLs may be asked, and which addresses may be connected to.

A URL in a public list is a stranger's text: it may name a file, the machine itself, or a host
within the network that the fetcher runs in. Each is checked here before anything is sent, and so is
every redirect.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import lru_cache
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network
from urllib.parse import urljoin

from yarl import URL

from curate.download.statuses import Status

AddressRule = Callable[[str], bool]
"""Says of an IP address, as text, whether it may be connected to."""

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):")
_STRIPPED = "".join(map(chr, range(0x21)))  # C0 controls and space, as browsers strip them
_IGNORED = str.maketrans("", "", "\t\r\n")
# What RFC 3986 allows. A URL of these alone is asked for as it is, byte for byte: a server may have
# signed it.
_ALLOWED = re.compile(r"[A-Za-z0-9\-._~:/?#\[\]@!$&'()*+,;=%]*")
_HOST = re.compile(r"[A-Za-z0-9._-]+|[0-9A-Fa-f:.]+")  # with the underscores of real names
_NUMBER = re.compile(r"0[xX][0-9a-fA-F]*|[0-9]+")

# Not for us: Azure's host services, which are public by the registries; the relays of 6to4; and all
# of the IETF's assignments, of which Python 3.11 knows a part (a metadata service is 192.0.0.192).
_NOT_FOR_US = tuple(map(ip_network, ("168.63.129.16/32", "192.88.99.0/24", "192.0.0.0/24")))
_GLOBAL_UNICAST = ip_network("2000::/3")  # all that IANA has given out; RFC 4291, section 2.4
_NOT_GLOBAL_IN_IT = tuple(map(ip_network, ("2001::/23", "2001:db8::/32", "3fff::/20")))
_SIX_TO_FOUR = ip_network("2002::/16")  # RFC 3056
_NAT64 = ip_network("64:ff9b::/96")  # RFC 6052


class RefusedURL(Exception):
    """The URL is not asked for; `status` says in which way it is wrong, `detail` in words."""

    def __init__(self, status: Status, detail: str) -> None:
        super().__init__(status, detail)
        self.status = status
        self.detail = detail


def normalised(text: str, max_characters: int) -> URL:
    """Return the URL as it is asked for: http or https, ASCII, without `#fragment`.

    What is not ASCII is percent-encoded as UTF-8, in a host by IDNA. A host that is a number in
    any notation becomes the address it stands for.

    Raises: RefusedURL, blocked_scheme or bad_url.
    """
    text = text.strip(_STRIPPED).translate(_IGNORED)
    scheme = _SCHEME.match(text)
    if scheme is None:
        raise RefusedURL(Status.BAD_URL, "no scheme" if text else "no URL")
    if scheme[1].lower() not in ("http", "https"):
        raise RefusedURL(Status.BLOCKED_SCHEME, f"{scheme[1].lower()[:40]}: is not http or https")
    if len(text) > max_characters:
        detail = f"{len(text)} characters are more than {max_characters}"
        raise RefusedURL(Status.BAD_URL, detail)
    try:
        return _parsed(text)
    except ValueError as error:  # from yarl: a host, port or character that cannot be
        raise RefusedURL(Status.BAD_URL, str(error)) from error


def redirected(url: URL, location: str, max_characters: int) -> URL:
    """Return where a redirect from `url` leads, checked as `normalised` does.

    Raises: RefusedURL.
    """
    if len(location) > max_characters and not location.lower().startswith("data:"):
        raise RefusedURL(Status.BAD_URL, f"redirected to {len(location)} characters")
    try:
        target = urljoin(str(url), location.strip(_STRIPPED))
    except ValueError as error:
        raise RefusedURL(Status.BAD_URL, f"redirected to no URL: {error}") from error
    return normalised(target, max_characters)


def literal_address(url: URL) -> str | None:
    """Return the address if the host is one, else None: then it is a name to be resolved."""
    return _as_address(url.raw_host or "")


@lru_cache(maxsize=1 << 16)
def is_public(address: str) -> bool:
    """Return whether the address, IPv4 or IPv6, is one of the public internet.

    Loopback, private, link-local (with the clouds' metadata services), shared (CGNAT), multicast,
    reserved and documentation addresses are not; nor are IPv6 addresses that stand for an IPv4
    address which is not. Source: IANA's special-purpose address registries.
    """
    try:
        found = ip_address(address)
    except ValueError:
        return False
    return _is_public_v4(found) if isinstance(found, IPv4Address) else _is_public_v6(found)


def _parsed(text: str) -> URL:
    text = text.partition("#")[0]
    text = text.replace(" ", "%20")  # yarl would write + in a query
    text.encode()  # raises for half a surrogate pair, which yarl would leave out
    url = URL(text, encoded=_ALLOWED.fullmatch(text) is not None)
    host = url.raw_host
    if not host:
        raise RefusedURL(Status.BAD_URL, "no host")
    if "@" in url.raw_authority:
        raise RefusedURL(Status.BAD_URL, "a user name or password in the URL")
    if not url.port:
        raise RefusedURL(Status.BAD_URL, "no port")
    if not _HOST.fullmatch(host):
        raise RefusedURL(Status.BAD_URL, "a host that is no name")
    asked = _as_asked(host)
    return url if asked == host else url.with_host(asked)


@lru_cache(maxsize=1 << 14)
def _as_address(host: str) -> str | None:
    try:
        return str(ip_address(host))
    except ValueError:
        return None


@lru_cache(maxsize=1 << 14)
def _as_asked(host: str) -> str:
    return _as_ipv4(host) or host.lower()


def _as_ipv4(host: str) -> str | None:
    """Return a.b.c.d for a host that inet_aton reads as a number: 2130706433, 0x7f.1, 0177.0.0.1.

    Raises: RefusedURL for a number that is no address. Source: WHATWG URL, the IPv4 parser.
    """
    labels = host.removesuffix(".").split(".")
    if ":" in host or not _NUMBER.fullmatch(labels[-1]):
        return None
    values = [_number(label) for label in labels]
    if len(labels) > 4 or any(value is None for value in values):
        raise RefusedURL(Status.BAD_URL, f"{host[:60]} is no address")
    *bytes_, last = [value or 0 for value in values]
    if any(value > 255 for value in bytes_) or last >= 256 ** (5 - len(labels)):
        raise RefusedURL(Status.BAD_URL, f"{host[:60]} is no address")
    upper = sum(value << 8 * (3 - place) for place, value in enumerate(bytes_))
    return str(IPv4Address(upper + last))


def _number(label: str) -> int | None:
    if not _NUMBER.fullmatch(label):
        return None
    if label[:2].lower() == "0x":
        return int(label[2:] or "0", 16)
    is_octal = len(label) > 1 and label.startswith("0")
    try:
        return int(label, 8 if is_octal else 10)
    except ValueError:
        return None


def _is_public_v4(address: IPv4Address) -> bool:
    if any(address in network for network in _NOT_FOR_US):
        return False
    return address.is_global and not address.is_multicast and not address.is_reserved


def _is_public_v6(address: IPv6Address) -> bool:
    if address.scope_id is not None:
        return False
    if address.ipv4_mapped is not None:
        return _is_public_v4(address.ipv4_mapped)
    if address in _NAT64:
        return _is_public_v4(IPv4Address(int(address) & 0xFFFF_FFFF))
    if address in _SIX_TO_FOUR:
        return _is_public_v4(IPv4Address(int(address) >> 80 & 0xFFFF_FFFF))
    is_given_out = address in _GLOBAL_UNICAST and address.is_global
    return is_given_out and not any(address in network for network in _NOT_GLOBAL_IN_IT)
