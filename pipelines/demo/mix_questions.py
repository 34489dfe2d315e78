"""What can be asked of a scene, with the one right answer: functions of the scene alone.

`questions(kind, scene)` lists every question of a kind, in a fixed order; whoever makes a data set
or a benchmark chooses among them. An answer holds for what is drawn, given a `clear_scene`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from pipelines.demo.captions import caption_scene, plural
from pipelines.demo.scenes import BACKGROUNDS, COLOURS, SHAPES, Scene, Thing, box_of, make_scene
from pipelines.demo.seeds import pick, rng_for

T = TypeVar("T")
YES, NO = "yes", "no"
SHORT = "Answer the question using a single word or phrase."
"""LLaVA-1.5's prompt after a question with a short answer."""
LETTER = "Answer with the option's letter from the given choices directly."
"""LLaVA-1.5's prompt after a question with options."""
_SIDES = (96, 104, 112)
_MAX_HEIGHT = 128
_REACH = 1.25
"""A shape reaches at most this many radii from its centre."""
_LETTERS = "ABCD"
_OPPOSITES = {"left of": ("left", "right"), "above": ("above", "below")}


@dataclass(frozen=True, slots=True)
class Question:
    """A question of one kind, without prompt or placeholder, and its answer."""

    kind: str
    text: str
    answer: str


