"""Answers to VQA as the official evaluation, and the uploads made by M4C's processor, see them.

Facts: GT-Vision-Lab/VQA, vqaEvaluation/vqaEval.py (its punctuation, numbers, articles and
contractions, quirks included), and the M4C processor that LLaVA and Bunny run before an upload.
"""

from __future__ import annotations

import re
from functools import lru_cache

PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
ARTICLES = frozenset(("a", "an", "the"))
_DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
NUMBERS = {"none": "0", **{word: str(value) for value, word in enumerate(_DIGITS)}}

_COMMA_IN_NUMBER = re.compile(r"\d,\d")
_PERIOD = re.compile(r"\.(?!\d)")
_MAX_PERIODS = 32  # the official call passes a flag of this value where the count stands

_CONTRACTED = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't
haven't he'd he'd've he's how'd how'll how's I'd've I'm I've isn't it'd it'd've it'll ma'am mightn't
mightn't've might've mustn't must've needn't not've o'clock oughtn't 'ow's'at shan't she'd've
should've shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd someone'd've
someone'll someone's something'd something'd've something'll that's there'd there'd've there're
there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're
what's what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're
why's won't would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're
you've
"""


def _contractions() -> dict[str, str]:
    """Return each contraction with one apostrophe left out -> the contraction, and the odd three.

    Capitals stay as the official table has them: words are in lower case, so those never apply.
    """
    found = {"let's": "let's", "she's": "she's", "somebody'd": "somebodyd"}
    for word in _CONTRACTED.split():
        for place, letter in enumerate(word):
            if letter == "'":
                found[word[:place] + word[place + 1 :]] = word
    return found


CONTRACTIONS = _contractions()


def without_punctuation(text: str) -> str:
    """Return a text after the official step on punctuation.

    A mark goes when it has a blank beside it anywhere in the text, or when a comma stands between
    two digits; else it becomes a blank. Then "." goes where no digit follows.
    """
    drops_all = _COMMA_IN_NUMBER.search(text) is not None
    found = text
    for mark in PUNCTUATION:
        drops = drops_all or f"{mark} " in text or f" {mark}" in text
        found = found.replace(mark, "" if drops else " ")
    return _PERIOD.sub("", found, count=_MAX_PERIODS)


def as_words(text: str) -> str:
    """Return a text after the official step on words: lower case, digits, no articles."""
    words = [NUMBERS.get(word, word) for word in text.lower().split()]
    kept = [word for word in words if word not in ARTICLES]
    return " ".join(CONTRACTIONS.get(word, word) for word in kept)


def on_one_line(text: str) -> str:
    """Return a text with newlines and tabs as blanks, and none around it."""
    return text.replace("\n", " ").replace("\t", " ").strip()


@lru_cache(maxsize=1 << 16)  # people give the same short answers again and again
def official(text: str) -> str:
    """Return a text as the official evaluation compares it."""
    return as_words(without_punctuation(on_one_line(text)))


def m4c(text: str) -> str:
    """Return a text as M4C's processor prepares it for an upload.

    "," and "?" go first, and "'s" is cut off its word: "women's" -> "women 's".
    """
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    return as_words(without_punctuation(on_one_line(text)))
