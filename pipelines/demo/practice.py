"""Clean pairs of other worlds than the demo's: what its model learns from and is judged on."""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from pipelines.demo import junk
from pipelines.demo.captions import caption_scene, pick_style
from pipelines.demo.scenes import (
    BACKGROUNDS,
    COLOURS,
    LAYOUTS,
    PLACES,
    SHAPES,
    TEXTURES,
    Scene,
    draw_scene,
    make_scene,
)
from pipelines.demo.seeds import pick, rng_for

if TYPE_CHECKING:
    import torch

IMAGE_SIDE = 64
TEXT_PICTURE_SHARE = 0.15
"""Share of pictures that show their caption in letters. The web is full of them, and a model that
never saw one could not be fooled by the demo's cheaters, as CLIP is."""

_PAIRS_OF_SHAPE = tuple((colour, shape) for colour in COLOURS for shape in SHAPES)
_LAYOUT_NAMES = tuple(dict.fromkeys(LAYOUTS))
_NUM_GROUPS = len(BACKGROUNDS) * len(_LAYOUT_NAMES) + 1
FACTS = (
    *(f"{colour} {shape}" for colour, shape in _PAIRS_OF_SHAPE),
    *(f"{colour} digit" for colour in COLOURS),
    *(f"digit {value}" for value in range(10)),
    *(f"at {place}" for place in PLACES),
    *(f"{number} things" for number in range(6)),
    *(f"relation {relation}" for relation in ("left of", "above")),
    *(f"on {background}" for background in BACKGROUNDS),
    *(f"is {texture}" for texture in TEXTURES),
)
"""Yes-or-no facts of a picture, the columns of `Practice.facts`."""
_FACT_COLUMN = {fact: column for column, fact in enumerate(FACTS)}


@dataclass(frozen=True, slots=True)
class Practice:
    """Pairs in memory.

    views: uint8 [n, 64, 64, 3], the picture.
    twins: the same picture disturbed (crop, brightness, scale, JPEG), alike.
    captions: n lists of equally true captions.
    facts: bool [n, len(FACTS)].
    groups: int [n], equal where background and layout are, so that one group holds pictures that
    are hard to tell apart.
    """

    views: np.ndarray
    twins: np.ndarray
    captions: list[list[str]]
    facts: np.ndarray
    groups: np.ndarray


def make_practice(
    seed: int,
    indices: range,
    *,
    num_captions: int = 1,
    text_share: float = TEXT_PICTURE_SHARE,
) -> Practice:
    """Return the pairs numbered `indices` of the world `seed`, a function of the numbers alone."""
    rows = [_practice_row(seed, index, num_captions, text_share) for index in indices]
    return Practice(
        views=np.stack([row[0] for row in rows]),
        twins=np.stack([row[1] for row in rows]),
        captions=[row[2] for row in rows],
        facts=np.stack([row[3] for row in rows]),
        groups=np.array([row[4] for row in rows]),
    )


def join_practice(parts: list[Practice]) -> Practice:
    """Return the pairs of all `parts` in order."""
    return Practice(
        views=np.concatenate([part.views for part in parts]),
        twins=np.concatenate([part.twins for part in parts]),
        captions=[captions for part in parts for captions in part.captions],
        facts=np.concatenate([part.facts for part in parts]),
        groups=np.concatenate([part.groups for part in parts]),
    )


def to_pixels(image: bytes) -> np.ndarray:
    """Return an image file as the model sees it: uint8 [64, 64, 3], squashed to a square."""
    with Image.open(io.BytesIO(image)) as picture:
        small = picture.convert("RGB").resize((IMAGE_SIDE, IMAGE_SIDE), Image.Resampling.BILINEAR)
    return np.asarray(small)


def _practice_row(
    seed: int, index: int, num_captions: int, text_share: float
) -> tuple[np.ndarray, np.ndarray, list[str], np.ndarray, int]:
    rng = rng_for(seed, "practice", index)
    scene = make_scene(seed, index)
    is_text = rng.random() < text_share
    if is_text:
        captions = [caption_scene(scene, pick(rng, ("plain", "short")), rng)] * num_captions
        picture = junk.draw_text(captions[0], rng)
    else:
        captions = [caption_scene(scene, pick_style(rng), rng) for _ in range(num_captions)]
        picture = draw_scene(scene)
    view = junk.encode_jpeg(picture, int(rng.integers(82, 97)))
    twin = junk.encode_jpeg(junk.disturb(picture, rng), int(rng.integers(55, 92)))
    facts = _facts(scene, is_text)
    return to_pixels(view), to_pixels(twin), captions, facts, _group(scene, is_text)


def _group(scene: Scene, is_text: bool) -> int:
    if is_text:
        return _NUM_GROUPS - 1
    ground = tuple(BACKGROUNDS).index(scene.background)
    return ground * len(_LAYOUT_NAMES) + _LAYOUT_NAMES.index(scene.layout)


def _facts(scene: Scene, is_text: bool) -> np.ndarray:
    """Return the facts of a scene; of written text only what the words can say for sure."""
    said = [f"{thing.colour} {thing.shape}" for thing in scene.things]
    if scene.digit is not None:
        said += [f"{scene.digit_colour} digit", f"digit {scene.digit}"]
    if not is_text:
        said += [f"at {thing.place}" for thing in scene.things]
        said += [f"{len(scene.things)} things", f"on {scene.background}", f"is {scene.texture}"]
        said += [f"relation {scene.relation}"] if scene.relation else []
    facts = np.zeros(len(FACTS), dtype=bool)
    facts[[_FACT_COLUMN[fact] for fact in said]] = True
    return facts


def to_model_input(pixels: np.ndarray) -> torch.Tensor:
    """Return uint8 [n, 64, 64, 3] pixels as float32 [n, 3, 64, 64] in -1..1 (preprocess_cfg)."""
    import torch

    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float().div_(127.5).sub_(1.0).contiguous()
