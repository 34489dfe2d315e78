"""Files cut at any byte, as a download that broke off leaves them, against whole ones."""

from __future__ import annotations

import io
import random
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from curate.media.image_ends import HEAD_BYTES, TAIL_BYTES, inspect
from curate.media.images import ImageError, ImageHeader

MAX_PIXELS = 10_000_000
CUT = {"truncated_image", "undecodable_image", "unknown_format", "empty_image"}


def encoded(width: int, height: int, kind: str, *, mode: str = "RGB", **options: Any) -> bytes:
    """Return an image file of noise, which no encoder makes small."""
    noise = np.random.default_rng(width).integers(0, 256, (height, width, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise).convert(mode).save(file, kind, **options)
    return file.getvalue()


def look(data: bytes, max_pixels: int = MAX_PIXELS) -> ImageHeader:
    return inspect(lambda at, size: data[at : at + size], len(data), max_pixels=max_pixels)


def error_class_of(data: bytes, max_pixels: int = MAX_PIXELS) -> str:
    with pytest.raises(ImageError) as caught:
        look(data, max_pixels)
    return caught.value.error_class


def thumbnailed(data: bytes) -> bytes:
    """Return the JPEG with a small one in its EXIF block, end marker and all."""
    thumbnail = encoded(8, 8, "JPEG")
    block = b"Exif\0\0II*\0\x08\0\0\0\0\0\0\0\0\0" + thumbnail
    return data[:2] + b"\xff\xe1" + (len(block) + 2).to_bytes(2, "big") + block + data[2:]


def animated(kind: str) -> bytes:
    frames = [Image.new("RGB", (30, 20), (shade, 9, 90)) for shade in (10, 120, 250)]
    file = io.BytesIO()
    frames[0].save(file, kind, save_all=True, append_images=frames[1:])
    return file.getvalue()


SMALL = {
    "jpeg": encoded(40, 30, "JPEG"),
    "jpeg progressive": encoded(40, 30, "JPEG", progressive=True),
    "jpeg restarts": encoded(40, 30, "JPEG", restart_marker_blocks=1),
    "jpeg coarse": encoded(40, 30, "JPEG", quality=1),
    "jpeg gray": encoded(40, 30, "JPEG", mode="L"),
    "jpeg with a thumbnail": thumbnailed(encoded(40, 30, "JPEG")),
    "png": encoded(40, 30, "PNG"),
    "png palette": encoded(40, 30, "PNG", mode="P"),
    "gif": encoded(40, 30, "GIF"),
    "gif animated": animated("GIF"),
    "webp": encoded(40, 30, "WEBP"),
    "webp lossless": encoded(40, 30, "WEBP", lossless=True),
    "webp animated": animated("WEBP"),
    "bmp": encoded(39, 30, "BMP"),
    "bmp palette": encoded(39, 30, "BMP", mode="P"),
    "bmp bilevel": encoded(39, 30, "BMP", mode="1"),
}
LARGE = {
    "jpeg": encoded(400, 300, "JPEG", quality=95),
    "png": encoded(300, 200, "PNG"),
    "gif": encoded(400, 300, "GIF"),
    "webp": encoded(400, 300, "WEBP", lossless=True),
    "bmp": encoded(300, 200, "BMP"),
}


@pytest.mark.parametrize("name", SMALL)
def test_whole_files_pass_and_what_follows_their_end_does_not_matter(name: str) -> None:
    data = SMALL[name]
    kind = name.split()[0].upper()
    sides = Image.open(io.BytesIO(data)).size
    for rest in (b"", b"\0", b"\0" * 5000, b"<html>", b"\xff\xd8\xff"):
        assert look(data + rest) == ImageHeader(kind, *sides)


@pytest.mark.parametrize("name", LARGE)
def test_large_files_are_judged_by_their_head_and_tail(name: str) -> None:
    data = LARGE[name]
    assert len(data) > HEAD_BYTES + TAIL_BYTES
    asked: list[tuple[int, int]] = []

    def read(at: int, size: int) -> bytes:
        assert 0 <= at <= at + size <= len(data)
        asked.append((at, size))
        return data[at : at + size]

    header = inspect(read, len(data), max_pixels=MAX_PIXELS)
    assert (header.width, header.height) == Image.open(io.BytesIO(data)).size
    limit = len(data) + HEAD_BYTES if name == "gif" else HEAD_BYTES + TAIL_BYTES
    assert sum(size for _, size in asked) <= limit
    assert look(data + bytes(3 * TAIL_BYTES)) == header  # its end is looked for before the tail too


@pytest.mark.parametrize("name", SMALL)
def test_cut_at_every_byte_a_small_file_is_refused(name: str) -> None:
    data = SMALL[name]
    assert {error_class_of(data[:cut]) for cut in range(len(data))} <= CUT


@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(name=st.sampled_from(sorted(LARGE)), share=st.floats(0, 1, exclude_max=True))
def test_cut_anywhere_a_large_file_is_refused(name: str, share: float) -> None:
    data = LARGE[name]
    assert error_class_of(data[: int(share * len(data))]) in CUT


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(
    kind=st.sampled_from(["JPEG", "PNG", "GIF", "WEBP", "BMP"]),
    width=st.integers(1, 70),
    height=st.integers(1, 70),
    mode=st.sampled_from(["RGB", "L", "P"]),
    cuts=st.lists(st.integers(1, 200), min_size=1, max_size=6),
)
def test_any_picture_that_lacks_its_last_bytes_is_refused(
    kind: str, width: int, height: int, mode: str, cuts: list[int]
) -> None:
    has_palette = kind in {"PNG", "GIF", "BMP"}
    data = encoded(width, height, kind, mode=mode if has_palette or mode != "P" else "RGB")
    assert look(data) == ImageHeader(kind, width, height)
    for cut in cuts:
        assert error_class_of(data[: max(0, len(data) - cut)]) in CUT


def test_a_cut_after_the_thumbnail_is_not_taken_for_the_end() -> None:
    data = SMALL["jpeg with a thumbnail"]
    cut = data[: data.index(b"\xff\xd9") + 200]
    assert b"\xff\xd9" in cut
    assert error_class_of(cut) == "truncated_image"


def test_headers_longer_than_a_head_are_read_whole() -> None:
    profile = random.Random(1).randbytes(3 * HEAD_BYTES)
    for kind in ("JPEG", "PNG"):
        data = encoded(90, 80, kind, icc_profile=profile)
        assert look(data) == ImageHeader(kind, 90, 80)
        assert error_class_of(data[:-3]) == "truncated_image"
        assert error_class_of(data[: 2 * HEAD_BYTES]) == "truncated_image"


def test_a_gif_ends_at_its_trailer_and_not_at_a_byte_like_it() -> None:
    data = SMALL["gif"]
    cuts = [at + 1 for at in range(400, len(data) - 1) if data[at] == 0x3B]
    assert cuts, "the picture holds the byte"
    assert {error_class_of(data[:cut]) for cut in cuts} == {"truncated_image"}


def run_coded_bmp(*, size_known: bool) -> bytes:
    """Return an 8-bit BMP of 4 x 2 pixels in RLE8: two rows of one run each, and the end."""
    rows = b"\x04\x00\0\0" * 2 + b"\0\1"
    palette = bytes(1024)
    start = 14 + 40 + len(palette)
    sizes = [start + len(rows), len(rows)] if size_known else [0, 0]
    fields = [(4, 4), (2, 4), (1, 2), (8, 2), (1, 4), (sizes[1], 4), (0, 4), (0, 4), (256, 4)]
    info = (40).to_bytes(4, "little") + b"".join(n.to_bytes(w, "little") for n, w in fields)
    file = b"BM" + sizes[0].to_bytes(4, "little") + bytes(4) + start.to_bytes(4, "little")
    return file + info + bytes(40 - len(info)) + palette + rows


def test_a_run_coded_bmp_is_as_long_as_its_header_says_if_it_says_so() -> None:
    """The one format that need not tell: without a size a cut cannot be seen."""
    told, silent = run_coded_bmp(size_known=True), run_coded_bmp(size_known=False)
    assert look(told) == look(silent) == look(silent[:-1]) == ImageHeader("BMP", 4, 2)
    assert error_class_of(told[:-1]) == "truncated_image"


def test_a_bmp_of_the_oldest_kind_has_its_own_header() -> None:
    sides = b"".join(n.to_bytes(2, "little") for n in (3, 2, 1, 24))
    data = b"BM" + bytes(8) + (26).to_bytes(4, "little") + b"\x0c\0\0\0" + sides + bytes(24)
    assert look(data) == ImageHeader("BMP", 3, 2)
    assert error_class_of(data[:-1]) == "truncated_image"


def test_bytes_that_are_no_image_keep_their_error_class() -> None:
    assert error_class_of(b"") == "empty_image"
    assert error_class_of(b"<!doctype html>" * 20_000) == "unknown_format"
    assert error_class_of(SMALL["png"], max_pixels=1199) == "too_many_pixels"
    assert look(SMALL["png"], max_pixels=1200) == ImageHeader("PNG", 40, 30)
