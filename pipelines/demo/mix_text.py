"""Instructions without a picture whose answers are right by construction."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from pipelines.demo.captions import plural
from pipelines.demo.mix_questions import Question
from pipelines.demo.scenes import COLOURS, SHAPES
from pipelines.demo.seeds import pick, rng_for

_WORDS = (
    *("apple", "bridge", "candle", "desert", "engine", "forest", "garden", "harbour", "island"),
    *("jacket", "kettle", "ladder", "market", "needle", "ocean", "pencil", "quarry", "river"),
    *("saddle", "tunnel", "umbrella", "valley", "window", "yard", "zebra"),
)


def text_task(seed: int, index: int) -> Question:
    """Return task `index` of the world `seed`; each index has words of its own."""
    rng = rng_for(seed, "text task", index)
    kind = pick(rng, tuple(_TASKS))
    text, answer = _TASKS[kind](rng)
    return Question(kind, f"Exercise {index + 1}. {text}", answer)


def _sum(rng: np.random.Generator) -> tuple[str, str]:
    one, other = rng.integers(10, 1000, size=2).tolist()
    return f"What is {one} plus {other}? Show the sum.", f"{one} + {other} = {one + other}"


def _product(rng: np.random.Generator) -> tuple[str, str]:
    one, other = rng.integers(2, 30, size=2).tolist()
    return f"Multiply {one} by {other}.", f"{one} x {other} = {one * other}"


def _sorting(rng: np.random.Generator) -> tuple[str, str]:
    words = _some(rng, 5)
    if words == sorted(words):  # else the question would hold its answer
        words.reverse()
    return f"Put these words in alphabetical order: {', '.join(words)}.", ", ".join(sorted(words))


def _spelling(rng: np.random.Generator) -> tuple[str, str]:
    word = pick(rng, _WORDS)
    return f"Spell the word {word}, letter by letter.", "-".join(word.upper())


def _reversal(rng: np.random.Generator) -> tuple[str, str]:
    words = _some(rng, 4)
    text = f"Repeat these words from the last to the first: {' '.join(words)}."
    return text, " ".join(reversed(words))


def _shopping(rng: np.random.Generator) -> tuple[str, str]:
    number, given = (int(n) for n in rng.integers([5, 1], [40, 5]).tolist())
    things = plural(f"{pick(rng, tuple(COLOURS))} {pick(rng, SHAPES)}")
    text = f"A box holds {number} {things}. {given} are taken out. How many are left in it?"
    return text, f"There are {number - given} {things} left in the box."


_TASKS: dict[str, Callable[[np.random.Generator], tuple[str, str]]] = {
    "sum": _sum,
    "product": _product,
    "sorting": _sorting,
    "spelling": _spelling,
    "reversal": _reversal,
    "remainder in words": _shopping,
}


def _some(rng: np.random.Generator, number: int) -> list[str]:
    return [_WORDS[i] for i in rng.permutation(len(_WORDS))[:number].tolist()]
