"""What rows are compared with of an evaluation set: made once, as tables, then read by every item.

sets/set-00000/images.parquet   IMAGES: an item per image that could be read
sets/set-00000/img_emb.npy      float16 [n, d], unit norm: its embeddings, in that order
sets/set-00000/texts.parquet    TEXTS: an item per text, with its words
sets/set-00000/grams.parquet    GRAMS: hashes of the texts' n-grams, ascending
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import islice
from typing import Any

import numpy as np
import pyarrow as pa

from curate.contamination import benchmark_files
from curate.contamination.benchmark_files import SetImage
from curate.contamination.config import BenchmarkSet, DecontaminateConfig
from curate.contamination.ngrams import GramIndex, index_of, words_of
from curate.contamination.phash import phash
from curate.media.images import ImageError, decode
from curate.vectors import clip_model, exact
from curate.vectors.clip_model import ClipModel, Pixels
from curate.vectors.exact import Float16Rows
from curate.vectors.halving import Halving
from manifests import paths, store
from manifests.errors import UserError
from manifests.work import Output, StageDir

IMAGES = pa.schema([("item", pa.string()), ("sha256", pa.binary(32)), ("phash", pa.uint64())])
TEXTS = pa.schema([("item", pa.string()), ("words", pa.string())])
GRAMS = pa.schema([("gram", pa.uint64()), ("text", pa.uint32())])
_SHOWN = 5


@dataclass(frozen=True, slots=True)
class Made:
    """A set as it was made. rows: float16 [n, d] of the n images, None without embeddings.

    images: IMAGES. texts: TEXTS. Both are of no rows where the set has none.
    """

    name: str
    images: pa.Table
    rows: Float16Rows | None
    texts: pa.Table
    grams: GramIndex


@dataclass(slots=True)
class _Seen:
    """What was seen of a set's images; problems are (name, why) of those without use."""

    images: list[dict[str, Any]] = field(default_factory=list)
    rows: list[Float16Rows] = field(default_factory=list)
    problems: list[tuple[str, str]] = field(default_factory=list)


def folder_of(number: int) -> str:
    """Return where the set of that number lies, below the stage's directory."""
    return f"sets/set-{number:05d}"


def make(name: str, number: int, config: DecontaminateConfig) -> Output:
    """Return the files of a set. Raises: UserError for what cannot be read."""
    given = config.sets[name]
    files: dict[str, Any] = {}
    notes: dict[str, Any] = {"set": name}
    base = folder_of(number)
    if given.images:
        seen = _seen(name, given, config)
        _refuse(name, seen.problems, config)
        files[f"{base}/images.parquet"] = pa.Table.from_pylist(seen.images, IMAGES)
        if seen.rows:
            files[f"{base}/img_emb.npy"] = np.concatenate(seen.rows)
        unreadable = [f"{one}: {why}" for one, why in seen.problems]
        notes |= {"images": len(seen.images), "unreadable": unreadable}
    if given.texts:
        texts, num_short = _texts(name, given, config)
        index = index_of(texts.column("words").to_pylist(), config.ngram_words)
        files[f"{base}/texts.parquet"] = texts
        files[f"{base}/grams.parquet"] = pa.table([index.gram, index.text], schema=GRAMS)
        notes |= {"texts": texts.num_rows, "texts_too_short": num_short}
    return Output(files=files, notes=notes)


def load_all(stage: StageDir, config: DecontaminateConfig) -> list[Made]:
    """Return the sets of a stage, by name."""
    return [_load(stage.path, number, name) for number, name in enumerate(sorted(config.sets))]


@lru_cache(maxsize=64)
def _load(path: str, number: int, name: str) -> Made:
    base = paths.join(path, folder_of(number))
    grams = _table(base, "grams.parquet", GRAMS)
    index = GramIndex(*(grams.column(one).to_numpy() for one in GRAMS.names))
    return Made(
        name,
        _table(base, "images.parquet", IMAGES),
        _array(base, "img_emb.npy"),
        _table(base, "texts.parquet", TEXTS),
        index,
    )


