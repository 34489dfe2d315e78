"""Tars in one place: scan members, group them into samples, read ranges, write archives."""

from __future__ import annotations

from curate.media.tar_samples import (
    CAPTION_SUFFIXES,
    IMAGE_SUFFIXES,
    BadSample,
    SampleErrorClass,
    SampleGroups,
    SkippedMember,
    Span,
    TarSample,
    group_samples,
    is_unsafe_name,
)
from curate.media.tar_scan import MemberScan, RangeReader, TarMember, read_range, scan_members
from curate.media.tar_write import MAX_KEY_CHARACTERS, sanitise_key, write_tar

__all__ = [
    "CAPTION_SUFFIXES",
    "IMAGE_SUFFIXES",
    "MAX_KEY_CHARACTERS",
    "BadSample",
    "MemberScan",
    "RangeReader",
    "SampleErrorClass",
    "SampleGroups",
    "SkippedMember",
    "Span",
    "TarMember",
    "TarSample",
    "group_samples",
    "is_unsafe_name",
    "read_range",
    "sanitise_key",
    "scan_members",
    "write_tar",
]
