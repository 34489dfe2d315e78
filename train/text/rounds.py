"""A LLaVA row as rounds: what is asked and what is answered, images as marks in the text.

    {"image"?: path or paths, "conversations": [{"from": "human", "value": "<image>\\nWhy?"}, ...]}

In a row of one image, a turn's only placeholder moves to the front of its turn, as the loaders of
LLaVA and Bunny have it (preprocess_multimodal in llava/train/train.py of haotian-liu/LLaVA and
bunny/util/data_utils.py of BAAI-DCAI/Bunny). In a row without images `<image>` is text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from manifests.errors import WarrenError
from train.text.marks import IMAGE_MARK, has_mark

IMAGE_PLACEHOLDER = "<image>"

Reason = Literal[
    "bad_field",  # no list of turns with from and value
    "turn_order",  # not human and gpt in turn
    "no_round",  # nobody answers
    "placeholder_count",  # not as many placeholders as images
    "mark_in_text",  # a noncharacter that is a mark of ours
    "not_one_round",  # of a row for the plain template
    "template_error",  # the tokenizer's chat template refused the row
    "first_round_too_long",  # over the maximum length, which would cut the answer
]


class SampleRefused(WarrenError):
    """A row that cannot be trained on: its named reason, and the same in words."""

    def __init__(self, reason: Reason, detail: str) -> None:
        super().__init__(reason, detail)
        self.reason = reason
        self.detail = detail


class Turn(NamedTuple):
    """One turn. role: system (only the first), human or gpt; each image is an IMAGE_MARK."""

    role: str
    text: str


class Span(NamedTuple):
    """Characters start to end (not included) of a rendered text."""

    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Conversation:
    """The system turn (or none), then questions and answers in turn, as many of each."""

    system: tuple[Turn, ...]
    turns: tuple[Turn, ...]

    @property
    def num_rounds(self) -> int:
        """Questions with their answers."""
        return len(self.turns) // 2

    def first(self, num_rounds: int) -> tuple[Turn, ...]:
        """Return the system turn and the turns of the first rounds."""
        return self.system + self.turns[: 2 * num_rounds]


def read_conversation(row: Mapping[str, Any]) -> Conversation:
    """Return the rounds of a LLaVA row.

    An answer that nobody asked for, at the start, and a question that nobody answers, at the end,
    are left out; if an image is shown there, the row's images no longer match and it is refused.

    Raises: SampleRefused, see Reason.
    """
    num_images = _num_images(row)
    turns = [_with_marks(turn, num_images) for turn in _turns(row)]
    system = tuple(turns[:1]) if turns and turns[0].role == "system" else ()
    rest = _whole_rounds(turns[len(system) :])
    if not rest:
        raise SampleRefused("no_round", "no question has an answer")
    found = sum(turn.text.count(IMAGE_MARK) for turn in (*system, *rest))
    if found != num_images:
        raise SampleRefused("placeholder_count", f"{found} placeholders, {num_images} images")
    return Conversation(system, rest)


def _turns(row: Mapping[str, Any]) -> list[Turn]:
    try:
        turns = [Turn(turn["from"], turn["value"]) for turn in row["conversations"]]
    except (TypeError, KeyError) as error:
        raise SampleRefused("bad_field", "conversations is no list of from and value") from error
    for turn in turns:
        if not isinstance(turn.text, str):
            raise SampleRefused("bad_field", f"a value is {type(turn.text).__name__}, not a text")
        if has_mark(turn.text):
            raise SampleRefused("mark_in_text", "a noncharacter U+FDD0 to U+FDD3 in the text")
    return turns


def _num_images(row: Mapping[str, Any]) -> int:
    images = row.get("image") or row.get("images") or []
    if not isinstance(images, str | list):
        raise SampleRefused("bad_field", "image is neither a path nor a list of paths")
    return 1 if isinstance(images, str) else len(images)


def _with_marks(turn: Turn, num_images: int) -> Turn:
    if not num_images or IMAGE_PLACEHOLDER not in turn.text:
        return turn
    if num_images > 1 or turn.text.count(IMAGE_PLACEHOLDER) > 1:
        return turn._replace(text=turn.text.replace(IMAGE_PLACEHOLDER, IMAGE_MARK))
    rest = turn.text.replace(IMAGE_PLACEHOLDER, "").strip()
    return turn._replace(text=f"{IMAGE_MARK}\n{rest}".strip())


def _whole_rounds(turns: Sequence[Turn]) -> tuple[Turn, ...]:
    asked = tuple(turns[1:] if turns and turns[0].role == "gpt" else turns)
    for at, turn in enumerate(asked):
        expected = ("human", "gpt")[at % 2]
        if turn.role != expected:
            raise SampleRefused("turn_order", f"turn {at} is by {turn.role!r}, not {expected}")
    return asked[: len(asked) // 2 * 2]
