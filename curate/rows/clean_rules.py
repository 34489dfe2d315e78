"""Why a mended conversation is dropped. The first rule that applies gives the reason.

no_rounds              nothing is left but a system turn
unknown_role           a turn is by neither system, human nor gpt
roles_not_alternating  after a system turn: human, gpt, human, gpt, ...; loaders assert it
too_many_turns         more turns, or images, than a table can count
empty_turn             a turn says nothing; a question may be an image alone
image_count            placeholders and images differ in number
message_is_empty       SVIT's failed GPT-4 answers (BAAI-DCAI/Visual-Instruction-Tuning, issue 5)
repeated_output        the answer stands in the question (nlpxucan/WizardLM, issue 8)
benchmark_leakage      an image is one of a benchmark's
too_long               more tokens than the model is trained on
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import polars as pl

from curate.rows.id_lists import image_names
from curate.rows.turns import GPT, HUMAN, SYSTEM, UNKNOWN, Images, Mask, Turns

MAX_ENTRIES = (1 << 16) - 1
"""Turns or images of one row; the tables count both in 16 bits."""
FAILED_ANSWER = r"(?i-u)message is empty"
"""Regular expression: of polars' ways to search regardless of case it is by far the fastest."""


class BenchmarkImages(NamedTuple):
    """Names of a benchmark's images, and where they are looked for. ids: String [k]."""

    ids: pl.Series
    under: str


def shape_rules(turns: Turns, images: Images) -> dict[str, Mask]:
    """Return reason -> rows it applies to, bool [n], of the rules on turns and placeholders."""
    return {
        "no_rounds": turns.counts == turns.has_system,
        "unknown_role": turns.any(turns.code == UNKNOWN),
        "roles_not_alternating": turns.any(_out_of_turn(turns)),
        "too_many_turns": np.maximum(turns.counts, images.counts) > MAX_ENTRIES,
        "empty_turn": turns.any(_says_nothing(turns)),
        "image_count": turns.sums(turns.num_placeholders()) != images.counts,
    }


def has_failed_answer(turns: Turns, images: Images) -> Mask:
    """Return the rows with images whose answer is an error message, bool [n]."""
    looked_at = (turns.code == GPT) & (images.counts > 0)[turns.row]
    text = turns.text.filter(pl.Series(looked_at))
    looked_at[looked_at] = text.str.contains(FAILED_ANSWER).to_numpy()
    return turns.any(looked_at)


def repeats_question(turns: Turns, min_chars: int) -> Mask:
    """Return the rows with an answer that stands in the question before it, bool [n].

    Both are compared without outer white space. Args: min_chars: shorter answers, such as the
    choice of an option, may repeat the question.
    """
    answers = np.flatnonzero((turns.code[1:] == GPT) & (turns.code[:-1] == HUMAN)) + 1
    answers = answers[turns.row[answers] == turns.row[answers - 1]]
    answer, question = turns.text[answers].str.strip_chars(), turns.text[answers - 1]
    fits = answer.str.len_bytes() <= question.str.len_bytes()
    fits &= answer.str.len_chars() >= min_chars
    # Few are left. Polars would make an only answer a regular expression, whose size is limited.
    pairs = zip(answer.filter(fits), question.filter(fits), strict=True)
    marked = np.zeros(len(turns.code), bool)
    marked[answers[fits.to_numpy()]] = [one in other for one, other in pairs]
    return turns.any(marked)


def is_leaked(images: Images, benchmarks: Sequence[BenchmarkImages]) -> Mask:
    """Return the rows with an image of a benchmark, bool [n]; see curate/rows/id_lists.py."""
    forms = image_names(images.path)
    marked = np.zeros(len(images.path), bool)
    for one in benchmarks:
        below = images.path.str.starts_with(one.under).to_numpy()
        for form in forms:
            marked |= below & form.is_in(one.ids.implode()).to_numpy()
    return images.any(marked)


def _out_of_turn(turns: Turns) -> Mask:
    """Return the turns that do not have the role of their place, bool [turns]."""
    place = np.arange(len(turns.code)) - (turns.starts[:-1] + turns.has_system)[turns.row]
    expected = np.where(place < 0, SYSTEM, np.where(place % 2 == 0, HUMAN, GPT))
    found: Mask = turns.code != expected
    return found


def _says_nothing(turns: Turns) -> Mask:
    """Return the turns without text, but for questions that are an image, bool [turns]."""
    blank = turns.is_blank()
    asked = blank & (turns.code == HUMAN)
    images = turns.text.filter(pl.Series(asked)).str.strip_chars().str.len_bytes() > 0
    blank[asked] = ~images.to_numpy()
    return blank
