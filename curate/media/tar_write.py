"""Write tars that are the same bytes for the same entries, on any machine and day.

Plain USTAR, no PAX header ever: uid, gid and mtime 0, no user or group name, mode 0644, padded with
zeros to a multiple of 10240 bytes. The bytes are those of Python's tarfile in USTAR format with the
same fields, five times faster.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from typing import BinaryIO

from curate.media.tar_samples import is_unsafe_name
from curate.media.tar_scan import BLOCK_BYTES, REGULAR, TarMember

RECORD_BYTES = 20 * BLOCK_BYTES
NAME_BYTES = 100
PREFIX_BYTES = 155
MAX_MEMBER_BYTES = 8**11 - 1  # eleven octal digits

# So that key, dot and suffix fit into the name field of a header.
MAX_KEY_CHARACTERS = 80
_KEY_HASH_CHARACTERS = 8
_PLAIN_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_.-]{0,99}")  # most names: nothing to look at
_NOT_OF_A_KEY = re.compile(r"[^A-Za-z0-9_-]")

_MODE_UID_GID = b"0000644\0" + b"0000000\0" * 2
_MTIME = b"00000000000\0"
_TYPE_LINK_MAGIC = REGULAR.encode() + bytes(100) + b"ustar\x0000"
_NO_OWNER_NO_DEVICE = bytes(32 + 32 + 8 + 8)
_FIXED_SUM = sum(_MODE_UID_GID + _MTIME + _TYPE_LINK_MAGIC) + 8 * ord(" ")


def write_tar(file: BinaryIO, entries: Iterable[tuple[str, bytes]]) -> list[TarMember]:
    """Write the entries in the given order as one tar; return each member's offset and size.

    Args: file: open for writing where the tar starts; offsets count from there.
    Raises: ValueError for a name that is unsafe or longer than USTAR can hold, and for a payload
        of 8 GiB or more.
    """
    members: list[TarMember] = []
    at = 0
    for name, data in entries:
        block = b"".join((_header(name, len(data)), data, bytes(-len(data) % BLOCK_BYTES)))
        file.write(block)
        members.append(TarMember(name, at + BLOCK_BYTES, len(data), REGULAR))
        at += len(block)
    end = at + 2 * BLOCK_BYTES
    file.write(bytes(end - at + -end % RECORD_BYTES))
    return members


def sanitise_key(key: str) -> str:
    """Return the key in at most 80 characters A-Za-z0-9_-, different for different keys.

    A key of that form is returned as it is; any other gets a hash of the original, because `a/b`
    and `a_b` must not meet.
    Example: "000012" -> "000012"; "a/b" -> "a_b-" and the first 8 hex digits of sha256("a/b").
    """
    replaced = _NOT_OF_A_KEY.sub("_", key)
    if key and replaced == key and len(key) <= MAX_KEY_CHARACTERS:
        return key
    digest = hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest()
    kept = replaced[: MAX_KEY_CHARACTERS - _KEY_HASH_CHARACTERS - 1]
    return f"{kept}-{digest[:_KEY_HASH_CHARACTERS]}"


def _header(name: str, size: int) -> bytes:
    if size > MAX_MEMBER_BYTES:
        raise ValueError(f"member {name!r} of {size} bytes does not fit a USTAR header")
    plain = _PLAIN_NAME.fullmatch(name)
    prefix, short_name = (b"", name.encode()) if plain else _split_name(name)
    digits = b"%011o" % size
    total = _FIXED_SUM + sum(short_name) + sum(prefix) + sum(digits)
    return b"".join(
        (
            short_name.ljust(NAME_BYTES, b"\0"),
            _MODE_UID_GID,
            digits,
            b"\0",
            _MTIME,
            b"%06o\0 " % total,
            _TYPE_LINK_MAGIC,
            _NO_OWNER_NO_DEVICE,
            prefix.ljust(PREFIX_BYTES + 12, b"\0"),
        )
    )


def _split_name(name: str) -> tuple[bytes, bytes]:
    """Return a header's prefix and name fields: the name cut at the first slash that serves."""
    if not name or name.endswith("/") or is_unsafe_name(name):
        raise ValueError(f"{name!r} is no safe file name for a tar member")
    encoded = name.encode()
    if len(encoded) <= NAME_BYTES:
        return b"", encoded
    slash = encoded.find(b"/", len(encoded) - NAME_BYTES - 1)
    if not 0 < slash <= PREFIX_BYTES:
        raise ValueError(f"a name of {len(encoded)} bytes does not fit a USTAR header: {name!r}")
    return encoded[:slash], encoded[slash + 1 :]
