"""Tars for tests: by the standard library in each dialect, and header blocks by hand."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

BLOCK = 512
FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}
TRIO = [("a.jpg", b"j" * 700), ("a.json", b"{}"), ("a.txt", b"one")]


def info_of(name: str, size: int, **fields: Any) -> tarfile.TarInfo:
    """Return a header's fields."""
    info = tarfile.TarInfo(name)
    info.size = size
    for field, value in fields.items():
        setattr(info, field, value)
    return info


def tar_bytes(entries: Iterable[tuple[str, bytes]], dialect: int = tarfile.USTAR_FORMAT) -> bytes:
    """Return a tar of regular files, written by the standard library."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=dialect) as archive:
        for name, data in entries:
            archive.addfile(info_of(name, len(data)), io.BytesIO(data))
    return file.getvalue()


def header(name: bytes, size_field: bytes, *, type_flag: bytes = b"0", rest: bytes = b"") -> bytes:
    """Return a header block by hand: v7 when `rest` is empty, else `rest` follows the link name."""
    block = bytearray(name.ljust(100, b"\0") + b"0000644\0" + b"0000000\0" * 2)
    block += size_field.ljust(12, b"\0") + b"00000000000\0" + b" " * 8 + type_flag + bytes(100)
    block += rest + bytes(BLOCK - len(block) - len(rest))
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def padded(data: bytes) -> bytes:
    """Return the data filled up to whole blocks."""
    return data + bytes(-len(data) % BLOCK)


def write(folder: Path, content: bytes, name: str = "shard.tar") -> str:
    """Write a file and return its path."""
    path = folder / name
    path.write_bytes(content)
    return str(path)
