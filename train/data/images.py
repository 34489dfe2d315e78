"""Image bytes to the pixel values that a vision tower is trained and served on.

Two rules, both Bunny's (https://github.com/BAAI-DCAI/Bunny, bunny/util/data_utils.py):

    square   as the tower's own processor does: SigLIP squeezes the picture into a square, CLIP
             takes the middle square; Bunny's stage 1
    pad      the picture is first set in the middle of a square of the mean colour; stage 2

The values are those of transformers' LlavaImageProcessorPil, bit by bit, with do_pad for `pad`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from typing import Any, Literal, Self

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from manifests.errors import WarrenError
from manifests.pixels import DECODER_ERRORS, upright_rgb

Mode = Literal["square", "pad"]

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
"""What assembled shards may hold; the bytes say which it is."""


class ImageDamaged(WarrenError):
    """The bytes are no whole image of a known format."""


@dataclass(frozen=True)
class ImageRules:
    """How a picture becomes pixel values.

    side: of the result, in pixels. keeps_shape: resize the shorter side and take the middle (CLIP),
    or else squeeze both (SigLIP). mean, std: of values from 0 to 1, by channel.
    """

    mode: Mode
    side: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    keeps_shape: bool = False
    rescale_factor: float = 1 / 255

    @classmethod
    def from_processor(cls, config: Mapping[str, Any], *, mode: Mode) -> Self:
        """Return the rules of an image processor's config, as its JSON file or to_dict() has it.

        Raises: ValueError for a processor that does something else: another filter, a result that
            is not square, or a crop that differs from the size.
        """
        size, crop = config["size"], config.get("crop_size") if config["do_center_crop"] else None
        side = _side(size)
        if side is None or (crop and _side(crop) != side) or ("shortest_edge" in size and not crop):
            raise ValueError(f"the processor's size {size} and crop {crop} make no fixed square")
        if config["resample"] != Image.Resampling.BICUBIC:
            raise ValueError(f"the processor's filter {config['resample']} is not bicubic")
        return cls(
            *(mode, side, _channels(config["image_mean"]), _channels(config["image_std"])),
            keeps_shape="shortest_edge" in size,
            rescale_factor=config["rescale_factor"],
        )

    def __call__(self, image: Image.Image) -> NDArray[np.float32]:
        """Return an RGB picture's pixel values: float32 [3, side, side], normalised."""
        padded = pad_to_square(image, self.background) if self.mode == "pad" else image
        values = np.empty((3, self.side, self.side), np.float32)
        bands = zip(self._resized(padded).split(), self._tables(), values, strict=True)
        for band, table, out in bands:  # "clip" costs nothing here, and spares take a copy
            np.take(table, np.asarray(band), out=out, mode="clip")
        return values

    @property
    def background(self) -> tuple[int, ...]:
        """The mean colour, rounded down: what Bunny pads with."""
        return tuple(int(255 * value) for value in self.mean)

    def _resized(self, image: Image.Image) -> Image.Image:
        """Return the picture of side x side pixels."""
        if not self.keeps_shape:
            return image.resize((self.side, self.side), Image.Resampling.BICUBIC)
        shorter = min(image.size)
        sides = [int(self.side * length / shorter) for length in image.size]
        left, top = ((length - self.side) // 2 for length in sides)
        resized = image.resize((sides[0], sides[1]), Image.Resampling.BICUBIC)
        return resized.crop((left, top, left + self.side, top + self.side))

    def _tables(self) -> NDArray[np.float32]:
        """Return what each 8-bit value becomes: float32 [3, 256].

        Scaled in 64 bits and normalised in 32, as transformers does.
        """
        scaled = (np.arange(256) * self.rescale_factor).astype(np.float32)
        mean, std = np.array(self.mean, np.float32), np.array(self.std, np.float32)
        return (scaled - mean[:, None]) / std[:, None]


def pad_to_square(image: Image.Image, color: tuple[int, ...]) -> Image.Image:
    """Return the picture in the middle of a square of one colour; a square one as it is.

    Where the border is odd, the pixel more is at the bottom or right.
    """
    side = max(image.size)
    if image.size == (side, side):
        return image
    square = Image.new("RGB", (side, side), color)
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square


def decode(data: bytes) -> Image.Image:
    """Return the first frame as an RGB image, upright by EXIF, on white where it is transparent.

    16-bit samples keep their upper 8 bits. Raises: ImageDamaged.
    """
    try:
        image = Image.open(BytesIO(data), formats=FORMATS)
        image.load()
        return upright_rgb(image)
    except DECODER_ERRORS as error:
        raise ImageDamaged(f"{len(data)} bytes are no whole image: {error}") from error


def _side(size: Mapping[str, int]) -> int | None:
    """Return the side of a processor's size when it is the same both ways."""
    if "shortest_edge" in size:
        return size["shortest_edge"]
    return size["height"] if size["height"] == size["width"] else None


def _channels(values: Sequence[float]) -> tuple[float, float, float]:
    red, green, blue = values
    return red, green, blue
