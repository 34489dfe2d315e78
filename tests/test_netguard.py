"""URLs and addresses: worked examples, and every special-purpose network."""

from __future__ import annotations

import asyncio
import socket
import string
import threading
from ipaddress import ip_network
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from curate.download.netguard import (
    RefusedURL,
    is_public,
    literal_address,
    normalised,
    redirected,
)
from curate.download.resolver import (
    BlockedAddressError,
    GuardedResolver,
    Network,
    guarded_socket,
    system_network,
)
from curate.download.statuses import Status

# IANA's registries of special-purpose addresses, and multicast; none is of the public internet.
NOT_PUBLIC = [
    *("0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16", "172.16.0.0/12"),
    *("192.0.0.0/24", "192.0.2.0/24", "192.88.99.0/24", "192.168.0.0/16", "198.18.0.0/15"),
    *("198.51.100.0/24", "203.0.113.0/24", "224.0.0.0/4", "240.0.0.0/4", "255.255.255.255/32"),
    *("::/128", "::1/128", "::ffff:0:0/97", "64:ff9b:1::/48", "100::/64", "2001::/32"),
    *("2001:2::/48", "2001:db8::/32", "3fff::/20", "5f00::/16", "fc00::/7", "fe80::/10"),
    *("fec0::/10", "ff00::/8", "168.63.129.16/32", "192.0.0.192/32"),
    *("2002:7f00::/24", "2002:a00::/24", "2002:c0a8::/32", "2002:a9fe::/32"),  # 6to4
    *("64:ff9b::7f00:0/104", "64:ff9b::a00:0/104", "64:ff9b::c0a8:0/112"),  # NAT64
    *("::ffff:10.0.0.0/104", "::ffff:169.254.0.0/112", "::7f00:0/104"),
]
PUBLIC = [
    *("1.1.1.1", "8.8.8.8", "9.255.255.255", "11.0.0.0", "100.63.255.255", "100.128.0.0"),
    *("126.255.255.255", "128.0.0.0", "169.253.255.255", "172.15.255.255", "172.32.0.0"),
    *("192.167.255.255", "192.169.0.0", "223.255.255.255", "2606:4700::1111", "2a00::1"),
    *("::ffff:8.8.8.8", "64:ff9b::808:808", "2002:808:808::1"),
]


@pytest.mark.parametrize("network", NOT_PUBLIC)
def test_no_end_of_a_special_network_is_public(network: str) -> None:
    found = ip_network(network)
    if network == "::ffff:0:0/97":  # 0.0.0.0 to 127.255.255.255, mapped: its ends are special
        assert not is_public("::ffff:0.0.0.0")
        return
    assert not is_public(str(found[0]))
    assert not is_public(str(found[-1]))


@pytest.mark.parametrize("address", PUBLIC)
def test_addresses_beside_special_networks_are_public(address: str) -> None:
    assert is_public(address)


@pytest.mark.parametrize("text", ["", "localhost", "1.2.3", "fe80::1%eth0", "2606:4700::1%1"])
def test_what_is_no_address_or_has_a_zone_is_not_public(text: str) -> None:
    assert not is_public(text)


@pytest.mark.parametrize(
    ("written", "asked"),
    [
        ("http://a.test", "http://a.test"),
        (" \t\nhttp://a.test/\r\n ", "http://a.test/"),
        ("HTTPS://A.Test:443/B", "https://a.test/B"),
        ("http://a.test/b c?d e#f g", "http://a.test/b%20c?d%20e"),
        ("http://a.test/ä", "http://a.test/%C3%A4"),
        ("http://bücher.test/", "http://xn--bcher-kva.test/"),
        ("http://a_b.test/", "http://a_b.test/"),
        ("http://a.test?q", "http://a.test/?q"),
        ("http://a.test/%41%2f%zz+~", "http://a.test/%41%2f%zz+~"),
        ("http://a.test/../b/./c", "http://a.test/../b/./c"),
        ("http://2130706433/", "http://127.0.0.1/"),
        ("http://0x7f.1/a?b", "http://127.0.0.1/a?b"),
        ("http://0177.0.0.1/", "http://127.0.0.1/"),
        ("http://017700000001/", "http://127.0.0.1/"),
        ("http://127.1/", "http://127.0.0.1/"),
        ("http://127.0.257/", "http://127.0.1.1/"),
        ("http://127.0.0.1./", "http://127.0.0.1/"),
        ("http://１２７.0.0.1/", "http://127.0.0.1/"),
        ("http://0x/", "http://0.0.0.0/"),
        ("http://1.2.test/", "http://1.2.test/"),
        ("http://[::1]:8080/", "http://[::1]:8080/"),
    ],
)
def test_a_url_as_it_is_asked_for(written: str, asked: str) -> None:
    assert str(normalised(written, 99)) == asked


@pytest.mark.parametrize("host", ["127.0.0.1", "2130706433", "0x7f000001", "0177.1", "[::1]"])
def test_a_host_that_is_a_number_is_an_address(host: str) -> None:
    assert literal_address(normalised(f"http://{host}/", 99)) in ("127.0.0.1", "::1")


