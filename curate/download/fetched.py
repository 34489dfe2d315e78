"""What is asked for, and what came of it."""

from __future__ import annotations

from typing import Literal, NamedTuple

from curate.download.statuses import Status

HashCheck = Literal["match", "mismatch", "absent"]


_MAX_DETAIL = 200  # characters


def shown(text: str) -> str:
    """Return a stranger's text as one short line of valid Unicode."""
    return " ".join(text[:_MAX_DETAIL].split()).encode(errors="replace").decode()


class Wanted(NamedTuple):
    """One URL, and the hashes of its file if the source has them."""

    row: int  # the caller's own number, given back as it is
    url: str
    md5: bytes | None = None  # 16 bytes
    sha256: bytes | None = None  # 32 bytes


class Fetched(NamedTuple):
    """What became of a URL. `data` is there exactly where the status is ok."""

    row: int
    status: Status
    detail: str  # for people, one short line; empty where the status is ok
    data: bytes | None
    http_code: int | None  # of the last answer
    final_url: str | None  # the last one asked, normalised
    num_attempts: int  # 0 where the URL alone was refused
    sha256: bytes | None  # of the bytes received, also where they mismatch
    md5: bytes | None  # computed only where one was wanted
    hash_check: HashCheck
