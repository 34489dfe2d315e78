"""What was fetched of one item, on disk before its shards are: a kill loses what was in flight.

    <attempt>.log   one record per settled row: header, the row as JSON, its image; only appended to
    sealed.json     which bytes of which logs make the shards; once it is there, nothing else does

Each attempt at an item writes a log of its own, so that two at once disturb nobody; what another
one left is read, up to its first record that is torn. A row that may turn out better (its failure
was transient) is not final: the next attempt asks again, and its answer replaces the old one.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import struct
import uuid
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from io import FileIO
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, Self

import orjson

from manifests import store
from manifests.errors import PartDamaged

SEAL = "sealed.json"
_HEADER = struct.Struct("<4sQ?II")  # mark, uid, is final, bytes of JSON, bytes of image
_CHECKSUM = struct.Struct("<I")  # CRC-32 of header, JSON and image
_MARK = b"row\n"
_NO_LINKS = {errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS}
_START = _HEADER.size + _CHECKSUM.size


class Entry(NamedTuple):
    """Where a row's record lies: the log's position in the list, offset and sizes in bytes."""

    log: int
    at: int
    is_final: bool
    row_bytes: int
    image_bytes: int

    @property
    def num_bytes(self) -> int:
        """Bytes of the whole record."""
        return _START + self.row_bytes + self.image_bytes


class Span(NamedTuple):
    """When the attempt that sealed the journal began and ended, in seconds since 1970."""

    started: float
    ended: float


class Journal:
    """One attempt's view of an item's journal; memory holds about 200 bytes a row.

    Files are opened when they are needed; `close` closes them, and the journal can still be read.
    """

    def __init__(self, folder: Path) -> None:
        """Open the journal, making it if need be. Raises: UserError when it cannot be written."""
        self.folder = folder
        self.span: Span | None = None
        self.entries: dict[int, Entry] = {}
        self._logs: list[Path] = []
        self._sizes: list[int] = []  # of what is known of each log, in bytes
        self._readers: dict[int, BinaryIO] = {}
        self._own: FileIO | None = None
        with _explained(folder):
            folder.mkdir(parents=True, exist_ok=True)
        self._load()

    @property
    def is_sealed(self) -> bool:
        """Whether all rows are settled for good."""
        return self.span is not None

    def __enter__(self) -> Self:
        """Return the journal."""
        return self

    def __exit__(self, *failure: object) -> None:
        """Close its files."""
        self.close()

    def close(self) -> None:
        """Close all files; nothing is removed."""
        for file in (*self._readers.values(), *([self._own] if self._own else [])):
            file.close()
        self._readers, self._own = {}, None

    def is_settled(self, uid: int) -> bool:
        """Tell whether a row needs no further attempt."""
        entry = self.entries.get(uid)
        return entry is not None and (entry.is_final or self.is_sealed)

    def append(self, uid: int, row: Mapping[str, Any], image: bytes, *, is_final: bool) -> None:
        """Settle a row. Raises: UserError when the disk is full."""
        assert not self.is_sealed, "a sealed journal is closed"
        text = orjson.dumps(dict(row))
        header = _HEADER.pack(_MARK, uid, is_final, len(text), len(image))
        checksum = zlib.crc32(image, zlib.crc32(text, zlib.crc32(header)))
        with _explained(self.folder):
            _write(self._own_log(), b"".join((header, _CHECKSUM.pack(checksum), text, image)))
        entry = Entry(len(self._logs) - 1, self._sizes[-1], is_final, len(text), len(image))
        self._sizes[-1] += entry.num_bytes
        self._take(uid, entry)

    def row(self, uid: int) -> dict[str, Any]:
        """Return what was noted of a row. Raises: PartDamaged."""
        entry = self.entries[uid]
        found: dict[str, Any] = orjson.loads(self._read(entry, _START, entry.row_bytes))
        return found

    def image(self, uid: int) -> bytes:
        """Return a row's image. Raises: PartDamaged."""
        entry = self.entries[uid]
        return self._read(entry, _START + entry.row_bytes, entry.image_bytes)

    def seal(self, span: Span) -> None:
        """Make what is known now the answer, unless another attempt was first: then take its.

        Everything that is built from a sealed journal is the same, whoever builds it.
        """
        logs = [[path.name, size] for path, size in zip(self._logs, self._sizes, strict=True)]
        temporary = self.folder / f"{uuid.uuid4().hex}.tmp"
        try:
            with _explained(self.folder):
                temporary.write_text(json.dumps({"logs": logs, "span": list(span)}))
            _name(temporary, self.folder / SEAL)
        except FileExistsError:
            self.close()
            self._logs, self._sizes, self.entries = [], [], {}
            self._load()
        else:
            self.span = span
        finally:
            temporary.unlink(missing_ok=True)

    def _own_log(self) -> FileIO:
        if self._own is None:
            path = self.folder / f"{uuid.uuid4().hex}.log"
            self._own = path.open("xb", buffering=0)
            self._logs.append(path)
            self._sizes.append(0)
        return self._own

    def _load(self) -> None:
        """Read the seal's logs to where it says, or all logs as far as they are whole."""
        sealed = store.read_json(str(self.folder / SEAL))
        if sealed is None:
            logs = [(path, None) for path in sorted(self.folder.glob("*.log"))]
        else:
            logs = [(self.folder / name, size) for name, size in sealed["logs"]]
        for path, size in logs:
            self._logs.append(path)
            self._sizes.append(0)
            with path.open("rb") as file:
                for uid, entry in _records(file, len(self._logs) - 1, size):
                    self._take(uid, entry)
                    self._sizes[-1] += entry.num_bytes
            if size is not None and self._sizes[-1] != size:
                raise PartDamaged(f"{path} is damaged. Delete {self.folder} and run again.")
        self.span = Span(*sealed["span"]) if sealed else None

    def _take(self, uid: int, entry: Entry) -> None:
        """Note a record: the later one counts, but nothing replaces a final one."""
        known = self.entries.get(uid)
        if known is None or not known.is_final:
            self.entries[uid] = entry

    def _read(self, entry: Entry, skip: int, size: int) -> bytes:
        if entry.log not in self._readers:
            self._readers[entry.log] = self._logs[entry.log].open("rb")
        found = os.pread(self._readers[entry.log].fileno(), size, entry.at + skip)
        if len(found) != size:
            raise PartDamaged(f"{self.folder} has lost bytes while it was read.")
        return found


