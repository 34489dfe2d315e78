"""Texts that share n-grams of words.

The words of a text are the runs of letters and digits of its NFKC form in lower case; its n-grams
are the different runs of n words. For a caption c and a text t, both of at least n words,

    overlap(c, t) = |grams(c) and grams(t)| / min(|grams(c)|, |grams(t)|)

which is 1 where one contains the other. Where either is shorter, it is 1 if their words are the
same, one by one, else 0. A script without spaces has sentences for words: only whole ones match.

Hashes of n-grams only say which pairs to look at; the words themselves decide.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from curate.contamination.pairs import Pairs, Ranked, Uint64s, joined, ranked

_WORD = re.compile(r"[^\W_]+")
_ROWS_PER_BLOCK = 1 << 14


class GramIndex(NamedTuple):
    """Where to look for n-grams. gram uint64 [g], ascending; text uint32 [g], its position."""

    gram: Uint64s
    text: npt.NDArray[np.uint32]


def words_of(text: str) -> list[str]:
    """Return the words. Example: "A ﬁne-looking DOG!" -> ["a", "fine", "looking", "dog"]."""
    return _WORD.findall(unicodedata.normalize("NFKC", text).lower())


def grams_of(words: Sequence[str], num_words: int) -> set[str]:
    """Return the n-grams, words joined by spaces; a shorter text is its own only one, as a whole.

    No n-gram of a long text equals a short text: it has more words. No words: none.
    """
    if not words:
        return set()
    last = max(len(words) - num_words, 0)
    return {" ".join(words[at : at + num_words]) for at in range(last + 1)}


def overlap(caption: set[str], text: set[str]) -> float:
    """Return the shared share of the smaller set of n-grams, 0..1; 0 where one is empty."""
    smaller = min(len(caption), len(text))
    return len(caption & text) / smaller if smaller else 0.0


def index_of(texts: Iterable[str], num_words: int) -> GramIndex:
    """Return the index of some texts. Args: texts: each its words joined by spaces."""
    grams, counts = array("Q"), array("I")
    for text in texts:
        found = grams_of(text.split(" ") if text else [], num_words)
        grams.extend(map(_hash, found))
        counts.append(len(found))
    gram = np.frombuffer(grams, np.uint64) if grams else np.empty(0, np.uint64)
    owner = np.repeat(np.arange(len(counts), dtype=np.uint32), np.array(counts, np.int64))
    order = np.lexsort((owner, gram))
    return GramIndex(gram[order], owner[order])


def overlapping(
    captions: Sequence[str],
    text_of: Callable[[int], str],
    index: GramIndex,
    *,
    num_words: int,
    above: float,
    most: int,
) -> Ranked:
    """Return the pairs whose overlap is above a share (strictly), the `most` largest of each row.

    Args: text_of: position -> the text's words joined by spaces, as they were indexed.
    """
    if not len(index.gram):
        return joined([])
    found = []
    for top in range(0, len(captions), _ROWS_PER_BLOCK):
        some = captions[top : top + _ROWS_PER_BLOCK]
        grams = [grams_of(words_of(one), num_words) for one in some]
        judged = list(_judged(grams, text_of, index, num_words, above))
        row, item = (np.array([one[at] for one in judged], np.int64) for at in (0, 1))
        score = np.array([one[2] for one in judged], np.float64)
        found.append(ranked(Pairs(row + top, item, score), most=most, largest_first=True))
    return joined(found)


def _judged(
    grams: Sequence[set[str]],
    text_of: Callable[[int], str],
    index: GramIndex,
    num_words: int,
    above: float,
) -> Iterator[tuple[int, int, float]]:
    for row, item in _candidates(grams, index):
        text = text_of(item)
        score = overlap(grams[row], grams_of(text.split(" "), num_words))
        if score > above:
            yield row, item, score


def _candidates(grams: Sequence[set[str]], index: GramIndex) -> list[tuple[int, int]]:
    """Return the (row, text) that share the hash of an n-gram, each once, in order."""
    row = np.repeat(np.arange(len(grams)), [len(one) for one in grams])
    hashed = np.array([_hash(gram) for one in grams for gram in one], np.uint64)
    first, last = (np.searchsorted(index.gram, hashed, side=side) for side in ("left", "right"))
    met = np.flatnonzero(last > first)
    pairs = {(int(row[at]), int(text)) for at in met for text in index.text[first[at] : last[at]]}
    return sorted(pairs)


def _hash(gram: str) -> int:
    return int.from_bytes(hashlib.blake2b(gram.encode(), digest_size=8).digest(), "little")
