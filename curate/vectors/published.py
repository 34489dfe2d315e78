"""Published CLIP embeddings in clip-retrieval's layout, as SAMPLES.

    img_emb/img_emb_0000.npy    text_emb/text_emb_0000.npy    metadata/metadata_0000.parquet

Row j of the three belongs together; files are paired by their numeric suffix and may have gaps
(LAION's own upload has). Arrays are float16 [n, d]; float32 (as the mclip text encoder writes) is
rounded to float16 on reading. Python objects inside npy files are never loaded. LAION's metadata
have no punsafe: `source.join` brings it from other tables, by URL or by LAION's hash of the
metadata's URL and caption.
Format source: github.com/rom1504/clip-retrieval.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from curate.rows import laion, score_tables
from curate.rows.columns import ALIASES, choose, plain_names, samples_from_columns
from curate.rows.url_rows import raw_text
from curate.source_config import SourceConfig
from curate.vectors import exact
from manifests import ledger, paths, store
from manifests.errors import UserError
from manifests.schemas import MAX_ROWS_PER_SHARD, SAMPLES, UID_ROW_BITS, conform, empty
from manifests.strict import Strict
from manifests.work import Output, part_name

KINDS = ("img_emb", "text_emb", "metadata")
_EXTENSION = {"img_emb": ".npy", "text_emb": ".npy", "metadata": ".parquet"}
_FIX = "Write the file again, or take its number out of img_emb/, text_emb/ and metadata/."
_NO_URLS = (
    "{name} has no column of URLs (named {known}, in any case), so nothing that is selected can be "
    "fetched. Its columns: {names}"
)


@dataclass(frozen=True, slots=True)
class Header:
    """Shape and dtype of one npy file."""

    rows: int
    dim: int
    dtype: np.dtype[np.generic]


def shards(folder: str) -> tuple[str, tuple[str, ...]]:
    """Return (root, img_emb file names below it, by numeric suffix).

    Raises: UserError when the folder is not in this layout or a number lacks one of its files.
    """
    return folder, tuple(triple[0] for triple in _triples(folder))


def companions(root: str, name: str) -> tuple[str, str, str]:
    """Return the (img_emb, text_emb, metadata) files of one number, given its img_emb name."""
    return next(triple for triple in _triples(root) if triple[0] == name)


def forget_listing() -> None:
    """Make the next call list the folders again."""
    _triples.cache_clear()


@lru_cache(maxsize=8)
def _triples(folder: str) -> tuple[tuple[str, str, str], ...]:
    image, text, table = (_by_suffix(folder, kind) for kind in KINDS)
    if not image:
        raise UserError(
            f"{folder!r} holds no img_emb/*.npy.",
            "A clip_retrieval source needs img_emb/, text_emb/ and metadata/.",
            "Check source.path; it is relative to the folder where the command runs.",
        )
    everywhere = image.keys() | text.keys() | table.keys()
    for kind, found in zip(KINDS, (image, text, table), strict=True):
        missing = sorted(everywhere - found.keys())
        if missing:
            raise UserError(
                f"{kind}/ has no file number {missing[0]} ({len(missing)} missing in all).",
                "Row j of the three files with one number belongs together.",
                "Add the missing files, or take the other two of that number away.",
            )
    return tuple((image[n], text[n], table[n]) for n in sorted(image))


def check_files(root: str, names: Sequence[str]) -> None:
    """Check dtype, dimension and row counts of every file by its header, before any work.

    Raises: UserError that names the file.
    """
    dim = _header(paths.join(root, names[0])).dim
    for name in names:
        image, text, rows = _headers(root, name)
        if image.rows != text.rows or image.rows != rows:
            raise UserError(
                f"{name}: {image.rows} image rows, {text.rows} text rows, {rows} metadata rows.",
                "Row j of the three files belongs together.",
                _FIX,
            )
        for header, kind in ((image, "img_emb"), (text, "text_emb")):
            if header.dim != dim:
                raise UserError(
                    f"{name}: {kind} has {header.dim} columns, the first file has {dim}.",
                    "All embeddings of a source come from one model.",
                    _FIX,
                )


def check_columns(source: SourceConfig, root: str, names: Sequence[str]) -> None:
    """Check that every file's metadata have what hashes and joins are made of, where asked for.

    Raises: UserError that names the file.
    """
    hashed = ("url", "caption") if source.laion_hash else ()
    needed = [*hashed, *(score_tables.keys_of(source.join) & {"url"})]
    for name in names if source.laion_hash or source.join else ():
        path = paths.join(root, companions(root, name)[2])
        with _parquet(path) as file:
            columns = plain_names(file.schema_arrow)
        for column in needed:
            if column not in choose(columns):
                raise UserError(
                    f"{path} has no column {column}: none is named {' or '.join(ALIASES[column])}.",
                    "LAION's hash is of URL and caption; tables without one are joined by URL.",
                    "Use metadata that have it, or take out source.laion_hash and source.join.",
                )
        score_tables.must_have_hash(path, columns, source)


def warnings(source: SourceConfig, sections: Mapping[str, Strict]) -> list[str]:
    """Return what a person should know of the metadata; the first file is looked at."""
    root, names = shards(source.location)
    table = companions(root, names[0])[2]
    with _parquet(paths.join(root, table)) as file:
        columns = list(file.schema_arrow.names)
    withdrawn = [laion.WITHDRAWN.format(shown=table)] if laion.is_withdrawn(columns) else []
    unfetchable = _lacks_urls(table, columns) if "download" in sections else []
    unsafe = score_tables.punsafe_warnings([columns], source, sections)
    return withdrawn + unsafe + unfetchable


def _lacks_urls(table: str, columns: list[str]) -> list[str]:
    """Return a warning, before rows are compared for days, that nothing could be fetched later."""
    if "url" in choose(columns):
        return []
    known, found = " or ".join(ALIASES["url"]), ", ".join(columns)
    return [_NO_URLS.format(name=table, known=known, names=found)]


def ingest_part(
    source: SourceConfig, root: str, part: int, shards: Sequence[tuple[int, str]]
) -> Output:
    """Return SAMPLES with exact clip scores; rows that cannot be compared are quarantined."""
    counts: Counter[str] = Counter()
    made = [_ingest_file(source, root, index, name, counts) for index, name in shards]
    samples = pa.concat_tables([empty(SAMPLES), *(one[0] for one in made)])
    samples, notes = score_tables.filled(samples, source, counts)
    return Output(
        files={f"{part_name(part)}.parquet": samples},
        verdicts=pa.concat_tables([one[1] for one in made]),
        quarantine=pa.concat_tables([one[2] for one in made]),
        notes=notes,
    )


def read_rows(path: str) -> npt.NDArray[np.float16]:
    """Return the embeddings of an npy file as float16 [n, d], memory-mapped where possible."""
    _header(path)
    array = store.read_array(path)
    if array.dtype == np.float16:
        return array
    with np.errstate(over="ignore"):  # a float32 beyond 65504 becomes infinite and is quarantined
        return array.astype(np.float16)


def _ingest_file(
    source: SourceConfig, root: str, index: int, name: str, counts: Counter[str]
) -> tuple[pa.Table, pa.Table, pa.Table]:
    image_path, text_path, table_path = (paths.join(root, one) for one in companions(root, name))
    images, texts = read_rows(image_path), read_rows(text_path)
    uids = np.arange(len(images), dtype=np.uint64) + np.uint64(index << UID_ROW_BITS)
    reasons = np.array(exact.REJECT_REASONS, dtype=object)[exact.reject_reasons(images, texts)]
    scores = exact.clip_score(images, texts)
    metadata = _read_metadata(table_path)
    samples = samples_from_columns(
        metadata, uids, source=source.label, shard=name, clip_score=scores
    )
    if source.laion_hash:
        samples = _with_hashes(samples, metadata, counts)
    good = reasons == ""
    bad = samples.filter(pa.array(~good))
    return (
        conform(samples.filter(pa.array(good)), SAMPLES),
        ledger.verdicts("ingest", uids, reasons=_quarantined(reasons)),
        _quarantine(bad, name, reasons[~good]),
    )


def _with_hashes(samples: pa.Table, metadata: pa.Table, counts: Counter[str]) -> pa.Table:
    """Return SAMPLES with LAION's hash of what the metadata say, not of what was mended."""
    chosen = choose(plain_names(metadata.schema))
    urls, captions = (raw_text(metadata.column(chosen[one])) for one in ("url", "caption"))
    hashes = laion.known_hashes(samples.column("hash"), urls, captions, counts)
    at = samples.schema.get_field_index("hash")
    return samples.set_column(at, SAMPLES.field("hash"), hashes)


