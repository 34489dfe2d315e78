"""MMBench's rules: which option an answer names, without a language model to ask.

Sources: bunny: VLMEvalKit's matching_util.py under its policy `exact_matching`; what it cannot read
went to a language model on the benchmark's server, and is wrong here. lmms: lmms-eval's
mmbench_evals.py and mcq_extract.py, task `mmbench_en_dev_static`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

from train.benchmarks.contract import Profile

BLANKED = str.maketrans(dict.fromkeys(".()[],:;!*#{}", " "))
MAX_FROM_END = 4
ANSWER_IS = re.compile(r"answer\s+is\s+\**([ABCD])\**", re.IGNORECASE)
REFUSALS = (
    "Sorry, I can't help with images of people yet.",
    "I can't process this file.",
    "I'm sorry, but without the image provided",
    "Cannot determine the answer",
)
LMMS_LETTERS = "ABCDE"
LMMS_FORMS = (
    *("{}.", "{},", "{}:", "{})", "{}).", "({})", "({})."),
    *(":{}", ":{},", ":{}.", ":{})", ":{})."),
)
LMMS_STRIPPED = ",.!?;:'\""
LMMS_MARKS = (("({})", 6), ("{}.", 5), ("{}:", 4), ("{})", 3), ("{} ", 2))
LMMS_SUBJECTS = ("answer", "correct answer", "best answer", "correct option", "best option")
LMMS_PHRASES = (
    *(f"{article}{one} is" for one in LMMS_SUBJECTS for article in ("the ", "")),
    *("the choice is", "choice is", "the correct choice is", "correct choice is"),
    *("i choose", "i select", "i pick", "my answer is", "my choice is"),
)
"""Its English phrases; those in Korean, Chinese and Japanese are left out."""


def named_option(text: str, options: Mapping[str, str], profile: Profile) -> str | None:
    """Return the letter of the option that an answer names, or None. options: letter -> text."""
    if profile == "lmms":
        letter = _lmms_letter(text) or _option_contained(text, options)
        return letter or _lmms_likeliest(text, "".join(sorted(options)))
    if any(refusal in text for refusal in REFUSALS):
        return None
    tokens = text.translate(BLANKED).split()
    present = [letter for letter in options if letter in tokens]
    if not present and "Z" in tokens:  # "Z": none of them
        return None
    if len(present) == 1 and tokens.index(present[0]) >= len(tokens) - MAX_FROM_END:
        return present[0]
    said = ANSWER_IS.search(text)
    if said and said[1].upper() in options:
        return said[1].upper()
    is_short = len(text) <= 2 * sum(len(option) for option in options.values())
    return _option_contained(text, options) if is_short else None


def _option_contained(text: str, options: Mapping[str, str]) -> str | None:
    """Return the only option whose text the answer contains."""
    lowered = text.lower()
    found = [letter for letter, option in options.items() if option.lower() in lowered]
    return found[0] if len(found) == 1 else None


def _lmms_letter(text: str) -> str | None:
    """Return the one letter that stands alone, or with one kind of punctuation, as a word."""
    words = text.split()
    alone = [letter for letter in LMMS_LETTERS if letter in words]
    is_article = "A" in words and len(words) > 3
    if len(alone) == 1 and not is_article:
        return alone[0]
    for form in LMMS_FORMS:
        found = [letter for letter in LMMS_LETTERS if form.format(letter) in words]
        if len(found) == 1:
            return found[0]
    return None


def _lmms_likeliest(text: str, letters: str) -> str | None:
    """Return the letter of the best kind of mark; of equal ones the last in the text."""
    bare = text.strip()
    for mark in LMMS_STRIPPED:
        bare = bare.strip(mark)
    padded = f" {bare} "
    found = list(_lmms_marks(padded, letters))
    if not found:
        found = [(0, padded.rfind(letter), letter) for letter in letters if letter in padded]
    return max(found, key=lambda one: one[:2])[2] if found else None


def _lmms_marks(padded: str, letters: str) -> Iterator[tuple[int, int, str]]:
    """Yield (weight, position, letter) of each mark in the text."""
    lowered, bare = padded.lower(), padded.strip()
    for mark, weight in LMMS_MARKS:
        for letter in letters:
            if mark.format(letter) in padded:
                yield weight, padded.rfind(mark.format(letter)), letter
    for phrase in LMMS_PHRASES:
        start = lowered.find(phrase)
        for letter in letters if start >= 0 else "":
            place = padded.find(letter, start + len(phrase))
            if place >= 0:
                yield 7, place, letter
    for letter in letters:
        if bare.startswith(letter) and not bare[1:2].isalpha():
            yield 10, 0, letter
        if bare.endswith(letter) and not bare[-2:-1].isalpha():
            yield 9, len(padded) - 1, letter