def clear_scene(seed: int, index: int, *, with_digit: bool = False) -> Scene:
    """Return scene `index` of the world `seed`: sides of 96 to 128 pixels, no shape over another.

    Only then is what a picture shows what its truth says: how many there are, and where.
    with_digit: only a scene with a handwritten digit will do.
    """
    for attempt in range(1000):
        scene = make_scene(seed, index * 1000 + attempt)
        if _are_apart(scene.things) and not (with_digit and scene.digit is None):
            width = pick(rng_for(scene.texture_seed, "side", 0), _SIDES)
            height = min(_MAX_HEIGHT, width * scene.height // scene.width)
            return dataclasses.replace(scene, width=width, height=height)
    raise AssertionError("none of a thousand random scenes will do")


def questions(kind: str, scene: Scene) -> list[Question]:
    """Return all that can be asked of `scene` in this kind, a key of KINDS; none at times."""
    return [Question(kind, text, answer) for text, answer in KINDS[kind](scene)]


def with_options(question: Question, rng: np.random.Generator) -> Question | None:
    """Return a question about a colour or a shape with four options; the answer is a letter.

    Returns None for a question of another kind, whose wrong answers are not known.
    """
    pool = {"colour": tuple(COLOURS), "shape": SHAPES, "background": tuple(BACKGROUNDS)}
    if question.kind not in pool:
        return None
    wrong = [word for word in pool[question.kind] if word != question.answer]
    options = [question.answer, *(wrong[i] for i in rng.permutation(len(wrong))[:3].tolist())]
    options = [options[i] for i in rng.permutation(4).tolist()]
    lines = [f"{letter}. {word}" for letter, word in zip(_LETTERS, options, strict=True)]
    answer = _LETTERS[options.index(question.answer)]
    return Question("choice", "\n".join([question.text, *lines]), answer)


def in_words(question: Question) -> Question:
    """Return the question with its short answer as a sentence."""
    sentence = _SENTENCES.get(question.kind, "{}").format(question.answer)
    return dataclasses.replace(question, answer=sentence[0].upper() + sentence[1:])


def box_text(thing: Thing, scene: Scene, *, gap: str = ", ") -> str:
    """Return a thing's box as "[x1, y1, x2, y2]", fractions of two digits as in LLaVA's rows."""
    return f"[{gap.join(f'{edge:.2f}' for edge in box_of(thing, scene))}]"


def noun(thing: Thing) -> str:
    """Return what a thing is called: "red star"."""
    return f"{thing.colour} {thing.shape}"


def _colour(scene: Scene) -> Iterator[tuple[str, str]]:
    for shape, colours in _grouped((t.shape, t.colour) for t in scene.things).items():
        if len(set(colours)) == 1:
            what = f"is the {shape}" if len(colours) == 1 else f"are the {plural(shape)}"
            yield f"What colour {what}?", colours[0]
    if scene.digit_colour is not None:
        yield "What colour is the handwritten digit?", scene.digit_colour


def _shape(scene: Scene) -> Iterator[tuple[str, str]]:
    for colour, shapes in _grouped((t.colour, t.shape) for t in scene.things).items():
        if len(set(shapes)) == 1 and colour != scene.digit_colour:
            yield f"Which shape is {colour}?", shapes[0]


def _count(scene: Scene) -> Iterator[tuple[str, str]]:
    yield "How many shapes are in the picture?", str(len(scene.things))
    for shape, things in _grouped((t.shape, t) for t in scene.things).items():
        yield f"How many {plural(shape)} are there?", str(len(things))
    absent = [shape for shape in SHAPES if shape not in {t.shape for t in scene.things}]
    yield f"How many {plural(absent[scene.texture_seed % len(absent)])} are there?", "0"


def _position(scene: Scene) -> Iterator[tuple[str, str]]:
    for thing in _distinct(scene):
        yield f"Where in the picture is the {noun(thing)}?", thing.place


def _digit(scene: Scene) -> Iterator[tuple[str, str]]:
    if scene.digit is not None:
        yield "Which digit is written in the picture?", str(scene.digit)


def _existence(scene: Scene) -> Iterator[tuple[str, str]]:
    """As many questions to be answered with yes as with no."""
    there = dict.fromkeys(noun(thing) for thing in scene.things)
    for at, thing in enumerate({noun(t): t for t in scene.things}.values()):
        others = [c for c in COLOURS if f"{c} {thing.shape}" not in there]
        yield f"Are there any {plural(noun(thing))} in the picture?", YES
        wrong = f"{others[(scene.texture_seed + at) % len(others)]} {thing.shape}"
        yield f"Are there any {plural(wrong)} in the picture?", NO


def _relation(scene: Scene) -> Iterator[tuple[str, str]]:
    if scene.relation is None or len(_distinct(scene)) < len(scene.things):
        return
    ahead, behind = _OPPOSITES[scene.relation]
    first, second = map(noun, scene.things)
    either = "to the left or to the right of" if ahead == "left" else "above or below"
    yield f"Is the {first} {either} the {second}?", ahead
    yield f"Is the {second} {either} the {first}?", behind


def _larger(scene: Scene) -> Iterator[tuple[str, str]]:
    things = _distinct(scene)
    for one, other in zip(things, things[1:], strict=False):
        if one.size != other.size:
            larger = max(one, other, key=lambda thing: thing.radius)
            text = f"Which is larger, the {noun(one)} or the {noun(other)}?"
            yield text, f"the {noun(larger)}"


def _background(scene: Scene) -> Iterator[tuple[str, str]]:
    yield "What colour is the background?", scene.background


def _remainder(scene: Scene) -> Iterator[tuple[str, str]]:
    for shape, things in _grouped((t.shape, t) for t in scene.things).items():
        text = f"If every {shape} were taken away, how many shapes would be left?"
        yield text, str(len(scene.things) - len(things))


def _refer(scene: Scene) -> Iterator[tuple[str, str]]:
    ask = "Please provide the bounding box coordinate of the region this sentence describes:"
    for thing in _distinct(scene):
        yield f"{ask} {noun(thing)}", box_text(thing, scene)


def _region(scene: Scene) -> Iterator[tuple[str, str]]:
    for thing in scene.things:
        text = f"Please provide a short description for this region: {box_text(thing, scene)}"
        yield text, noun(thing)


def _caption(scene: Scene) -> Iterator[tuple[str, str]]:
    caption = caption_scene(scene, "plain", rng_for(scene.texture_seed, "mix caption", 0))
    yield "Provide a one-sentence caption for the provided image.", caption


def _detail(scene: Scene) -> Iterator[tuple[str, str]]:
    size = f"{scene.width} by {scene.height} pixels"
    parts = [f"The picture measures {size} and has a {scene.texture} {scene.background} ground."]
    parts += [f"There is a {t.size} {noun(t)} at the {t.place}." for t in scene.things]
    if scene.digit is not None:
        parts.append(f"The digit {scene.digit} is written by hand in {scene.digit_colour}.")
    yield "Describe the picture in detail.", " ".join(parts)


KINDS: dict[str, Callable[[Scene], Iterator[tuple[str, str]]]] = {
    "colour": _colour,
    "shape": _shape,
    "count": _count,
    "position": _position,
    "digit": _digit,
    "existence": _existence,
    "relation": _relation,
    "larger": _larger,
    "background": _background,
    "remainder": _remainder,
    "refer": _refer,
    "region": _region,
    "caption": _caption,
    "detail": _detail,
}
"""Kind of question -> the function that lists (question, answer) for a scene."""

_SENTENCES = {
    "colour": "the colour is {}.",
    "shape": "it is a {}.",
    "count": "the number is {}.",
    "position": "it is at the {}.",
    "digit": "the digit is {}.",
    "existence": "{}.",
    "relation": "it is on this side: {}.",
    "larger": "{} is larger.",
    "background": "the background is {}.",
    "remainder": "then this many would be left: {}.",
}


def _grouped(pairs: Iterator[tuple[str, T]]) -> dict[str, list[T]]:
    found: dict[str, list[T]] = {}
    for key, value in pairs:
        found.setdefault(key, []).append(value)
    return found


def _distinct(scene: Scene) -> list[Thing]:
    """Return the things whose name means one of them only."""
    named = _grouped((noun(thing), thing) for thing in scene.things)
    return [things[0] for things in named.values() if len(things) == 1]


def _are_apart(things: Sequence[Thing]) -> bool:
    """Return whether no two shapes can touch; the height is at least the width."""
    return all(
        math.hypot(one.x - other.x, one.y - other.y) > _REACH * (one.radius + other.radius)
        for at, one in enumerate(things)
        for other in things[at + 1 :]
    )
