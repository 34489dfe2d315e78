"""How long each sample really is: all conversations tokenized before the first plan is made.

Curation's estimates know neither the template nor the tokenizer. With exact lengths a micro-batch
never holds more tokens than its budget, and what the template refuses is gone before global batches
are cut, so each has its full number of samples. Only the JSON members of shards are read.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from manifests import paths, store
from manifests.errors import UserError
from train.data.index import Index, named
from train.data.plan import Columns

LENGTHS_VERSION = 1
"""Part of the name under which lengths are kept; raised when the same rows get other lengths."""

LENGTHS_PREFIX = "lengths-"
"""What the name of a table of lengths begins with."""

_ROWS_AT_ONCE = 256
_SCHEMA = pa.schema({"tokens": pa.uint32(), "num_images": pa.int32(), "reason": pa.string()})


class Length(NamedTuple):
    """A sample's length: tokens of its text, images left out, and the images it shows."""

    tokens: int
    num_images: int


Measure = Callable[[Mapping[str, Any], int], Length | str]
"""(LLaVA row, number of images its shard holds) -> its length, or why it cannot be trained on."""


class Measured(NamedTuple):
    """What can be trained on. refused: rows of the index that was given -> reason.

    rows: an index without those; columns: of its rows, with exact lengths.
    """

    rows: Index
    columns: Columns
    refused: dict[int, str]


def exact_columns(
    index: Index, measure: Measure, cache_dir: str, *, key: str, num_workers: int = 0
) -> Measured:
    """Return the rows that can be trained on with their exact lengths, after cuts to whole rounds.

    They are kept in `cache_dir`, and read again by the same key for the same rows of an index.

    Args:
        measure: see Measure; called in worker processes where there are some.
        key: what `measure` decides by, e.g. hashes of tokenizer and template.
        num_workers: processes that read and tokenize; with 0 it is this one.

    Raises: SampleFailed, with the sample's key and shard, for what a read or `measure` raises;
        UserError where nothing can be trained on.
    """
    name = f"{LENGTHS_PREFIX}{_key(index, key)[:16]}.parquet"
    path = paths.join(cache_dir, name)
    if not paths.exists(path):
        table = _measured(index, measure, num_workers)
        store.write(cache_dir, name, lambda file: pq.write_table(table, file))
    return _kept(index, store.read_table(path))


def _key(index: Index, key: str) -> str:
    """Return a SHA-256 of what decides the lengths, in hex.

    Shards are known by their stage's fingerprint, where it has one, and by their names and offsets.
    """
    folders = sorted(set(index.directory))
    records = [store.read_json(paths.join(one, "record.json")) for one in folders]
    said = [LENGTHS_VERSION, key, index.shards, [one and one.get("fingerprint") for one in records]]
    found = hashlib.sha256(json.dumps(said).encode())
    for column in (index.uid, index.shard, index.json_offset, index.json_size, index.image_starts):
        found.update(column.astype("<u8").tobytes())
    return found.hexdigest()


def _measured(index: Index, measure: Measure, num_workers: int) -> pa.Table:
    """Return each row's length or reason, in the index's order."""
    found = [one for chunk in _chunks(index, measure, num_workers) for one in chunk]
    lengths = [Length(0, 0) if isinstance(one, str) else one for one in found]
    reasons = [one if isinstance(one, str) else None for one in found]
    tokens, num_images = np.array(lengths, np.int64).reshape(-1, 2).T
    return pa.table([tokens, num_images, reasons], schema=_SCHEMA)


def _chunks(index: Index, measure: Measure, num_workers: int) -> Iterator[list[Length | str]]:
    """Yield the lengths of a few hundred rows each time."""
    from torch import Generator
    from torch.utils.data import DataLoader

    loader: Any = DataLoader
    yield from loader(
        _Chunks(index, measure),
        batch_size=None,
        collate_fn=_as_it_is,
        num_workers=num_workers,
        generator=Generator(),  # torch's global random state stays as it is
    )


@dataclass(frozen=True)
class _Chunks:
    """The lengths of a chunk of rows by its number; torch calls this a dataset."""

    index: Index
    measure: Measure

    def __len__(self) -> int:
        return -(-len(self.index) // _ROWS_AT_ONCE)

    def __getitem__(self, chunk: int) -> list[Length | str]:
        first = chunk * _ROWS_AT_ONCE
        return [self._one(row) for row in range(first, min(first + _ROWS_AT_ONCE, len(self.index)))]

    def _one(self, row: int) -> Length | str:
        conversation = self.index.conversation(row)
        num_images = int(self.index.image_starts[row + 1] - self.index.image_starts[row])
        with named(self.index, row, "tokenized"):
            return self.measure(conversation, num_images)


def _as_it_is(chunk: list[Length | str]) -> list[Length | str]:
    """Return the chunk: torch would make tensors of it."""
    return chunk


def _kept(index: Index, table: pa.Table) -> Measured:
    """Return what can be trained on by a table of lengths."""
    reasons = table.column("reason").to_pylist()
    refused = {row: reason for row, reason in enumerate(reasons) if reason is not None}
    keep = np.flatnonzero([reason is None for reason in reasons])
    if not len(keep):
        raise UserError(
            f"None of the {len(index)} samples can be trained on.",
            f"They were refused: {dict(Counter(refused.values()))}.",
            "Look at the data with the template that the run uses, and at plan.max_length.",
        )
    rest = index.taken(keep) if refused else index
    tokens: NDArray[np.uint32] = table.column("tokens").to_numpy()[keep]
    num_images: NDArray[np.int32] = table.column("num_images").to_numpy()[keep]
    columns = replace(rest.columns(), tokens=tokens, num_images=num_images)
    return Measured(rest, columns, refused)
