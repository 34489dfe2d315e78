"""The only writer: a file appears whole, under its final name, or not at all.

Write to a temporary name in the same folder, fsync, rename. On an object store the whole object
is written at once; either way a marker comes after the data, so that half a part is never a part.
"""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import uuid
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from tokenize import TokenError
from typing import Any, BinaryIO, TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from manifests.errors import PartDamaged, UserError
from manifests.paths import filesystem, is_local, join

Content: TypeAlias = pa.Table | npt.NDArray[Any] | bytes | Callable[[BinaryIO], None]

ROW_GROUP_ROWS = 1 << 17
BAD_PARQUET = (pa.ArrowException, OSError, ValueError)
"""What reading a damaged parquet raises: OSError for a page, ValueError for a column's name."""
_NO_SPACE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_NOT_WRITABLE = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST, errno.EISDIR}


@dataclass(frozen=True, slots=True)
class Written:
    """A finished file: path below the stage directory, size, SHA-256 and rows (if a table)."""

    path: str
    num_bytes: int
    sha256: str
    num_rows: int | None


class _Hashing(io.RawIOBase):
    """A write-only file that hashes and counts what passes through."""

    def __init__(self, file: BinaryIO) -> None:
        super().__init__()
        self._file = file
        self._digest = hashlib.sha256()
        self.num_bytes = 0

    def writable(self) -> bool:
        return True

    def write(self, data: Any, /) -> int:
        view = memoryview(data).cast("B")
        self._file.write(view)
        self._digest.update(view)
        self.num_bytes += len(view)
        return len(view)

    def tell(self) -> int:
        return self.num_bytes

    def hexdigest(self) -> str:
        return self._digest.hexdigest()


def write(base: str, name: str, content: Content) -> Written:
    """Write one file below `base` atomically and return what was written.

    Raises: UserError when the disk is full or the folder cannot be written (nothing is left there).
    """
    path = join(base, name)
    try:
        sink = _write_local(path, content) if is_local(path) else _write_object(path, content)
    except OSError as error:
        if told := explained(path, error):
            raise told from error
        raise
    rows = content.num_rows if isinstance(content, pa.Table) else None
    return Written(name, sink.num_bytes, sink.hexdigest(), rows)


def write_json(base: str, name: str, value: Any) -> Written:
    """Write a value as sorted, indented JSON."""
    text = json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False)
    return write(base, name, (text + "\n").encode())


def append_line(path: str, line: str) -> None:
    """Append one line to a local log file; on an object store (no append) do nothing.

    Raises: UserError as `write` does.
    """
    if not is_local(path):
        return
    local = filesystem(path)[1]
    try:
        Path(local).parent.mkdir(parents=True, exist_ok=True)
        with Path(local).open("a", encoding="utf-8", errors="backslashreplace") as file:
            file.write(line + "\n")
    except OSError as error:
        if told := explained(path, error):
            raise told from error
        raise


def read_json(path: str) -> Any:
    """Return the parsed JSON file, or None when it is missing or cut short."""
    try:
        return json.loads(read_bytes(path))
    except (FileNotFoundError, ValueError):
        return None


def read_bytes(path: str) -> bytes:
    """Return a whole file. Raises: FileNotFoundError."""
    fs, local = filesystem(path)
    with fs.open(local, "rb") as file:
        return bytes(file.read())


def read_table(path: str, columns: Sequence[str] | None = None) -> pa.Table:
    """Return a parquet file's table, or the named columns of it.

    Raises: PartDamaged when it is missing or not parquet.
    """
    fs, local = filesystem(path)
    try:
        with fs.open(local, "rb") as file:
            return pq.ParquetFile(file).read(columns=None if columns is None else list(columns))
    except BAD_PARQUET as error:
        raise PartDamaged(f"{path} cannot be read: {error}") from error


def read_range(path: str, column: str, start: int, stop: int) -> pa.Table:
    """Return the rows of a parquet file whose column is in start..stop, the end left out.

    Row groups that cannot hold any are not read. Raises: PartDamaged when it is missing or damaged.
    """
    fs, local = filesystem(path)
    try:
        with fs.open(local, "rb") as file:
            bounds = [(column, ">=", start), (column, "<", stop)]
            return pq.read_table(file, filters=bounds)
    except BAD_PARQUET as error:
        raise PartDamaged(f"{path} cannot be read: {error}") from error


def read_array(path: str) -> npt.NDArray[Any]:
    """Return an npy file's array, memory-mapped when local; arrays of Python objects are refused.

    `numpy.load` would also take zip archives and pickles, by their content.
    Raises: OSError when it cannot be opened; ValueError for anything that is not a plain npy file.
    """
    try:
        if is_local(path):
            return np.lib.format.open_memmap(filesystem(path)[1], mode="r")
        content = io.BytesIO(read_bytes(path))
        found: np.ndarray = np.lib.format.read_array(content, allow_pickle=False)
    except (EOFError, SyntaxError, TokenError, OverflowError, TypeError) as error:
        raise ValueError(f"the npy header cannot be read: {error}") from error
    return found


