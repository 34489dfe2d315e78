"""Image bytes to RGB pixels, the same on every machine and worker, or a named error.

The format is told by the content, never by the file's suffix; only FORMATS are decoded. Sizes are
read from the header and checked before anything is decoded. Any number of threads may decode at
once. ICC profiles are ignored: the pixels are those of the file.

Decoder: Pillow, by plugin class. `Image.open` would try every other format too, and warn or fail
by a global limit.
"""

from __future__ import annotations

import re
import struct
import warnings
from io import BytesIO
from typing import Literal, NamedTuple

from PIL import Image, ImageFile, ImageStat
from PIL.BmpImagePlugin import BmpImageFile
from PIL.GifImagePlugin import GifImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.WebPImagePlugin import WebPImageFile

from manifests.pixels import DECODER_ERRORS, upright_rgb

ImageErrorClass = Literal[
    "empty_image",
    "unknown_format",
    "truncated_image",
    "too_many_pixels",
    "undecodable_image",
    "zero_side",
]

# What the web serves as still images and decodes in one well-trodden way. Left out on purpose: TIFF
# (dozens of sub-formats, none shown by browsers), AVIF (a video codec), SVG (a program). GIF and
# BMP come under .jpg names: OCR-VQA has 900 of them.
FORMATS: dict[str, type[ImageFile.ImageFile]] = {
    "JPEG": JpegImageFile,
    "PNG": PngImageFile,
    "WEBP": WebPImageFile,
    "GIF": GifImageFile,
    "BMP": BmpImageFile,
}

SUFFIX_OF_FORMAT = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp", "GIF": "gif", "BMP": "bmp"}

_INPUT_ENDED = (EOFError, IndexError, struct.error)
# Where a header keeps its sides; only asked why a plugin has refused it.
_SIDES_AT = {"PNG": (">II", 16), "BMP": ("<ii", 18), "GIF": ("<HH", 6)}
_BITMAP_HEADER_BYTES = 26  # all of the above lie within
_JPEG_FRAME = re.compile(rb"\xff[\xc0-\xc2]\x00.[\x08\x0c](..)(..)", re.DOTALL)
# Remarks on metadata that is not used here. A filter, as warnings.catch_warnings is not safe
# between threads.
_PILLOW_REMARKS = ("ignore", None, Warning, re.compile(r"PIL\."), 0)


class ImageError(Exception):
    """The bytes are no usable image; `error_class` says in which way, `detail` in words."""

    def __init__(self, error_class: ImageErrorClass, detail: str) -> None:
        super().__init__(error_class, detail)  # the same arguments: so it can be pickled
        self.error_class = error_class
        self.detail = detail

    def __str__(self) -> str:
        """Return class and detail."""
        return f"{self.error_class}: {self.detail}"


class ImageHeader(NamedTuple):
    """What the header says: the format, and the sides in pixels as stored (before rotation)."""

    format: str  # a key of FORMATS
    width: int
    height: int


def sniff(data: bytes) -> ImageHeader:
    """Return format and sides from the header, without decoding any pixel.

    The first bytes of a file are enough when they hold the whole header.

    Raises: ImageError, as decode does for a file whose header cannot be used. A GIF of more pixels
        than Pillow's own limit (179 million) is too_many_pixels already here.
    """
    format_name = _format_of(data)
    if format_name == "WEBP":  # Pillow's plugin wants the whole file
        return ImageHeader(format_name, *_webp_sides(data))
    return ImageHeader(format_name, *_open(format_name, data).size)


def decode(data: bytes, *, max_pixels: int) -> Image.Image:
    """Return the first frame as an RGB image, upright, on white where it is transparent.

    16-bit samples keep their upper 8 bits. Truncated files are refused, not padded with gray.

    Args: max_pixels: the largest width times height that is decoded; larger images are refused by
        their header.
    Raises: ImageError, of every class.
    """
    return load(opened(data, max_pixels=max_pixels))


def opened(data: bytes, *, max_pixels: int) -> ImageFile.ImageFile:
    """Return an image with its header read and its pixels not, if it is not too large.

    Raises: ImageError.
    """
    format_name = _format_of(data)
    if format_name == "WEBP":  # opening alone would claim memory for the canvas
        check_pixels(_webp_sides(data), max_pixels)
    image = _open(format_name, data)
    check_pixels(image.size, max_pixels)
    return image


