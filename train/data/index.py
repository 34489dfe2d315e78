"""Samples of assembled shards, found through TRAIN_INDEX and read by offset: no tar is unpacked.

`Index` is for training: millions of rows in a few arrays, any of which is read at once.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from manifests import paths, store
from manifests.errors import UserError, WarrenError
from train.data.cuts import Ints
from train.data.plan import Columns, occurrences
from train.data.shard_files import ShardFiles

_NUMBERS = ("uid", "json_offset", "json_size", "token_estimate")


@dataclass(frozen=True, slots=True)
class TrainSample:
    """One row of instruction or caption data: LLaVA-format conversation and its images' bytes."""

    uid: int
    row: Mapping[str, Any]
    images: list[bytes]


def read_index(directory: str) -> list[dict[str, Any]]:
    """Return the TRAIN_INDEX rows of a directory of shards, in shard order."""
    return [row for path in _index_files(directory) for row in store.read_table(path).to_pylist()]


def read_samples(directory: str) -> Iterator[TrainSample]:
    """Yield every sample of a directory of shards, in shard order; one shard's index in memory."""
    for path in _index_files(directory):
        for entry in store.read_table(path).to_pylist():
            yield read_sample(directory, entry)


def read_sample(directory: str, entry: Mapping[str, Any]) -> TrainSample:
    """Return the sample of one TRAIN_INDEX row.

    Raises: ValueError when the bytes at the offset are no JSON: the index belongs to other shards.
    """
    shard = paths.join(directory, entry["shard"])
    text = _pread(shard, entry["json_offset"], entry["json_size"])
    images = [_pread(shard, one["offset"], one["size"]) for one in entry["images"]]
    return TrainSample(entry["uid"], json.loads(text), images)


def _index_files(directory: str) -> list[str]:
    names = [n for n in paths.list_names(directory, ".parquet") if n.startswith("part-")]
    return [paths.join(directory, name) for name in paths.shard_order(names)]


def _pread(path: str, offset: int, size: int) -> bytes:
    fs, local = paths.filesystem(path)
    return bytes(fs.cat_file(local, start=offset, end=offset + size))


class SampleFailed(WarrenError):
    """A sample cannot be read or prepared; the text names its key and shard.

    One text is its only argument: so torch can raise it again from a worker's.
    """


