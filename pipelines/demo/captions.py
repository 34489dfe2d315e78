"""Captions of a scene in several styles, some of them not in ASCII; and the captions of junk."""

from __future__ import annotations

import numpy as np

from pipelines.demo.scenes import Scene, Thing
from pipelines.demo.seeds import pick

STYLE_SHARES = {
    "plain": 0.27,
    "wordy": 0.24,
    "list": 0.13,
    "alt": 0.13,
    "short": 0.08,
    "french": 0.08,
    "japanese": 0.04,
    "decorated": 0.03,
}
"""Caption style -> its share of the captions."""

NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
ONE_WORD = ("image", "photo", "untitled", "logo", "banner", "IMG_2041.JPG", "thumbnail", "null")
_OPENINGS = ("This picture shows", "An image of", "Here we see", "A drawing of", "You can see")
_SPAM = ("buy", "cheap", "online", "free", "shipping", "best", "price", "sale", "new", "deal")
_STYLES = tuple(STYLE_SHARES)
_STYLE_EDGES = np.cumsum(list(STYLE_SHARES.values()))

_FRENCH_SHAPES = {
    "circle": "cercle",
    "square": "carré",
    "triangle": "triangle",
    "star": "étoile",
    "cross": "croix",
    "ring": "anneau",
    "diamond": "losange",
}
_FRENCH_COLOURS = {
    "red": "rouge",
    "green": "vert",
    "blue": "bleu",
    "yellow": "jaune",
    "purple": "violet",
    "orange": "orange",
    "black": "noir",
    "white": "blanc",
}
_FRENCH_NUMBERS = ("zéro", "un", "deux", "trois", "quatre", "cinq", "six", "sept", "huit", "neuf")
_JAPANESE_SHAPES = {
    "circle": "円",
    "square": "正方形",
    "triangle": "三角",
    "star": "星",
    "cross": "十字",
    "ring": "輪",
    "diamond": "菱形",
}
_JAPANESE_COLOURS = {
    "red": "赤",
    "green": "緑",
    "blue": "青",
    "yellow": "黄",
    "purple": "紫",
    "orange": "橙",
    "black": "黒",
    "white": "白",
}
_JAPANESE_NUMBERS = ("零", "一", "二", "三", "四", "五", "六", "七", "八", "九")


def pick_style(rng: np.random.Generator) -> str:
    """Return a caption style, drawn by `STYLE_SHARES`."""
    return _STYLES[min(int(np.searchsorted(_STYLE_EDGES, rng.random())), len(_STYLES) - 1)]


def caption_scene(scene: Scene, style: str, rng: np.random.Generator) -> str:
    """Return a true caption of `scene` in `style`; `rng` chooses among equal wordings."""
    return _STYLE_OF[style](scene, rng)


def caption_too_long(scene: Scene, rng: np.random.Generator) -> str:
    """Return a true caption drowned in 2,000 to 9,000 characters of shop words."""
    num_words = int(rng.integers(400, 1500))
    words = [_SPAM[i] for i in rng.integers(len(_SPAM), size=num_words).tolist()]
    return f"{_plain(scene, rng)} {' '.join(words)}"


def caption_one_word(rng: np.random.Generator) -> str:
    """Return one word that says nothing about any picture."""
    return pick(rng, ONE_WORD)


def is_uniform(scene: Scene) -> bool:
    """Return whether the scene shows several things of one kind, which a caption counts."""
    return scene.layout == "count"


def plural(noun: str) -> str:
    """Return the plural of a shape's name."""
    return noun + ("es" if noun.endswith("s") else "s")


def _plain(scene: Scene, rng: np.random.Generator) -> str:
    with_size = rng.random() < 0.4
    if scene.digit is not None:
        return _plain_digit(scene, rng)
    if is_uniform(scene):
        first = scene.things[0]
        return f"{NUMBERS[len(scene.things)]} {first.colour} {plural(first.shape)}"
    nouns = [_noun(thing, with_size) for thing in scene.things]
    if scene.relation:
        return f"{_a(nouns[0])} {_relation(scene, rng)} {_a(nouns[1])}"
    if len(nouns) == 1:
        return f"{_a(nouns[0])}{_where(scene.things[0]) if rng.random() < 0.5 else ''}"
    return f"{_a(nouns[0])}, {_a(nouns[1])} and {_a(nouns[2])}"


