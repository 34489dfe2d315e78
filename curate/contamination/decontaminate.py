"""The decontaminate stage: rows that are in an evaluation set are dropped, with its item as proof.

    sets/                       the evaluation sets, hashed, embedded and cut into n-grams once
    part-00000.parquet          VERDICTS of a source part; the first method that finds a row (in the
                                order of curate/contamination/methods.py) gives the reason, e.g.
                                contaminated:phash, with the score of the nearest item
    evidence/part-00000.parquet EVIDENCE: the nearest items of every method and set
    kept/part-00000.parquet     SELECTABLE of the kept rows, where dedup or select made figures

Each row is judged alone: the verdict does not depend on which other rows there are. A row whose
image should be read and cannot is quarantined, as the embed stage does.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import polars as pl
import pyarrow as pa

from curate.contamination import benchmark_sets
from curate.contamination.config import DecontaminateConfig, identity, with_model
from curate.contamination.methods import Found, Rows, compare
from curate.contamination.phash import phash
from curate.download.layout import shard_name
from curate.media.images import ImageError, decode
from curate.media.originals import read_originals
from curate.rows.selectable_rows import KEPT, has_parts_of_its_own, kept_figures
from curate.sources import image_root_of
from curate.vectors import vector_parts
from curate.vectors.embed import ahead
from manifests import ledger, paths, store
from manifests.errors import PartDamaged
from manifests.schemas import EVIDENCE, UID_ROW_BITS, conform, empty
from manifests.work import Item, Output, View, part_name

__all__ = ["DecontaminateConfig", "identity", "plan", "plan_sets", "with_model", "work", "work_set"]

PREFIX = "contaminated:"
DECODE_THREADS = 4
IMAGES_AHEAD = 64
_COLUMNS = ("uid", "key", "shard", "offset", "size", "caption", "url", "image_sha256")


class _Image(NamedTuple):
    """A row's image: its SHA-256 and perceptual hash, or the error class and detail."""

    sha256: bytes | None = None
    phash: int | None = None
    error: str = ""
    detail: str = ""


def plan_sets(view: View) -> list[Item]:
    """One item per evaluation set."""
    names = sorted(_config(view).sets)
    return [Item(f"set-{at:05d}", {"set": name, "number": at}) for at, name in enumerate(names)]


def work_set(view: View, item: Item) -> Output:
    """Hash, embed and index one evaluation set."""
    return benchmark_sets.make(item.payload["set"], item.payload["number"], _config(view))


def plan(view: View) -> list[Item]:
    """One item per source part."""
    return [Item(part_name(one["part"]), {"part": one["part"]}) for one in view.parts()]


def work(view: View, item: Item) -> Output:
    """Judge the rows of one source part."""
    config, part = _config(view), item.payload["part"]
    figures = _figures(view, part)
    samples = _samples(view, part, figures)
    uids = samples["uid"].to_numpy()
    images = list(_images(view, samples)) if config.reads_images else [_Image()] * len(uids)
    vectors = vector_parts.gather(view, uids) if config.compares_embeddings else None
    rows = Rows(
        samples,
        pl.Series("sha256", [one.sha256 for one in images], pl.Binary),
        _fetched_sha256(view, uids, wanted=config.image_hash),
        pl.Series("phash", [one.phash for one in images], pl.UInt64),
        vectors,
    )
    found = compare(rows, benchmark_sets.load_all(view.own, config), config)
    verdicts = _verdicts(view.stage, uids, found, images)
    files = {f"evidence/{item.name}.parquet": _evidence(uids, found)}
    if figures is not None:
        files[f"{KEPT}/{item.name}.parquet"] = figures.filter(verdicts.column("keep"))
    return Output(files, verdicts, _quarantine(samples, verdicts, images))


def _config(view: View) -> DecontaminateConfig:
    return DecontaminateConfig.model_validate(view.config)


def _figures(view: View, number: int) -> pa.Table | None:
    """Return the SELECTABLE rows of a part, where the stage before has parts of its own."""
    if not has_parts_of_its_own(view.previous):
        return None
    part = next(one for one in view.parts() if int(one["part"]) == number)
    return kept_figures(view, part)


def _samples(view: View, part: int, figures: pa.Table | None) -> pl.DataFrame:
    """Return the rows to judge. Raises: PartDamaged when SAMPLES lack one of them."""
    if figures is None:
        return pl.DataFrame(view.samples(part, _COLUMNS)).sort("uid")
    path = paths.join(view.described_by.path, f"{part_name(part)}.parquet")
    wanted = pl.DataFrame({"uid": figures.column("uid").to_numpy()})
    table = pl.DataFrame(store.read_table(path, _COLUMNS))
    found = table.join(wanted, on="uid", how="semi").sort("uid")
    if found.height != wanted.height:
        raise PartDamaged(f"{path} lacks rows that the {view.previous.stage} stage kept.")
    return found


