"""What a file is, told by its first bytes: no pixel is decoded before it has passed here."""

from __future__ import annotations

import re
from typing import NamedTuple

from pydantic import Field

from curate.download.statuses import Status
from curate.media.images import ImageError, ImageErrorClass, ImageHeader, sniff
from manifests.strict import Strict

_STATUS_OF: dict[ImageErrorClass, Status] = {
    "empty_image": Status.EMPTY_BODY,
    "unknown_format": Status.NOT_AN_IMAGE,
    "truncated_image": Status.TRUNCATED_IMAGE,
    "too_many_pixels": Status.TOO_MANY_PIXELS,
    "undecodable_image": Status.DECODE_ERROR,
    "zero_side": Status.DECODE_ERROR,
}
_HEAD_BYTES = 512
_NAMES = (  # what is often served in place of an image, for the detail only
    ("a web page", re.compile(rb"<!doctype html|<html|<head|<body", re.IGNORECASE)),
    ("an SVG, which is a program", re.compile(rb"<svg[\s/>]", re.IGNORECASE)),
    ("XML", re.compile(rb"\s*<\?xml")),
    ("a TIFF", re.compile(rb"\A(II\*\0|MM\0\*)")),
    ("an AVIF or HEIC", re.compile(rb"\A....ftyp", re.DOTALL)),
)


class ImageLimits(Strict):
    """Which images are decoded, by the sides that their header gives."""

    max_pixels: int = Field(default=128_000_000, ge=1)
    """Largest width times height. A small file can claim an image that fills the memory."""
    min_side: int = Field(default=0, ge=0)
    """Smallest width and height."""
    max_aspect_ratio: float | None = Field(default=None, ge=1)
    """Largest longer side over shorter side; None for no limit."""


class Look(NamedTuple):
    """What the header says, and whether the image may be decoded: where the status is ok."""

    status: Status
    detail: str
    header: ImageHeader | None


def look(data: bytes, limits: ImageLimits) -> Look:
    """Return format, sides and whether they are within the limits."""
    try:
        header = sniff(data)
    except ImageError as error:
        return Look(status_of(error), _detail(error, data), None)
    status, detail = _judged(header, limits)
    return Look(status, detail, header)


def status_of(error: ImageError) -> Status:
    """Return the status of an image that `sniff` or `decode` has refused."""
    return _STATUS_OF[error.error_class]


def _judged(header: ImageHeader, limits: ImageLimits) -> tuple[Status, str]:
    shorter, longer = sorted((header.width, header.height))
    sides = f"{header.width} x {header.height}"
    if shorter * longer > limits.max_pixels:
        return Status.TOO_MANY_PIXELS, f"{sides} is more than {limits.max_pixels} pixels"
    if shorter < limits.min_side:
        return Status.TOO_SMALL, f"{sides} has a side below {limits.min_side}"
    if limits.max_aspect_ratio is not None and longer > limits.max_aspect_ratio * shorter:
        return Status.ASPECT_RATIO, f"{sides} is longer than {limits.max_aspect_ratio} to 1"
    return Status.OK, ""


def _detail(error: ImageError, data: bytes) -> str:
    if error.error_class == "unknown_format":
        head = data[:_HEAD_BYTES]
        for name, pattern in _NAMES:
            if pattern.search(head):
                return name
    return error.detail
