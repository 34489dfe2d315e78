"""What is repaired in a conversation, instead of dropping it.

blank_system_turn     a first system turn that says nothing is taken away
leading_gpt_turn      an answer before the first question is taken away, as LLaVA's loader does
dangling_human_turn   questions at the end that nobody answers are taken away: Bunny's and LLaVA's
                      preprocessing would give the whole row no label
end_string            a marker that a tokenizer reads as an end of sequence or a new turn gets a
                      space after its first character: else a user's text could end the answer, and
                      Bunny's preprocessing would give the whole row no label

A clean stage stores the names of a row's mends, not the mended row: `mend` makes it again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
import polars as pl
import pyarrow as pa
from pydantic import field_validator

from curate.media.llava_rows import IMAGE_PLACEHOLDER
from curate.rows.turns import BLANK, GPT, HUMAN, SYSTEM, Mask, Turns
from manifests.strict import Strict

END_STRING = "end_string"
SEPARATOR = ","

Names = npt.NDArray[np.object_]


class MendConfig(Strict):
    """What `mend` must know beside the names of the mends."""

    end_strings: list[str] = [
        *("</s>", "<|endoftext|>", "<|im_end|>", "<|im_start|>"),
        *("<|end_of_text|>", "<|eot_id|>", "<|end|>"),
    ]
    """Markers of the end of a sequence or turn, broken in every turn's text. By default those of
    Llama 1 to 3, Phi, Qwen and their like, as one mix may train any of them."""

    @field_validator("end_strings")
    @classmethod
    def _can_be_broken(cls, strings: list[str]) -> list[str]:
        for one in strings:
            # A string with a space in it could come to be by breaking another.
            if len(one) < 2 or any(char.isspace() for char in one):
                raise ValueError(f"{one!r} should be 2 or more characters, none of them a space")
            if one in IMAGE_PLACEHOLDER or IMAGE_PLACEHOLDER in one:
                raise ValueError(f"{one!r} would break {IMAGE_PLACEHOLDER}, an image's place")
        return strings


def blank_system_turn(turns: Turns) -> Mask:
    """Return the system turns in front that say nothing, bool [turns]."""
    blank: Mask = turns.code == SYSTEM
    blank[blank] = turns.text.filter(pl.Series(blank)).str.contains(BLANK).to_numpy()
    if not blank.any():
        return blank
    num = len(blank)
    later = np.where(blank, num, np.arange(num))[::-1]
    next_other = np.append(np.minimum.accumulate(later)[::-1], num)
    found: Mask = np.arange(num) < next_other[turns.starts[:-1]][turns.row]
    return found


def leading_gpt_turn(turns: Turns) -> Mask:
    """Return the turns that answer before anything was asked, at most one a row, bool [turns]."""
    found = np.zeros(len(turns.code), bool)
    first = turns.starts[:-1] + turns.has_system
    first = first[first < turns.starts[1:]]
    found[first] = turns.code[first] == GPT
    return found


def dangling_human_turn(turns: Turns) -> Mask:
    """Return the human turns at the end of a conversation, bool [turns]."""
    order = np.arange(len(turns.code))
    others = np.where(turns.code == HUMAN, -1, order)
    last_other = np.append(np.maximum.accumulate(others), -1)[turns.starts[1:] - 1]
    found: Mask = order > last_other[turns.row]  # where a row has none, it lies in a row before
    return found


TAKEN_AWAY: dict[str, Callable[[Turns], Mask]] = {
    "blank_system_turn": blank_system_turn,
    "leading_gpt_turn": leading_gpt_turn,
    "dangling_human_turn": dangling_human_turn,
}
"""Mends that take turns away, in order; each sees what the one before it left."""
MENDS = (*TAKEN_AWAY, END_STRING)


def mend_all(turns: Turns, config: MendConfig) -> tuple[Names, Turns]:
    """Return (names of the mends that each row needs, object [n]; the mended turns)."""
    names: Names = np.full(turns.num_rows, "", object)
    for name, find in TAKEN_AWAY.items():
        marked = find(turns)
        if marked.any():
            _add(names, turns.any(marked), name)
            turns = turns.only(~marked)
    marked = has_end_string(turns.text, config.end_strings)
    _add(names, turns.any(marked), END_STRING)
    return names, _broken(turns, marked, config.end_strings)


def mend(conversations: pa.Table, mended: Sequence[str], config: MendConfig) -> pa.Table:
    """Return the CONVERSATIONS table with exactly the named mends made in each row.

    Args: conversations: n rows; mended: each row's names as CLEANED has them, joined by commas, ""
    for none; config: the clean stage's.
    """
    listed = pl.Series(mended, dtype=pl.String).str.split(SEPARATOR)
    turns = Turns.of(conversations)
    for name, find in TAKEN_AWAY.items():
        wanted = listed.list.contains(name).to_numpy()
        if wanted.any():
            turns = turns.only(~(find(turns) & wanted[turns.row]))
    wanted = listed.list.contains(END_STRING).to_numpy()[turns.row]
    turns = _broken(turns, wanted, config.end_strings)
    return turns.put_into(conversations)


def has_end_string(text: pl.Series, end_strings: Sequence[str]) -> Mask:
    """Return which texts hold an end string, bool [n]."""
    if not end_strings:
        return np.zeros(len(text), bool)
    return text.str.contains_any(list(end_strings)).to_numpy()


def _broken(turns: Turns, marked: Mask, end_strings: Sequence[str]) -> Turns:
    """Return the turns with a space in every end string of the marked ones, until none is left."""
    if not marked.any():
        return turns
    places = np.flatnonzero(marked)
    text = turns.text[places]
    for one in end_strings:
        while text.str.contains(one, literal=True).any():  # again where it overlaps itself
            text = text.str.replace_all(one, f"{one[0]} {one[1:]}", literal=True)
    return turns.with_text(turns.text.clone().scatter(places, text))


def _add(names: Names, rows: Mask, name: str) -> None:
    """Append a name to the lists of the marked rows."""
    names[rows] = [f"{have}{SEPARATOR}{name}" if have else name for have in names[rows]]
