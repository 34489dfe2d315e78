"""The ingest stage: what comes in, as SAMPLES with fixed uids.

    webdataset, img2dataset   tar shards of image + caption    -> curate/media/tar_source.py
    clip_retrieval            published CLIP embeddings         -> curate/vectors/published.py
    url_table                 URLs and captions, no images yet  -> curate/rows/url_source.py
    llava_json                conversations in JSON files       -> curate/rows/llava_source.py

`shard_index` is a shard's position in the source's list (numeric suffix, then name), so a shard
appended later is numbered on and no other uid changes. Of tables of URLs the shards are slices.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from curate.rows import llava_source, score_tables, url_source
from curate.source_config import SourceConfig
from manifests import paths
from manifests.strict import Strict
from manifests.work import Item, Output, View, part_name

SOURCE_SUFFIX = {"webdataset": ".tar", "img2dataset": ".tar", "clip_retrieval": ".npy"}


def source_of(view: View) -> SourceConfig:
    """Return the view's source. Raises: TypeError when the run gave something else."""
    if not isinstance(view.source, SourceConfig):
        raise TypeError(f"not a source: {view.source!r}")
    return view.source


@lru_cache(maxsize=8)
def shards_of(source: SourceConfig) -> tuple[str, tuple[str, ...]]:
    """Return (root, shard names below it in shard order) of a source."""
    if source.is_embeddings:
        from curate.vectors import published

        return published.shards(source.location)
    if source.is_urls:
        return url_source.files_of(source)
    root, names = paths.expand(source.location, suffix=SOURCE_SUFFIX[source.kind])
    return root, tuple(names)


def root_of(view: View) -> str:
    """Return the folder of the source's own files."""
    return shards_of(source_of(view))[0]


def image_root_of(view: View) -> str:
    """Return the folder to which `shard` is relative in the SAMPLES that tell where images lie."""
    described_by = view.described_by
    return root_of(view) if described_by.stage == "ingest" else described_by.path


def identity(source: SourceConfig) -> list[list[Any]]:
    """Return [name, size, modification time] of each file read: a changed file is another input.

    Files that are joined to the source's own come last. Lists the source anew; later calls in this
    process use that list.
    """
    if source.is_conversations:
        llava_source.forget_listing()
        return [[one.shard, *paths.identity_of(one.path)] for one in llava_source.files_of(source)]
    shards_of.cache_clear()
    if source.is_urls:
        return url_source.identity(source)
    if source.is_embeddings:
        from curate.vectors import published

        published.forget_listing()
    root, names = shards_of(source)
    found = [
        [name, *paths.identity_of(paths.join(root, name))]
        for name in _identity_names(source, root, names)
    ]
    return found + score_tables.identity(source.join)


def warnings(source: SourceConfig, sections: Mapping[str, Strict]) -> list[str]:
    """Return what a person should know of the source before a run uses it."""
    if source.is_embeddings:
        from curate.vectors import published

        return published.warnings(source, sections)
    return url_source.warnings(source, sections) if source.is_urls else []


def plan(view: View) -> list[Item]:
    """One item per part: `shards_per_part` consecutive shards."""
    source = source_of(view)
    if source.is_conversations:
        return llava_source.plan(source)
    if source.is_urls:
        return url_source.plan(source)
    root, names = shards_of(source)
    if source.is_embeddings:
        from curate.vectors import published

        published.check_files(root, names)
        published.check_columns(source, root, names)
    step = source.shards_per_part
    starts = range(0, len(names), step)
    return [_item(root, names[i : i + step], part, i) for part, i in enumerate(starts)]


def work(view: View, item: Item) -> Output:
    """Scan one part's shards."""
    source = source_of(view)
    if source.is_conversations:
        return llava_source.ingest_part(source, item.payload)
    if source.is_urls:
        return url_source.ingest_part(source, item.payload)
    root = root_of(view)
    shards = list(enumerate(item.payload["shards"], start=item.payload["first_shard_index"]))
    if source.is_embeddings:
        from curate.vectors import published

        return published.ingest_part(source, root, item.payload["part"], shards)
    from curate.media import tar_source

    return tar_source.ingest_part(source, root, item.payload["part"], shards)


def _item(root: str, names: tuple[str, ...], part: int, first: int) -> Item:
    payload = {"part": part, "first_shard_index": first, "shards": list(names)}
    cost = float(sum(paths.size_of(paths.join(root, name)) or 0 for name in names))
    return Item(part_name(part), payload, cost)


def _identity_names(source: SourceConfig, root: str, names: tuple[str, ...]) -> list[str]:
    if source.is_embeddings:
        from curate.vectors import published

        return [one for name in names for one in published.companions(root, name)]
    companions = [name.removesuffix(".tar") + ".parquet" for name in names]
    return [*names, *companions]