@dataclass(frozen=True, eq=False)
class Index:
    """The TRAIN_INDEX of one or several stage directories, about 70 bytes a row.

    A row is a position here, in the order of directories, shards and members. For n rows, m images:

    identity: uint64 [n], all different, also where a uid comes more than once (see `occurrences`).
    uid: uint64 [n]. key: large_string [n]. shard: int32 [n], a position in `shards`.
    json_offset: uint64 [n]; json_size, tokens: uint32 [n]; source: int32 [n], one of `sources`.
    image_starts: int64 [n + 1], where in image_offset (uint64 [m]) and image_size (uint32 [m]) a
    row's images begin. shards: full paths; directory: of each shard.
    """

    identity: NDArray[np.uint64]
    uid: NDArray[np.uint64]
    key: pa.LargeStringArray
    shard: NDArray[np.int32]
    json_offset: NDArray[np.uint64]
    json_size: NDArray[np.uint32]
    tokens: NDArray[np.uint32]
    source: NDArray[np.int32]
    image_starts: Ints
    image_offset: NDArray[np.uint64]
    image_size: NDArray[np.uint32]
    shards: tuple[str, ...]
    directory: tuple[str, ...]
    sources: tuple[str, ...]
    files: ShardFiles

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.uid)

    @classmethod
    def load(cls, directories: Sequence[str]) -> Index:
        """Return the index of stage directories. Raises: UserError where there is none."""
        if len(set(directories)) < len(directories):
            raise UserError(
                f"A directory comes twice in {list(directories)}.",
                "Its samples would be drawn twice without a word.",
                "Name it once, and give its sources the weight 2 for that.",
            )
        index = _joined([_read_part(*one) for one in _parts_of(directories)])
        pa.default_memory_pool().release_unused()  # else it keeps what the tables took
        return index

    def columns(self) -> Columns:
        """Return what a plan is made from; token counts are those estimated by curation."""
        num_images = np.diff(self.image_starts).astype(np.int32)
        return Columns(self.identity, self.tokens, num_images, self.source, self.sources)

    def sample(self, row: int) -> TrainSample:
        """Return a row's conversation and image bytes. Raises: SampleFailed."""
        with named(self, row, "read"):
            shard = self.shards[self.shard[row]]
            spans = range(self.image_starts[row], self.image_starts[row + 1])
            images = [
                self.files.read(shard, int(self.image_offset[at]), int(self.image_size[at]))
                for at in spans
            ]
            return TrainSample(int(self.uid[row]), self._conversation(row), images)

    def conversation(self, row: int) -> Mapping[str, Any]:
        """Return a row's conversation; its images are not read. Raises: SampleFailed."""
        with named(self, row, "read"):
            return self._conversation(row)

    def _conversation(self, row: int) -> Mapping[str, Any]:
        shard = self.shards[self.shard[row]]
        text = self.files.read(shard, int(self.json_offset[row]), int(self.json_size[row]))
        found: Mapping[str, Any] = json.loads(text)
        return found

    def subset(self, uids: NDArray[np.uint64]) -> Index:
        """Return an index of only the rows of these uids, in the same order; shards stay as is.

        Raises: UserError when uids are unknown (it counts them), name rows of several directories,
            or are none.
        """
        wanted = np.unique(uids)
        rows = np.flatnonzero(np.isin(self.uid, wanted))
        _check_known(wanted, self.uid[rows])
        number = np.unique(self.directory, return_inverse=True)[1]
        _check_one_directory(self.uid[rows], number[self.shard[rows]])
        return self.taken(rows)

    def taken(self, rows: Ints) -> Index:
        """Return an index of only these rows, in their order: int64 [n]."""
        counts = np.diff(self.image_starts)[rows]
        starts = np.append(0, np.cumsum(counts))
        images = np.arange(starts[-1]) + np.repeat(self.image_starts[rows] - starts[:-1], counts)
        names = ("identity", "uid", "shard", "json_offset", "json_size", "tokens", "source")
        return replace(
            self,
            **{name: getattr(self, name)[rows] for name in names},
            key=self.key.take(pa.array(rows)),
            image_starts=starts,
            image_offset=self.image_offset[images],
            image_size=self.image_size[images],
        )


def read_subset(path: str) -> NDArray[np.uint64]:
    """Return the uids that a parquet file, or all those of a folder, keep: uint64 [n].

    Those of a coreset, or any table with a uid column; of verdicts, those whose `keep` is true.
    Raises: UserError when there is no such file or it has no uid column.
    """
    if path.endswith(".parquet"):
        return _kept(path)
    names = paths.list_names(path, ".parquet")
    if not names:
        raise UserError(
            f"{path!r} has no parquet file.",
            "A subset is told by the uid column of one or several.",
            "Give a parquet file or a folder of them, e.g. runs/mine/select-1a2b3c.",
        )
    return np.concatenate([_kept(paths.join(path, name)) for name in names])


@contextmanager
def named(index: Index, row: int, done: str) -> Iterator[None]:
    """Say which sample an error is about."""
    try:
        yield
    except Exception as error:
        key, shard = index.key[row].as_py(), index.shards[index.shard[row]]
        cause = f"{type(error).__name__}: {error}"
        raise SampleFailed(f"Sample {key} of {shard} cannot be {done}: {cause}") from error


