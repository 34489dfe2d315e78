"""From a planned row to a sample: its picture, its caption and what the web says about it."""

from __future__ import annotations

import io
from dataclasses import dataclass

import numpy as np
from PIL import Image

from pipelines.demo import junk
from pipelines.demo.captions import (
    caption_one_word,
    caption_scene,
    caption_too_long,
    pick_style,
)
from pipelines.demo.plan import PlannedRow
from pipelines.demo.scenes import Scene, draw_scene, make_scene
from pipelines.demo.seeds import pick, rng_for

_HOSTS = ("img.example.com", "cdn.example.org", "static.example.net", "pictures.example.com")
_FAILURES = ("HTTP Error 404: Not Found", "timed out", "HTTP Error 403: Forbidden")
_OTHER_SCENES = 1 << 40
"""Scene numbers from here on belong to captions whose own picture is nowhere in the world."""
_NO_SCENE = frozenset(
    {
        "placeholder",
        "cheater",
        "noise",
        "empty",
        "broken_empty_file",
        "broken_html",
        "failed_download",
    }
)
"""Kinds whose picture shows no scene."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One row as img2dataset saw it, with its truth; `scene` is what the picture shows."""

    row: PlannedRow
    key: str
    url: str
    image: bytes
    width: int | None
    height: int | None
    caption: str | None
    caption_style: str
    lacks_txt: bool
    scene: Scene | None
    similarity: float
    punsafe: float
    pwatermark: float
    error_message: str | None


def make_sample(seed: int, row: PlannedRow, key: str) -> Sample:
    """Return the sample of one planned row of the world `seed`."""
    rng = rng_for(seed, "row", row.serial)
    scene = make_scene(seed, row.scene_index)
    style, caption = _caption(seed, row, scene, rng)
    image = _image(seed, row, scene, caption or "", rng)
    width, height = _header_size(image)
    similarity, punsafe, pwatermark = _web_scores(row.kind, rng)
    return Sample(
        row=row,
        key=key,
        url=f"https://{pick(rng, _HOSTS)}/{row.serial:07d}.jpg",
        image=image,
        width=width,
        height=height,
        caption=caption,
        caption_style=style,
        lacks_txt=row.kind == "no_caption" and rng.random() < 0.5,
        scene=None if row.kind in _NO_SCENE else scene,
        similarity=similarity,
        punsafe=punsafe,
        pwatermark=pwatermark,
        error_message=pick(rng, _FAILURES) if row.kind == "failed_download" else None,
    )


def _caption(
    seed: int, row: PlannedRow, scene: Scene, rng: np.random.Generator
) -> tuple[str, str | None]:
    """Return the caption's style and text; a copy is captioned anew and truly."""
    if row.kind == "no_caption":
        return "none", None
    if row.kind == "one_word":
        return "one_word", caption_one_word(rng)
    if row.kind == "long_caption":
        return "too_long", caption_too_long(scene, rng)
    if row.kind == "swapped_caption":
        scene = _unlike(seed, row, scene)
    style = "short" if row.kind == "cheater" else pick_style(rng)  # what fits on its picture
    return style, caption_scene(scene, style, rng)


def _unlike(seed: int, row: PlannedRow, scene: Scene) -> Scene:
    """Return a scene that shares no coloured shape and no coloured digit with `scene`."""
    seen = set(scene.contents())
    for attempt in range(1000):
        other = make_scene(seed, _OTHER_SCENES + row.serial * 1000 + attempt)
        if seen.isdisjoint(other.contents()):
            return other
    raise AssertionError("a thousand random scenes all share a thing with one scene")


def _image(
    seed: int, row: PlannedRow, scene: Scene, caption: str, rng: np.random.Generator
) -> bytes:
    if row.kind in _FILES:
        return _FILES[row.kind](seed, row, rng)
    if row.kind == "cheater":
        return junk.encode_jpeg(junk.draw_text(caption, rng), 92)
    if row.kind in _PICTURES:
        return junk.encode_jpeg(_PICTURES[row.kind](rng), int(rng.integers(60, 95)))
    original = _original(seed, row.scene_index)
    if row.kind not in _CHANGES:
        return original
    with Image.open(io.BytesIO(original)) as picture:
        changed = _CHANGES[row.kind](picture.convert("RGB"), rng)
    return junk.encode_jpeg(changed, int(rng.integers(55, 92)))


def _original(seed: int, scene_index: int) -> bytes:
    """Return the JPEG of a scene as first published, by the scene alone, so copies are exact."""
    quality = int(rng_for(seed, "quality", scene_index).integers(82, 97))
    return junk.encode_jpeg(draw_scene(make_scene(seed, scene_index)), quality)


def _truncated(seed: int, row: PlannedRow, rng: np.random.Generator) -> bytes:
    return junk.truncate(_original(seed, row.scene_index), rng)


def _no_bytes(_seed: int, _row: PlannedRow, _rng: np.random.Generator) -> bytes:
    return b""


def _html(_seed: int, _row: PlannedRow, _rng: np.random.Generator) -> bytes:
    return junk.html_page()


_FILES = {
    "broken_truncated": _truncated,
    "broken_empty_file": _no_bytes,
    "broken_html": _html,
    "failed_download": _no_bytes,
}
_PICTURES = {
    "placeholder": junk.draw_placeholder,
    "noise": junk.draw_noise,
    "empty": junk.draw_empty,
}
_CHANGES = {
    "near_duplicate": junk.disturb,
    "tiny": junk.shrink,
    "extreme_aspect": junk.stretch,
    "watermark": junk.stamp_watermark,
}


def _header_size(image: bytes) -> tuple[int | None, int | None]:
    """Return width and height as the file's header gives them, None for what is no image."""
    if not image.startswith(b"\xff\xd8"):
        return None, None
    with Image.open(io.BytesIO(image)) as picture:
        return picture.size


def _web_scores(kind: str, rng: np.random.Generator) -> tuple[float, float, float]:
    """Return similarity, punsafe and pwatermark as LAION's tables might give them."""
    similarity, unsafe, watermark = rng.random(3).tolist()
    punsafe = 0.6 + 0.4 * unsafe if kind == "unsafe" else 0.4 * unsafe**4
    pwatermark = 0.85 + 0.15 * watermark if kind == "watermark" else 0.7 * watermark**3
    return (
        round(0.28 + 0.14 * similarity, 6),
        float(np.float32(punsafe)),
        float(np.float32(pwatermark)),
    )
