"""What a user lists is never fetched or never kept, and a list that cannot be used is told."""

from __future__ import annotations

import hashlib
import random
from pathlib import Path

import pytest

from curate.download.blocklists import Blocklists, DigestList, load
from manifests.errors import UserError


@pytest.fixture(autouse=True)
def _fresh() -> None:
    load.cache_clear()


def lists(folder: Path, urls: str = "", domains: str = "", images: str = "") -> Blocklists:
    given = []
    for name, text in (("urls", urls), ("domains", domains), ("images", images)):
        (folder / name).write_text(text)
        given.append((str(folder / name),))
    return load(*given)


@pytest.mark.parametrize("num_bytes", [16, 32])
def test_digests_are_found_as_in_a_set(num_bytes: int) -> None:
    rng = random.Random(num_bytes)
    some = [rng.randbytes(num_bytes) for _ in range(500)]
    near = [one[:-1] + bytes([one[-1] ^ 1]) for one in some]
    found = DigestList(some, num_bytes)
    assert len(found) == 500
    assert all(one in found for one in some)
    assert [one in found for one in near] == [one in set(some) for one in near]
    assert bytes(num_bytes) not in DigestList([], num_bytes)
    assert b"\xff" * num_bytes not in found


def test_urls_are_found_by_themselves_and_by_either_hash(tmp_path: Path) -> None:
    urls = [f"http://a.example/{n}?q=ü" for n in range(4)]
    md5 = hashlib.md5(urls[1].encode(), usedforsecurity=False).hexdigest()
    sha256 = hashlib.sha256(urls[2].encode()).hexdigest().upper()
    blocked = lists(tmp_path, urls=f"# comment\n\n {urls[0]} \n{md5}\n{sha256}\n")
    assert [blocked.blocks_url(url) for url in urls] == [True, True, True, False]


def test_a_domain_blocks_what_is_below_it_and_nothing_beside(tmp_path: Path) -> None:
    blocked = lists(tmp_path, domains="Bad.example\nhost\n")
    for url in ("http://bad.example/x", "https://a.BAD.example:8443/", "http://host./"):
        assert blocked.blocks_url(url), url
    for url in ("http://notbad.example/", "http://example/bad.example", "", "http://[::1/"):
        assert not blocked.blocks_url(url), url


def test_another_way_to_write_a_url_or_domain_is_no_way_around_a_list(tmp_path: Path) -> None:
    """What is asked for counts: the requests are the same."""
    urls = "http://a.example/x?y=ü\nHTTP://B.example:80/z#top\n"
    domains = "bücher.example\nxn--mnchen-3ya.example\n"
    blocked = lists(tmp_path, urls=urls, domains=domains)
    for url in (
        "http://A.example/x?y=%C3%BC#part",
        " http://a.exam\nple/x?y=ü",
        "http://b.example/z",
        "http://xn--bcher-kva.example/1",
        "http://Bücher.example/2",
        "http://www.münchen.example/3",
    ):
        assert blocked.blocks_url(url), url
    for url in ("http://a.example/x?y=u", "http://b.example/z?top", "http://bucher.example/"):
        assert not blocked.blocks_url(url), url


def test_images_are_found_by_either_hash(tmp_path: Path) -> None:
    by_md5 = hashlib.md5(b"one", usedforsecurity=False).hexdigest()
    by_sha256 = hashlib.sha256(b"two").hexdigest()
    blocked = lists(tmp_path, images=f"{by_md5}\n{by_sha256}\n")
    found = [blocked.blocks_image(data, sha256=None) for data in (b"one", b"two", b"three")]
    assert found == [True, True, False]
    assert blocked.blocks_image(b"two", sha256=hashlib.sha256(b"two").digest())


@pytest.mark.parametrize(
    "given",
    [{"images": "ok"}, {"urls": "no-url"}, {"domains": "http://a.example/"}, {"images": "ab" * 17}],
)
def test_a_line_that_cannot_be_used_is_told_with_its_place(
    given: dict[str, str], tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="line 2"):
        lists(tmp_path, **{name: f"# a list\n{text}" for name, text in given.items()})


def test_a_list_that_is_missing_is_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be read"):
        load((str(tmp_path / "gone"),), (), ())
