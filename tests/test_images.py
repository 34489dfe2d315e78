"""Decoding against pictures whose pixels are known, and bad bytes against their error classes."""

from __future__ import annotations

import io
import pickle
import random
import struct
import subprocess
import sys
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from curate.media.images import ImageError, ImageHeader, decode, pixel_std, sniff

MAX_PIXELS = 10_000_000
EXIF_ORIENTATION = 0x0112
RED, WHITE = (255, 0, 0), (255, 255, 255)
LOSSLESS = {"PNG": {}, "WEBP": {"lossless": True}, "BMP": {}}
LOSSY = {"JPEG": {"quality": 95}, "GIF": {}}


def encoded(image: Image.Image, format_name: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, format_name, **options)
    return file.getvalue()


def photo(width: int = 40, height: int = 24, seed: int = 0) -> Image.Image:
    """Return smooth colours with a little noise, so that every format has something to do."""
    y, x = np.mgrid[0:height, 0:width]
    noise = np.random.default_rng(seed).integers(0, 8, (height, width, 3))
    planes = np.stack([x * 240 // width, y * 240 // height, (x + y) % 240], axis=2)
    return Image.fromarray((planes + noise).astype(np.uint8))


def rgb(data: bytes) -> np.ndarray[Any, np.dtype[np.uint8]]:
    image = decode(data, max_pixels=MAX_PIXELS)
    assert image.mode == "RGB"
    assert image.info == {}
    return np.asarray(image)


def error_class_of(data: bytes, max_pixels: int = MAX_PIXELS) -> str:
    with pytest.raises(ImageError) as caught:
        decode(data, max_pixels=max_pixels)
    assert caught.value.detail
    return caught.value.error_class


def png_chunk(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def png(
    width: int, height: int, *, bits: int, color: int, rows: bytes, extra: bytes = b""
) -> bytes:
    """Return a PNG by hand: `rows` are the filtered scanlines."""
    head = png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, color, 0, 0, 0))
    body = head + extra + png_chunk(b"IDAT", zlib.compress(rows)) + png_chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


# --- what is kept ------------------------------------------------------------------------------


@pytest.mark.parametrize("format_name", LOSSLESS)
def test_lossless_formats_keep_every_pixel(format_name: str) -> None:
    data = encoded(photo(), format_name, **LOSSLESS[format_name])
    assert sniff(data) == ImageHeader(format_name, 40, 24)
    assert np.array_equal(rgb(data), np.asarray(photo()))


@pytest.mark.parametrize("format_name", LOSSY)
def test_lossy_formats_keep_the_picture(format_name: str) -> None:
    data = encoded(photo(), format_name, **LOSSY[format_name])
    assert sniff(data) == ImageHeader(format_name, 40, 24)
    difference = rgb(data).astype(int) - np.asarray(photo(), dtype=int)
    assert np.abs(difference).mean() < 8


def test_sixteen_bit_gray_keeps_its_mean() -> None:
    ramp = np.linspace(0, 65535, 64 * 64).reshape(64, 64).astype(np.uint16)
    pixels = rgb(encoded(Image.fromarray(ramp), "PNG"))
    assert abs(pixels.mean() - 127) < 1
    assert np.array_equal(pixels[..., 0], ramp >> 8)


@pytest.mark.parametrize(
    ("color", "sample"), [(2, (0x1234, 0x80FF, 0xFF00)), (4, (0x80FF, 0xFFFF))]
)
def test_sixteen_bit_colour_and_gray_with_alpha_keep_the_upper_byte(
    color: int, sample: tuple[int, ...]
) -> None:
    rows = b"".join(b"\0" + struct.pack(f">{len(sample)}H", *sample) * 3 for _ in range(2))
    pixels = rgb(png(3, 2, bits=16, color=color, rows=rows))
    expected = [value >> 8 for value in sample] if color == 2 else [sample[0] >> 8] * 3
    assert pixels.tolist() == [[expected] * 3] * 2


@pytest.mark.parametrize("format_name", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_exif_orientation_is_applied(format_name: str, orientation: int) -> None:
    """The eight values, as EXIF words them: where the stored first row and column are shown."""
    upright = np.zeros((16, 32, 3), dtype=np.uint8)
    upright[:8, :16] = RED  # top left
    upright[:8, 16:] = (0, 0, 255)  # top right
    transposed = upright.transpose(1, 0, 2)
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: transposed,
        6: transposed[::-1],
        7: transposed[::-1, ::-1],
        8: transposed[:, ::-1],
    }[orientation]
    exif = Image.Exif()
    exif[EXIF_ORIENTATION] = orientation
    options: dict[str, Any] = {"WEBP": {"lossless": True}, "JPEG": {"subsampling": 0}}
    image = Image.fromarray(np.ascontiguousarray(stored))
    data = encoded(image, format_name, exif=exif, **options.get(format_name, {}))
    shown = rgb(data).astype(int)
    assert shown.shape == upright.shape
    assert np.abs(shown - upright).max() <= 4


@pytest.mark.parametrize(
    "exif", [b"Exif\0\0MM", b"Exif\0\0" + b"\xff" * 40, b"Exif\0\0II*\0\x08\0\0\0"]
)
def test_damaged_exif_costs_the_rotation_and_not_the_image(exif: bytes) -> None:
    assert rgb(encoded(photo(), "JPEG", exif=exif)).shape == (24, 40, 3)


def test_an_exif_orientation_outside_the_standard_is_ignored() -> None:
    for value in (0, 9, 255):
        exif = Image.Exif()
        exif[EXIF_ORIENTATION] = value
        assert rgb(encoded(photo(), "PNG", exif=exif)).shape == (24, 40, 3)


def test_cmyk_becomes_rgb() -> None:
    red = Image.new("CMYK", (16, 16), (0, 255, 255, 0))
    pixels = rgb(encoded(red, "JPEG", quality=95)).astype(int)
    assert np.abs(pixels - RED).max() <= 4


@pytest.mark.parametrize("mode", ["1", "L"])
def test_gray_and_bilevel_images_get_three_equal_channels(mode: str) -> None:
    image = photo().convert(mode)
    pixels = rgb(encoded(image, "PNG"))
    assert np.array_equal(pixels, np.asarray(image.convert("L"))[..., None].repeat(3, axis=2))


def test_alpha_is_composited_on_white() -> None:
    half_red = Image.new("RGBA", (4, 4), (255, 0, 0, 128))
    half_black = Image.new("LA", (4, 4), (0, 128))
    for format_name in ("PNG", "WEBP"):
        data = encoded(half_red, format_name, **LOSSLESS[format_name])
        assert np.abs(rgb(data)[0, 0].astype(int) - (255, 127, 127)).max() <= 1
    assert np.abs(rgb(encoded(half_black, "PNG"))[0, 0].astype(int) - 127).max() <= 1


def test_hidden_colours_below_full_transparency_do_not_show() -> None:
    assert (rgb(encoded(Image.new("RGBA", (4, 4), (9, 9, 9, 0)), "PNG")) == 255).all()


def test_palettes_with_and_without_transparency() -> None:
    image = Image.new("P", (4, 2), 0)
    image.putpalette([*RED, 0, 0, 255])
    image.putpixel((1, 0), 1)
    assert rgb(encoded(image, "PNG"))[0, :2].tolist() == [[*RED], [0, 0, 255]]
    for transparency in (1, bytes([255, 0])):
        pixels = rgb(encoded(image, "PNG", transparency=transparency))
        assert pixels[0, :2].tolist() == [[*RED], [*WHITE]]
    assert rgb(encoded(image, "GIF", transparency=1))[0, :2].tolist() == [[*RED], [*WHITE]]


@pytest.mark.parametrize(("mode", "color", "key"), [("L", 70, 70), ("RGB", (1, 2, 3), (1, 2, 3))])
def test_a_transparent_colour_key_shows_white(mode: str, color: Any, key: Any) -> None:
    assert (rgb(encoded(Image.new(mode, (4, 4), color), "PNG", transparency=key)) == 255).all()


@pytest.mark.parametrize("format_name", ["GIF", "WEBP", "PNG"])
def test_animations_give_their_first_frame(format_name: str) -> None:
    first, second = Image.new("RGB", (20, 10), RED), Image.new("RGB", (20, 10), (0, 255, 0))
    options = {"WEBP": {"lossless": True}}.get(format_name, {})
    data = encoded(first, format_name, save_all=True, append_images=[second], **options)
    assert (rgb(data) == RED).all()


def test_the_content_decides_and_not_the_name() -> None:
    assert sniff(encoded(photo(), "GIF")).format == "GIF"  # as in a .jpg of OCR-VQA


def test_the_head_of_a_file_is_enough_to_sniff_it() -> None:
    for format_name in (*LOSSLESS, *LOSSY):
        data = encoded(photo(400, 300), format_name)
        head = data[: 1500 if format_name != "GIF" else 20000]
        assert sniff(head) == ImageHeader(format_name, 400, 300)


@pytest.mark.parametrize(
    "image",
    [photo(16, 9), photo(16, 9).convert("RGBA"), photo(300, 2)],
)
@pytest.mark.parametrize(
    "options", [{}, {"lossless": True}, {"exif": b"Exif\0\0II*\0\x08\0\0\0\0\0"}]
)
def test_webp_sides_are_those_of_the_decoded_image(
    image: Image.Image, options: dict[str, Any]
) -> None:
    data = encoded(image, "WEBP", **options)
    assert sniff(data[:30])[1:] == decode(data, max_pixels=MAX_PIXELS).size == image.size


# --- what is refused ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"", "empty_image"),
        (b"<!doctype html><html><body>404</body></html>", "unknown_format"),
        (b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>', "unknown_format"),
        (b"\0" * 1000, "unknown_format"),
        (encoded(photo(), "TIFF"), "unknown_format"),
        (b"BMore text than picture, of which two letters look like a BMP", "unknown_format"),
        (b"BM" + bytes(12) + b"\x29\0\0\0" + b"\1" * 60, "undecodable_image"),
        (b"\xff\xd8\xff", "truncated_image"),
        (b"\x89PNG\r\n\x1a\n", "truncated_image"),
        (b"GIF89a", "truncated_image"),
        (encoded(photo(), "BMP")[:20], "truncated_image"),
        (b"RIFF\x10\0\0\0WEBPVP8 ", "truncated_image"),
        (b"RIFF\x30\0\0\0WEBPALPH" + bytes(40), "undecodable_image"),
        (b"\x89PNG\r\n\x1a\n" + b"\xff" * 60, "undecodable_image"),
    ],
)
def test_bytes_that_are_no_image_have_their_error_class(data: bytes, expected: str) -> None:
    assert error_class_of(data) == expected
    with pytest.raises(ImageError, match=expected):
        sniff(data)


