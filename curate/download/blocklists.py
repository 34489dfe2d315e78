"""Lists of what is never fetched or never kept: URLs, domains, hashes of URLs and of images.

A line is one entry; blank lines and those that begin with # are left out. Hashes are MD5 or SHA-256
in hexadecimal and take 16 or 32 bytes of memory each, so that lists of millions can be used.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from urllib.parse import urlsplit

import numpy as np

from curate.download.config import DownloadConfig
from curate.download.netguard import RefusedURL, normalised
from manifests import paths, store
from manifests.errors import UserError

MD5_BYTES, SHA256_BYTES = 16, 32
_HASH = re.compile(r"(?:[0-9a-fA-F]{32}|[0-9a-fA-F]{64})")
_DOMAIN = re.compile(r"[^\s/:@?#]+")


class DigestList:
    """Sorted digests of one length, found by bisection."""

    def __init__(self, digests: Iterable[bytes], num_bytes: int) -> None:
        """Sort the digests, each of `num_bytes` bytes (a multiple of 8)."""
        words = np.frombuffer(b"".join(digests), ">u8").reshape(-1, num_bytes // 8)
        self._num_bytes = num_bytes
        self._sorted = words[np.lexsort(words.T[::-1])].tobytes()

    def __len__(self) -> int:
        """Return how many there are."""
        return len(self._sorted) // self._num_bytes

    def __contains__(self, digest: bytes) -> bool:
        """Tell whether a digest is one of them."""
        low, high, size = 0, len(self), self._num_bytes
        while low < high:
            middle = (low + high) // 2
            if self._sorted[middle * size : (middle + 1) * size] < digest:
                low = middle + 1
            else:
                high = middle
        return self._sorted[low * size : (low + 1) * size] == digest


def _no_digests(num_bytes: int) -> DigestList:
    return DigestList([], num_bytes)


@dataclass(frozen=True, slots=True)
class Hashes:
    """MD5s and SHA-256s."""

    md5: DigestList = field(default_factory=lambda: _no_digests(MD5_BYTES))
    sha256: DigestList = field(default_factory=lambda: _no_digests(SHA256_BYTES))

    def has(self, data: bytes, *, sha256: bytes | None = None) -> bool:
        """Tell whether the hash of `data` is listed; `sha256` is its own where it is known."""
        if len(self.sha256) and (sha256 or hashlib.sha256(data).digest()) in self.sha256:
            return True
        if not len(self.md5):
            return False
        return hashlib.md5(data, usedforsecurity=False).digest() in self.md5


@dataclass(frozen=True, slots=True)
class Blocklists:
    """All lists of one config. domains are in lower case, without a dot at either end."""

    urls: Hashes
    domains: frozenset[str]
    images: Hashes

    def blocks_url(self, url: str) -> bool:
        """Tell whether a URL, its hash, its domain or one above it is listed.

        As it is written, and as it is asked for: without fragment, its host in lower case, ...
        """
        if not (self.domains or len(self.urls.md5) or len(self.urls.sha256)):
            return False
        return any(
            self.blocks_domain_of(one) or self.urls.has(one.encode("utf-8", "replace"))
            for one in dict.fromkeys((url, _as_asked(url)))
        )

    def blocks_domain_of(self, url: str) -> bool:
        """Tell whether a URL's domain or one above it is listed."""
        if not self.domains:
            return False
        try:
            host = (urlsplit(url).hostname or "").strip(".")
        except ValueError:
            return False  # no URL: the fetcher says so
        labels = host.split(".")
        return any(".".join(labels[at:]) in self.domains for at in range(len(labels)))

    def blocks_image(self, data: bytes, *, sha256: bytes | None) -> bool:
        """Tell whether an image's hash is listed."""
        return self.images.has(data, sha256=sha256)


def of(config: DownloadConfig) -> Blocklists:
    """Return the lists that a config names. Raises: UserError as `load`."""
    return load(*(tuple(files) for files in files_of(config)))


def files_of(config: DownloadConfig) -> tuple[list[str], list[str], list[str]]:
    """Return the config's lists of URLs, of domains and of images."""
    return config.blocked_urls, config.blocked_domains, config.blocked_images


@lru_cache(maxsize=2)
def load(urls: tuple[str, ...], domains: tuple[str, ...], images: tuple[str, ...]) -> Blocklists:
    """Return the lists in the files. Raises: UserError for a file or line that cannot be used."""
    return Blocklists(
        urls=_hashes(_lines(urls), hash_of=_url_hash),
        domains=frozenset(_domain(*one) for one in _lines(domains)),
        images=_hashes(_lines(images), hash_of=_image_hash),
    )


def identity(files: Sequence[str]) -> list[str]:
    """Return the SHA-256 of each file. Raises: UserError when one cannot be read."""
    return [hashlib.sha256(_content(path)).hexdigest() for path in files]


def _content(path: str) -> bytes:
    try:
        return store.read_bytes(paths.resolve_resource(path))
    except OSError as error:
        raise UserError(
            f"The blocklist {path} cannot be read.",
            f"{error}.",
            "Check the path; it is relative to the folder where the command runs.",
        ) from error


def _lines(files: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Yield (place for messages, text) of every entry."""
    for path in files:
        text = _content(path).decode("utf-8-sig", errors="replace")
        for number, line in enumerate(text.splitlines(), start=1):
            entry = line.strip()
            if entry and not entry.startswith("#"):
                yield f"{path}, line {number}", entry


def _as_asked(url: str) -> str:
    """Return a URL as it is asked for; one that never is, as it is written."""
    try:
        return str(normalised(url, max(1, len(url))))
    except RefusedURL:
        return url


def _hashes(lines: Iterable[tuple[str, str]], *, hash_of: Callable[[str, str], bytes]) -> Hashes:
    found = [hash_of(*one) for one in lines]
    return Hashes(
        DigestList((one for one in found if len(one) == MD5_BYTES), MD5_BYTES),
        DigestList((one for one in found if len(one) == SHA256_BYTES), SHA256_BYTES),
    )


def _url_hash(where: str, entry: str) -> bytes:
    if _HASH.fullmatch(entry):
        return bytes.fromhex(entry)
    if "://" in entry:
        return hashlib.sha256(_as_asked(entry).encode()).digest()
    raise _bad(where, entry, "a URL, or the MD5 or SHA-256 of one in hexadecimal")


def _image_hash(where: str, entry: str) -> bytes:
    if _HASH.fullmatch(entry):
        return bytes.fromhex(entry)
    raise _bad(where, entry, "an MD5 or SHA-256 in hexadecimal")


def _domain(where: str, entry: str) -> str:
    if not _DOMAIN.fullmatch(entry):
        raise _bad(where, entry, "a domain, such as example.org")
    name = entry.lower().strip(".")
    try:
        return normalised(f"http://{name}/", len(name) + 8).raw_host or name
    except RefusedURL:
        return name


def _bad(where: str, entry: str, wanted: str) -> UserError:
    return UserError(
        f"{where}: {entry[:80]!r} cannot be used.", f"Each line is {wanted}.", "Fix it."
    )
