"""The download section of a recipe: how images are fetched, judged, resized and kept."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from curate.download.content import ImageLimits
from curate.download.fetch_config import FetchConfig

ResizeMode = Literal["no", "keep_ratio", "keep_ratio_largest", "center_crop", "border"]
EncodeFormat = Literal["jpg", "png", "webp"]

_QUALITY = {"jpg": (0, 100, 95), "png": (0, 9, 6), "webp": (0, 100, 95)}  # lowest, highest, default

_OF_ENCODING = ("resize", "image_size", "only_if_bigger", "encode_format", "encode_quality")

PATIENCE = (
    "concurrency",
    "connections_per_host",
    "connect_timeout_seconds",
    "total_timeout_seconds",
    "max_bytes_in_flight",
    "attempts",
    "retry_wait_seconds",
    "max_retry_wait_seconds",
    "resize_threads",
    "min_success_share",
)
"""What says only how fast and how patiently the same bytes are asked for, and when to give up. It
enters no fingerprint: a run that stopped goes on with other patience where it was."""


def _yaml_no(value: Any) -> Any:
    """Return "no" for what YAML makes of a bare no: false."""
    return "no" if value is False else value


class DownloadConfig(FetchConfig, ImageLimits):
    """Fetching, which images are wanted, and what becomes of them.

    Modes of resizing and their names are img2dataset's. Any other setting than those of PATIENCE
    makes another result, for which every image is fetched anew.
    """

    location_fields: ClassVar[frozenset[str]] = frozenset(
        {"blocked_urls", "blocked_domains", "blocked_images"}
    )

    resize: Annotated[ResizeMode, BeforeValidator(_yaml_no)] = "keep_ratio"
    """keep_ratio: the shorter side becomes `image_size`; keep_ratio_largest: the longer side;
    center_crop: as keep_ratio, then the middle square; border: as keep_ratio_largest, then white up
    to the square; no: as it came."""
    image_size: int = Field(default=384, ge=1)
    """Pixels."""
    only_if_bigger: bool = True
    """Leave images alone whose side in question is `image_size` or less: nothing is enlarged."""
    encode_format: EncodeFormat = "jpg"
    """What every image is encoded as, and the suffix of its name."""
    encode_quality: int | None = Field(default=None, ge=0, le=100)
    """0..100 for jpg and webp (95 by default); for png the compression level 0..9 (6)."""
    keep_original_bytes: bool = False
    """Store the files as they came, under the suffix that their content tells; they are looked at,
    but not decoded, resized or encoded."""
    blocked_urls: list[str] = []
    """Files with a URL, or the MD5 or SHA-256 of a URL in hexadecimal, a line; never fetched, nor
    kept when a redirect has led there."""
    blocked_domains: list[str] = []
    """Files with a domain a line; it and what is below it is never fetched, nor kept when a
    redirect has led there."""
    blocked_images: list[str] = []
    """Files with the MD5 or SHA-256 of an image file in hexadecimal, a line; such images are thrown
    away before they are decoded."""
    min_success_share: float = Field(default=0.05, ge=0, le=1)
    """A shard of at least 20 rows of which fewer are fetched fails, and so does a stage: that is an
    outage, not a result. 0 takes any."""
    resize_threads: int = Field(default=4, ge=1)
    """Threads that decode, resize and encode beside the fetching."""

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        lowest, highest, _ = _QUALITY[self.encode_format]
        if self.encode_quality is not None and self.encode_quality > highest:
            raise ValueError(f"encode_quality of {self.encode_format} is {lowest}..{highest}")
        if self.keep_original_bytes and (unused := self._changed(_OF_ENCODING)):
            raise ValueError(f"keep_original_bytes leaves no use for {', '.join(unused)}")
        return self

    def _changed(self, names: Iterable[str]) -> list[str]:
        """Return those of the fields that do not have their default."""
        fields = type(self).model_fields
        return [name for name in names if getattr(self, name) != fields[name].default]

    @property
    def quality(self) -> int:
        """The quality or compression level to encode with."""
        return (
            _QUALITY[self.encode_format][2]
            if self.encode_quality is None
            else (self.encode_quality)
        )

    def canonical(self) -> dict[str, Any]:
        """Return what decides the result; of blocklists their content does, see `identity`."""
        return {k: v for k, v in super().canonical().items() if k not in PATIENCE}
