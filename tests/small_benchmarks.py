"""Pictures that look like nothing else, what the web does to them, and texts that share words."""

from __future__ import annotations

import io
import unicodedata

import numpy as np
from PIL import Image, ImageEnhance


def smooth_picture(seed: int, width: int = 160, height: int = 120) -> Image.Image:
    """Return a picture of random soft blots."""
    grid = np.random.default_rng(seed).integers(20, 220, (9, 12, 3), dtype=np.uint8)
    return Image.fromarray(grid).resize((width, height), Image.Resampling.BICUBIC)


def encoded(picture: Image.Image, kind: str = "PNG", **options: int) -> bytes:
    """Return an image file."""
    file = io.BytesIO()
    picture.save(file, format=kind, **options)
    return file.getvalue()


def halved(picture: Image.Image) -> Image.Image:
    """Return the picture at half its sides."""
    return picture.resize((picture.width // 2, picture.height // 2), Image.Resampling.BICUBIC)


def brightened(picture: Image.Image, factor: float = 1.15) -> Image.Image:
    """Return the picture with each value times a factor."""
    return ImageEnhance.Brightness(picture).enhance(factor)


def brute_overlap(caption: str, text: str, num_words: int) -> float:
    """Return the overlap of two texts as curate/contamination/ngrams.py defines it."""

    def words(one: str) -> list[str]:
        form = unicodedata.normalize("NFKC", one).lower()
        return "".join(c if c.isalnum() else " " for c in form).split()

    a, b = words(caption), words(text)
    if min(len(a), len(b)) < num_words:
        return float(bool(a) and a == b)
    grams = [
        {tuple(one[at : at + num_words]) for at in range(len(one) - num_words + 1)}
        for one in (a, b)
    ]
    return len(grams[0] & grams[1]) / min(len(grams[0]), len(grams[1]))
