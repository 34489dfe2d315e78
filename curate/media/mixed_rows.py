"""The rows of a mix on their way to the shards: JSON text and image places, by output position.

A shard's rows come from all parts. Each part therefore writes its rows once, by output position,
cut at the shards' borders; a shard then reads one piece of every part's file:

    rows/rows-00000.arrow   one Arrow stream (lz4) per output shard, one after the other
    rows/rows-00000.npy     int64 [num_shards + 1], where each stream begins; equal where none is
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt
import polars as pl
import pyarrow as pa

from curate.media.tars import RangeReader
from manifests import paths, store
from manifests.schemas import RESOLVED

FOLDER = "rows"
_PLACE = ("image", "root", "choice", "file", "offset", "size", "suffix")

PLACE = pa.struct([RESOLVED.field(name) for name in _PLACE])
"""Where an image lies: the columns of RESOLVED that say so."""

MIXED = pa.schema(
    [
        ("position", pa.uint64()),  # in the output
        ("uid", pa.uint64()),
        ("source", pa.string()),
        ("json", pa.binary()),
        ("rounds", pa.uint16()),
        ("token_estimate", pa.uint32()),
        ("images", pa.list_(PLACE)),
    ]
)

Positions = npt.NDArray[np.uint64]


def json_rows(keys: pl.Series, conversations: pl.DataFrame) -> pl.Series:
    """Return each conversation as the JSON text of a LLaVA row, with sorted keys and no spaces.

    A text-only row has no `image` key, which is how LLaVA's loader tells it
    (github.com/haotian-liu/LLaVA/issues/546); a row of several images has a list.
    Args: keys: string [n], the rows' ids; conversations: CONVERSATIONS [n].
    Returns: string [n], as `orjson.dumps` with sorted keys would write it.
    """
    images, num_images = pl.col("images"), pl.col("images").list.len()
    one, several = _named(images.list.first()), _named(images)
    frame = conversations.with_columns(
        id=keys,
        conversations=pl.col("turns").list.eval(
            pl.struct(
                pl.element().struct.field("role").alias("from"),
                pl.element().struct.field("text").alias("value"),
            )
        ),
    )
    text_only = pl.struct("conversations", "id").struct.json_encode()
    return frame.select(
        pl.when(num_images == 0).then(text_only).when(num_images == 1).then(one).otherwise(several)
    ).to_series()


def _named(images: pl.Expr) -> pl.Expr:
    return pl.struct("conversations", "id", images.alias("image")).struct.json_encode()


def places_by_uid(resolved: pa.Table, uids: npt.NDArray[np.uint64]) -> pa.ListArray:
    """Return the images' places of each uid, PLACE lists [n], by position in the row.

    Args: resolved: RESOLVED, any order; uids: uint64 [n] ascending.
    """
    table = resolved.sort_by([("uid", "ascending"), ("position", "ascending")]).combine_chunks()
    owners = table.column("uid").to_numpy()
    columns = [table.column(name).combine_chunks() for name in _PLACE]
    wanted = np.isin(owners, uids)
    flat = pa.StructArray.from_arrays(columns, fields=list(PLACE)).filter(pa.array(wanted))
    offsets = np.searchsorted(owners[wanted], uids, side="left")
    ends = np.append(offsets, int(wanted.sum())).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(ends), flat)


def pieces(
    table: pa.Table, num_shards: int, samples_per_shard: int
) -> tuple[bytes, npt.NDArray[np.int64]]:
    """Return a part's MIXED rows cut by output shard: the streams, and where each begins.

    Args: table: MIXED, by ascending position.
    """
    borders = np.arange(num_shards + 1, dtype=np.uint64) * np.uint64(samples_per_shard)
    cuts = np.searchsorted(table.column("position").to_numpy(), borders).tolist()
    sink = io.BytesIO()
    starts = [0]
    for low, high in zip(cuts, cuts[1:], strict=False):
        if high > low:
            _write_stream(sink, table.slice(low, high - low).combine_chunks())
        starts.append(sink.tell())
    return sink.getvalue(), np.array(starts, np.int64)


def of_shard(directory: str, parts: Sequence[str], shard: int) -> pl.DataFrame:
    """Return the MIXED rows of one output shard, by position, from the parts' files.

    Args: directory: of the stage; parts: file stems, as "rows-00000".
    """
    tables = [found for part in parts for found in _piece(directory, part, shard)]
    frame = pl.DataFrame(pa.concat_tables([MIXED.empty_table(), *tables]))
    return frame.sort("position")


def _write_stream(sink: io.BytesIO, table: pa.Table) -> None:
    options = pa.ipc.IpcWriteOptions(compression="lz4")
    with pa.ipc.new_stream(sink, MIXED, options=options) as writer:
        writer.write_table(table)


def _piece(directory: str, part: str, shard: int) -> Iterator[pa.Table]:
    base = paths.join(directory, FOLDER, part)
    start, end = store.read_slice(f"{base}.npy", shard, shard + 2).tolist()
    if start == end:
        return
    with RangeReader(f"{base}.arrow") as reader:
        yield pa.ipc.open_stream(reader.read(start, end - start)).read_all()