def _images(view: View, samples: pl.DataFrame) -> Iterator[_Image]:
    """Yield what is compared of each row's image, in order."""
    config = _config(view)
    wants_phash = config.drop_at_phash_distance is not None
    if not wants_phash and samples["image_sha256"].null_count() == 0:
        yield from map(_Image, samples["image_sha256"])
        return
    places = samples.select("shard", "offset", "size").iter_rows()
    originals = read_originals(image_root_of(view), places)
    given = zip(originals, samples["image_sha256"], strict=True)
    yield from ahead(
        lambda one: _image(*one, max_pixels=config.max_pixels if wants_phash else None),
        given,
        num_threads=DECODE_THREADS,
        depth=IMAGES_AHEAD,
    )


def _image(data: bytes | None, expected: bytes | None, *, max_pixels: int | None) -> _Image:
    """Return what is compared of an image. Args: max_pixels: None, and it is not decoded."""
    if data is None:
        return _Image(error="unreadable_bytes", detail="the shard ends before the image")
    digest = hashlib.sha256(data).digest()
    if expected is not None and expected != digest:
        detail = "the image has changed since it was ingested (SHA-256)"
        return _Image(error="unreadable_bytes", detail=detail)
    if max_pixels is None:
        return _Image(digest)
    try:
        return _Image(digest, phash(decode(data, max_pixels=max_pixels)))
    except ImageError as error:
        return _Image(error=error.error_class, detail=error.detail)


def _fetched_sha256(view: View, uids: np.ndarray, *, wanted: bool) -> pl.Series:
    """Return the SHA-256 of each file as it was fetched; nulls where none was, or is not wanted.

    What is stored may be encoded anew: no file of an evaluation set would be equal to it.
    """
    if not wanted or "download" not in view.before or not len(uids):
        return pl.Series([None] * len(uids), dtype=pl.Binary)
    folder = view.before["download"].path
    shards = (shard_name(int(n), ".parquet") for n in np.unique(uids >> np.uint64(UID_ROW_BITS)))
    tables = (store.read_table(paths.join(folder, one), ("uid", "sha256")) for one in shards)
    listed = pl.concat([pl.DataFrame(one) for one in tables])
    found = pl.DataFrame({"uid": uids}).join(listed, on="uid", how="left", maintain_order="left")
    return found["sha256"].str.decode("hex")


def _verdicts(
    stage: str, uids: np.ndarray, found: Sequence[Found], images: Sequence[_Image]
) -> pa.Table:
    """Return the verdicts: the first method that found a row, its nearest item's score."""
    reasons = np.full(len(uids), "", object)
    scores, cutoffs = np.full(len(uids), np.nan), np.full(len(uids), np.nan)
    for one in found:
        reason = PREFIX + one.method
        is_larger_nearer = one.method in ("clip", "caption")
        row, first = np.unique(one.pairs.row, return_index=True)
        score = one.pairs.score[first]
        is_nearer = score > scores[row] if is_larger_nearer else score < scores[row]
        takes = (reasons[row] == "") | ((reasons[row] == reason) & is_nearer)
        reasons[row[takes]], cutoffs[row[takes]] = reason, one.cutoff
        scores[row[takes]] = score[takes]
    for at, image in enumerate(images):
        if image.error and not reasons[at]:
            reasons[at] = ledger.quarantine_reason(image.error)
    return ledger.verdicts(stage, uids, reasons=reasons, scores=scores, cutoffs=cutoffs)


def _evidence(uids: np.ndarray, found: Sequence[Found]) -> pa.Table:
    """Return EVIDENCE by uid, method in their order and set."""
    tables = [
        pl.DataFrame(
            {
                "uid": uids[one.pairs.row],
                "method": pl.repeat(one.method, len(one.pairs.row), eager=True),
                "set": pl.repeat(one.set_name, len(one.pairs.row), eager=True),
                "item": one.items.gather(one.pairs.item),
                "score": pl.Series(one.pairs.score).fill_nan(None),
                "num_items": one.pairs.num_items,
            }
        )
        for one in found
    ]
    none = pl.DataFrame(empty(EVIDENCE)).cast({"num_items": pl.Int64})
    table = pl.concat([none, *tables]).sort("uid", maintain_order=True)
    return conform(table.to_arrow(), EVIDENCE)


def _quarantine(samples: pl.DataFrame, verdicts: pa.Table, images: Sequence[_Image]) -> pa.Table:
    bad: list[Mapping[str, Any]] = [
        {**samples.row(at, named=True), "error": image.error, "detail": image.detail}
        for at, image in enumerate(images)
        if image.error and not str(verdicts.column("reason")[at]).startswith(PREFIX)
    ]
    names = ("uid", "key", "shard", "error", "detail")
    return ledger.quarantine([{name: one[name] for name in names} for one in bad])
