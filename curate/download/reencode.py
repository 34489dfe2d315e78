"""A downloaded file -> the image that is stored, upright, resized, encoded; or why there is none.

Resizing modes and the sides that come out are img2dataset's, with one difference: sides are those
of the upright picture (img2dataset does not look at the EXIF orientation). Pixels are told by
manifests/pixels.py, so 16-bit, CMYK, transparent and animated files are what they are elsewhere.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import nullcontext
from io import BytesIO
from threading import Lock
from typing import Any, NamedTuple

from PIL import ExifTags, Image, ImageFile

from curate.download.config import DownloadConfig
from curate.download.content import look, status_of
from curate.download.statuses import Status
from curate.media import image_ends
from curate.media.images import SUFFIX_OF_FORMAT, ImageError, ImageHeader, load, opened
from manifests.pixels import DECODER_ERRORS, swaps_sides

_WHITE = (255, 255, 255)
_SHRINK, _ENLARGE = Image.Resampling.BOX, Image.Resampling.LANCZOS
"""img2dataset's filters: shrinking is the mean of the area that becomes a pixel."""
_DRAFT_SIDES = 2
"""A JPEG is decoded at 1/2, 1/4 or 1/8 of its size as long as it stays this many times too big."""
_MAX_SIDE = {"jpg": 65_500, "png": 2**31 - 1, "webp": 16_383}
"""Longest side in pixels that the encoders can write: of libjpeg and libwebp."""
_LARGE, _ONE_LARGE = 1 << 24, Lock()
"""Images of more pixels are decoded one at a time in a process: at the limit of 128 million pixels
one takes 1 GB."""
_MAX_EXIF_VALUE_CHARACTERS = 200
_IFDS = (
    ("EXIF", ExifTags.IFD.Exif, ExifTags.TAGS),
    ("GPS", ExifTags.IFD.GPSInfo, ExifTags.GPSTAGS),
)

Sides = tuple[int, int]
"""Width and height in pixels."""


class Stored(NamedTuple):
    """An image to store. The sides are its own, the original ones those of the upright file."""

    data: bytes
    suffix: str
    width: int
    height: int
    original_width: int
    original_height: int
    exif: str  # a JSON object


class Refused(NamedTuple):
    """Why a file is not stored."""

    status: Status
    detail: str


def prepare(data: bytes, config: DownloadConfig) -> Stored | Refused:
    """Return the image that a file is stored as. Threads may call it side by side."""
    found = look(data, config)
    if found.status is not Status.OK or found.header is None:
        return Refused(found.status, found.detail)
    try:
        if config.keep_original_bytes:
            return _as_it_came(data, found.header, config)
        with _ONE_LARGE if found.header.width * found.header.height > _LARGE else nullcontext():
            return _encoded_anew(data, config)
    except ImageError as error:
        return Refused(status_of(error), error.detail)


def resized_sides(sides: Sides, config: DownloadConfig) -> Sides | None:
    """Return the sides that a picture is scaled to, before it is cropped or bordered.

    None where it is left alone. Halves are rounded to even, no side is below one pixel.
    """
    of_shorter = config.resize in ("keep_ratio", "center_crop")
    side = min(sides) if of_shorter else max(sides)
    if config.resize == "no" or (config.only_if_bigger and side <= config.image_size):
        return None
    scale = config.image_size / side
    width, height = (max(1, round(one * scale)) for one in sides)
    return width, height


def exif_json(image: Image.Image) -> str:
    """Return the EXIF block as a JSON object of texts, e.g. {"Image Make": "Canon", ...}.

    Names are those of img2dataset: the block's name, then the tag's. Long values are cut. Args:
    image: loaded, or a JPEG.
    """
    try:
        return json.dumps(dict(_exif_items(image.getexif())))
    except DECODER_ERRORS:
        return "{}"


