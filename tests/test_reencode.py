"""What is stored of a downloaded file: its sides, its pixels, its format, or why it is refused.

The sides are those that img2dataset 1.47 gave for the same files and settings.
"""

from __future__ import annotations

import io
import json
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from download_worlds import photo
from PIL import Image

from curate.download import reencode
from curate.download.config import DownloadConfig
from curate.download.reencode import Refused, Stored, prepare
from curate.download.statuses import Status
from manifests.errors import UserError

LEFT, RIGHT = (255, 0, 0), (0, 0, 255)


def config(**settings: Any) -> DownloadConfig:
    return DownloadConfig.load(settings, where="download")


def stored(data: bytes, **settings: Any) -> Stored:
    found = prepare(data, config(**settings))
    assert isinstance(found, Stored), found
    return found


def refused(data: bytes, **settings: Any) -> Status:
    found = prepare(data, config(**settings))
    assert isinstance(found, Refused), found
    assert found.detail
    return found.status


def file_of(image: Image.Image, kind: str = "JPEG", **how: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **how)
    return file.getvalue()


def pixels(one: Stored) -> np.ndarray:
    image = Image.open(io.BytesIO(one.data))
    assert image.size == (one.width, one.height)
    return np.asarray(image.convert("RGB"), np.int16)


def halves(width: int = 120, height: int = 40) -> Image.Image:
    """Return a picture that is red on the left and blue on the right."""
    image = Image.new("RGB", (width, height), LEFT)
    image.paste(RIGHT, (width // 2, 0, width, height))
    return image


@pytest.mark.parametrize(
    ("sides", "size", "keep_ratio", "largest"),
    [
        ((255, 256), 257, (257, 258), (256, 257)),
        ((257, 1000), 64, (64, 249), (16, 64)),
        ((333, 500), 64, (64, 96), (43, 64)),
        ((500, 333), 257, (386, 257), (257, 171)),
        ((640, 427), 257, (385, 257), (257, 171)),
        ((641, 359), 64, (114, 64), (64, 36)),
        ((99, 33), 257, (771, 257), (257, 86)),
        ((50, 75), 257, (257, 386), (171, 257)),
        ((96, 1536), 64, (64, 1024), (4, 64)),
        ((3, 2), 64, (96, 64), (64, 43)),
        ((1, 1), 64, (64, 64), (64, 64)),
    ],
)
def test_sides_are_those_of_img2dataset(
    sides: tuple[int, int], size: int, keep_ratio: tuple[int, int], largest: tuple[int, int]
) -> None:
    data = photo(1, *sides, kind="PNG")
    settings = {"image_size": size, "only_if_bigger": False}
    for mode, wanted in (
        ("keep_ratio", keep_ratio),
        ("keep_ratio_largest", largest),
        ("center_crop", (size, size)),
        ("border", (size, size)),
        ("no", sides),
    ):
        one = stored(data, resize=mode, **settings)
        assert (one.width, one.height) == wanted, mode
        assert (one.original_width, one.original_height) == sides
        pixels(one)


@pytest.mark.parametrize(
    ("mode", "wanted"),
    [
        ("keep_ratio", (60, 40)),  # the shorter side is 40 already
        ("center_crop", (60, 40)),
        ("keep_ratio_largest", (40, 27)),
        ("border", (40, 40)),
    ],
)
def test_only_what_is_bigger_is_resized_cropped_or_bordered(
    mode: str, wanted: tuple[int, int]
) -> None:
    one = stored(photo(2, 60, 40), resize=mode, image_size=40)
    assert (one.width, one.height) == wanted


def test_the_middle_is_cropped_and_the_border_is_white() -> None:
    data = file_of(halves(), "PNG")
    how = {"image_size": 40, "encode_format": "png", "only_if_bigger": False}
    cropped = pixels(stored(data, resize="center_crop", **how))
    assert (cropped[:, :20] == LEFT).all()
    assert (cropped[:, 20:] == RIGHT).all()
    bordered = pixels(stored(data, resize="border", **how))
    assert (bordered[:13] == 255).all()  # 40 x 13 in the middle of 40 x 40
    assert (bordered[26:] == 255).all()
    assert not (bordered[13:26] == 255).all(axis=2).any()


def test_a_turned_jpeg_is_upright_at_every_size() -> None:
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = 6, "A maker"  # to be turned 90 degrees clockwise
    data = file_of(halves(1200, 400), exif=exif, quality=95)
    for size in (50, 160, 400):  # decoded at 1/8 (of 1200 x 400: not below twice 150 x 50), ...
        one = stored(data, image_size=size)
        assert (one.width, one.height) == (size, 3 * size)
        assert (one.original_width, one.original_height) == (400, 1200)
        rows = pixels(one)
        assert np.abs(rows[: size + size // 3] - LEFT).max() < 12  # what was left is on top
        assert np.abs(rows[-size - size // 3 :] - RIGHT).max() < 12
    said = json.loads(one.exif)
    assert said["Image Orientation"] == "6"
    assert said["Image Make"] == "A maker"
    assert stored(photo(1)).exif == "{}"


def test_decoding_a_jpeg_smaller_loses_no_quality() -> None:
    picture = Image.open(io.BytesIO(photo(3, 1600, 1200, kind="PNG")))
    data = file_of(picture, quality=97)
    small = pixels(stored(data, image_size=300, encode_format="png"))
    wanted = np.asarray(picture.resize((400, 300), Image.Resampling.BICUBIC), np.int16)
    assert np.abs(small - wanted).mean() < 1.0


def test_large_pictures_are_decoded_one_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each thread may meet one, and each would take as much memory as a worker should in all."""
    decode, lock = reencode._encoded_anew, threading.Lock()
    now, most = 0, 0

    def counted(data: bytes, config: DownloadConfig) -> Stored | Refused:
        nonlocal now, most
        with lock:
            now += 1
            most = max(most, now)
        try:
            return decode(data, config)
        finally:
            with lock:
                now -= 1

    monkeypatch.setattr(reencode, "_encoded_anew", counted)
    monkeypatch.setattr(reencode, "_LARGE", 40 * 30 - 1)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda n: prepare(photo(n), config()), range(40)))
    assert all(isinstance(one, Stored) for one in found)
    assert most == 1


def test_sixteen_bits_keep_their_mean() -> None:
    half = np.full((50, 50), 127 << 8 | 200, np.uint16)  # taken as it is, it would become 255
    one = stored(file_of(Image.fromarray(half), "PNG"), resize="no", encode_format="png")
    assert pixels(one).mean() == 127


def test_transparent_cmyk_and_animated_files_are_what_they_show() -> None:
    clear = Image.new("RGBA", (40, 40), (0, 0, 0, 0))
    assert pixels(stored(file_of(clear, "PNG"))).min() == 255
    inks = Image.new("CMYK", (40, 40), (0, 255, 255, 0))
    assert np.abs(pixels(stored(file_of(inks))) - (254, 0, 0)).max() <= 3
    frames = [Image.new("RGB", (40, 40), shade) for shade in (LEFT, RIGHT)]
    film = file_of(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert np.abs(pixels(stored(film)) - LEFT).max() <= 3


@pytest.mark.parametrize(("suffix", "kind"), [("jpg", "JPEG"), ("png", "PNG"), ("webp", "WEBP")])
def test_every_format_is_encoded_with_its_quality(suffix: str, kind: str) -> None:
    data = photo(4, 300, 200)
    best = stored(data, encode_format=suffix, resize="no")
    assert best.suffix == suffix
    assert Image.open(io.BytesIO(best.data)).format == kind
    worst = {"jpg": 10, "webp": 10, "png": 0}[suffix]
    other = stored(data, encode_format=suffix, resize="no", encode_quality=worst)
    assert (len(other.data) > len(best.data)) == (suffix == "png")


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP"])
def test_original_bytes_are_kept_under_the_suffix_of_their_content(kind: str) -> None:
    data = photo(5, kind=kind)
    one = stored(data, keep_original_bytes=True)
    assert one.data == data
    assert one.suffix == {"JPEG": "jpg"}.get(kind, kind.lower())
    assert (one.width, one.height, one.original_width, one.original_height) == (40, 30, 40, 30)


@pytest.mark.parametrize("keep_original_bytes", [False, True])
def test_files_that_are_no_usable_image_are_refused_by_name(keep_original_bytes: bool) -> None:
    def status(data: bytes, **settings: Any) -> Status:
        return refused(data, keep_original_bytes=keep_original_bytes, **settings)

    data = photo(6, 300, 100)
    assert status(b"") is Status.EMPTY_BODY
    assert status(b"<html>not found</html>") is Status.NOT_AN_IMAGE
    assert status(data[: len(data) // 2]) is Status.TRUNCATED_IMAGE
    assert status(data, max_pixels=29_999) is Status.TOO_MANY_PIXELS
    assert status(data, min_side=101) is Status.TOO_SMALL
    assert status(data, max_aspect_ratio=2.9) is Status.ASPECT_RATIO


def test_what_only_decoding_tells_is_a_decode_error() -> None:
    data = photo(7, kind="PNG")
    pixels_at = data.index(b"IDAT") + 4
    damaged = data[:pixels_at] + b"\xff\xff" + data[pixels_at + 2 :]  # no zlib stream
    assert refused(damaged) is Status.DECODE_ERROR
    assert stored(damaged, keep_original_bytes=True).data == damaged  # it is not decoded


def test_nothing_is_enlarged_beyond_the_limit_of_pixels() -> None:
    line = file_of(Image.new("RGB", (2000, 2)), "PNG")
    settings = {"only_if_bigger": False, "max_pixels": 10_000_000}
    assert refused(line, **settings) is Status.TOO_MANY_PIXELS
    assert stored(line, resize="keep_ratio_largest", **settings).height == 1


@pytest.mark.parametrize(("suffix", "longest"), [("jpg", 65_500), ("webp", 16_383)])
def test_what_a_format_cannot_hold_is_refused_and_not_an_error(suffix: str, longest: int) -> None:
    """A line of a few hundred bytes; an error here would fail its whole shard, at each attempt."""
    for kind, make in (("across", lambda n: (n, 2)), ("down", lambda n: (2, n))):
        for length, is_stored in ((longest, True), (longest + 1, False), (70_000, False)):
            line = file_of(Image.new("RGB", make(length)), "PNG")
            if is_stored:
                assert max(pixels(stored(line, encode_format=suffix)).shape) == longest, kind
            else:
                assert refused(line, encode_format=suffix) is Status.TOO_MANY_PIXELS, kind
            if suffix == "webp":
                assert stored(line, encode_format="png").original_width == make(length)[0]


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"encode_format": "png", "encode_quality": 95}, "0..9"),
        ({"keep_original_bytes": True, "resize": "border"}, "keep_original_bytes"),
        ({"resize": "crop"}, "keep_ratio"),
        ({"imagesize": 3}, "image_size"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings: dict[str, Any], word: str) -> None:
    with pytest.raises(UserError, match=word):
        config(**settings)


def test_patience_enters_no_fingerprint() -> None:
    patient = config(attempts=9, concurrency=3, min_success_share=0.0, resize_threads=1)
    assert patient.canonical() == config().canonical()
    assert config(image_size=12).canonical() != config().canonical()