def zero_sided() -> dict[str, bytes]:
    """Return one file of each format whose header gives a side of 0."""
    jpeg = bytearray(encoded(photo(), "JPEG"))
    frame = jpeg.index(b"\xff\xc0")
    jpeg[frame + 5 : frame + 7] = bytes(2)
    bmp = bytearray(encoded(photo(), "BMP"))
    bmp[18:22] = bytes(4)
    webp = bytearray(encoded(photo(), "WEBP"))
    assert webp[12:16] == b"VP8 "
    webp[26:28] = bytes(2)
    flat = png(0, 5, bits=8, color=2, rows=bytes(5))
    return {"JPEG": bytes(jpeg), "BMP": bytes(bmp), "WEBP": bytes(webp), "PNG": flat}


@pytest.mark.parametrize("format_name", ["JPEG", "BMP", "WEBP", "PNG"])
def test_a_side_of_zero_is_named(format_name: str) -> None:
    assert error_class_of(zero_sided()[format_name]) == "zero_side"


@pytest.mark.parametrize("format_name", [*LOSSLESS, *LOSSY])
@pytest.mark.parametrize("progressive", [False, True])
def test_cut_anywhere_a_file_is_refused_or_whole(format_name: str, progressive: bool) -> None:
    """A cut that takes no pixel away (an end marker, trailing metadata) may pass; no other may."""
    options = {"progressive": True} if progressive and format_name == "JPEG" else {}
    data = encoded(photo(), format_name, **options)
    whole = rgb(data)
    num_refused = 0
    for cut in range(1, len(data)):
        try:
            assert np.array_equal(rgb(data[:cut]), whole), cut
        except ImageError as error:
            num_refused += 1
            assert error.error_class in {"truncated_image", "undecodable_image", "unknown_format"}
    assert num_refused > 0.95 * len(data)
    assert error_class_of(data[: len(data) // 2]) == "truncated_image"


def test_a_bomb_is_refused_by_its_header() -> None:
    """144 megapixels in some kilobytes; decoding it would take 430 MB."""
    side = 12_000
    row = b"\0" + bytes(side // 8)
    compressor = zlib.compressobj(9)
    body = b"".join(compressor.compress(row) for _ in range(side)) + compressor.flush()
    head = png_chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0))
    data = b"\x89PNG\r\n\x1a\n" + head + png_chunk(b"IDAT", body) + png_chunk(b"IEND", b"")
    assert len(data) < 50_000
    assert sniff(data) == ImageHeader("PNG", side, side)
    assert error_class_of(data, max_pixels=128_000_000) == "too_many_pixels"
    without_pixels = b"\x89PNG\r\n\x1a\n" + head + png_chunk(b"IDAT", b"")
    assert error_class_of(without_pixels, max_pixels=128_000_000) == "too_many_pixels"


def test_bombs_of_other_formats_are_refused_by_their_header() -> None:
    webp = bytearray(encoded(photo().convert("RGBA"), "WEBP", exif=b"Exif\0\0II*\0\x08\0\0\0\0\0"))
    assert webp[12:16] == b"VP8X"
    webp[24:30] = b"\xff\x3f\0" * 2
    gif = bytearray(encoded(photo(), "GIF"))
    gif[6:10] = b"\xff" * 4
    jpeg = bytearray(encoded(photo(), "JPEG"))
    frame = jpeg.index(b"\xff\xc0")
    jpeg[frame + 5 : frame + 9] = b"\xff\xf0" * 2
    for data in (webp, gif, jpeg):
        assert error_class_of(bytes(data)) == "too_many_pixels"


def test_the_pixel_limit_is_inclusive() -> None:
    data = encoded(photo(40, 25), "PNG")
    assert decode(data, max_pixels=1000).size == (40, 25)
    assert error_class_of(data, max_pixels=999) == "too_many_pixels"


def test_random_damage_gives_an_image_or_an_image_error() -> None:
    generator = random.Random(3)
    seeds = [encoded(photo(), name) for name in (*LOSSLESS, *LOSSY)]
    seeds += [encoded(photo().convert(mode), "PNG") for mode in ("P", "LA", "RGBA", "1")]
    for _ in range(3000):
        data = bytearray(generator.choice(seeds))
        for _ in range(generator.choice([1, 2, 8])):
            data[generator.randrange(generator.choice([60, len(data)]))] = generator.randrange(256)
        try:
            assert decode(bytes(data), max_pixels=100_000).mode == "RGB"
        except ImageError as error:
            assert error.detail


def test_an_image_error_survives_pickling() -> None:
    error = pickle.loads(pickle.dumps(ImageError("zero_side", "0 x 5")))  # noqa: S301 - our own bytes
    assert (error.error_class, error.detail, str(error)) == (
        "zero_side",
        "0 x 5",
        "zero_side: 0 x 5",
    )


# --- around decoding ---------------------------------------------------------------------------


def test_pillows_remarks_do_not_leak() -> None:
    remarkable = png(2, 2, bits=8, color=2, rows=bytes(14), extra=png_chunk(b"acTL", b"\0" * 8))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning):  # an animation of no frames
            Image.open(io.BytesIO(remarkable))
        assert rgb(remarkable).shape == (2, 2, 3)
        sniff(remarkable)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        rgb(remarkable)
    assert caught == []


