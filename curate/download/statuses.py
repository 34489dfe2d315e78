"""What became of a URL: one name per way to fail, in place of free text."""

from __future__ import annotations

from enum import StrEnum
from typing import Literal

Img2datasetStatus = Literal["success", "failed_to_download", "failed_to_resize"]


class Status(StrEnum):
    """The fate of one URL. The words beside it (`detail`) are for people; nothing decides by them.

    In the order of the work: the URL, the connection, the answer, the bytes, the image.
    """

    OK = "ok"
    BAD_URL = "bad_url"  # no URL, or too long a one
    BLOCKED_SCHEME = "blocked_scheme"  # anything but http and https
    BLOCKED_IP = "blocked_ip"  # no public address
    BLOCKLISTED = "blocklisted"  # on a list of URLs or image hashes that the user gave
    DNS = "dns"
    TIMEOUT_CONNECT = "timeout_connect"
    TIMEOUT_TOTAL = "timeout_total"
    TLS = "tls"
    CONNECTION = "connection"  # refused, reset, closed without an answer
    BAD_RESPONSE = "bad_response"  # an answer that is no HTTP, or undoes its own encoding wrongly
    TOO_MANY_REDIRECTS = "too_many_redirects"
    HTTP_4XX = "http_4xx"
    HTTP_429 = "http_429"  # too many requests
    HTTP_5XX = "http_5xx"
    HTTP_OTHER = "http_other"  # 204, 206, 304 and other answers that are not the whole file
    OPT_OUT = "opt_out"  # the site asks that the image is not used so
    TOO_LARGE = "too_large"  # more bytes than max_bytes, also once inflated
    TRUNCATED = "truncated"  # fewer bytes arrived than were announced
    EMPTY_BODY = "empty_body"
    HASH_MISMATCH = "hash_mismatch"  # not the file that the source has hashed
    NOT_AN_IMAGE = "not_an_image"  # HTML, SVG, a format that is not decoded
    TOO_MANY_PIXELS = "too_many_pixels"
    TOO_SMALL = "too_small"
    ASPECT_RATIO = "aspect_ratio"
    TRUNCATED_IMAGE = "truncated_image"  # all bytes arrived, and they end within the image
    DECODE_ERROR = "decode_error"


TRANSIENT = frozenset(
    {
        Status.DNS,
        Status.TIMEOUT_CONNECT,
        Status.TIMEOUT_TOTAL,
        Status.CONNECTION,
        Status.HTTP_429,
        Status.HTTP_5XX,
        Status.TRUNCATED,
    }
)
"""What may pass: only these are tried again."""

_OF_THE_IMAGE = frozenset(
    {
        Status.EMPTY_BODY,
        Status.NOT_AN_IMAGE,
        Status.TOO_MANY_PIXELS,
        Status.TOO_SMALL,
        Status.ASPECT_RATIO,
        Status.TRUNCATED_IMAGE,
        Status.DECODE_ERROR,
    }
)


def img2dataset_status(status: Status) -> Img2datasetStatus:
    """Return the word that img2dataset's parquet has for it.

    Its resizer is where it meets images that are none, also empty ones.
    """
    if status is Status.OK:
        return "success"
    return "failed_to_resize" if status in _OF_THE_IMAGE else "failed_to_download"
