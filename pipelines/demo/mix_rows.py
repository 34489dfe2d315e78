"""Rows of an instruction mix: rounds of questions and answers, in the formats of the real files.

Prompts, ids and the place of `<image>` are those of SVIT-mix-665K (ids svit_* and llavav1.5_*),
LLaVA-1.5's mix and WizardLM; what is asked is of our own scenes, so every answer is known.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipelines.demo.mix_questions import (
    LETTER,
    SHORT,
    Question,
    box_text,
    in_words,
    noun,
    questions,
    with_options,
)
from pipelines.demo.scenes import Scene
from pipelines.demo.seeds import pick

IMAGE = "<image>"
_TALKED_OF = ("colour", "shape", "count", "position", "digit", "existence", "relation", "larger")
_THOUGHT_ABOUT = ("remainder", "larger", "relation", "count")


@dataclass(frozen=True, slots=True)
class Row:
    """One clean row: what stands in a file, and what is true of it.

    key: its id; "" in a file without ids. images: paths as the row gives them.
    """

    key: str
    source: str
    images: tuple[str, ...]
    rounds: tuple[Question, ...]


Record = dict[str, Any]
Builder = Callable[[Scene, np.random.Generator], tuple[str, tuple[Question, ...]]]
"""Scene -> (what the row's id begins with, its rounds)."""


def llava_record(row: Row, rng: np.random.Generator) -> Record:
    """Return the row as LLaVA has it; the placeholder stands before or after the first question.

    A text-only row has no image key and ShareGPT's "model": "".
    """
    turns = []
    for at, one in enumerate(row.rounds):
        question = one.text
        if row.images and at == 0:
            is_first = rng.random() < 0.7
            question = f"{IMAGE}\n{question}" if is_first else f"{question}\n{IMAGE}"
        turns.append({"from": "human", "value": question})
        turns.append({"from": "gpt", "value": one.answer})
    head = {"id": row.key, **({"image": row.images[0]} if row.images else {"model": ""})}
    return {**head, "conversations": turns}


def wizardlm_record(row: Row) -> Record:
    """Return a text-only row of one round as WizardLM has it."""
    (one,) = row.rounds
    return {"instruction": one.text, "output": one.answer}


def messages_record(row: Row) -> Record:
    """Return the row as OpenAI-style messages, the images as parts before the first question."""
    messages: list[Record] = []
    for at, one in enumerate(row.rounds):
        parts: list[Record] = [{"type": "text", "text": one.text}]
        if at == 0:
            parts = [{"type": "image", "image": path} for path in row.images] + parts
        messages.append({"role": "user", "content": parts})
        messages.append({"role": "assistant", "content": one.answer})
    return {"id": row.key, "messages": messages}


def core(scene: Scene, rng: np.random.Generator) -> tuple[str, tuple[Question, ...]]:
    """Return an SVIT core row: a detailed description, talk, a reasoned answer or a reference."""
    kinds = ("detail", "conversation", "complex", "referring")
    kind = kinds[int(np.searchsorted((0.45, 0.73, 0.87), rng.random()))]  # SVIT's shares
    return f"svit_{kind}", _CORES[kind](scene, rng)


def short_answers(scene: Scene, rng: np.random.Generator) -> tuple[str, tuple[Question, ...]]:
    """Return two to four questions with short answers, the prompt after the first of them."""
    first, *others = _some_of((*_TALKED_OF, "background"), scene, int(rng.integers(2, 5)), rng)
    return "llavav1.5", (_asked(first, SHORT), *others)


def options_or_boxes(scene: Scene, rng: np.random.Generator) -> tuple[str, tuple[Question, ...]]:
    """Return a question with options, or what stands where in the picture (as RefCOCO's rows)."""
    boxes = [*questions("refer", scene), *questions("region", scene)]
    if boxes and rng.random() < 0.4:
        return "llavav1.5", tuple(boxes)
    (one,) = _some_of(("colour", "shape", "background"), scene, 1, rng)
    chosen = with_options(one, rng)
    assert chosen is not None, "colours and shapes have options"
    return "llavav1.5", (_asked(chosen, LETTER),)


def regions(scene: Scene, rng: np.random.Generator) -> tuple[str, tuple[Question, ...]]:
    """Return boxes and names of things, as LLaVA's Visual Genome rows; a caption without any."""
    found = [*questions("region", scene), *questions("refer", scene)]
    if not found:
        return captioned(scene, rng)
    return "llavav1.5", tuple(found[i] for i in rng.permutation(len(found)).tolist())


def captioned(scene: Scene, _rng: np.random.Generator) -> tuple[str, tuple[Question, ...]]:
    """Return a caption with what can be read in the picture, as LLaVA's TextCaps rows."""
    (one,) = questions("caption", scene)
    token = "" if scene.digit is None else f"\nReference OCR token: {scene.digit}"
    return "llavav1.5", (dataclasses.replace(one, text=one.text + token),)


def compared(first: Scene, second: Scene) -> tuple[Question, ...]:
    """Return the rounds of a row with two pictures."""
    counts = [len(scene.things) for scene in (first, second)]
    more = "both the same" if counts[0] == counts[1] else ("first", "second")[counts[1] > counts[0]]
    same = "yes" if first.background == second.background else "no"
    return (
        Question("more", "Which of the two pictures shows more shapes?", more),
        Question("same ground", "Do both pictures have a background of one colour name?", same),
    )


def _detailed(scene: Scene, _rng: np.random.Generator) -> tuple[Question, ...]:
    return tuple(questions("detail", scene))


def _talk(scene: Scene, rng: np.random.Generator) -> tuple[Question, ...]:
    asked = _some_of(_TALKED_OF, scene, int(rng.integers(2, 5)), rng)
    return tuple(in_words(one) for one in asked)


def _reasoned(scene: Scene, rng: np.random.Generator) -> tuple[Question, ...]:
    return tuple(in_words(one) for one in _some_of(_THOUGHT_ABOUT, scene, 1, rng))


def _referring(scene: Scene, rng: np.random.Generator) -> tuple[Question, ...]:
    """Return a description that names each thing with its box, in SVIT's notation."""
    if not scene.things:
        return _talk(scene, rng)
    named = [f"<st>{noun(t)}<ed> {box_text(t, scene, gap=',')}" for t in scene.things]
    text = "Describe the picture and give the box of everything that you name."
    return (Question("referring", text, f"The picture shows {' and '.join(named)}."),)


_CORES: dict[str, Callable[[Scene, np.random.Generator], tuple[Question, ...]]] = {
    "detail": _detailed,
    "conversation": _talk,
    "complex": _reasoned,
    "referring": _referring,
}


def _asked(question: Question, prompt: str) -> Question:
    return dataclasses.replace(question, text=f"{question.text}\n{prompt}")


def _some_of(
    kinds: Sequence[str], scene: Scene, number: int, rng: np.random.Generator
) -> list[Question]:
    """Return one question of each of up to `number` kinds that fit the scene, in random order."""
    order = [kinds[i] for i in rng.permutation(len(kinds)).tolist()]
    fitting = [found for found in (questions(kind, scene) for kind in order) if found]
    return [pick(rng, found) for found in fitting[:number]]