def _table(base: str, name: str, schema: pa.Schema) -> pa.Table:
    path = paths.join(base, name)
    return schema.empty_table() if paths.size_of(path) is None else store.read_table(path)


def _array(base: str, name: str) -> Float16Rows | None:
    path = paths.join(base, name)
    return None if paths.size_of(path) is None else store.read_array(path)


def _seen(name: str, given: BenchmarkSet, config: DecontaminateConfig) -> _Seen:
    """Look at the images of a set, a batch of the model at a time."""
    seen = _Seen()
    images = benchmark_files.read_images(benchmark_files.image_files(name, given.images))
    embed = config.embed if config.compares_embeddings else None
    if embed is None:
        for image in images:
            _look(image, None, config.max_pixels, seen)
        return seen
    named = clip_model.find(embed.model, embed.pretrained)
    clip_model.check_known(named)
    clip = clip_model.load(named, gpu_precision=embed.gpu_precision)
    with clip_model.pinned_threads(embed.num_threads):
        _embed(clip, config, images, seen)
    return seen


def _embed(
    clip: ClipModel, config: DecontaminateConfig, images: Iterator[SetImage], seen: _Seen
) -> None:
    assert config.embed is not None, "its model embeds them"
    batch_size = config.embed.batch_size
    halving = Halving(batch_size)
    while some := list(islice(images, batch_size)):
        start = len(seen.images)
        looked = (_look(image, clip, config.max_pixels, seen) for image in some)
        pixels = [one for one in looked if one is not None]
        if not pixels:
            continue
        batch = np.stack(pixels)
        found = halving.run(
            lambda at, px=batch: clip_model.encode_images(clip, px[at]),  # type: ignore[misc]
            len(batch),
        )
        _keep(np.concatenate([one.cpu().numpy() for one in found]), start, seen)


def _keep(rows: Float16Rows, start: int, seen: _Seen) -> None:
    """Add embeddings to the images from `start` on, which lose those that cannot be compared."""
    codes = exact.reject_reasons(rows)
    looked, seen.images = seen.images[start:], seen.images[:start]
    for image, code in zip(looked, codes, strict=True):
        if code:
            seen.problems.append((image["item"], exact.REJECT_REASONS[code]))
        else:
            seen.images.append(image)
    seen.rows.append(rows[codes == 0])


def _look(image: SetImage, clip: ClipModel | None, max_pixels: int, seen: _Seen) -> Pixels | None:
    """Note an image's digests, or what is wrong with it; return what the model sees, if any."""
    if image.error:
        seen.problems.append((image.name, image.error))
        return None
    try:
        picture = decode(image.data, max_pixels=max_pixels)
        pixels = None if clip is None else clip_model.prepare(clip, picture)
    except ImageError as error:
        seen.problems.append((image.name, str(error)))
        return None
    digest = hashlib.sha256(image.data).digest()
    seen.images.append({"item": image.name, "sha256": digest, "phash": phash(picture)})
    return pixels


def _refuse(name: str, problems: Sequence[tuple[str, str]], config: DecontaminateConfig) -> None:
    if not problems or config.skip_unreadable:
        return
    shown = "; ".join(f"{one} ({why})" for one, why in problems[:_SHOWN])
    more = f"; and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
    raise UserError(
        f"{len(problems)} images of the evaluation set {name!r} cannot be read: {shown}{more}.",
        "What is not seen cannot be looked for among the rows.",
        "Mend or remove them, or leave them out with decontaminate.skip_unreadable: true.",
    )


def _texts(name: str, given: BenchmarkSet, config: DecontaminateConfig) -> tuple[pa.Table, int]:
    """Return TEXTS, and how many texts have too few words."""
    items, words, num_short = [], [], 0
    for file in benchmark_files.text_files(name, given.texts):
        for item, text in benchmark_files.read_texts(file, given.column):
            found = words_of(text)
            if len(found) < config.min_text_words:
                num_short += bool(text.strip())
                continue
            items.append(item)
            words.append(" ".join(found))
    return pa.table([items, words], schema=TEXTS), num_short
