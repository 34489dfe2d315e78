"""Scenes: what is in a picture (the truth) and how it is drawn.

A scene holds up to five things (shape, colour, size, place), sometimes a handwritten digit, on a
flat, graded or textured background. `make_scene` draws the truth from a random stream, `draw_scene`
turns it into pixels; both are functions of their arguments only.
"""

from __future__ import annotations

import functools
import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from pipelines.demo.seeds import pick, rng_for

Rgb = tuple[int, int, int]

SHAPES = ("circle", "square", "triangle", "star", "cross", "ring", "diamond")
COLOURS: dict[str, Rgb] = {
    "red": (215, 40, 40),
    "green": (35, 160, 60),
    "blue": (45, 75, 220),
    "yellow": (245, 220, 45),
    "purple": (140, 50, 175),
    "orange": (245, 135, 25),
    "black": (20, 20, 20),
    "white": (250, 250, 250),
}
BACKGROUNDS: dict[str, Rgb] = {
    "grey": (150, 150, 150),
    "pink": (240, 185, 200),
    "beige": (222, 204, 168),
    "teal": (80, 150, 150),
    "navy": (40, 50, 95),
    "mint": (185, 230, 200),
    "sky": (165, 205, 240),
    "brown": (115, 80, 55),
}
TEXTURES = ("flat", "graded", "grainy", "striped", "checked")
SIZES = {"small": 0.11, "medium": 0.16, "large": 0.23}
"""Size word -> radius as a fraction of the picture's shorter side."""
PLACES: dict[str, tuple[float, float]] = {
    "top left": (0.25, 0.25),
    "top": (0.5, 0.25),
    "top right": (0.75, 0.25),
    "left": (0.25, 0.5),
    "centre": (0.5, 0.5),
    "right": (0.75, 0.5),
    "bottom left": (0.25, 0.75),
    "bottom": (0.5, 0.75),
    "bottom right": (0.75, 0.75),
}
"""Place word -> centre (x, y) as fractions of width and height."""
LAYOUTS = ("single", "single", "pair", "pair", "trio", "count", "digit", "digit")
SIDES = (64, 64, 72, 80, 96)
MIN_CONTRAST = 120.0
"""Least RGB distance between a thing and its background."""


@dataclass(frozen=True, slots=True)
class Thing:
    """One shape in a picture; x, y and radius are fractions of width, height and short side."""

    shape: str
    colour: str
    size: str
    place: str
    x: float
    y: float
    radius: float
    angle: float


@dataclass(frozen=True, slots=True)
class Scene:
    """Everything that is true of a picture; `relation` is of the first thing to the second."""

    layout: str
    things: tuple[Thing, ...]
    relation: str | None
    digit: int | None
    digit_colour: str | None
    digit_row: int | None
    background: str
    texture: str
    width: int
    height: int
    texture_seed: int

    def to_dict(self) -> dict[str, Any]:
        """Return the scene as plain values, ready for JSON."""
        return asdict(self)

    def contents(self) -> tuple[tuple[str, ...], ...]:
        """Return the (colour, shape or digit) pairs that can be seen, sorted."""
        things = [(thing.colour, thing.shape) for thing in self.things]
        digits = [] if self.digit is None else [(str(self.digit_colour), str(self.digit))]
        return tuple(sorted(things + digits))


def make_scene(seed: int, index: int) -> Scene:
    """Return scene number `index` of the world `seed`."""
    rng = rng_for(seed, "scene", index)
    layout = pick(rng, LAYOUTS)
    background = pick(rng, tuple(BACKGROUNDS))
    colours = _colours_on(background)
    things, relation = _THINGS_OF[layout](rng, colours)
    has_digit = layout == "digit"
    digit_row = int(rng.integers(_NUM_DIGITS)) if has_digit else None
    width = pick(rng, SIDES)
    return Scene(
        layout=layout,
        things=things,
        relation=relation,
        digit=int(_digits()[1][digit_row]) if digit_row is not None else None,
        digit_colour=pick(rng, colours) if has_digit else None,
        digit_row=digit_row,
        background=background,
        texture=pick(rng, TEXTURES),
        width=width,
        height=width if rng.random() < 0.8 else int(width * 1.15),
        texture_seed=int(rng.integers(2**31)),
    )


def draw_scene(scene: Scene) -> Image.Image:
    """Return the RGB picture of `scene`, `scene.width` by `scene.height` pixels."""
    picture = _draw_background(scene)
    draw = ImageDraw.Draw(picture)
    for thing in scene.things:
        _draw_thing(draw, thing, scene)
    if scene.digit_row is not None:
        _paste_digit(picture, scene)
    return picture


