"""A decoded picture as RGB, upright: what curation judges is what training sees, pixel by pixel."""

from __future__ import annotations

import struct
import zlib

import numpy as np
from PIL import Image

# What Pillow's plugins raise on damaged input. The first four were met on 130k files with bytes
# changed, cut and repeated; the others are those that ImageFile turns into SyntaxError while
# opening, but not while loading.
DECODER_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    Image.DecompressionBombError,
    EOFError,
    LookupError,
    OverflowError,
    TypeError,
    struct.error,
    zlib.error,
)
_SIXTEEN_BIT_MODES = {"I;16", "I;16L", "I;16B", "I;16N", "I"}
_ORIENTATION_TAG = 0x0112
_TURNS = {  # EXIF 2.32, tag 0x0112: value -> what brings the picture upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_ONTO_ITS_SIDE = {_TURNS[orientation] for orientation in (5, 6, 7, 8)}


def upright_rgb(image: Image.Image) -> Image.Image:
    """Return a loaded image in mode RGB, turned as its EXIF says, without metadata.

    It is on white where it is transparent; 16-bit samples keep their upper 8 bits. Damaged EXIF
    says nothing about the pixels. Raises: one of DECODER_ERRORS.
    """
    turn = _turn(image)
    rgb = _rgb(image)
    return rgb if turn is None else rgb.transpose(turn)


def swaps_sides(image: Image.Image) -> bool:
    """Tell whether width and height change places when the image is turned as its EXIF says.

    Ask a loaded image, or a JPEG: other plugins decode to find EXIF, and a failure would be lost.
    """
    return _turn(image) in _ONTO_ITS_SIDE


def _turn(image: Image.Image) -> Image.Transpose | None:
    try:
        orientation = image.getexif().get(_ORIENTATION_TAG)
    except DECODER_ERRORS:
        return None
    return _TURNS.get(orientation) if isinstance(orientation, int) else None


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode in _SIXTEEN_BIT_MODES:  # Pillow's own conversion would saturate all above 255
        upper_bits = np.clip(np.asarray(image), 0, 65535) >> 8
        image = Image.fromarray(upper_bits.astype(np.uint8))
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    rgb = image.convert("RGB")
    rgb.info.clear()
    return rgb
