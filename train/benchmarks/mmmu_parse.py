"""MMMU's rules: which option an answer names, and whether a short answer holds the right one.

Sources: MMMU's eval_utils.py, which Bunny's eval/mmmu and lmms-eval 0.7.3 both follow. Upstream
draws a letter for an answer that names none from one random stream, so that the score depends on
the order of the questions; here each id has a draw of its own, which is counted.
"""

from __future__ import annotations

import random
import re
import string
from collections.abc import Sequence

from train.benchmarks.contract import Profile

SEED = 42
STRIPPED = ",.!?;:'"
MIN_WORDS_ABOVE = 5
CUES = ("could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ")
TRIVIAL = frozenset(":,.!?;'")
WITH_COMMAS = re.compile(r"-?\b\d{1,3}(?:,\d{3})+\b")
SCIENTIFIC = re.compile(r"-?\d+(?:\.\d+)?[eE][+-]?\d+")
SIMPLE = re.compile(r"-?(?:\d+\.\d+|\.\d+|\d+\b)(?![eE][+-]?\d+)(?![,\d])")


def letters_of(num_options: int) -> str:
    """Return the letters of so many options: 3 -> "ABC"."""
    return string.ascii_uppercase[:num_options]


def named_option(text: str, options: Sequence[str], profile: Profile) -> str | None:
    """Return the letter of the option that an answer names last, or None when it names none.

    Marks are looked for in this order: "(A)"; " A " (bunny), or "A " and then "A." (lmms, so that
    "USA today" names A); the option's text, in an answer of more than five words. Where several
    options are named the last occurrence counts, and of equals the first letter; for letters
    without brackets that is the last " A ", in both profiles.
    """
    padded = f" {_stripped(text)} "
    letters = letters_of(len(options))
    plain = [" {} "] if profile == "bunny" else ["{} ", "{}."]
    for mark, place in [("({})", "({})"), *((mark, " {} ") for mark in plain)]:
        named = [one for one in letters if mark.format(one) in padded]
        if named:
            return max(named, key=lambda one: padded.rfind(place.format(one)))
    if len(padded.split()) <= MIN_WORDS_ABOVE:
        return None
    lowered = padded.lower()
    texts = dict(zip(letters, (option.lower() for option in options), strict=True))
    named = [one for one in letters if texts[one] in lowered]
    return max(named, key=lambda one: lowered.rfind(texts[one])) if named else None


def _stripped(text: str) -> str:
    """Strip each mark once, in this order: a blank, or a mark that comes later, stops it."""
    for mark in STRIPPED:
        text = text.strip(mark)
    return text


def drawn_option(question_id: str, num_options: int) -> str:
    """Return the letter that stands for an unreadable answer: the same for this id, always."""
    return random.Random(f"{SEED}:{question_id}").choice(letters_of(num_options))


def short_answers(text: str) -> list[str | float]:
    """Return what an open answer may mean: its telling ends, and the numbers in them.

    Per line, the end counts that is shortest after a cue ("is ", "answer ", on the last line also
    "="); without any cue, the whole text.
    """
    lowered = text.strip().strip(".").lower()
    lines = lowered.split("\n")
    ends = [_end(line, is_last=line_no == len(lines)) for line_no, line in enumerate(lines, 1)]
    telling = [end for end in ends if end and end not in TRIVIAL] or [lowered]
    numbers = [number for end in telling for number in numbers_in(end)]
    return [form for found in [*telling, *numbers] for form in normal(found)]


def _end(line: str, *, is_last: bool) -> str:
    shortest = ""
    for cue in (*CUES, "=") if is_last else CUES:
        if cue in line:
            end = line.rpartition(cue)[2].strip()
            # An empty end is taken, and then gives way to any: so does the official code.
            shortest = end if not shortest or len(end) < len(shortest) else shortest
    return shortest


def numbers_in(text: str) -> list[str]:
    """Return numbers as written: with thousands' commas, scientific, simple, in that order."""
    return [one for pattern in (WITH_COMMAS, SCIENTIFIC, SIMPLE) for one in pattern.findall(text)]


def normal(text: str) -> list[str | float]:
    """Return a number rounded to 2 decimals, or lower-case text.

    A single letter becomes two strings, with a blank before or after it, so that it is not found
    in every word.
    """
    text = text.strip()
    try:
        return [round(float(text.replace(",", "")), 2)]
    except ValueError:
        text = text.lower()
        return [f" {text}", f"{text} "] if len(text) == 1 else [text]


def is_right(text: str, golds: Sequence[str]) -> bool:
    """Return whether an open answer holds one of the right texts, or equals one as a number."""
    wanted = [form for gold in golds for form in normal(gold)]
    wanted_texts = [form for form in wanted if isinstance(form, str)]
    for found in short_answers(text):
        if isinstance(found, str):
            if any(gold in found for gold in wanted_texts):
                return True
        elif found in wanted:
            return True
    return False