def _quarantined(reasons: npt.NDArray[np.object_]) -> list[str]:
    return [ledger.quarantine_reason(one) if one else "" for one in reasons]


def _quarantine(bad: pa.Table, shard: str, reasons: npt.NDArray[np.object_]) -> pa.Table:
    found = zip(bad.column("uid").to_pylist(), bad.column("key").to_pylist(), reasons, strict=True)
    detail = "row of the embedding files"
    return ledger.quarantine(
        [dict(uid=u, key=k, shard=shard, error=e, detail=detail) for u, k, e in found]
    )


def _headers(root: str, name: str) -> tuple[Header, Header, int]:
    image, text, table = (paths.join(root, one) for one in companions(root, name))
    return _header(image), _header(text), _parquet_rows(table)


def _header(path: str) -> Header:
    try:
        array = store.read_array(path)
    except FileNotFoundError as error:
        raise UserError(f"{path} is gone.", "It was listed a moment ago.", _FIX) from error
    except ValueError as error:
        raise UserError(f"{path} is not a plain npy file.", f"{error}.", _FIX) from error
    if array.dtype not in (np.float16, np.float32) or array.ndim != 2:
        raise UserError(
            f"{path} is {array.dtype} with shape {array.shape}.",
            "Embeddings are float16 (or float32) arrays of rows x dimensions.",
            _FIX,
        )
    if array.shape[0] > MAX_ROWS_PER_SHARD:
        raise UserError(f"{path} has more than 2^24 rows.", "A uid gives 24 bits to the row.", _FIX)
    return Header(array.shape[0], array.shape[1], array.dtype)


