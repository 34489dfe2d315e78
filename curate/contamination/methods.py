"""The methods by which rows are compared with evaluation sets, in the order in which they judge.

id_list      a listed image id names the row        no score
image_hash   the image files are equal, as they     no score
             are or as they were fetched
phash        the perceptual hashes nearly are       bits that differ
clip         the image embeddings are near          their exact dot
caption      the captions share n-grams of words    the share; see curate/contamination/ngrams.py
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import polars as pl
import pyarrow as pa

from curate.contamination import near_images, ngrams, phash
from curate.contamination.benchmark_sets import Made
from curate.contamination.config import DecontaminateConfig, where_ids
from curate.contamination.pairs import Ints, Pairs, Ranked, Uint64s, equal_pairs, ranked
from curate.rows.id_lists import image_names, read_image_ids
from curate.vectors.exact import Float16Rows

METHODS = ("id_list", "image_hash", "phash", "clip", "caption")
_URL_PATH = r"(?s)[?#].*\z"


@dataclass(frozen=True, slots=True)
class Rows:
    """The rows to judge: n of them, by ascending uid.

    samples: uid, key, url, caption. sha256: Binary [n], of the image files; fetched_sha256: of the
    files that were downloaded, where they were encoded anew; phash: UInt64 [n], null for a flat
    picture; all of nulls where they are not compared. vectors: float16 [n, d], or None.
    """

    samples: pl.DataFrame
    sha256: pl.Series
    fetched_sha256: pl.Series
    phash: pl.Series
    vectors: Float16Rows | None


@dataclass(frozen=True, slots=True)
class Found:
    """What one method found in one set. items: what the set calls its items, by position."""

    method: str
    set_name: str
    pairs: Ranked
    items: pl.Series
    cutoff: float


def compare(rows: Rows, sets: Sequence[Made], config: DecontaminateConfig) -> list[Found]:
    """Return what the methods that are switched on find, in the order of METHODS, sets by name."""
    by_method: list[Iterator[Found]] = [_by_id(rows, config)]
    if config.image_hash:
        by_method.append(_by_image_hash(rows, sets, config))
    if config.drop_at_phash_distance is not None:
        by_method.append(_by_phash(rows, sets, config, config.drop_at_phash_distance))
    if config.drop_above_similarity is not None and rows.vectors is not None:
        by_method.append(_by_clip(rows.vectors, sets, config, config.drop_above_similarity))
    if config.drop_above_ngram_overlap is not None:
        by_method.append(_by_caption(rows, sets, config, config.drop_above_ngram_overlap))
    return [one for found in by_method for one in found]


def _by_id(rows: Rows, config: DecontaminateConfig) -> Iterator[Found]:
    urls = rows.samples["url"].fill_null("").str.replace(_URL_PATH, "")
    columns = {"key": rows.samples["key"], "url": urls}
    for name, one in sorted(config.id_lists.items()):
        ids = read_image_ids(one.ids, where=where_ids(name))
        names = [form for column in one.match for form in image_names(columns[column])]
        pairs = _first_equal(names, ids)
        yield Found("id_list", name, pairs, ids, np.nan)


def _first_equal(names: Sequence[pl.Series], ids: pl.Series) -> Ranked:
    """Return each row with the id that the first of its names that has one means."""
    places = pl.DataFrame({"id": ids, "place": np.arange(len(ids))})
    found = np.full(len(names[0]), -1, np.int64)
    for name in names:
        at = pl.DataFrame({"id": name}).join(places, on="id", how="left", maintain_order="left")
        place = at["place"].fill_null(-1).to_numpy()
        found = np.where(found < 0, place, found)
    row = np.flatnonzero(found >= 0)
    return Ranked(row, found[row], np.full(len(row), np.nan), np.ones(len(row), np.int64))


def _by_image_hash(
    rows: Rows, sets: Sequence[Made], config: DecontaminateConfig
) -> Iterator[Found]:
    for one in sets:
        theirs = pl.Series(one.images.column("sha256"))
        pairs = [_equal(ours, theirs) for ours in (rows.sha256, rows.fetched_sha256)]
        row, item = np.unique(np.concatenate(pairs, axis=1), axis=1)
        every = Pairs(row, item, np.full(len(row), np.nan))
        found = ranked(every, most=config.max_evidence, largest_first=False)
        yield Found("image_hash", one.name, found, _items(one.images), np.nan)


def _equal(ours: pl.Series, theirs: pl.Series) -> Ints:
    """Return the positions of equal digests, int64 [2, p]; null equals nothing."""
    both = pl.concat([ours, theirs]).rank("dense").fill_null(0).to_numpy()
    mine, known = np.split(both.astype(np.int64), [len(ours)])
    at = np.flatnonzero(mine)
    pairs = equal_pairs(mine[at], known)
    return np.stack([at[pairs.row], pairs.item])


def _by_phash(
    rows: Rows, sets: Sequence[Made], config: DecontaminateConfig, at_most: int
) -> Iterator[Found]:
    ours, at = _known(rows.phash)
    for one in sets:
        theirs, known = _known(pl.Series(one.images.column("phash")))
        found = phash.near_pairs(ours, theirs, at_most=at_most, most=config.max_evidence)
        items = _items(one.images).gather(known)
        yield Found("phash", one.name, _of(at, found), items, float(at_most))


def _by_clip(
    vectors: Float16Rows, sets: Sequence[Made], config: DecontaminateConfig, above: float
) -> Iterator[Found]:
    for one in sets:
        if one.rows is not None:
            most = config.max_evidence
            found = near_images.near_pairs(vectors, one.rows, above=above, most=most)
            yield Found("clip", one.name, found, _items(one.images), above)


def _by_caption(
    rows: Rows, sets: Sequence[Made], config: DecontaminateConfig, above: float
) -> Iterator[Found]:
    captions = rows.samples["caption"].to_list()
    for one in sets:
        found = ngrams.overlapping(
            captions,
            _text_of(one.texts),
            one.grams,
            num_words=config.ngram_words,
            above=above,
            most=config.max_evidence,
        )
        yield Found("caption", one.name, found, _items(one.texts), above)


def _text_of(texts: pa.Table) -> Callable[[int], str]:
    words = texts.column("words")
    return lambda item: str(words[item].as_py())


def _items(table: pa.Table) -> pl.Series:
    return pl.Series(table.column("item"))


def _known(hashes: pl.Series) -> tuple[Uint64s, Ints]:
    """Return the hashes that there are, and where."""
    at = np.flatnonzero(hashes.is_not_null().to_numpy())
    return hashes.gather(at).to_numpy().astype(np.uint64), at


def _of(at: Ints, found: Ranked) -> Ranked:
    """Return pairs of some rows as pairs of all rows. Args: at: which rows those were."""
    return found._replace(row=at[found.row])
