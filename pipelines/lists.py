"""A run's coreset as lists that other programs read.

    reference-keys   PATH/tar_000000.npy ...  int64 keys of each input tar, for BAAI's retar and its
                                              training filter (Dataset-Pruning, LAION/retar.py)
    datacomp-uids    PATH                     npy of dtype "u8,u8", sorted, for DataComp's resharder
    urls             PATH                     parquet of URLs and captions, for img2dataset

The coreset is what the select stage chose; where images are fetched after it, some of them may
have been lost since (`warren funnel` counts them).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any, BinaryIO, Literal

import numpy as np
import numpy.typing as npt
import orjson
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from curate.source_config import SourceConfig
from manifests import paths, store
from manifests.errors import UserError
from manifests.work import StageDir

Kind = Literal["reference-keys", "datacomp-uids", "urls"]

CORESET = "coreset.parquet"
ROWS_PER_REFERENCE_TAR = 10_000
"""Keys of one tar of the reference, which finds a key's tar by integer division."""
MAX_REFERENCE_TARS = 1_000_000
"""Its tars have six digits (LAION-2B are 232,320); a list is written for each up to the last."""
DATACOMP_UID = np.dtype("u8,u8")

URL_LIST = pa.schema(
    [
        pa.field("url", pa.string(), nullable=False),
        pa.field("caption", pa.string(), nullable=False),
        pa.field("key", pa.string(), nullable=False),
        pa.field("uid", pa.uint64(), nullable=False),
        pa.field("hash", pa.int64()),
        pa.field("md5", pa.string()),  # of the file behind the URL, in hex, as img2dataset wants it
        pa.field("sha256", pa.string()),
    ]
)
_PUBLISHED = {"published_md5": "md5", "published_sha256": "sha256"}
_NUMERIC_KEY = re.compile(r"[0-9]{1,18}")  # 10^18 fits int64
_HEX_UID = re.compile(r"[0-9a-fA-F]{32}")


def write_list(
    source: SourceConfig, chain: Mapping[str, StageDir], kind: Kind, path: str
) -> dict[str, Any]:
    """Write a finished coreset as one of the lists; return {"rows": ..., "files": ...}.

    Args: source: of the run's recipe; path: of the file, or of the folder of reference-keys.
    Raises: UserError when nothing is selected yet, when the rows have no such ids, or when
    something is at `path`.
    """
    if "select" not in chain:
        raise UserError(
            "This run has no coreset.",
            "Its recipe has no select section, or the run has not come to it.",
            "Run it with --to select first.",
        )
    if paths.exists(path):
        raise UserError(f"{path!r} is there.", "Nothing is overwritten.", "Choose another --out.")
    if kind == "reference-keys":
        return _write_reference_keys(source, chain, path)
    if kind == "datacomp-uids":
        return _write_datacomp_uids(chain, path)
    return _write_urls(chain, path)


def datacomp_uid(text: str) -> tuple[int, int]:
    """Return the two halves of a uid of 32 hex digits, high first.

    Example: "00000000000000ff0000000000000001" -> (255, 1)
    """
    return int(text[:16], 16), int(text[16:], 16)