def _parquet_rows(path: str) -> int:
    with _parquet(path) as file:
        names = file.schema_arrow.names
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise UserError(f"{path} has two columns {twice[0]!r}.", "Columns go by name.", _FIX)
        return int(file.metadata.num_rows)


def _read_metadata(path: str) -> pa.Table:
    with _parquet(path) as file:
        return file.read()


@contextmanager
def _parquet(path: str) -> Iterator[pq.ParquetFile]:
    """Open a parquet file. Raises: UserError, also for what the reading in the block meets."""
    fs, local = paths.filesystem(path)
    try:
        with fs.open(local, "rb") as file:
            yield pq.ParquetFile(file)
    except FileNotFoundError as error:
        raise UserError(f"{path} is gone.", "It was listed a moment ago.", _FIX) from error
    except store.BAD_PARQUET as error:
        raise UserError(f"{path} is not a readable parquet file.", f"{error}.", _FIX) from error


def _by_suffix(folder: str, kind: str) -> dict[int, str]:
    names = paths.list_names(paths.join(folder, kind), _EXTENSION[kind])
    found: dict[int, str] = {}
    for name in names:
        paths.must_be_utf8(name)
        suffix = paths.numeric_suffix(name)
        if suffix is None:
            raise UserError(
                f"{kind}/{name} has no number.", "Files are paired by number.", "Rename it."
            )
        if suffix in found:
            raise UserError(
                f"{kind}/ has two files number {suffix}, {found[suffix]} and {name}.",
                "Files are paired by number.",
                "Rename or remove one.",
            )
        found[suffix] = f"{kind}/{name}"
    return found
