"""Reads at an offset of any of many shards, by any thread or process."""

from __future__ import annotations

import os
from collections import OrderedDict
from threading import Lock
from typing import Any, NamedTuple

from manifests import paths

MOST_OPEN_SHARDS = 128
"""A training set of two million samples has about 200 shards; a process may open about 1000."""


class ShardFiles:
    """Shards by path, read at an offset; the last used ones stay open.

    Threads may share it: pread has no position, and a file closes after its last reader. A forked
    process opens its own files. Paths that are not local are read through fsspec.
    """

    def __init__(self, most_open: int = MOST_OPEN_SHARDS) -> None:
        self._most_open = most_open
        self._forget()

    def read(self, path: str, offset: int, size: int) -> bytes:
        """Return `size` bytes from `offset` on.

        Raises: EOFError when the shard ends before; OSError when it cannot be read.
        """
        data = self._shard(path).read(offset, size)
        if len(data) != size:
            raise EOFError(f"the shard ends {size - len(data)} bytes too early")
        return data

    def __reduce__(self) -> tuple[Any, ...]:
        """Return what makes another one, with nothing open: for a process that is not a fork."""
        return ShardFiles, (self._most_open,)

    def _forget(self) -> None:
        self._owner, self._lock = os.getpid(), Lock()
        self._shards: OrderedDict[str, _LocalShard | _RemoteShard] = OrderedDict()

    def _shard(self, path: str) -> _LocalShard | _RemoteShard:
        if self._owner != os.getpid():  # another thread may have held the lock when we forked
            self._forget()
        with self._lock:
            shard = self._shards.pop(path, None) or _opened(path)
            self._shards[path] = shard
            if len(self._shards) > self._most_open:
                self._shards.popitem(last=False)
        return shard


class _LocalShard:
    """A file of this machine; it closes when nobody refers to it any more."""

    def __init__(self, path: str) -> None:
        self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def read(self, offset: int, size: int) -> bytes:
        data = os.pread(self._descriptor, size, offset)
        while len(data) < size and (more := self._more(offset, size, data)):
            data += more
        return data

    def _more(self, offset: int, size: int, data: bytes) -> bytes:
        """Return what comes after `data`: network filesystems may give less than asked for."""
        return os.pread(self._descriptor, size - len(data), offset + len(data))

    def __del__(self) -> None:
        descriptor = getattr(self, "_descriptor", None)  # None: it could not be opened
        if descriptor is not None:
            os.close(descriptor)


class _RemoteShard(NamedTuple):
    """A file of any fsspec filesystem."""

    fs: Any
    path: str

    def read(self, offset: int, size: int) -> bytes:
        return bytes(self.fs.cat_file(self.path, start=offset, end=offset + size))


def _opened(path: str) -> _LocalShard | _RemoteShard:
    fs, local = paths.filesystem(path)
    return _LocalShard(local) if paths.is_local(path) else _RemoteShard(fs, local)