def test_threads_decode_the_same_pixels() -> None:
    files = [encoded(photo(64, 64, seed), name) for seed in range(8) for name in LOSSY]
    expected = [rgb(data) for data in files]
    with ThreadPoolExecutor(8) as pool:
        for found in (list(pool.map(rgb, files)) for _ in range(5)):
            assert all(np.array_equal(a, b) for a, b in zip(found, expected, strict=True))


def test_the_spread_of_luminance_tells_empty_images() -> None:
    assert pixel_std(Image.new("RGB", (30, 30), RED)) == 0
    board = np.indices((32, 32)).sum(axis=0) % 2 * 255
    checkers = Image.fromarray(board.astype(np.uint8)).convert("RGB")
    assert pixel_std(checkers) == pytest.approx(127.5)
    gray = np.asarray(photo().convert("L"), dtype=np.float64)
    assert pixel_std(photo()) == pytest.approx(gray.std())


def test_torchvision_imports_after_the_missing_operators_are_declared() -> None:
    code = (
        "from curate.media.torchvision_ops import ensure_torchvision_importable as ensure\n"
        "ensure(); ensure()\n"
        "from torchvision.transforms.functional import pil_to_tensor\n"
        "ensure()\n"
        "from PIL import Image\n"
        "print(tuple(pil_to_tensor(Image.new('RGB', (5, 4))).shape))\n"
    )
    root = Path(__file__).resolve().parents[1]
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=False
    )
    assert result.stdout.strip() == "(3, 4, 5)", result.stderr