def _parts_of(directories: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Yield (directory, index file). Raises: UserError where a directory has none."""
    for directory in directories:
        files = _index_files(directory)
        if not files:
            raise UserError(
                f"{directory!r} has no part-*.parquet.",
                "Training reads the index beside a stage's shards.",
                "Name the directory of an assemble or mix stage, e.g. runs/mine/mix-1a2b3c.",
            )
        yield from ((directory, path) for path in files)


def _read_part(directory: str, path: str) -> dict[str, Any]:
    """Return an index file's columns as arrays; strings that repeat as dictionaries."""
    table = store.read_table(path, [*_NUMBERS, "key", "shard", "source", "images"])
    images = table.column("images").combine_chunks()
    shard = table.column("shard").combine_chunks().dictionary_encode()
    full = pa.array([paths.join(directory, name) for name in shard.dictionary.to_pylist()], "str")
    return {
        **{name: table.column(name).to_numpy() for name in _NUMBERS},
        "key": table.column("key").combine_chunks().cast(pa.large_string()),
        "source": table.column("source").combine_chunks().dictionary_encode(),
        "shard": pa.DictionaryArray.from_arrays(shard.indices, full),
        "directory": dict.fromkeys(full.to_pylist(), directory),
        "num_images": pc.list_value_length(images).to_numpy(),
        "image_offset": images.flatten().field("offset").to_numpy(),
        "image_size": images.flatten().field("size").to_numpy(),
    }


def _joined(parts: list[dict[str, Any]]) -> Index:
    """Return the index of all parts."""

    def all_of(name: str) -> NDArray[Any]:
        return np.concatenate([part.pop(name) for part in parts])  # what is joined is freed

    shard, shards = _coded([part["shard"] for part in parts])
    source, sources = _coded([part["source"] for part in parts])
    directory = {name: at for part in parts for name, at in part["directory"].items()}
    uid = all_of("uid")
    return Index(
        identity=occurrences(uid),
        uid=uid,
        key=pa.concat_arrays([part.pop("key") for part in parts]),
        shard=shard,
        json_offset=all_of("json_offset"),
        json_size=all_of("json_size"),
        tokens=all_of("token_estimate"),
        source=source,
        image_starts=np.append(0, np.cumsum(all_of("num_images"), dtype=np.int64)),
        image_offset=all_of("image_offset"),
        image_size=all_of("image_size"),
        shards=shards,
        directory=tuple(directory[name] for name in shards),
        sources=sources,
        files=ShardFiles(),
    )


def _coded(columns: list[pa.DictionaryArray]) -> tuple[NDArray[np.int32], tuple[str, ...]]:
    """Return the columns, one after the other, as positions in the names: int32 [n]."""
    one = pa.chunked_array(columns).unify_dictionaries().combine_chunks()
    return one.indices.to_numpy(), tuple(one.dictionary.to_pylist())


def _kept(path: str) -> NDArray[np.uint64]:
    """Return the uids that a parquet file keeps."""
    table = store.read_table(path)
    if "uid" not in table.column_names:
        raise UserError(
            f"{path} has no column `uid`.",
            f"A subset is told by uids; the file has {', '.join(table.column_names)}.",
            "Give a coreset's parquet file or a folder of verdicts.",
        )
    kept = table.filter(table.column("keep")) if "keep" in table.column_names else table
    uids: NDArray[np.uint64] = kept.column("uid").to_numpy().astype(np.uint64)
    return uids


def _check_known(wanted: NDArray[np.uint64], met: NDArray[np.uint64]) -> None:
    """Check that each wanted uid was met. Raises: UserError."""
    unknown = np.setdiff1d(wanted, met)
    if not len(wanted):
        raise UserError("The subset keeps no sample.", "It names no uid, or keeps none of them.")
    if len(unknown):
        raise UserError(
            f"{len(unknown)} of the subset's {len(wanted)} uids are not in the index.",
            f"Among them {', '.join(map(str, unknown[:3]))}: the shards were written without them.",
            "Use a subset of the run that wrote the shards; rows lost while writing are in "
            "its later verdicts.",
        )


def _check_one_directory(uids: NDArray[np.uint64], directory: Ints) -> None:
    """Check that no uid is met in two directories. Raises: UserError."""
    order = np.lexsort((directory, uids))
    is_same, moves = np.diff(uids[order]) == 0, np.diff(directory[order]) != 0
    twice = len(np.unique(uids[order][1:][is_same & moves]))
    if twice:
        raise UserError(
            f"{twice} uids of the subset are in several of the directories.",
            "A uid names a sample within its own run only.",
            "Load each directory alone and take its own subset.",
        )


def uids_hash(uids: NDArray[np.uint64]) -> str:
    """Return the SHA-256 of a set of uids, in hex; order and repeats do not matter."""
    return hashlib.sha256(np.unique(uids).astype("<u8").tobytes()).hexdigest()
