"""List the members of a tar by reading its headers only, and read byte ranges of a file.

A header scan gives every member's data offset and size, so payloads can be fetched later without
unpacking; nothing is ever extracted. Reads v7, USTAR (with prefix), GNU (long names, base-256
sizes) and PAX (path, size) archives. A damaged archive never raises: the members before the damage
are returned together with what is wrong and where.

Format: POSIX.1-2017 pax, "ustar Interchange Format"; GNU tar manual, "Basic Tar Format".
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from threading import Lock
from types import TracebackType
from typing import IO, NamedTuple, Self
from zlib import adler32

from manifests.paths import filesystem, is_local

BLOCK_BYTES = 512
# Long names and PAX records stay in the kilobytes; without a cap a forged size would load the whole
# archive into memory.
MAX_EXTENSION_BYTES = 1 << 20
# Remote files are read through a cache of such blocks: large enough to hide latency, small enough
# for single samples.
REMOTE_BLOCK_BYTES = 1 << 20

REGULAR = "0"
DIRECTORY = "5"
SPARSE = "S"
PAX_SPARSE = "x"  # a regular file whose PAX records say that its payload leaves holes out
_REGULAR_FLAGS = {"0", "\0", "7"}  # "\0": v7; "7": contiguous, to be treated as regular
# Links, devices, directories, FIFOs: a size in their header is not one of a payload.
_NO_PAYLOAD_FLAGS = {"1", "2", "3", "4", "5", "6"}
_LONG_NAME, _LONG_LINK, _PAX_GLOBAL = "L", "K", "g"
_PAX_FLAGS = {"x", "X"}  # "X": Solaris' older spelling
_EXTENSION_FLAGS = {_LONG_NAME, _LONG_LINK, _PAX_GLOBAL, *_PAX_FLAGS}
_ZERO_BLOCK = bytes(BLOCK_BYTES)
_BLANK_CHECKSUM = 8 * ord(" ")
_ADLER_PRIME = 65521
_MAX_READ_BYTES = 1 << 30  # one pread returns at most 2^31 - 4096 bytes on Linux
_COMPRESSED_MAGIC = {
    b"\x1f\x8b": "gzip",
    b"BZh": "bzip2",
    b"\xfd7zXZ": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
}


class TarMember(NamedTuple):
    """One member of a tar: its payload is the `size` bytes from `offset` on."""

    name: str  # as stored; bytes that are not UTF-8 are spelled \xff
    offset: int
    size: int
    type_flag: str  # "0" for every kind of regular file, else the header's ("2": symbolic link)


@dataclass(frozen=True, slots=True)
class MemberScan:
    """The readable members of one tar, without its directories, and what is wrong with it."""

    members: tuple[TarMember, ...]
    num_bytes: int  # of the file
    damage: str | None = None
    damage_offset: int | None = None  # of the header or block that could not be used


class RangeReader:
    """Keeps one file open for many reads at any offset, from any thread. A context manager.

    Raises: FileNotFoundError, or another OSError, when the file cannot be opened.
    """

    def __init__(self, path: str) -> None:
        fs, plain_path = filesystem(path)
        self._lock = Lock()
        self._remote: IO[bytes] | None = None
        self._descriptor = -1
        if is_local(path):
            self._descriptor = os.open(plain_path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
            self.num_bytes = os.fstat(self._descriptor).st_size
        else:
            options = {"block_size": REMOTE_BLOCK_BYTES, "cache_type": "blockcache"}
            self._remote = fs.open(plain_path, "rb", **options)
            self.num_bytes = self._remote.seek(0, os.SEEK_END)

    def __enter__(self) -> Self:
        """Return itself, open."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close the file."""
        self.close()

    def close(self) -> None:
        """Close the file; closing twice is harmless."""
        if self._remote is not None:
            self._remote.close()
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def read(self, offset: int, size: int) -> bytes:
        """Return exactly `size` bytes from `offset` on.

        Raises: EOFError when the file ends before.
        """
        data = self.read_up_to(offset, size)
        if len(data) != size:
            raise EOFError(f"{size} bytes wanted at {offset}, {len(data)} are there")
        return data

    def read_up_to(self, offset: int, size: int) -> bytes:
        """Return the bytes from `offset` on: `size` of them, fewer only where the file ends."""
        size = min(size, self.num_bytes - offset)
        if 0 < size <= _MAX_READ_BYTES:
            return self._read_once(offset, size)
        starts = range(offset, offset + size, _MAX_READ_BYTES)
        sizes = (min(_MAX_READ_BYTES, offset + size - start) for start in starts)
        return b"".join(map(self._read_once, starts, sizes))

    def _read_once(self, offset: int, size: int) -> bytes:
        if self._remote is None:
            return os.pread(self._descriptor, size, offset)
        with self._lock:
            self._remote.seek(offset)
            return self._remote.read(size)


