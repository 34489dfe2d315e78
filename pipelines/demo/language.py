"""Texts of the demo world for its language model: captions, and talk about scenes that are told.

A scene is told in words where a picture would stand, so the model learns to look things up in what
stands before a question; or it is not told at all, and answers can only be guessed. No pixel is
seen, so nothing here says what a picture shows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from pipelines.demo.captions import caption_scene, pick_style
from pipelines.demo.mix_pictures import FOLDERS
from pipelines.demo.mix_questions import KINDS, SHORT, Question, clear_scene, noun, questions
from pipelines.demo.mix_text import text_task
from pipelines.demo.patches import ASKED, GRID, OF_PATCH, answers_of
from pipelines.demo.scenes import Scene
from pipelines.demo.seeds import pick, rng_for
from train.text.template import BUNNY_SYSTEM

END = "<|endoftext|>"
MIXED = {"talk": 0.62, "row": 0.18, "caption": 0.16, "task": 0.04}
"""Kind of text -> its share, for a model that knows nothing."""
LOOKED_UP = {"ask": 0.7, "talk": 0.07, "row": 0.11, "caption": 0.1, "task": 0.02}
"""The same, to learn above all to look answers up."""
LEARNED_ALONE = ("ask",)
"""Kinds of text of which only the answers are learned."""
_TOLD_SHARE = 0.88
_MOST_ROUNDS = 7
_MAP_WORDS = 40
ASKED_KINDS = (
    *("colour", "shape", "count", "position", "digit"),
    *("existence", "relation", "larger", "background"),
)
"""Kinds whose answers are a word or phrase, as the instruction mix asks them."""
_SHORT_KINDS = tuple(kind for kind in KINDS if kind not in ("caption", "detail"))


@dataclass(frozen=True, slots=True)
class Text:
    """A text; its first `told` characters tell a scene, and are not learned."""

    kind: str
    told: int
    text: str


def make_text(seed: int, index: int, shares: Mapping[str, float] = MIXED) -> Text:
    """Return text number `index` of the world `seed`, a function of its arguments alone."""
    rng = rng_for(seed, "text", index)
    edges = np.cumsum(list(shares.values()))
    kind = list(shares)[min(int(np.searchsorted(edges, rng.random())), len(shares) - 1)]
    if kind == "task":
        task = text_task(seed, index)
        return Text(kind, 0, _conversation("", (task,)))
    scene = clear_scene(seed, index, with_digit=rng.random() < 0.15)
    told = tell(scene, rng) if kind in LEARNED_ALONE or rng.random() < _TOLD_SHARE else ""
    if kind == "caption":
        caption = caption_scene(scene, pick_style(rng), rng)
        return Text(kind, len(told), f"{told}{caption}\n")
    rounds = _ROUNDS[kind](scene, rng)
    start = len(_conversation(told, ()))
    return Text(kind, start if told else 0, _conversation(told, rounds))


def tell(scene: Scene, rng: np.random.Generator) -> str:
    """Return what a scene shows, in words: as sentences, as a list, or as a map of its patches."""
    return pick(rng, (_sentences, _listed, _mapped, _mapped))(scene, rng)


def _conversation(told: str, rounds: tuple[Question, ...]) -> str:
    """Return the text of train.text.template's `bunny`, the scene told in place of the image."""
    text = f"{BUNNY_SYSTEM} USER: " + (f"{told}\n" if told else "")
    for at, one in enumerate(rounds):
        text += "USER: " if at else ""
        text += f"{one.text} ASSISTANT: {one.answer}{END}"
    return text


def _row(scene: Scene, rng: np.random.Generator) -> tuple[Question, ...]:
    """Return the rounds of a row as the instruction mix has them."""
    folders = [one for one in FOLDERS.values() if scene.digit is not None or not one.with_digit]
    builders: list[Callable[..., tuple[str, tuple[Question, ...]]]] = [
        builder for folder in folders for builder in folder.builders
    ]
    return pick(rng, builders)(scene, rng)[1]


def _talk(
    scene: Scene, rng: np.random.Generator, kinds: tuple[str, ...] = _SHORT_KINDS
) -> tuple[Question, ...]:
    """Return questions of many kinds with short answers, sometimes with the mix's prompt."""
    order = [kinds[i] for i in rng.permutation(len(kinds)).tolist()]
    found = [pick(rng, some) for some in (questions(kind, scene) for kind in order) if some]
    chosen = found[:_MOST_ROUNDS]
    if rng.random() < 0.5:
        first = chosen[0]
        chosen[0] = Question(first.kind, f"{first.text}\n{SHORT}", first.answer)
    return tuple(chosen)


def _ask(scene: Scene, rng: np.random.Generator) -> tuple[Question, ...]:
    """Return the questions whose answers are told, word for word or nearly so."""
    return _talk(scene, rng, ASKED_KINDS)


_ROUNDS = {"row": _row, "talk": _talk, "ask": _ask}


def _sentences(scene: Scene, _rng: np.random.Generator) -> str:
    (one,) = questions("detail", scene)
    return f"{len(scene.things)} shapes. {one.answer}"


def _listed(scene: Scene, rng: np.random.Generator) -> str:
    parts = [f"{t.size} {noun(t)} at {t.place}" for t in scene.things]
    if scene.digit is not None:
        parts.append(f"{scene.digit_colour} digit {scene.digit}")
    parts = [parts[i] for i in rng.permutation(len(parts)).tolist()]
    ground = f"{scene.texture} {scene.background} ground"
    return f"{len(scene.things)} shapes: {'; '.join(parts)}; {ground}."


def _mapped(scene: Scene, rng: np.random.Generator) -> str:
    """Return what some patches show, in raster order, a thing in as many words as patches."""
    answers = answers_of(scene, pad=True)
    shown = answers[:, 0] > 0
    chance = np.where(shown, 0.75, 0.18) * min(1.0, _MAP_WORDS / (3 * shown.sum() + 1))
    words = [f"{scene.texture} {scene.background} {len(scene.things)}"]
    for patch in np.flatnonzero(rng.random(GRID * GRID) < chance).tolist():
        said = [ASKED[name][answers[patch, at]] for at, name in enumerate(OF_PATCH)]
        what, colour, size, place = said
        if what == "nothing":
            words.append(scene.background)
        elif size == "none":
            words.append(f"{colour} digit {what}")
        else:
            words.append(f"{size} {colour} {what} {place}")
    return f"{' '.join(words)}."