def read_slice(path: str, start: int, stop: int, out: npt.NDArray[Any] | None = None) -> Any:
    """Return entries start..stop of an npy file's first axis, reading no other bytes of it.

    Args: out: array whose head is filled and returned, of the file's dtype and inner shape, in C
    order. Raises: PartDamaged when the file is missing, cut short or not a plain npy file.
    """
    fs, local = filesystem(path)
    try:
        with fs.open(local, "rb") as file:
            shape, dtype = _npy_header(file)
            stop = min(stop, shape[0])
            found = np.empty((stop - start, *shape[1:]), dtype) if out is None else out
            found = found[: stop - start]
            file.seek(start * found.strides[0] if len(found) else 0, os.SEEK_CUR)
            _read_fully(file, found)
    except (OSError, ValueError, EOFError) as error:
        raise PartDamaged(f"{path} cannot be read: {error}") from error
    return found


def length_of(path: str) -> int:
    """Return how many entries the first axis of an npy file has. Raises: PartDamaged."""
    fs, local = filesystem(path)
    try:
        with fs.open(local, "rb") as file:
            return int(_npy_header(file)[0][0])
    except (OSError, ValueError, EOFError) as error:
        raise PartDamaged(f"{path} cannot be read: {error}") from error


def _npy_header(file: BinaryIO) -> tuple[tuple[int, ...], np.dtype[Any]]:
    version = np.lib.format.read_magic(file)
    read = {(1, 0): np.lib.format.read_array_header_1_0}.get(
        version, np.lib.format.read_array_header_2_0
    )
    shape, is_fortran, dtype = read(file)
    if is_fortran or not shape or dtype.hasobject:
        raise ValueError(f"a plain array in C order is needed, not {dtype} {shape}")
    return shape, dtype


def _read_fully(file: BinaryIO, into: npt.NDArray[Any]) -> None:
    view = into.reshape(-1).view(np.uint8).data
    while len(view):
        num_read = file.readinto(view)  # type: ignore[attr-defined]
        if not num_read:
            raise EOFError(f"{len(view)} bytes are missing at its end")
        view = view[num_read:]


def sha256_of(path: str) -> str:
    """Return the SHA-256 of a whole file, in hexadecimal."""
    fs, local = filesystem(path)
    digest = hashlib.sha256()
    with fs.open(local, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def remove_temporaries(base: str, *, depth: int | None = None) -> None:
    """Delete what killed writers left in a folder; finished files are never touched.

    A worker that outlives its killed driver by a moment may rename its file under our eyes.
    Args: depth: levels to look at, 1 for the folder alone; None for all.
    """
    fs, local = filesystem(base)
    for path in fs.find(local, maxdepth=depth) if fs.exists(local) else []:
        name = str(path).rsplit("/", 1)[-1]
        if name.startswith(".") and name.endswith(".tmp"):
            with suppress(FileNotFoundError):
                fs.rm_file(path)


def _write_local(path: str, content: Content) -> _Hashing:
    final = Path(filesystem(path)[1])
    final.parent.mkdir(parents=True, exist_ok=True)
    temporary = final.with_name(f".{final.name}.{uuid.uuid4().hex[:12]}.tmp")
    try:
        with temporary.open("wb") as file:
            sink = _Hashing(file)
            _fill(sink, content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(final)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync_folder(final.parent)
    return sink


def _write_object(path: str, content: Content) -> _Hashing:
    fs, local = filesystem(path)
    fs.makedirs(local.rsplit("/", 1)[0], exist_ok=True)
    whole = io.BytesIO()
    sink = _Hashing(whole)
    _fill(sink, content)
    fs.pipe_file(local, whole.getvalue())
    return sink


def _fill(sink: _Hashing, content: Content) -> None:
    if isinstance(content, pa.Table):
        pq.write_table(content, sink, compression="zstd", row_group_size=ROW_GROUP_ROWS)
    elif isinstance(content, np.ndarray):
        np.save(sink, content, allow_pickle=False)
    elif isinstance(content, bytes):
        sink.write(content)
    else:
        content(sink)  # type: ignore[arg-type]


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def explained(path: str, error: OSError) -> UserError | None:
    """Return what to tell the user when a write failed for want of space or rights, else None."""
    if error.errno in _NO_SPACE:
        return UserError(
            f"No space is left to write {path}.",
            "The disk or the quota is full; nothing unfinished was left behind.",
            "Free space or choose another --out, then run the same command: it goes on from here.",
        )
    if error.errno in _NOT_WRITABLE:
        return UserError(f"{path} cannot be written.", f"{error}.", "Choose another --out.")
    return None