def test_a_name_is_no_address() -> None:
    assert literal_address(normalised("http://1.2.3.test/", 99)) is None


@pytest.mark.parametrize(
    "url",
    [
        *("http://256.1/", "http://1.2.3.256/", "http://1.2.3.4.5/", "http://4294967296/"),
        *("http://08.1/", "http://1..2/", "http://1.2.3.0x100/", "http://a.1/"),
    ],
)
def test_a_number_that_is_no_address_is_refused(url: str) -> None:
    with pytest.raises(RefusedURL) as refused:
        normalised(url, 99)
    assert refused.value.status is Status.BAD_URL


def test_the_limit_on_characters_is_the_longest_allowed() -> None:
    url = "http://a.test/" + "a" * 86
    assert str(normalised(url, 100)) == url
    with pytest.raises(RefusedURL, match="101 characters are more than 100"):
        normalised(url + "a", 100)


def test_a_redirect_is_relative_to_what_redirects_and_is_checked_alike() -> None:
    url = normalised("https://a.test/b/c?d", 99)
    assert str(redirected(url, "e?f#g", 99)) == "https://a.test/b/e?f"
    assert str(redirected(url, "//h.test/ä", 99)) == "https://h.test/%C3%A4"
    for where in ("file:///etc/passwd", "data:," + "a" * 200, "FTP://a.test/"):
        with pytest.raises(RefusedURL) as refused:
            redirected(url, where, 99)
        assert refused.value.status is Status.BLOCKED_SCHEME


def test_each_guard_holds_alone() -> None:
    """The resolver gives only public addresses, and no socket goes to another one."""

    async def look_up(host: str, port: int) -> list[str]:
        return ["10.0.0.1", "8.8.8.8", "::ffff:127.0.0.1"] if host == "mixed.test" else ["10.0.0.1"]

    network = Network(look_up, is_public)
    resolver = GuardedResolver(network)
    found = asyncio.run(resolver.resolve("mixed.test", 80))
    assert [(one["host"], one["port"], one["family"]) for one in found] == [
        ("8.8.8.8", 80, socket.AF_INET)
    ]
    with pytest.raises(BlockedAddressError, match=r"inward\.test is 10\.0\.0\.1"):
        asyncio.run(resolver.resolve("inward.test", 80))
    opened = guarded_socket(network)
    tcp = (socket.SOCK_STREAM, socket.IPPROTO_TCP, "")
    opened((socket.AF_INET, *tcp, ("8.8.8.8", 80))).close()
    with pytest.raises(BlockedAddressError):
        opened((socket.AF_INET, *tcp, ("127.0.0.1", 80)))
    with pytest.raises(BlockedAddressError):
        opened((socket.AF_INET6, *tcp, ("::1", 80, 0, 0)))


_PIECES = st.sampled_from(
    [*("http", "https", "file", ":", "/", "//", "@", "?", "#", "%", "\\", "[", "]", ".", "..")]
    + [*("127.0.0.1", "0x7f", "::1", "a.test", "ä", "。", "\ud800", "\x00", "\n", " ", "１", "%2e")]
)
_TEXT = st.one_of(st.text(max_size=40), st.lists(_PIECES, max_size=12).map("".join))
_ALLOWED = set(string.ascii_letters + string.digits + "-._~:/?[]@!$&'()*+,;=%")


@settings(max_examples=60, deadline=None)
@given(_TEXT)
def test_any_text_is_refused_or_is_an_ascii_url_of_a_host(text: str) -> None:
    for written in (text, f"http://{text}", f"http://a.test/{text}"):
        try:
            url = normalised(written, 8192)
        except RefusedURL as refused:
            assert refused.status in (Status.BAD_URL, Status.BLOCKED_SCHEME)
            continue
        assert url.scheme in ("http", "https")
        assert url.raw_host
        assert url.port
        assert set(str(url)) <= _ALLOWED
        assert normalised(str(url), 10**6).raw_host == url.raw_host


def test_names_that_are_not_answered_keep_no_other_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """A look-up goes on after its URL has timed out: there are more of them than URLs in flight."""
    answered = threading.Event()
    ask = socket.getaddrinfo

    def getaddrinfo(host: str, *args: Any, **options: Any) -> Any:
        if host.startswith("silent"):
            answered.wait()
            raise socket.gaierror(socket.EAI_AGAIN, "no answer")
        return ask(host, *args, **options)

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)

    async def found() -> list[str]:
        resolver = GuardedResolver(system_network(allow_private_addresses=True))
        silent = [asyncio.create_task(resolver.resolve(f"silent-{n}")) for n in range(250)]
        await asyncio.sleep(0)  # they are asked first
        try:
            async with asyncio.timeout(10):
                return [one["host"] for one in await resolver.resolve("127.0.0.1")]
        finally:
            answered.set()
            await asyncio.gather(*silent, return_exceptions=True)
            await resolver.close()

    assert asyncio.run(found()) == ["127.0.0.1"]
