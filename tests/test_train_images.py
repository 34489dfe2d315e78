"""Pixel values: those of transformers' LLaVA processor bit by bit; decoding as curate decodes."""

from __future__ import annotations

import json
from io import BytesIO
from typing import Any

import numpy as np
import pytest
from PIL import Image

from curate.media import images as curated
from curate.media.torchvision_ops import ensure_torchvision_importable
from train.data.images import ImageDamaged, ImageRules, Mode, decode, pad_to_square

SIGLIP: dict[str, Any] = {
    "size": {"height": 48, "width": 48},
    "crop_size": {"height": 48, "width": 48},
    "do_center_crop": False,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
}
CLIP: dict[str, Any] = {
    "size": {"shortest_edge": 42},
    "crop_size": {"height": 42, "width": 42},
    "do_center_crop": True,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
}
SIDES = [(48, 48), (64, 64), (61, 40), (40, 61), (97, 30), (31, 98), (200, 7), (3, 50), (1, 1)]


def photo(width: int, height: int, mode: str = "RGB", seed: int = 0) -> Image.Image:
    """Return noise: a picture in which every pixel matters."""
    channels = len(Image.new(mode, (1, 1)).getbands())
    shape = (height, width) if channels == 1 else (height, width, channels)
    values = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
    return Image.frombytes(mode, (width, height), values.tobytes())


def saved(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("mode", ["square", "pad"])
@pytest.mark.parametrize("config", [SIGLIP, CLIP], ids=["siglip", "clip"])
def test_pixel_values_are_those_of_transformers(config: dict[str, Any], mode: Mode) -> None:
    ensure_torchvision_importable()
    from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

    processor = LlavaImageProcessorPil(**config, resample=3, do_pad=mode == "pad")
    rules = ImageRules.from_processor(json.loads(processor.to_json_string()), mode=mode)
    for width, height in SIDES:
        image = photo(width, height)
        values = rules(image)
        reference = processor(image, return_tensors="np")["pixel_values"][0]
        assert values.dtype == reference.dtype == np.float32
        assert values.tobytes() == np.ascontiguousarray(reference).tobytes(), (width, height)


def test_at_the_size_that_models_have() -> None:
    ensure_torchvision_importable()
    from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

    size = {"height": 384, "width": 384}
    image = photo(640, 427)
    for mode, do_pad in (("square", False), ("pad", True)):
        config = SIGLIP | {"size": size, "crop_size": size}
        processor = LlavaImageProcessorPil(**config, resample=3, do_pad=do_pad)
        rules = ImageRules(mode, 384, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
        assert rules == ImageRules.from_processor(processor.to_dict(), mode=mode)
        reference = processor(image, return_tensors="np")["pixel_values"][0]
        assert np.array_equal(rules(image), reference)


def test_the_picture_is_in_the_middle_of_the_mean_colour() -> None:
    rules = ImageRules("pad", 4, (0.48145466, 0.4578275, 0.40821073), (1, 1, 1))
    assert rules.background == (122, 116, 104)
    wide = np.asarray(pad_to_square(photo(5, 2), rules.background))
    assert (wide[[0, 3, 4]] == rules.background).all()  # 1 above, 2 below
    assert np.array_equal(wide[1:3], np.asarray(photo(5, 2)))
    tall = np.asarray(pad_to_square(photo(2, 5), rules.background))
    assert (tall[:, [0, 3, 4]] == rules.background).all()


@pytest.mark.parametrize(
    "change",
    [
        {"size": {"height": 48, "width": 40}},
        {"size": {"shortest_edge": 48}},
        {"do_center_crop": True, "crop_size": {"height": 40, "width": 40}},
        {"resample": 2},
    ],
)
def test_a_processor_that_does_something_else_is_refused(change: dict[str, Any]) -> None:
    config = SIGLIP | {"resample": 3, "rescale_factor": 1 / 255}
    assert ImageRules.from_processor(config, mode="square").side == 48
    with pytest.raises(ValueError, match="the processor's"):
        ImageRules.from_processor(config | change, mode="square")


def kinds() -> dict[str, bytes]:
    """Return files of every sort that curation lets through."""
    deep = np.random.default_rng(1).integers(0, 65536, (6, 9), dtype=np.uint16)
    palette = photo(9, 6).quantize(16)
    exif = Image.Exif()
    files = {
        "jpeg": saved(photo(9, 6), "JPEG"),
        "gray": saved(photo(9, 6, "L"), "JPEG"),
        "cmyk": saved(photo(9, 6, "CMYK"), "JPEG"),
        "bmp": saved(photo(9, 6), "BMP"),
        "webp": saved(photo(9, 6), "WEBP"),
        "alpha": saved(photo(9, 6, "RGBA")),
        "gray with alpha": saved(photo(9, 6, "LA")),
        "palette": saved(palette),
        "transparent palette": saved(palette, transparency=3),
        "one bit": saved(photo(9, 6, "L").convert("1")),
        "16 bit": saved(Image.fromarray(deep)),
        "gif": saved(
            palette, "GIF", save_all=True, append_images=[photo(9, 6, seed=2).quantize(16)]
        ),
    }
    for turn in range(1, 10):  # 9 is no orientation
        exif[0x0112] = turn
        files[f"turn {turn}"] = saved(photo(9, 6), "JPEG", exif=exif)
    return files


@pytest.mark.parametrize("kind", kinds())
def test_decodes_as_curation_does(kind: str) -> None:
    data = kinds()[kind]
    found = decode(data)
    assert found.mode == "RGB"
    assert np.array_equal(np.asarray(found), np.asarray(curated.decode(data, max_pixels=100)))


def test_transparency_is_white_and_16_bits_keep_their_upper_ones() -> None:
    clear = Image.new("RGBA", (2, 2), (9, 8, 7, 0))
    assert decode(saved(clear)).getcolors() == [(4, (255, 255, 255))]
    deep = Image.fromarray(np.full((2, 2), 0x1234, np.uint16))
    assert decode(saved(deep)).getcolors() == [(4, (0x12, 0x12, 0x12))]


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP"])
def test_cut_files_are_a_named_error(kind: str) -> None:
    data = saved(photo(40, 30), kind)
    for size in (0, 1, 20, len(data) // 2, len(data) * 3 // 4):
        with pytest.raises(ImageDamaged, match=f"^{size} bytes are no whole image: "):
            decode(data[:size])


def test_other_formats_are_a_named_error() -> None:
    for data in (saved(photo(4, 4), "TIFF"), b"<svg/>", b"\xff\xd8\xff" * 20):
        with pytest.raises(ImageDamaged):
            decode(data)