def box_of(thing: Thing, scene: Scene) -> tuple[float, float, float, float]:
    """Return what `thing` covers: left, top, right, bottom as fractions of width and height.

    A thing that reaches over the picture's edge ends there.
    """
    x, y = thing.x * scene.width, thing.y * scene.height
    r = thing.radius * min(scene.width, scene.height)
    points = [(x - r, y - r), (x + r, y + r)]
    if thing.shape in _OUTLINES:
        points = _corners(thing, x, y, r)
    across = [min(max(at / scene.width, 0.0), 1.0) for at, _ in points]
    down = [min(max(at / scene.height, 0.0), 1.0) for _, at in points]
    return min(across), min(down), max(across), max(down)


@functools.cache
def _colours_on(background: str) -> tuple[str, ...]:
    """Return the colours that stand out from `background`."""
    ground = BACKGROUNDS[background]
    return tuple(name for name, rgb in COLOURS.items() if math.dist(rgb, ground) >= MIN_CONTRAST)


def _thing_at(
    rng: np.random.Generator, colours: tuple[str, ...], *, place: str, size: str
) -> Thing:
    x, y = PLACES[place]
    jitter_x, jitter_y, radius_scale, turn = rng.uniform(-1.0, 1.0, size=4).tolist()
    return Thing(
        shape=pick(rng, SHAPES),
        colour=pick(rng, colours),
        size=size,
        place=place,
        x=round(x + 0.05 * jitter_x, 4),
        y=round(y + 0.05 * jitter_y, 4),
        radius=round(SIZES[size] * (1 + 0.12 * radius_scale), 4),
        angle=round(0.35 * turn, 4),
    )


def _single(
    rng: np.random.Generator, colours: tuple[str, ...]
) -> tuple[tuple[Thing, ...], str | None]:
    size, place = pick(rng, tuple(SIZES)), pick(rng, tuple(PLACES))
    return (_thing_at(rng, colours, place=place, size=size),), None


def _pair(
    rng: np.random.Generator, colours: tuple[str, ...]
) -> tuple[tuple[Thing, ...], str | None]:
    relation = pick(rng, ("left of", "above"))
    places = ("left", "right") if relation == "left of" else ("top", "bottom")
    sizes = (pick(rng, ("small", "medium", "large")) for _ in places)
    first, second = (
        _thing_at(rng, colours, place=place, size=size)
        for place, size in zip(places, sizes, strict=True)
    )
    return (first, second), relation


def _trio(
    rng: np.random.Generator, colours: tuple[str, ...]
) -> tuple[tuple[Thing, ...], str | None]:
    corners = [place for place in PLACES if " " in place]
    chosen = [corners[i] for i in sorted(rng.permutation(4)[:3].tolist())]
    return tuple(
        _thing_at(rng, colours, place=place, size=pick(rng, ("small", "medium")))
        for place in chosen
    ), None


def _count(
    rng: np.random.Generator, colours: tuple[str, ...]
) -> tuple[tuple[Thing, ...], str | None]:
    places = list(PLACES)
    chosen = sorted(rng.permutation(len(places))[: int(rng.integers(2, 6))].tolist())
    things = [_thing_at(rng, colours, place=places[i], size="small") for i in chosen]
    first = things[0]
    same = (
        Thing(first.shape, first.colour, "small", t.place, t.x, t.y, t.radius, t.angle)
        for t in things
    )
    return tuple(same), None


def _beside_digit(
    rng: np.random.Generator, colours: tuple[str, ...]
) -> tuple[tuple[Thing, ...], str | None]:
    if rng.random() < 0.5:
        return (), None
    place = pick(rng, ("left", "top left", "bottom left"))
    return (_thing_at(rng, colours, place=place, size="small"),), None


_THINGS_OF = {
    "single": _single,
    "pair": _pair,
    "trio": _trio,
    "count": _count,
    "digit": _beside_digit,
}


def _draw_background(scene: Scene) -> Image.Image:
    rng = rng_for(scene.texture_seed, "background", 0)
    ground = np.asarray(BACKGROUNDS[scene.background], dtype=np.float32)
    ground = ground + rng.uniform(-14, 14, size=3).astype(np.float32)
    pattern = _TEXTURE_OF[scene.texture](rng, scene.height, scene.width)
    pixels = np.clip(ground + pattern[..., None], 0, 255).astype(np.uint8)
    return Image.fromarray(np.ascontiguousarray(np.broadcast_to(pixels, _shape_of(scene))))


def _shape_of(scene: Scene) -> tuple[int, int, int]:
    return (scene.height, scene.width, 3)


