"""Images of every kind that a fetcher meets, small and made on the spot."""

from __future__ import annotations

import struct
import zlib
from io import BytesIO
from typing import Any

import numpy as np
from PIL import Image

_SIDES = (48, 32)


def picture(mode: str = "RGB") -> Image.Image:
    """Return a picture of 48 x 32 pixels with some texture."""
    noise = np.random.default_rng(0).integers(0, 255, (_SIDES[1], _SIDES[0], 3), np.uint8)
    return Image.fromarray(noise).convert(mode)


def encoded(image: Image.Image, format: str, **options: Any) -> bytes:
    """Return an image as a file."""
    out = BytesIO()
    image.save(out, format, **options)
    return out.getvalue()


def jpeg(**options: Any) -> bytes:
    """Return the picture as JPEG."""
    return encoded(picture(), "JPEG", **options)


def rotated_jpeg() -> bytes:
    """Return a JPEG whose EXIF says that it lies on its side."""
    exif = Image.Exif()
    exif[0x0112] = 6
    return jpeg(exif=exif)


def animated(format: str) -> bytes:
    """Return an animation of three frames."""
    frames = [Image.new("RGB", _SIDES, colour) for colour in ("red", "green", "blue")]
    return encoded(frames[0], format, save_all=True, append_images=frames[1:])


def sixteen_bit_png() -> bytes:
    """Return a PNG of 16-bit gray."""
    return encoded(Image.fromarray(np.full((32, 48), 32768, np.uint16)), "PNG")


def plain_png(width: int, height: int) -> bytes:
    """Return a PNG of black pixels, one bit each: few bytes, however large it is."""
    packer = zlib.compressobj(9)
    row = bytes(1 + (width + 7) // 8)
    parts = [packer.compress(row) for _ in range(height)]
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    data = b"".join([*parts, packer.flush()])
    chunks = ((b"IHDR", header), (b"IDAT", data), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(*chunk) for chunk in chunks)


def gif(width: int, height: int) -> bytes:
    """Return a GIF whose header claims these sides, whatever its one frame has."""
    data = encoded(Image.new("P", (1, 1)), "GIF")
    return data[:6] + struct.pack("<HH", width, height) + data[10:]


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
