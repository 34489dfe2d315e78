"""What describes a directory of written shards as a whole: sizes.json, wids.json, the flat list."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, BinaryIO

from curate.media.tars import RangeReader
from manifests import paths, store
from manifests.work import View

SHARDS = "shards"
_ROWS_PER_WRITE = 512

Facts = Mapping[str, Any]
"""Of one shard: `shard` (path in the directory), `samples`, `filesize` (bytes), perhaps `md5sum`,
which wids can do without."""


class Md5Sink(io.RawIOBase):
    """A file that counts and digests what it passes on, if anywhere. wids compares MD5s."""

    def __init__(self, file: BinaryIO | None = None) -> None:
        super().__init__()
        self._file = file
        self._digest = hashlib.md5(usedforsecurity=False)
        self.num_bytes = 0

    def writable(self) -> bool:
        """Return true."""
        return True

    def write(self, data: Any, /) -> int:
        """Take the bytes."""
        if self._file is not None:
            self._file.write(data)
        self._digest.update(data)
        self.num_bytes += len(data)
        return len(data)

    def hexdigest(self) -> str:
        """Return the MD5 of all bytes so far, in hexadecimal."""
        return self._digest.hexdigest()


def written_shards(view: View) -> list[Facts]:
    """Return the facts of the shards that this stage has written, in shard order."""
    return [one["notes"] for one in view.own.markers() if "shard" in one["notes"]]


def list_files(shards: Sequence[Facts]) -> dict[str, bytes]:
    """Return the two lists of shards that readers want, by their path in the directory."""
    sizes = {paths.name_of(one["shard"]): one["samples"] for one in shards}
    return {
        f"{SHARDS}/sizes.json": _json_bytes(sizes),
        f"{SHARDS}/wids.json": _json_bytes(_wids(shards)),
    }


def write_json_list(file: BinaryIO, rows: Iterable[bytes]) -> None:
    """Write JSON texts as one JSON list, a row a line."""
    is_first = True
    for some in batched(rows, _ROWS_PER_WRITE):
        file.write((b"[\n" if is_first else b",\n") + b",\n".join(some))
        is_first = False
    file.write(b"[]\n" if is_first else b"\n]\n")


def json_members(directory: str, index_files: Sequence[str]) -> Iterator[bytes]:
    """Yield the JSON member of each sample of a directory's shards, in TRAIN_INDEX order."""
    for path in index_files:
        index = store.read_table(path, ["shard", "json_offset", "json_size"])
        if not index.num_rows:
            continue
        with RangeReader(paths.join(directory, index.column("shard")[0].as_py())) as reader:
            spans = (index.column(name).to_pylist() for name in ("json_offset", "json_size"))
            yield from map(reader.read, *spans)


def batched(rows: Iterable[bytes], num_rows: int) -> Iterator[list[bytes]]:
    """Yield the rows in lists of `num_rows`, the last of the rest."""
    rows = iter(rows)
    while some := list(islice(rows, num_rows)):
        yield some


def _wids(shards: Sequence[Facts]) -> dict[str, Any]:
    """Return the shard list that webdataset's `wids` opens; its URLs are relative to the list."""
    listed = [
        {
            "url": paths.name_of(one["shard"]),
            "nsamples": one["samples"],
            "filesize": one["filesize"],
            **({"md5sum": one["md5sum"]} if "md5sum" in one else {}),
        }
        for one in shards
    ]
    return {"__kind__": "wids-shard-index-v1", "wids_version": 1, "shardlist": listed}


def _json_bytes(value: Any) -> bytes:
    return (json.dumps(value, sort_keys=True, indent=1) + "\n").encode()