def _write_reference_keys(
    source: SourceConfig, chain: Mapping[str, StageDir], folder: str
) -> dict[str, Any]:
    keys: dict[str, list[npt.NDArray[np.int64]]] = {}
    if source.brings_images:
        keys = {_tar_name(stem): [] for stem in _stems(chain)}
    largest = -1
    for table in _selected(chain, ["uid", "key", "shard"]):
        numbers = _numeric(table["key"])
        if source.brings_images:
            names = [_tar_name(_stem(shard)) for shard in table["shard"]]
        else:
            names = [_tar_name(f"{n // ROWS_PER_REFERENCE_TAR:06d}") for n in numbers.tolist()]
        grouped = pl.DataFrame({"name": names, "key": numbers}).partition_by("name", as_dict=True)
        for (name,), rows in grouped.items():
            keys.setdefault(str(name), []).append(rows["key"].to_numpy())
        largest = max(largest, int(numbers.max(initial=-1)))
    if not source.brings_images and largest >= MAX_REFERENCE_TARS * ROWS_PER_REFERENCE_TAR:
        raise UserError(
            f"The key {largest} is in no tar of the reference.",
            f"It finds a key in the tar of its ten thousand, {MAX_REFERENCE_TARS:,} tars at most; "
            "ids such as LAION's SAMPLE_ID are no such keys.",
            "Take `--as urls` instead, or coreset.parquet.",
        )
    if not source.brings_images:  # the reference opens the list of every tar, also of an empty one
        tars = range(max(largest // ROWS_PER_REFERENCE_TAR, -1) + 1)
        keys = {_tar_name(f"{tar:06d}"): [] for tar in tars} | keys
    none = np.zeros(0, np.int64)
    for name, found in sorted(keys.items()):
        store.write(folder, name, np.sort(np.concatenate([none, *found])))
    num_rows = sum(len(one) for found in keys.values() for one in found)
    return {"rows": num_rows, "files": len(keys)}


def _write_datacomp_uids(chain: Mapping[str, StageDir], path: str) -> dict[str, Any]:
    halves = [np.zeros((0, 2), np.uint64)]
    for table in _selected(chain, ["uid", "key", "extra"]):
        rows = zip(table["key"].to_list(), table["extra"].to_list(), strict=True)
        found = [datacomp_uid(_hex_uid(key, extra)) for key, extra in rows]
        halves.append(np.array(found, np.uint64).reshape(-1, 2))
    both = np.concatenate(halves)
    both = both[np.lexsort((both[:, 1], both[:, 0]))]
    uids = np.ascontiguousarray(both).view(DATACOMP_UID).reshape(-1)
    _write_file(path, uids)
    return {"rows": len(uids), "files": 1}


def _write_urls(chain: Mapping[str, StageDir], path: str) -> dict[str, Any]:
    num_rows = 0

    def write(file: BinaryIO) -> None:
        nonlocal num_rows
        with pq.ParquetWriter(file, URL_LIST, compression="zstd") as writer:
            for table in _selected(chain, ["uid", "key", "caption", "url", "hash", *_PUBLISHED]):
                writer.write_table(_url_rows(table), row_group_size=store.ROW_GROUP_ROWS)
                num_rows += table.height

    _write_file(path, write)
    return {"rows": num_rows, "files": 1}


def _url_rows(table: pl.DataFrame) -> pa.Table:
    lacking = table.filter(pl.col("url").is_null() | (pl.col("url") == ""))
    if lacking.height:
        raise UserError(
            f"{lacking.height} samples of the coreset have no URL, the first is "
            f"{lacking['key'][0]!r}.",
            "The source has no url column, or no value in it.",
            "Use the shards themselves, or select from a source with URLs.",
        )
    hashes = [
        (pl.col(given).bin.encode("hex") if given in table.columns else pl.lit(None, pl.String))
        .cast(pl.String)
        .alias(name)
        for given, name in _PUBLISHED.items()
    ]
    return table.with_columns(hashes).select(URL_LIST.names).to_arrow().cast(URL_LIST)


def _selected(chain: Mapping[str, StageDir], columns: list[str]) -> Iterator[pl.DataFrame]:
    """Yield the coreset's rows of each source part, by uid, with these columns of SAMPLES.

    A column that the run's SAMPLES do not have is left out.
    """
    path = paths.join(chain["select"].path, CORESET)
    uids = pl.DataFrame(store.read_table(path, ["uid"]))["uid"]
    num_found = 0
    for part in chain["ingest"].files():
        names = _names(part)
        table = pl.DataFrame(store.read_table(part, [one for one in columns if one in names]))
        inside = uids.filter(uids.is_between(table["uid"].min(), table["uid"].max()))
        found = table.filter(pl.col("uid").is_in(inside.implode())).sort("uid")
        num_found += found.height
        if found.height:
            yield found
    assert num_found == len(uids), "every selected row was ingested"


def _names(path: str) -> list[str]:
    fs, local = paths.filesystem(path)
    with fs.open(local, "rb") as file:
        return list(pq.read_schema(file).names)


def _stems(chain: Mapping[str, StageDir]) -> list[str]:
    """Return the input tars' names without folder and ".tar". Raises: UserError for equal ones."""
    shards = [name for one in chain["ingest"].markers() for name in one["payload"]["shards"]]
    stems = [_stem(shard) for shard in shards]
    if len(set(stems)) < len(stems):
        twice = next(stem for stem in stems if stems.count(stem) > 1)
        raise UserError(
            f"Two input tars are named {twice}.tar.",
            "This list has one file per tar, named after it.",
            "Rename them, or take `--as urls`.",
        )
    return stems


def _numeric(keys: pl.Series) -> npt.NDArray[np.int64]:
    """Return keys as int64. Raises: UserError for one that is not all digits."""
    wrong = [key for key in keys if not _NUMERIC_KEY.fullmatch(key)]
    if wrong:
        raise UserError(
            f"The key {wrong[0]!r} is no number ({len(wrong)} such keys).",
            "This list names samples by img2dataset's keys, such as 000120034, as int64.",
            "Take `--as urls` instead, or coreset.parquet.",
        )
    return keys.cast(pl.Int64).to_numpy()


def _hex_uid(key: str, extra: str | None) -> str:
    """Return a DataComp uid: the source column `uid`, else the key. Raises: UserError."""
    given = orjson.loads(extra).get("uid") if extra else None
    for text in (given, key):
        if isinstance(text, str) and _HEX_UID.fullmatch(text):
            return text
    raise UserError(
        f"The sample {key!r} has no DataComp uid.",
        "That is 32 hex digits, in the source's column uid or as its key.",
        "Take `--as urls` or `--as reference-keys` instead.",
    )


def _tar_name(stem: str) -> str:
    return f"tar_{stem}.npy"


def _stem(shard: str) -> str:
    """Return a tar's name as the reference cuts it: without ".tar"."""
    return paths.name_of(shard).removesuffix(".tar")


def _write_file(path: str, content: Any) -> None:
    folder, _, name = paths.absolute(path).rpartition("/")
    store.write(folder, name, content)