def read_range(path: str, offset: int, size: int) -> bytes:
    """Return exactly `size` bytes of the file from `offset` on; for many reads keep a RangeReader.

    Raises: EOFError when the file ends before; OSError when it cannot be opened.
    """
    with RangeReader(path) as reader:
        return reader.read(offset, size)


def scan_members(path: str) -> MemberScan:
    """Return every member of the tar at `path` but its directories, in archive order.

    A member whose payload runs past the end of the file is listed, and the damage says so.

    Raises: OSError when the file cannot be opened or read; damage inside the file is a field of the
    result.
    """
    members: list[TarMember] = []
    with RangeReader(path) as reader:
        try:
            for member in _walk(reader):
                members.append(member)
        except _Damage as damage:
            return MemberScan(tuple(members), reader.num_bytes, damage.what, damage.offset)
        return MemberScan(tuple(members), reader.num_bytes)


class _Damage(Exception):
    """The archive cannot be followed beyond the block at `offset`."""

    def __init__(self, what: str, offset: int) -> None:
        super().__init__(what)
        self.what = what
        self.offset = offset


class _Header(NamedTuple):
    """The fields of one 512-byte header block that a scan needs."""

    raw_name: bytes
    size: int
    type_flag: str


class _Override(NamedTuple):
    """What extension headers say about the member that follows them."""

    raw_name: bytes | None = None
    size: int | None = None
    is_sparse: bool = False


_NO_OVERRIDE = _Override()


def _walk(reader: RangeReader) -> Iterator[TarMember]:
    """Yield the members in order; raise _Damage at the first block that cannot be used."""
    at = 0
    override = _NO_OVERRIDE
    while not _is_end(block := reader.read_up_to(at, BLOCK_BYTES), reader, at):
        header = _parse_header(block, at)
        data_at = at + BLOCK_BYTES
        if header.type_flag in _EXTENSION_FLAGS:
            override = _read_extension(reader, header, override, at)
            at = data_at + _padded(header.size)
            continue
        if override is not _NO_OVERRIDE:
            header, override = _overridden(header, override), _NO_OVERRIDE
        if header.type_flag == SPARSE:
            data_at = _skip_sparse_maps(reader, block, data_at)
        if header.type_flag != DIRECTORY:
            yield TarMember(_repaired(header.raw_name), data_at, header.size, header.type_flag)
        _check_payload(data_at + header.size, reader.num_bytes, at)
        at = data_at + _padded(header.size)
    if override is not _NO_OVERRIDE:
        raise _Damage("the archive ends after an extension header, without its member", at)


def _is_end(block: bytes, reader: RangeReader, at: int) -> bool:
    """Whether the archive ends at this block: in zero blocks, or (tolerated) in nothing."""
    if block[:1] not in (b"", b"\0"):  # the first byte of a header is the first of a name
        return False
    if block.strip(b"\0"):
        return False
    if at == 0 and not block:
        raise _Damage("the file is empty, not a tar", 0)
    after = at
    while chunk := reader.read_up_to(after, REMOTE_BLOCK_BYTES):
        if chunk.count(0) != len(chunk):
            raise _Damage("bytes follow the end-of-archive marker", at)
        after += len(chunk)
    return True


def _parse_header(block: bytes, at: int) -> _Header:
    if len(block) < BLOCK_BYTES or not _sums_to(block, block[148:156]):
        raise _Damage(_not_a_header(block, at), at)
    try:
        size = _number(block[124:136])
    except ValueError as error:
        raise _Damage("a header's size is not a number", at) from error
    if size < 0:
        raise _Damage(f"a header's size is negative: {size}", at)
    raw_name = _stored_name(block)
    type_flag = _type_flag(block[156:157].decode("latin-1"), raw_name)
    return _Header(raw_name, 0 if type_flag in _NO_PAYLOAD_FLAGS else size, type_flag)


def _sums_to(block: bytes, sum_field: bytes) -> bool:
    """Whether the header's bytes, with its checksum field as blanks, add up to the stored sum.

    The low half of Adler-32 is one plus the sum of the bytes modulo 65521, twenty times faster than
    a Python sum. Old Sun archives added signed bytes; that slow sum is tried last.
    """
    try:
        stored_sum = _number(sum_field)
    except ValueError:
        return False
    low_half = adler32(block[156:], adler32(block[:148])) & 0xFFFF
    if (stored_sum - _BLANK_CHECKSUM + 1) % _ADLER_PRIME == low_half:
        return True
    unblanked = block[:148] + block[156:]
    signed_sum = sum(byte - 256 if byte > 127 else byte for byte in unblanked)
    return stored_sum == signed_sum + _BLANK_CHECKSUM


