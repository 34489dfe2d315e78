"""Pictures that look like nothing else, and what the web does to them."""

from __future__ import annotations

import io

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
