"""One shard of a mix: where each member will lie, known before a byte is written, and the writing.

Members of a sample: `key.jpg` (or png, webp, gif, bmp, by content; `key.0.jpg`, `key.1.png` for
several images) with the original bytes, then `key.json`. A text-only sample has its JSON alone.
Keys are the samples' positions in the mix, so the order of the keys is the order of the samples.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import Any, BinaryIO, cast

import numpy as np
import numpy.typing as npt
import polars as pl
import pyarrow as pa

from curate.media.image_places import read_images
from curate.media.tar_scan import BLOCK_BYTES
from curate.media.tar_write import write_tar
from manifests.errors import UserError
from manifests.schemas import IMAGE_MEMBER, TRAIN_INDEX, conform

KEY_DIGITS = 9
_WRITE_BYTES = 1 << 20
_PLACE = ("root", "choice", "file", "offset", "size")

Roots = dict[str, str | list[str]]


def key_of(position: int) -> str:
    """Return the `__key__` of the sample at a position. Example: 12 -> "000000012"."""
    return f"{position:0{KEY_DIGITS}d}"


def index_of(rows: pl.DataFrame, shard: str) -> pa.Table:
    """Return the TRAIN_INDEX of a shard's rows.

    Args: rows: MIXED, by position; shard: its path in the directory.
    """
    images = rows["images"].to_arrow()
    counts = rows["images"].list.len().to_numpy().astype(np.int64)
    image_sizes = rows["images"].explode(empty_as_null=False).struct.field("size").to_numpy()
    json_sizes = rows["json"].bin.size().to_numpy().astype(np.int64)
    image_at, json_at = _offsets(counts, image_sizes.astype(np.int64), json_sizes)
    flat = images.flatten()
    suffixes = flat.field("suffix").cast(pa.string())
    members = pa.StructArray.from_arrays(
        [suffixes, pa.array(image_at, pa.uint64()), flat.field("size")], fields=list(IMAGE_MEMBER)
    )
    ends = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
    columns = {
        "uid": rows["uid"].to_arrow(),
        "key": [key_of(position) for position in rows["position"].to_list()],
        "shard": [shard] * rows.height,
        "images": pa.ListArray.from_arrays(pa.array(ends), members),
        "json_offset": json_at,
        "json_size": json_sizes,
        "source": rows["source"].to_arrow(),
        "has_image": counts > 0,
        "turns": rows["rounds"].to_arrow(),
        "token_estimate": rows["token_estimate"].to_arrow(),
    }
    return conform(pa.table(columns), TRAIN_INDEX)


def write_shard(file: BinaryIO, rows: pl.DataFrame, roots: Roots) -> int:
    """Write a shard's tar; return its size in bytes. One image is in memory at a time.

    Raises: UserError when an image is gone or is not what the resolve stage saw.
    """
    buffered = io.BufferedWriter(cast(io.RawIOBase, file), _WRITE_BYTES)
    write_tar(buffered, _entries(rows, roots))
    buffered.flush()
    buffered.detach()  # or it would close the file, which is not its own
    return file.tell()


def _offsets(
    counts: npt.NDArray[np.int64],
    image_sizes: npt.NDArray[np.int64],
    json_sizes: npt.NDArray[np.int64],
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Return the offset of every image and of every JSON text in the tar that write_tar makes.

    Args: counts [n]: images of each row; image_sizes [sum of counts]; json_sizes [n].
    """
    num_rows = len(counts)
    ends = np.cumsum(counts + 1)
    is_json = np.zeros(int(ends[-1]) if num_rows else 0, np.bool_)
    is_json[ends - 1] = True
    sizes = np.empty(len(is_json), np.int64)
    sizes[is_json], sizes[~is_json] = json_sizes, image_sizes
    padded = BLOCK_BYTES + sizes + -sizes % BLOCK_BYTES
    offsets = np.cumsum(padded) - padded + BLOCK_BYTES
    return offsets[~is_json], offsets[is_json]


def _entries(rows: pl.DataFrame, roots: Roots) -> Iterator[tuple[str, bytes]]:
    columns = (rows[name].to_list() for name in ("position", "json", "images"))
    listed = list(zip(*columns, strict=True))
    where = (tuple(place[name] for name in _PLACE) for _, _, places in listed for place in places)
    originals = read_images(roots, where)
    for position, text, places in listed:
        key = key_of(position)
        for at, (place, data) in enumerate(zip(places, originals, strict=False)):
            yield _image_name(key, place, at, len(places)), data
        yield f"{key}.json", text


def _image_name(key: str, place: dict[str, Any], at: int, num_images: int) -> str:
    return f"{key}.{place['suffix']}" if num_images == 1 else f"{key}.{at}.{place['suffix']}"


def check_space_for_keys(num_samples: int) -> None:
    """Check that all positions have the digits that keys have. Raises: UserError."""
    if num_samples > 10**KEY_DIGITS:
        raise UserError(
            f"The mix has {num_samples} samples.",
            f"A key has {KEY_DIGITS} digits, so that sorting by key keeps the order.",
            "Make several mixes of it.",
        )
