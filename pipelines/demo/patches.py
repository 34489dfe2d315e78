"""Pictures as a vision tower takes them, and what each patch of them shows.

A patch of 8 x 8 pixels shows the thing whose box covers at least a quarter of it, the one in front
if there are several, and the whole picture's facts are said of every patch.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image

from pipelines.demo import junk
from pipelines.demo.captions import caption_scene, pick_style
from pipelines.demo.mix_questions import clear_scene
from pipelines.demo.practice import IMAGE_SIDE
from pipelines.demo.scenes import (
    BACKGROUNDS,
    COLOURS,
    PLACES,
    SHAPES,
    SIZES,
    TEXTURES,
    Scene,
    box_of,
    draw_scene,
    make_scene,
)
from pipelines.demo.seeds import rng_for
from train.data.images import ImageRules, decode

PATCH = 8
GRID = IMAGE_SIDE // PATCH
MOST = 5
"""Most things in a picture."""
_COVERED = 0.25
_DIGIT_SIDE = 0.56

OF_PATCH = {
    "what": ("nothing", *SHAPES, *(str(digit) for digit in range(10))),
    "colour": ("none", *COLOURS),
    "size": ("none", *SIZES),
    "place": ("none", *PLACES),
}
"""What is asked of a patch alone -> the answers; the first of them where it shows no thing."""
OF_PICTURE = {
    "background": tuple(BACKGROUNDS),
    "texture": TEXTURES,
    "number": tuple(str(number) for number in range(MOST + 1)),
    **{f"number of {shape}": tuple(str(n) for n in range(MOST + 1)) for shape in SHAPES},
}
"""What is asked of a whole picture -> the answers."""
ASKED = {**OF_PATCH, **OF_PICTURE}


@dataclass(frozen=True, slots=True)
class Pictures:
    """Pictures in memory, with their truth.

    pixels: uint8 [n, 64, 64, 3]. answers: uint8 [n, 64, len(ASKED)], positions in ASKED's answers,
    for each patch in raster order. captions: n lists of equally true captions.
    """

    pixels: np.ndarray
    answers: np.ndarray
    captions: list[list[str]]


def make_pictures(seed: int, indices: range, *, num_captions: int = 0) -> Pictures:
    """Return the pictures numbered `indices` of the world `seed`, a function of the numbers alone.

    Every second one is a scene of the mix (no thing over another), padded to a square; the others
    are scenes of the web, squeezed into one.
    """
    rows = [_picture(seed, index, num_captions) for index in indices]
    return Pictures(
        np.stack([row[0] for row in rows]),
        np.stack([row[1] for row in rows]),
        [row[2] for row in rows],
    )


def join_pictures(parts: list[Pictures]) -> Pictures:
    """Return the pictures of all `parts` in order."""
    return Pictures(
        np.concatenate([part.pixels for part in parts]),
        np.concatenate([part.answers for part in parts]),
        [captions for part in parts for captions in part.captions],
    )


def _picture(seed: int, index: int, num_captions: int) -> tuple[np.ndarray, np.ndarray, list[str]]:
    rng = rng_for(seed, "tower", index)
    is_mix = index % 2 == 0
    scene = clear_scene(seed, index) if is_mix else make_scene(seed, index)
    jpeg = junk.encode_jpeg(draw_scene(scene), int(rng.integers(82, 97)))
    pixels = _to_pixels(jpeg, pad=is_mix)
    captions = [caption_scene(scene, pick_style(rng), rng) for _ in range(num_captions)]
    return pixels, answers_of(scene, pad=is_mix), captions


def _to_pixels(jpeg: bytes, *, pad: bool) -> np.ndarray:
    """Return uint8 [64, 64, 3]: what training's own rules make of a picture, not yet normalised."""
    rules = ImageRules("pad" if pad else "square", IMAGE_SIDE, (0.5,) * 3, (0.5,) * 3)
    values = rules(decode(jpeg))
    pixels: np.ndarray = np.rint((values.transpose(1, 2, 0) + 1) * 127.5).astype(np.uint8)
    return pixels


def answers_of(scene: Scene, *, pad: bool) -> np.ndarray:
    """Return the answers to ASKED for each patch: uint8 [64, len(ASKED)].

    pad: whether the picture stands in the middle of a square, or fills it.
    """
    found = np.zeros((GRID, GRID, len(ASKED)), np.uint8)
    found[:, :, len(OF_PATCH) :] = _of_picture(scene)
    for box, answers in _boxes(scene):
        found[_patches_in(box, scene if pad else None), : len(OF_PATCH)] = answers
    return found.reshape(GRID * GRID, len(ASKED))


def _of_picture(scene: Scene) -> list[int]:
    shapes = [thing.shape for thing in scene.things]
    said = {"background": scene.background, "texture": scene.texture, "number": str(len(shapes))}
    said |= {f"number of {shape}": str(shapes.count(shape)) for shape in SHAPES}
    return [answers.index(said[name]) for name, answers in OF_PICTURE.items()]


def _boxes(scene: Scene) -> list[tuple[tuple[float, ...], list[int]]]:
    """Return what there is, from back to front: its box and the answers of its patches."""
    found: list[tuple[tuple[float, ...], list[int]]] = []
    for thing in scene.things:
        said = (thing.shape, thing.colour, thing.size, thing.place)
        found.append((box_of(thing, scene), _positions(said)))
    if scene.digit is not None:
        said = (str(scene.digit), str(scene.digit_colour), "none", "none")
        found.append((_digit_box(scene), _positions(said)))
    return found


def _positions(said: tuple[str, ...]) -> list[int]:
    return [answers.index(one) for one, answers in zip(said, OF_PATCH.values(), strict=True)]


def _digit_box(scene: Scene) -> tuple[float, ...]:
    """Return about where the digit is pasted, its small random shift left out."""
    half = _DIGIT_SIDE * min(scene.width, scene.height) / 2
    across, down = half / scene.width, half / scene.height
    middle = 0.66 if scene.things else 0.5
    return middle - across, 0.5 - down, middle + across, 0.5 + down


def _patches_in(box: tuple[float, ...], padded: Scene | None) -> np.ndarray:
    """Return which patches a box covers enough of: bool [8, 8]."""
    left, top, right, bottom = box
    if padded is not None:
        side = max(padded.width, padded.height)
        left, right = (
            (x - 0.5) * padded.width / side + 0.5 for x in (left, right)
        )  # the padding is alike on both sides
        top, bottom = ((y - 0.5) * padded.height / side + 0.5 for y in (top, bottom))
    edges = np.arange(GRID)
    across = np.minimum(right * GRID, edges + 1) - np.maximum(left * GRID, edges)
    down = np.minimum(bottom * GRID, edges + 1) - np.maximum(top * GRID, edges)
    covered = np.clip(down, 0, 1)[:, None] * np.clip(across, 0, 1)[None, :]
    inside: np.ndarray = covered >= _COVERED
    return inside


def picture_of(pixels: np.ndarray) -> Image.Image:
    """Return one picture's pixels, uint8 [64, 64, 3], as a picture to look at."""
    return Image.fromarray(pixels)
