"""What an image's first bytes say, and the limits, each at its edge."""

from __future__ import annotations

import hostile_images as images
import pytest

from curate.download.content import ImageLimits, look
from curate.download.statuses import Status

LIMITS = ImageLimits(max_pixels=6000, min_side=20, max_aspect_ratio=3.0)


@pytest.mark.parametrize(
    ("sides", "status"),
    [
        ((60, 100), Status.OK),
        ((61, 100), Status.TOO_MANY_PIXELS),
        ((60, 20), Status.OK),
        ((20, 60), Status.OK),
        ((61, 20), Status.ASPECT_RATIO),
        ((20, 61), Status.ASPECT_RATIO),
        ((19, 19), Status.TOO_SMALL),
        ((12000, 12000), Status.TOO_MANY_PIXELS),
    ],
)
def test_the_limits_are_the_last_sides_allowed(sides: tuple[int, int], status: Status) -> None:
    seen = look(images.plain_png(*sides), LIMITS)
    assert seen.status is status
    assert seen.header == ("PNG", *sides)
    assert (seen.detail == "") == (status is Status.OK)


def test_without_settings_only_bombs_are_refused() -> None:
    assert look(images.plain_png(1, 1000), ImageLimits()).status is Status.OK
    assert look(images.plain_png(12000, 12000), ImageLimits()).status is Status.TOO_MANY_PIXELS


@pytest.mark.parametrize(
    ("data", "detail"),
    [
        (b"\n<!doctype HTML><html>", "a web page"),
        (b"<html><body><svg></svg>", "a web page"),
        (b'<?xml version="1.0"?><!-- a --><svg width="1">', "an SVG, which is a program"),
        (b'<?xml version="1.0"?><Error><Code>AccessDenied</Code>', "XML"),
        (b"II*\0" + bytes(9), "a TIFF"),
        (b"\0\0\0 ftypavif", "an AVIF or HEIC"),
    ],
)
def test_what_comes_in_place_of_an_image_is_named(data: bytes, detail: str) -> None:
    assert look(data, ImageLimits()) == (Status.NOT_AN_IMAGE, detail, None)