def _flat(_rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    return np.zeros((height, width), dtype=np.float32)


def _graded(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Return a linear ramp of up to 60 grey levels in a random direction."""
    turn = float(rng.uniform(0, 2 * math.pi))
    rows = np.linspace(-30, 30, height, dtype=np.float32)[:, None] * np.float32(math.sin(turn))
    columns = np.linspace(-30, 30, width, dtype=np.float32)[None, :] * np.float32(math.cos(turn))
    return rows + columns


def _grainy(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    return rng.standard_normal((height, width), dtype=np.float32) * np.float32(12)


def _striped(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    period, is_upright = int(rng.integers(6, 15)), rng.random() < 0.5
    phase = int(rng.integers(period))
    length = width if is_upright else height
    band = np.where((np.arange(length) + phase) % period < period // 2, 16, -16)
    stripes = band.astype(np.float32)[None, :] if is_upright else band.astype(np.float32)[:, None]
    return np.broadcast_to(stripes, (height, width))


def _checked(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    cell = int(rng.integers(5, 13))
    rows, columns = np.arange(height) // cell, np.arange(width) // cell
    return np.where((rows[:, None] + columns[None, :]) % 2 == 0, 14, -14).astype(np.float32)


_TEXTURE_OF = {
    "flat": _flat,
    "graded": _graded,
    "grainy": _grainy,
    "striped": _striped,
    "checked": _checked,
}


def _draw_thing(draw: ImageDraw.ImageDraw, thing: Thing, scene: Scene) -> None:
    x, y = thing.x * scene.width, thing.y * scene.height
    r = thing.radius * min(scene.width, scene.height)
    colour = COLOURS[thing.colour]
    box = (x - r, y - r, x + r, y + r)
    if thing.shape == "circle":
        draw.ellipse(box, fill=colour)
    elif thing.shape == "ring":
        draw.ellipse(box, outline=colour, width=max(2, round(r * 0.4)))
    else:
        draw.polygon(_corners(thing, x, y, r), fill=colour)


def _corners(thing: Thing, x: float, y: float, r: float) -> list[tuple[float, float]]:
    """Return the polygon's corners in pixels, turned by `thing.angle` radians about (x, y)."""
    sine, cosine = math.sin(thing.angle), math.cos(thing.angle)
    return [
        (x + r * (cosine * u - sine * v), y + r * (sine * u + cosine * v))
        for u, v in _OUTLINES[thing.shape]
    ]


def _star_outline() -> tuple[tuple[float, float], ...]:
    spokes = [(1.15 if i % 2 == 0 else 0.48, math.pi * (i / 5 - 0.5)) for i in range(10)]
    return tuple((length * math.cos(turn), length * math.sin(turn)) for length, turn in spokes)


_OUTLINES: dict[str, tuple[tuple[float, float], ...]] = {
    "square": ((-0.9, -0.9), (0.9, -0.9), (0.9, 0.9), (-0.9, 0.9)),
    "diamond": ((0.0, -1.2), (0.7, 0.0), (0.0, 1.2), (-0.7, 0.0)),
    "triangle": ((0.0, -1.1), (1.05, 0.8), (-1.05, 0.8)),
    "cross": (
        *((-0.32, -1.05), (0.32, -1.05), (0.32, -0.32), (1.05, -0.32), (1.05, 0.32), (0.32, 0.32)),
        *((0.32, 1.05), (-0.32, 1.05), (-0.32, 0.32), (-1.05, 0.32), (-1.05, -0.32)),
        (-0.32, -0.32),
    ),
    "star": _star_outline(),
}
"""Corners around (0, 0) in units of the radius, y downwards."""

_NUM_DIGITS = 1797
"""Rows of scikit-learn's handwritten digits (UCI Optical Recognition of Handwritten Digits)."""


@functools.cache
def _digits() -> tuple[np.ndarray, np.ndarray]:
    """Return handwritten digits as masks, uint8 [1797, 8, 8], and their values, int64 [1797]."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    masks = np.minimum(bunch.images * 17.0, 255.0).astype(np.uint8)
    return masks, bunch.target.astype(np.int64)


def _paste_digit(picture: Image.Image, scene: Scene) -> None:
    """Paste the digit in the middle, or right of it when a thing stands on the left."""
    side = round(0.56 * min(scene.width, scene.height))
    mask = Image.fromarray(_digits()[0][scene.digit_row]).resize(
        (side, side), Image.Resampling.BICUBIC
    )
    jitter = rng_for(scene.texture_seed, "digit", 0).uniform(-0.05, 0.05, size=2)
    centre_x = (0.66 if scene.things else 0.5) + float(jitter[0])
    left = round(centre_x * scene.width - side / 2)
    top = round((0.5 + float(jitter[1])) * scene.height - side / 2)
    picture.paste(COLOURS[str(scene.digit_colour)], (left, top), mask)
