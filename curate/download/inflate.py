"""The file within an encoded answer, with a limit on what comes out."""

from __future__ import annotations

import zlib

from curate.download.statuses import Status

_AUTOMATIC = zlib.MAX_WBITS | 32  # gzip or zlib, by its header
_RAW = -zlib.MAX_WBITS  # what some servers mean by "deflate"; RFC 9110, section 8.4.1.2


class BadBodyError(Exception):
    """The body cannot be had; `status` says in which way, `detail` in words."""

    def __init__(self, status: Status, detail: str) -> None:
        super().__init__(status, detail)
        self.status = status
        self.detail = detail


def inflated(body: bytes, encoding: str, max_bytes: int) -> bytes:
    """Return the file of a body, by its Content-Encoding.

    None is asked for (`Accept-Encoding: identity`), and some servers send one all the same.

    Raises: BadBodyError: too_large, truncated, or bad_response for other encodings and for a body
        that is not encoded so.
    """
    name = encoding.strip().lower()
    if name in ("", "identity") or not body:
        return body
    if name not in ("gzip", "x-gzip", "deflate"):
        raise BadBodyError(Status.BAD_RESPONSE, f"encoded as {name[:40]}, which was not asked for")
    try:
        return _inflated(body, _AUTOMATIC, max_bytes)
    except zlib.error as error:
        if name != "deflate":
            raise BadBodyError(Status.BAD_RESPONSE, f"not {name}: {error}") from error
    try:
        return _inflated(body, _RAW, max_bytes)
    except zlib.error as error:
        raise BadBodyError(Status.BAD_RESPONSE, f"not {name}: {error}") from error


def _inflated(body: bytes, window: int, max_bytes: int) -> bytes:
    inflater = zlib.decompressobj(window)
    data = inflater.decompress(body, max_bytes + 1)  # stops there, whatever is to come
    if len(data) > max_bytes:
        raise BadBodyError(Status.TOO_LARGE, f"inflates to more than {max_bytes} bytes")
    if not inflater.eof:
        raise BadBodyError(Status.TRUNCATED, "the compressed body ends too early")
    return data