def load(image: ImageFile.ImageFile) -> Image.Image:
    """Return the pixels of an opened image as `decode` does. Raises: ImageError."""
    try:
        image.load()
        return upright_rgb(image)
    except DECODER_ERRORS as error:
        raise _named(error) from error


def check_pixels(sides: tuple[int, int], max_pixels: int) -> None:
    """Check width times height against a limit. Raises: ImageError, too_many_pixels."""
    width, height = sides
    if width * height > max_pixels:
        raise ImageError("too_many_pixels", f"{width} x {height} is more than {max_pixels} pixels")


def pixel_std(image: Image.Image) -> float:
    """Return the standard deviation of the luminance (ITU-R 601-2): 0 (one colour) to 127.5."""
    return float(ImageStat.Stat(image.convert("L")).stddev[0])


def _format_of(data: bytes) -> str:
    """Return the key of FORMATS that the first bytes name."""
    if not data:
        raise ImageError("empty_image", "no bytes")
    if data.startswith(b"\xff\xd8\xff"):
        return "JPEG"
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return "PNG"
    if data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        return "WEBP"
    if data.startswith((b"GIF87a", b"GIF89a")):
        return "GIF"
    if data.startswith(b"BM") and data[15:18] == bytes(3):  # its second header is below 256 bytes
        return "BMP"
    raise ImageError("unknown_format", f"none of {', '.join(FORMATS)}; starts with {data[:16]!r}")


def _webp_sides(data: bytes) -> tuple[int, int]:
    """Return the canvas sides. Source: RFC 9649, sections 2.7 and 3.4; RFC 6386, section 9.1."""
    kind = data[12:16]
    if len(data) < (25 if kind == b"VP8L" else 30):
        raise ImageError("truncated_image", f"the WEBP file ends after {len(data)} bytes")
    if kind == b"VP8X":
        return int.from_bytes(data[24:27], "little") + 1, int.from_bytes(data[27:30], "little") + 1
    if kind == b"VP8L" and data[20] == 0x2F:
        bits = int.from_bytes(data[21:25], "little")
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    if kind == b"VP8 " and data[23:26] == b"\x9d\x01\x2a":
        width, height = (side & 0x3FFF for side in struct.unpack_from("<HH", data, 26))
        if 0 in (width, height):
            raise ImageError("zero_side", f"{width} x {height} pixels")
        return width, height
    raise ImageError("undecodable_image", f"a WEBP file that begins with a {kind!r} chunk")


def _open(format_name: str, data: bytes) -> ImageFile.ImageFile:
    """Return the image with its header read and its pixels not."""
    _silence_pillow()
    try:
        return FORMATS[format_name](BytesIO(data))
    except DECODER_ERRORS as error:
        raise _named_in_header(error, format_name, data) from error


def _silence_pillow() -> None:
    """Keep Pillow's remarks on odd metadata off the screen, also when filters were reset."""
    if _PILLOW_REMARKS not in warnings.filters:
        warnings.filterwarnings("ignore", module=_PILLOW_REMARKS[3].pattern)


def _named_in_header(error: Exception, format_name: str, data: bytes) -> ImageError:
    """Return the error class of a header that a plugin has refused."""
    if _has_zero_side(format_name, data):
        return ImageError("zero_side", f"a {format_name} image of width or height 0")
    is_short_webp = format_name == "WEBP" and 8 + int.from_bytes(data[4:8], "little") > len(data)
    is_short_jpeg = format_name == "JPEG" and _JPEG_FRAME.search(data) is None
    if is_short_webp or is_short_jpeg:
        return ImageError("truncated_image", f"the {format_name} file ends too early: {error}")
    return _named(error)


def _has_zero_side(format_name: str, data: bytes) -> bool:
    if format_name == "JPEG":
        frame = _JPEG_FRAME.search(data)
        return frame is not None and bytes(2) in frame.groups()
    if format_name not in _SIDES_AT or len(data) < _BITMAP_HEADER_BYTES:
        return False
    layout, offset = _SIDES_AT[format_name]
    return 0 in struct.unpack_from(layout, data, offset)


def _named(error: Exception) -> ImageError:
    """Return the error class of what a plugin raised."""
    text = str(error) or type(error).__name__
    if isinstance(error, Image.DecompressionBombError):
        return ImageError("too_many_pixels", text)
    has_ended = isinstance(error, _INPUT_ENDED) or isinstance(error.__cause__, _INPUT_ENDED)
    if has_ended or "truncated" in text.lower():
        return ImageError("truncated_image", text)
    return ImageError("undecodable_image", text)