def _write(file: FileIO, data: bytes) -> None:
    """Write all bytes. Nothing is buffered: closing would try in vain to write what did not fit."""
    left = memoryview(data)
    while left:
        left = left[file.write(left) :]


def _name(temporary: Path, final: Path) -> None:
    """Give a file its name. Raises: FileExistsError where there is one: a rename would not.

    On a file system without hard links (vfat; buckets that are mounted) only a rename is left; two
    attempts that seal within the same moment would then not see each other.
    """
    try:
        os.link(temporary, final)
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        if final.exists():
            raise FileExistsError(final) from error
        temporary.rename(final)


@contextmanager
def _explained(folder: Path) -> Iterator[None]:
    """Turn errors that the user can mend into a UserError."""
    try:
        yield
    except FileExistsError:
        raise
    except OSError as error:
        raise store.explained(str(folder), error) or error from error


def sweep(journals: Path, is_done: Mapping[str, bool]) -> None:
    """Remove the journals of items whose marker is there."""
    for name, done in is_done.items():
        if done:
            shutil.rmtree(journals / name, ignore_errors=True)
    with suppress(OSError):
        journals.rmdir()  # the last one has gone


def _records(file: BinaryIO, log: int, size: int | None) -> Iterator[tuple[int, Entry]]:
    """Yield (uid, entry) of the records of a log up to `size` bytes, or to the first torn one."""
    end = os.fstat(file.fileno()).st_size if size is None else size
    at = 0
    while at + _START <= end:
        head = file.read(_START)
        if len(head) < _START or not head.startswith(_MARK):
            return
        _, uid, is_final, row_bytes, image_bytes = _HEADER.unpack_from(head)
        entry = Entry(log, at, is_final, row_bytes, image_bytes)
        if at + entry.num_bytes > end:
            return
        body = file.read(row_bytes + image_bytes)
        if (zlib.crc32(body, zlib.crc32(head[: _HEADER.size])),) != _CHECKSUM.unpack_from(
            head, _HEADER.size
        ):
            return
        yield uid, entry
        at += entry.num_bytes
