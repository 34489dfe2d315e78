"""Whether an image file is whole, told from its header and its end, without decoding a pixel.

Every format but BMP says where it ends, so a download that broke off is found by reading one block
at the file's start and one at its end. What is damaged in the middle is found only by decoding.

Sources: ITU-T T.81, B.1.1 (JPEG markers; inside entropy-coded data 0xFF is followed by 0x00 or a
restart marker, never by the end marker); PNG 3rd edition, 5.3 and 11.2.5; GIF89a, 18-27; RFC 9649,
2.4 (WEBP); Microsoft, BITMAPFILEHEADER and BITMAPINFOHEADER.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass

from curate.media.images import ImageError, ImageHeader, check_pixels, sniff

HEAD_BYTES = 1 << 16
"""Read first: nearly every header lies within, with an EXIF thumbnail too."""
TAIL_BYTES = 1 << 12
"""Read next, of files that are longer than both: the end marker, and a little behind it."""

Read = Callable[[int, int], bytes]
"""(offset, size) -> the bytes of the image from offset on; size never runs past its end."""

_JPEG_END = b"\xff\xd9"
_JPEG_SCAN = 0xDA
_JPEG_BARE = {0x01, *range(0xD0, 0xD9)}  # markers without a length: TEM, RSTn, SOI
_PNG_END = b"\0\0\0\0IEND\xaeB`\x82"
_GIF_EXTENSION, _GIF_IMAGE, _GIF_END = 0x21, 0x2C, 0x3B
_BMP_CORE_HEADER_BYTES = 12
_BMP_RLE = {1, 2}


@dataclass(slots=True)
class _File:
    """An image of which `head` is read; the rest is read when it is asked for."""

    read: Read
    num_bytes: int
    head: bytes

    @property
    def is_read(self) -> bool:
        return len(self.head) >= self.num_bytes

    def whole(self) -> bytes:
        if not self.is_read:
            self.head = self.read(0, self.num_bytes)
        return self.head

    def has_after(self, mark: bytes, start: int) -> bool:
        """Whether `mark` stands somewhere from `start` on; the last bytes are tried first."""
        if not self.is_read and mark in self.read(self.num_bytes - TAIL_BYTES, TAIL_BYTES):
            return True
        return self.whole().rfind(mark, start) >= 0


def inspect(read: Read, num_bytes: int, *, max_pixels: int) -> ImageHeader:
    """Return format and sides of an image whose file is whole; reads as little as it can.

    Whole means: JPEG has an end-of-image marker after its first start of scan, PNG its IEND chunk,
    GIF its trailer after complete blocks, WEBP as many bytes as its RIFF header says, BMP as many
    as its rows need (run-length coded: as its headers say, which some writers leave 0; a cut is
    then not seen). Bytes that follow are allowed.
    Args: num_bytes: of the image. max_pixels: the largest width times height.
    Raises: ImageError; what `read` raises.
    """
    is_small = num_bytes <= HEAD_BYTES + TAIL_BYTES
    file = _File(read, num_bytes, read(0, num_bytes if is_small else HEAD_BYTES))
    header = _header_of(file)
    check_pixels((header.width, header.height), max_pixels)
    if not _IS_WHOLE[header.format](file):
        detail = f"the {header.format} file has no end within its {num_bytes} bytes"
        raise ImageError("truncated_image", detail)
    return header


def _header_of(file: _File) -> ImageHeader:
    try:
        return sniff(file.head)
    except ImageError as error:
        if file.is_read or error.error_class == "unknown_format":
            raise
    return sniff(file.whole())  # its header is longer than a head


def _jpeg_is_whole(file: _File) -> bool:
    """A thumbnail in a header has an end marker too, so only one after the start of scan counts."""
    scan = _start_of_scan(file.head)
    if scan is None and not file.is_read:
        scan = _start_of_scan(file.whole())
    return scan is not None and file.has_after(_JPEG_END, scan)


def _start_of_scan(data: bytes) -> int | None:
    """Return where the first start-of-scan marker stands, or None when the bytes end before it."""
    at = data.find(b"\xff", 2)
    while 0 <= at < len(data) - 3:
        marker = data[at + 1]
        if marker == _JPEG_SCAN:
            return at
        if marker == 0xFF:  # fill
            at += 1
        elif marker in _JPEG_BARE:
            at += 2
        else:
            at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")
        at = data.find(b"\xff", at)
    return None


def _png_is_whole(file: _File) -> bool:
    return file.has_after(_PNG_END, 0)


def _webp_is_whole(file: _File) -> bool:
    return 8 + int.from_bytes(file.head[4:8], "little") <= file.num_bytes


def _gif_is_whole(file: _File) -> bool:
    """0x3B may be a byte of any picture, so the blocks are followed to see where it is the end."""
    data = file.whole()
    at = 13 + _gif_palette_bytes(data[10])
    while at < len(data) and data[at] != _GIF_END:
        if data[at] == _GIF_EXTENSION:
            at = _after_sub_blocks(data, at + 2)
        elif data[at] == _GIF_IMAGE:
            flags = data[at + 9] if at + 9 < len(data) else 0
            at = _after_sub_blocks(data, at + 11 + _gif_palette_bytes(flags))
        else:
            at += 1  # padding between blocks, which decoders skip
    return at < len(data)


def _gif_palette_bytes(flags: int) -> int:
    return 3 << (flags & 7) + 1 if flags & 0x80 else 0


def _after_sub_blocks(data: bytes, at: int) -> int:
    """Return where a chain of length-prefixed blocks ends, past the data when it is cut."""
    num_bytes = len(data)
    while at < num_bytes and data[at]:
        at += data[at] + 1
    return at + 1


def _bmp_is_whole(file: _File) -> bool:
    head = file.head
    file_bytes, _, start, header_bytes = struct.unpack_from("<4I", head, 2)
    start = start or 14 + header_bytes
    if header_bytes == _BMP_CORE_HEADER_BYTES:
        width, height, _, bits = struct.unpack_from("<4H", head, 18)
        return _bmp_end(start, width, height, bits) <= file.num_bytes
    width, height, _, bits, coding, data_bytes = struct.unpack_from("<iiHHII", head, 18)
    if coding in _BMP_RLE:
        return (start + data_bytes if data_bytes else int(file_bytes)) <= file.num_bytes
    return _bmp_end(start, width, abs(height), bits) <= file.num_bytes


def _bmp_end(start: int, width: int, height: int, bits: int) -> int:
    """Return where the rows end; each is filled up to 4 bytes."""
    return start + (width * bits + 31) // 32 * 4 * height


_IS_WHOLE: dict[str, Callable[[_File], bool]] = {
    "JPEG": _jpeg_is_whole,
    "PNG": _png_is_whole,
    "WEBP": _webp_is_whole,
    "GIF": _gif_is_whole,
    "BMP": _bmp_is_whole,
}