def _plain_digit(scene: Scene, rng: np.random.Generator) -> str:
    name = NUMBERS[int(scene.digit or 0)] if rng.random() < 0.5 else str(scene.digit)
    text = f"the handwritten digit {name} in {scene.digit_colour}"
    if not scene.things:
        return text
    return f"{text} next to {_a(_noun(scene.things[0], False))}"


def _wordy(scene: Scene, rng: np.random.Generator) -> str:
    opening = pick(rng, _OPENINGS)
    ground = f"on a {scene.texture} {scene.background} background"
    if scene.digit is not None or is_uniform(scene):
        return f"{opening} {_plain(scene, rng)} {ground}."
    if scene.relation:
        first, second = (_noun(thing, True) for thing in scene.things)
        return f"{opening} {_a(first)} {_relation(scene, rng)} {_a(second)} {ground}."
    if len(scene.things) == 1:
        noun = _a(_noun(scene.things[0], True))
        return f"{opening} {noun}{_where(scene.things[0])} {ground}."
    nouns = [_a(_noun(thing, False)) for thing in scene.things]
    return f"{opening} {nouns[0]}, {nouns[1]} and {nouns[2]} {ground}."


def _list(scene: Scene, rng: np.random.Generator) -> str:
    tags = [f"{thing.colour} {thing.shape}" for thing in scene.things]
    if is_uniform(scene):
        tags = [f"{len(tags)} x {tags[0]}"]
    if scene.digit is not None:
        tags.append(f"{scene.digit_colour} digit {scene.digit}")
    if len(scene.things) == 1:
        tags.append(scene.things[0].place)
    tags.append(f"{scene.background} background")
    return ", ".join(tags)


def _alt(scene: Scene, rng: np.random.Generator) -> str:
    number = int(rng.integers(100, 9999))
    forms = (
        f"{_short(scene, rng)} - stock illustration #{number}",
        f"{_short(scene, rng).replace(' ', '-')}_{number}.jpg",
        f"Clipart: {_short(scene, rng)} | free download",
    )
    return pick(rng, forms)


def _short(scene: Scene, rng: np.random.Generator) -> str:
    if is_uniform(scene):
        return f"{scene.things[0].colour} {plural(scene.things[0].shape)}"
    parts = [f"{thing.colour} {thing.shape}" for thing in scene.things]
    if scene.digit is not None:
        parts.append(f"{scene.digit_colour} {scene.digit}")
    return " and ".join(parts)


def _french(scene: Scene, rng: np.random.Generator) -> str:
    nouns = [f"{_FRENCH_SHAPES[t.shape]} {_FRENCH_COLOURS[t.colour]}" for t in scene.things]
    if is_uniform(scene):
        return f"{_FRENCH_NUMBERS[len(nouns)]} formes : {nouns[0]}"
    if scene.digit is not None:
        nouns.append(f"chiffre {scene.digit} {_FRENCH_COLOURS[str(scene.digit_colour)]}")
    if scene.relation:
        link = "à gauche de" if scene.relation == "left of" else "au-dessus de"
        return f"{nouns[0]} {link} {nouns[1]}"
    return " et ".join(nouns)


def _japanese(scene: Scene, rng: np.random.Generator) -> str:
    nouns = [f"{_JAPANESE_COLOURS[t.colour]}の{_JAPANESE_SHAPES[t.shape]}" for t in scene.things]
    if is_uniform(scene):
        return f"{nouns[0]}が{_JAPANESE_NUMBERS[len(nouns)]}個"
    if scene.digit is not None:
        nouns.append(f"{_JAPANESE_COLOURS[str(scene.digit_colour)]}の数字{scene.digit}")
    return "と".join(nouns)


def _decorated(scene: Scene, rng: np.random.Generator) -> str:
    mark = pick(rng, ("★", "№ 7 —", "→", "☕ café", "«»"))
    return f"{mark} “{_plain(scene, rng)}” …"


_STYLE_OF = {
    "plain": _plain,
    "wordy": _wordy,
    "list": _list,
    "alt": _alt,
    "short": _short,
    "french": _french,
    "japanese": _japanese,
    "decorated": _decorated,
}


def _noun(thing: Thing, with_size: bool) -> str:
    words = f"{thing.colour} {thing.shape}"
    return f"{thing.size} {words}" if with_size else words


def _a(noun: str) -> str:
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"


def _where(thing: Thing) -> str:
    return " in the centre" if thing.place == "centre" else f" at the {thing.place}"


def _relation(scene: Scene, rng: np.random.Generator) -> str:
    if scene.relation == "above":
        return pick(rng, ("above", "over"))
    return pick(rng, ("to the left of", "left of"))