def _not_a_header(block: bytes, at: int) -> str:
    what = "a header's checksum is wrong"
    if len(block) < BLOCK_BYTES:
        what = f"the file ends inside a header, after {len(block)} of {BLOCK_BYTES} bytes"
    if at > 0:
        return what
    for magic, kind in _COMPRESSED_MAGIC.items():
        if block.startswith(magic):
            return f"the file is {kind} data, not a plain tar: decompress it first"
    return f"the file is not a tar: {what}"


def _number(field: bytes) -> int:
    """Return a header field's number: octal digits, or GNU base-256 when the top bit is set."""
    first = field[0]
    if first & 0x80:
        unsigned = int.from_bytes(field, "big") & ((1 << (8 * len(field) - 1)) - 1)
        return unsigned - (1 << (8 * len(field) - 1)) if first & 0x40 else unsigned
    return int(field.partition(b"\0")[0].strip() or b"0", 8)


def _stored_name(block: bytes) -> bytes:
    name = block[:100].partition(b"\0")[0]
    if block[345] and block.startswith(b"ustar\0", 257):  # GNU's "ustar  " keeps other things there
        return block[345:500].partition(b"\0")[0] + b"/" + name
    return name


def _type_flag(flag: str, raw_name: bytes) -> str:
    if flag not in _REGULAR_FLAGS:
        return flag
    is_old_directory = flag == "\0" and raw_name.endswith(b"/")  # v7 had no flag for directories
    return DIRECTORY if is_old_directory else REGULAR


def _read_extension(
    reader: RangeReader, header: _Header, override: _Override, at: int
) -> _Override:
    """Return what is known about the next member after the extension header at `at`."""
    _check_payload(at + BLOCK_BYTES + header.size, reader.num_bytes, at)
    if header.size > MAX_EXTENSION_BYTES:
        raise _Damage(f"an extension header of {header.size} bytes", at)
    payload = reader.read_up_to(at + BLOCK_BYTES, header.size)
    if header.type_flag == _LONG_NAME:
        return override._replace(raw_name=payload.partition(b"\0")[0])
    if header.type_flag in _PAX_FLAGS:
        try:
            return _override_of_pax(dict(_pax_records(payload)), override)
        except ValueError as error:
            raise _Damage("a PAX header that cannot be read", at) from error
    return override  # a long link target, or defaults for the whole archive: nothing a scan needs


def _override_of_pax(records: dict[bytes, bytes], override: _Override) -> _Override:
    digits = records.get(b"size")
    size = override.size if digits is None else int(digits)
    if size is not None and size < 0:
        raise ValueError("negative size")
    return _Override(
        raw_name=records.get(b"GNU.sparse.name", records.get(b"path", override.raw_name)),
        size=size,
        is_sparse=any(name.startswith(b"GNU.sparse.") for name in records),
    )


def _pax_records(payload: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Yield the records "LENGTH NAME=VALUE\\n", where LENGTH counts the whole record.

    Raises: ValueError when a record is not of that form.
    """
    at = 0
    while at < len(payload) and payload[at] != 0:
        digits, _, _ = payload[at : at + 20].partition(b" ")
        length = int(digits)
        record = payload[at : at + length]
        name, separator, value = record[len(digits) + 1 : -1].partition(b"=")
        if not separator or len(record) != length or not record.endswith(b"\n"):
            raise ValueError(f"malformed record at {at}")
        yield name, value
        at += length


def _overridden(header: _Header, override: _Override) -> _Header:
    """Return the member's header, with its extension headers' fields before its own."""
    raw_name = header.raw_name if override.raw_name is None else override.raw_name
    has_payload = header.type_flag not in _NO_PAYLOAD_FLAGS
    size = override.size if override.size is not None and has_payload else header.size
    return _Header(raw_name, size, PAX_SPARSE if override.is_sparse else header.type_flag)


def _skip_sparse_maps(reader: RangeReader, block: bytes, data_at: int) -> int:
    """Return where an old GNU sparse member's data begins: after the maps behind its header."""
    is_continued = block[482] != 0
    while is_continued:
        more = reader.read_up_to(data_at, BLOCK_BYTES)
        data_at += BLOCK_BYTES
        is_continued = len(more) == BLOCK_BYTES and more[504] != 0
    return data_at


def _check_payload(end: int, num_bytes: int, at: int) -> None:
    if end > num_bytes:
        raise _Damage(f"a member's payload ends {end - num_bytes} bytes past the file", at)


def _padded(size: int) -> int:
    return size + -size % BLOCK_BYTES


def _repaired(raw_name: bytes) -> str:
    """Return the name as valid UTF-8, different for different bytes (U+FFFD would merge them)."""
    return raw_name.decode("utf-8", "backslashreplace")
