"""What the demo asks of its pictures: every answer is the one that reading and looking give."""

from __future__ import annotations

import re
from collections import Counter

import numpy as np
import pytest
from scipy import ndimage

from pipelines.demo.mix_questions import (
    KINDS,
    clear_scene,
    in_words,
    questions,
    with_options,
)
from pipelines.demo.mix_text import text_task
from pipelines.demo.scenes import COLOURS, SHAPES, Scene, box_of, draw_scene
from pipelines.demo.seeds import rng_for

SCENES = [clear_scene(11, index) for index in range(150)]


def seen(scene: Scene) -> dict[tuple[str, str], int]:
    """Return (colour, shape) -> how many, the plain way."""
    return dict(Counter((thing.colour, thing.shape) for thing in scene.things))


def answer_of(kind: str, text: str, scene: Scene) -> str:  # noqa: C901 - one case per kind
    """Answer a question by reading its text, with no knowledge of how it was made."""
    counts = seen(scene)
    shapes = [shape for shape in SHAPES if re.search(rf"\b{shape}(s|es)?\b", text)]
    colours = [colour for colour in COLOURS if colour in text.split()]
    named = [pair for pair in counts if f"{pair[0]} {pair[1]}" in text]
    num_asked = sum(n for (_, shape), n in counts.items() if shape in shapes)
    if kind == "colour" and "digit" in text:
        return str(scene.digit_colour)
    if kind == "colour":
        (colour,) = {colour for colour, shape in counts if [shape] == shapes}
        return colour
    if kind == "shape":
        (shape,) = {shape for colour, shape in counts if f"is {colour}?" in text}
        return shape
    if kind == "count":
        return str(num_asked if shapes else len(scene.things))
    if kind == "remainder":
        return str(len(scene.things) - num_asked)
    if kind == "existence":
        return "yes" if (*colours, *shapes) in counts else "no"
    if kind == "position":
        (pair,) = named
        (thing,) = [t for t in scene.things if (t.colour, t.shape) == pair]
        return thing.place
    if kind == "digit":
        return str(scene.digit)
    if kind == "background":
        return scene.background
    one, other = sorted(scene.things, key=lambda t: text.index(f"{t.colour} {t.shape}"))[:2]
    if kind == "larger":
        winner = one if one.radius > other.radius else other
        return f"the {winner.colour} {winner.shape}"
    if "left" in text:
        return "left" if one.x < other.x else "right"
    return "above" if one.y < other.y else "below"


DERIVED = ("colour", "shape", "count", "remainder", "existence", "position", "digit", "background")


@pytest.mark.parametrize("kind", DERIVED)
def test_a_short_answer_is_what_reading_the_question_gives(kind: str) -> None:
    asked = [(scene, one) for scene in SCENES for one in questions(kind, scene)]
    assert len(asked) > 20
    for scene, one in asked:
        assert one.answer == answer_of(kind, one.text, scene), one


@pytest.mark.parametrize("kind", ["relation", "larger"])
def test_a_comparison_is_answered_by_the_coordinates(kind: str) -> None:
    asked = [(s, q) for s in SCENES if len(s.things) == 2 for q in questions(kind, s)]
    assert len({one.answer for _, one in asked}) > 3
    for scene, one in asked:
        assert one.answer == answer_of(kind, one.text, scene), one


def test_every_kind_can_be_asked_and_no_scene_has_a_question_twice() -> None:
    for kind in KINDS:
        assert any(questions(kind, scene) for scene in SCENES), kind
    for scene in SCENES:
        texts = [one.text for kind in KINDS for one in questions(kind, scene)]
        assert len(texts) == len(set(texts))


def test_yes_and_no_are_equally_right() -> None:
    answers = Counter(q.answer for scene in SCENES for q in questions("existence", scene))
    assert set(answers) == {"yes", "no"}
    assert answers["yes"] == answers["no"]


def test_as_many_blots_of_a_colour_are_painted_as_the_truth_says() -> None:
    checked = 0
    for scene in SCENES:
        if scene.digit is not None:
            continue
        pixels = np.asarray(draw_scene(scene))
        for colour in {thing.colour for thing in scene.things}:
            painted = (pixels == np.array(COLOURS[colour])).all(axis=2)
            _, num_blots = ndimage.label(painted, structure=np.ones((3, 3)))
            assert num_blots == sum(thing.colour == colour for thing in scene.things)
            checked += 1
    assert checked > 100


def test_a_box_is_where_the_paint_is() -> None:
    checked = 0
    for scene in SCENES:
        pixels = np.asarray(draw_scene(scene))
        for thing in scene.things:
            if [t.colour for t in scene.things].count(thing.colour) > 1:
                continue
            if scene.digit_colour == thing.colour:
                continue
            rows, columns = np.nonzero((pixels == np.array(COLOURS[thing.colour])).all(axis=2))
            height, width = scene.height, scene.width
            painted = (columns.min() / width, rows.min() / height)
            painted += ((columns.max() + 1) / width, (rows.max() + 1) / height)
            assert np.abs(np.array(box_of(thing, scene)) - painted).max() < 2 / width
            checked += 1
    assert checked > 100


def test_scenes_have_sides_of_96_to_128_pixels_and_a_digit_when_asked() -> None:
    sides = {side for scene in SCENES for side in (scene.width, scene.height)}
    assert min(sides) == 96
    assert max(sides) == 128
    assert all(clear_scene(11, i, with_digit=True).digit is not None for i in range(20))


def test_the_letter_is_that_of_the_answer() -> None:
    rng = rng_for(0, "test", 0)
    letters = Counter()
    for scene in SCENES:
        for one in (*questions("colour", scene), *questions("shape", scene)):
            chosen = with_options(one, rng)
            assert chosen is not None
            options = dict(re.findall(r"^([A-D])\. (\w+)$", chosen.text, re.MULTILINE))
            assert len(set(options.values())) == 4
            assert options[chosen.answer] == one.answer
            letters[chosen.answer] += 1
    assert set(letters) == set("ABCD")
    assert with_options(questions("count", SCENES[0])[0], rng) is None


def test_a_sentence_holds_the_short_answer() -> None:
    for scene in SCENES[:50]:
        for kind in (*DERIVED, "relation", "larger"):
            for one in questions(kind, scene):
                sentence = in_words(one).answer
                assert one.answer in sentence.lower()
                assert sentence.endswith(".")


def test_text_tasks_are_answered_rightly() -> None:
    kinds = Counter()
    for index in range(200):
        one = text_task(5, index)
        kinds[one.kind] += 1
        text, numbers = one.text.partition(". ")[2], [int(n) for n in re.findall(r"\d+", one.text)]
        assert one.answer not in one.text
        if one.kind in ("sum", "product"):
            left, right = one.answer.split(" = ")
            assert eval(left.replace("x", "*")) == int(right)  # noqa: S307 - digits, + and *
            assert [int(n) for n in re.findall(r"\d+", left)] == numbers[1:]
        elif one.kind == "sorting":
            assert one.answer.split(", ") == sorted(re.findall(r"\w+", text.partition(": ")[2]))
        elif one.kind == "reversal":
            assert one.answer.split()[::-1] == re.findall(r"\w+", text.partition(": ")[2])
        elif one.kind == "spelling":
            assert one.answer.replace("-", "").lower() == text.split()[3].strip(",")
        else:
            assert int(one.answer.split()[2]) == numbers[1] - numbers[2]
    assert len(kinds) == 6
