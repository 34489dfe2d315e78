"""Junk pictures: what a crawl of the web brings along, made on purpose and known by name.

Every function takes the random stream that decides its details. Pictures are RGB; `encode_jpeg`
makes bytes.
"""

from __future__ import annotations

import functools
import io
import textwrap

import numpy as np
from PIL import Image, ImageDraw, ImageEnhance, ImageFont

from pipelines.demo.seeds import pick

_PAPERS = ((250, 250, 250), (235, 235, 220), (225, 235, 245), (20, 20, 30), (60, 60, 70))
_HTML_PAGE = (
    b"<!DOCTYPE html><html><head><title>404 Not Found</title></head>"
    b"<body><h1>Not Found</h1><p>The image you asked for is gone.</p></body></html>\n"
)


def encode_jpeg(picture: Image.Image, quality: int) -> bytes:
    """Return `picture` as baseline JPEG bytes; the same picture and quality give the same bytes."""
    buffer = io.BytesIO()
    picture.save(buffer, format="JPEG", quality=quality)
    return buffer.getvalue()


def disturb(picture: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Return `picture` as another site shows it: cropped by up to 5%, lit anew, or rescaled.

    The caller re-encodes it, which is the fourth kind of disturbance (and at times the only one).
    """
    crop, brightness, scale = rng.random(3) < (0.45, 0.45, 0.4)
    if crop:
        left, top, right, bottom = rng.uniform(0, 0.05, size=4).tolist()
        width, height = picture.size
        box = (left * width, top * height, (1 - right) * width, (1 - bottom) * height)
        picture = picture.crop(tuple(round(edge) for edge in box))
    if brightness:
        picture = ImageEnhance.Brightness(picture).enhance(float(rng.uniform(0.85, 1.15)))
    if scale:
        factor = float(rng.uniform(0.85, 1.3))
        size = tuple(max(48, round(side * factor)) for side in picture.size)
        picture = picture.resize((size[0], size[1]), Image.Resampling.BILINEAR)
    return picture


def draw_placeholder(rng: np.random.Generator) -> Image.Image:
    """Return the "no image available" picture at one of many sizes and brightnesses."""
    side = int(rng.integers(60, 110))
    picture = _placeholder().resize((side, side), Image.Resampling.BILINEAR)
    return ImageEnhance.Brightness(picture).enhance(float(rng.uniform(0.95, 1.05)))


def draw_text(text: str, rng: np.random.Generator) -> Image.Image:
    """Return a plain 64-pixel picture with `text` written on it, as far as it fits.

    A picture that spells its caption out scores higher than one that shows it (the "cheaters").
    """
    paper = pick(rng, _PAPERS)
    ink = (15, 15, 15) if sum(paper) > 380 else (245, 245, 245)
    picture = Image.new("RGB", (64, 64), paper)
    lines = textwrap.wrap(text, width=10)[:5]
    left, top = int(rng.integers(1, 4)), int(rng.integers(0, 8))
    ImageDraw.Draw(picture).multiline_text(
        (left, top), "\n".join(lines), fill=ink, font=_bitmap_font(), spacing=1
    )
    return picture


def draw_noise(rng: np.random.Generator) -> Image.Image:
    """Return pure noise, grey or in colour, fine or coarse."""
    cells = pick(rng, (16, 32, 64))
    channels = pick(rng, (1, 3))
    values = rng.integers(0, 256, size=(cells, cells, channels), dtype=np.uint8)
    pixels = np.ascontiguousarray(np.broadcast_to(values, (cells, cells, 3)))
    return Image.fromarray(pixels).resize((64, 64), Image.Resampling.NEAREST)


def draw_empty(rng: np.random.Generator) -> Image.Image:
    """Return one flat colour, at times with a border one level darker: nothing to see."""
    colour = tuple(rng.integers(0, 256, size=3).tolist())
    picture = Image.new("RGB", (64, 64), colour)
    if rng.random() < 0.5:
        darker = tuple(max(0, level - 1) for level in colour)
        ImageDraw.Draw(picture).rectangle((0, 0, 63, 63), outline=darker)
    return picture


def shrink(picture: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Return `picture` with both sides of 8 to 16 pixels, as a tracking icon has."""
    side = int(rng.integers(8, 17))
    return picture.resize((side, side), Image.Resampling.BILINEAR)


def stretch(picture: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Return `picture` as a banner, four to eight times as long as it is thick."""
    long, short = 64 * int(rng.integers(4, 9)), 64
    size = (long, short) if rng.random() < 0.7 else (short, long)
    return picture.resize(size, Image.Resampling.BILINEAR)


def stamp_watermark(picture: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Return `picture` under rows of half-transparent text."""
    layer = Image.new("L", picture.size, 0)
    draw = ImageDraw.Draw(layer)
    start = int(rng.integers(0, 12))
    for row, y in enumerate(range(start, picture.height, 18)):
        draw.text((-6 * (row % 3), y), "STOCK PREVIEW " * 3, fill=130, font=_bitmap_font())
    marked = picture.copy()
    marked.paste((250, 250, 250), (0, 0), layer)
    return marked


def truncate(jpeg: bytes, rng: np.random.Generator) -> bytes:
    """Return a JPEG cut off after 10% to 60% of its scan: the header reads, the pixels do not."""
    scan = jpeg.index(b"\xff\xda")
    return jpeg[: scan + int((len(jpeg) - scan) * float(rng.uniform(0.1, 0.6)))]


def html_page() -> bytes:
    """Return the error page that servers send in place of a lost image."""
    return _HTML_PAGE


@functools.cache
def _bitmap_font() -> ImageFont.ImageFont:
    """Return Pillow's own 6 by 11 pixel font: no font file, the same pixels everywhere."""
    return ImageFont.load_default_imagefont()


@functools.cache
def _placeholder() -> Image.Image:
    picture = Image.new("RGB", (96, 96), (228, 228, 228))
    draw = ImageDraw.Draw(picture)
    draw.rectangle((26, 14, 70, 48), outline=(150, 150, 150), width=3)
    draw.polygon(((30, 45), (44, 28), (54, 38), (60, 32), (67, 45)), fill=(150, 150, 150))
    draw.ellipse((54, 19, 62, 27), fill=(150, 150, 150))
    for place, word in (((27, 58), "NO IMAGE"), ((21, 72), "AVAILABLE")):
        draw.text(place, word, fill=(110, 110, 110), font=_bitmap_font())
    return picture