def _as_it_came(data: bytes, header: ImageHeader, config: DownloadConfig) -> Stored:
    image_ends.inspect(
        lambda at, size: data[at : at + size], len(data), max_pixels=config.max_pixels
    )
    sides = header.width, header.height
    exif = "{}"
    if header.format == "JPEG" and b"Exif" in data[: image_ends.HEAD_BYTES]:
        exif = exif_json(opened(data, max_pixels=config.max_pixels))
    return Stored(data, SUFFIX_OF_FORMAT[header.format], *sides, *sides, exif)


def _encoded_anew(data: bytes, config: DownloadConfig) -> Stored | Refused:
    image = opened(data, max_pixels=config.max_pixels)
    sides = image.size
    if image.format == "JPEG":
        _decode_smaller(image, config)
    picture = load(image)  # before its EXIF is asked for: some plugins decode for that, silently
    original = sides[::-1] if swaps_sides(image) else sides
    wanted = resized_sides(original, config)
    if wanted is not None:
        if wanted[0] * wanted[1] > config.max_pixels:
            detail = f"it would be enlarged to {wanted[0]} x {wanted[1]}"
            return Refused(Status.TOO_MANY_PIXELS, detail)
        picture = _squared(_scaled(picture, wanted), config)
    if max(picture.size) > _MAX_SIDE[config.encode_format]:
        width, height = picture.size
        detail = f"{width} x {height} has a side that {config.encode_format} cannot hold"
        return Refused(Status.TOO_MANY_PIXELS, detail)
    found = _encode(picture, config), config.encode_format, *picture.size, *original
    return Stored(*found, exif_json(image))


def _decode_smaller(image: ImageFile.ImageFile, config: DownloadConfig) -> None:
    """Let a JPEG's decoder leave out the detail that shrinking would take away."""
    is_turned = swaps_sides(image)  # of a JPEG this decodes nothing
    wanted = resized_sides(image.size[::-1] if is_turned else image.size, config)
    if wanted is not None:
        width, height = wanted[::-1] if is_turned else wanted
        image.draft(None, (width * _DRAFT_SIDES, height * _DRAFT_SIDES))


def _scaled(picture: Image.Image, wanted: Sides) -> Image.Image:
    if picture.size == wanted:
        return picture
    if min(wanted) >= min(picture.size):
        return picture.resize(wanted, _ENLARGE)
    return picture.resize(wanted, _SHRINK)


def _squared(picture: Image.Image, config: DownloadConfig) -> Image.Image:
    """Return the middle square, or the picture in the middle of a white one, if so asked."""
    side, (width, height) = config.image_size, picture.size
    if config.resize == "center_crop":
        left, top = (width - side) // 2, (height - side) // 2
        return picture.crop((left, top, left + side, top + side))
    if config.resize == "border":
        square = Image.new("RGB", (side, side), _WHITE)
        square.paste(picture, ((side - width) // 2, (side - height) // 2))
        return square
    return picture


def _encode(picture: Image.Image, config: DownloadConfig) -> bytes:
    file = BytesIO()
    if config.encode_format == "png":
        picture.save(file, "PNG", compress_level=config.quality)
    else:
        kind = "JPEG" if config.encode_format == "jpg" else "WEBP"
        picture.save(file, kind, quality=config.quality)
    return file.getvalue()


def _exif_items(exif: Image.Exif) -> Iterator[tuple[str, str]]:
    yield from _named("Image", exif, ExifTags.TAGS)
    for block, number, names in _IFDS:
        yield from _named(block, exif.get_ifd(number), names)


def _named(block: str, values: Any, names: dict[int, str]) -> Iterator[tuple[str, str]]:
    for tag, value in sorted(values.items()):
        if tag not in (ExifTags.IFD.Exif, ExifTags.IFD.GPSInfo):  # where the other blocks lie
            text = str(value).replace("\0", "").strip()[:_MAX_EXIF_VALUE_CHARACTERS]
            yield f"{block} {names.get(tag, f'Tag 0x{tag:04X}')}", text
