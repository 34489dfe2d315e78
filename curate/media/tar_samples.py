"""Group the members of a tar into image-text samples and name what is wrong with the others.

A sample is, as in WebDataset, a run of consecutive members with one key: the path up to the first
dot of the file name. Every member that is not a directory ends in exactly one place: a good sample,
a bad sample, or the list of skipped members.

Key and suffix rules: webdataset 0.2.111, tariterators.py (base_plus_ext, skip_meta).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Literal, NamedTuple

from curate.media.tar_scan import PAX_SPARSE, REGULAR, SPARSE, MemberScan, TarMember

IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp")
CAPTION_SUFFIXES = ("txt", "json")

SampleErrorClass = Literal[
    "missing_image",
    "missing_caption",
    "ambiguous_image",
    "empty_image",
    "duplicate_key",
    "duplicate_member",
    "non_contiguous_members",
    "unsafe_member_name",
    "unsafe_member_type",
    "truncated_member",
]

_SAMPLE_SUFFIXES = frozenset((*IMAGE_SUFFIXES, *CAPTION_SUFFIXES))
# Control characters (NUL among them), absolute and UNC paths, drive letters, and `..` as a
# component.
_UNSAFE_NAME = re.compile(
    r"[\x00-\x1f\x7f-\x9f]|^/|^\\\\|^[A-Za-z]:[\\/]|(?:^|[\\/])\.\.(?:[\\/]|$)"
)
_DOT_SLASH = re.compile(r"^(?:\./+)+")
_META_NAME = re.compile(r"__[^/]*__(?:/|$)")
_TYPE_NAMES = {
    "1": "hard link",
    "2": "symbolic link",
    "3": "character device",
    "4": "block device",
    "6": "FIFO",
    SPARSE: "sparse file",
    PAX_SPARSE: "sparse file",
}


class Span(NamedTuple):
    """A byte range of the shard."""

    offset: int
    size: int


@dataclass(frozen=True, slots=True)
class TarSample:
    """One image with at least one caption member."""

    row: int  # position among the good and bad samples of the shard
    key: str
    image_suffix: str  # one of IMAGE_SUFFIXES; what the bytes are is for the decoder to say
    image: Span
    txt: Span | None
    json: Span | None
    members: tuple[TarMember, ...]


@dataclass(frozen=True, slots=True)
class BadSample:
    """Members of one key that do not make a sample, and why."""

    row: int
    key: str
    error_class: SampleErrorClass
    detail: str
    members: tuple[TarMember, ...]


@dataclass(frozen=True, slots=True)
class SkippedMember:
    """A member that belongs to no sample, and why."""

    member: TarMember
    reason: str


@dataclass(frozen=True, slots=True)
class SampleGroups:
    """A shard's samples in archive order (`rows[i].row == i`) and the members outside of them."""

    rows: tuple[TarSample | BadSample, ...]
    skipped: tuple[SkippedMember, ...]


def is_unsafe_name(name: str) -> bool:
    """Tell whether a member name could write outside a folder or hides control characters."""
    return _UNSAFE_NAME.search(name) is not None


def group_samples(scan: MemberScan) -> SampleGroups:
    """Return the samples of a scanned shard, good and bad, and the members that belong to none.

    A run that names the same suffix twice is cut there when every piece is a sample of its own (the
    same sample written twice in a row); otherwise the whole run is one bad sample.
    """
    skipped: list[SkippedMember] = []
    runs = [
        piece
        for run in _runs(_with_keys(scan.members, skipped), skipped)
        for piece in _cut_at_repeats(run)
    ]
    problems = [_own_problem(run, scan.num_bytes) for run in runs]
    _blame_damage(scan, runs, problems)
    _blame_repeated_keys(runs, problems)
    rows = [
        _row(number, run, problem)
        for number, (run, problem) in enumerate(zip(runs, problems, strict=True))
    ]
    return SampleGroups(tuple(rows), tuple(skipped))


class _Keyed(NamedTuple):
    """A member with its place in a sample."""

    key: str
    suffix: str
    member: TarMember


class _Problem(NamedTuple):
    """Why a run of members is not a sample."""

    error_class: SampleErrorClass
    detail: str


_Run = list[_Keyed]


def _with_keys(members: Sequence[TarMember], skipped: list[SkippedMember]) -> Iterator[_Keyed]:
    """Yield the members that have a key; the others join `skipped` and do not break a run."""
    for member in members:
        name = _DOT_SLASH.sub("", member.name)
        folder, slash, file_name = name.rpartition("/")
        stem, dot, suffix = file_name.partition(".")
        if _META_NAME.match(name):
            skipped.append(SkippedMember(member, "a name of the form __x__ is metadata"))
        elif not (stem and dot):
            skipped.append(SkippedMember(member, "a name without key and suffix"))
        else:
            yield _Keyed(folder + slash + stem, suffix.lower(), member)


def _runs(keyed: Iterator[_Keyed], skipped: list[SkippedMember]) -> Iterator[_Run]:
    """Yield the runs of one key that hold an image or a caption; skip the other members."""
    for _, members in groupby(keyed, key=lambda item: item.key):
        run = list(members)
        # "1.5.jpg" has the suffix "5.jpg": no sample, but surely meant as one
        if any(item.suffix.rpartition(".")[2] in _SAMPLE_SUFFIXES for item in run):
            yield run
            continue
        reason = "neither image nor caption, and no other member of its key beside it"
        skipped.extend(SkippedMember(item.member, reason) for item in run)


def _cut_at_repeats(run: _Run) -> list[_Run]:
    if len(_suffixes(run)) == len(run):
        return [run]
    pieces: list[_Run] = [[]]
    for item in run:
        if any(item.suffix == other.suffix for other in pieces[-1]):
            pieces.append([])
        pieces[-1].append(item)
    return pieces if all(_is_full(piece) for piece in pieces) else [run]


def _is_full(run: _Run) -> bool:
    """Whether the run has an image and a caption, be they good or bad."""
    suffixes = _suffixes(run)
    return not suffixes.isdisjoint(IMAGE_SUFFIXES) and not suffixes.isdisjoint(CAPTION_SUFFIXES)


def _suffixes(run: _Run) -> set[str]:
    return {item.suffix for item in run}


def _own_problem(run: _Run, num_bytes: int) -> _Problem | None:
    """Return the first thing that is wrong with the run by itself: safety first, then shape."""
    return _unsafe(run) or _cut_short(run, num_bytes) or _misshapen(run)


def _unsafe(run: _Run) -> _Problem | None:
    for item in run:
        if is_unsafe_name(item.member.name):
            return _Problem("unsafe_member_name", f"the name {item.member.name!r}")
    for item in run:
        if item.member.type_flag != REGULAR:
            flag = item.member.type_flag
            kind = _TYPE_NAMES.get(flag, f"member of type {flag!r}")
            return _Problem("unsafe_member_type", f"{item.member.name!r} is a {kind}")
    return None


def _cut_short(run: _Run, num_bytes: int) -> _Problem | None:
    for item in run:
        missing = item.member.offset + item.member.size - num_bytes
        if missing > 0:
            detail = f"the last {missing} bytes of {item.member.name!r} are not in the file"
            return _Problem("truncated_member", detail)
    return None


def _misshapen(run: _Run) -> _Problem | None:
    suffixes = _suffixes(run)
    images = [item.member for item in run if item.suffix in IMAGE_SUFFIXES]
    if len(suffixes) < len(run):
        return _Problem("duplicate_member", f"a suffix comes twice: {_listed(run)}")
    if len(images) > 1:
        return _Problem("ambiguous_image", f"more than one image: {_listed(run)}")
    if not images:
        detail = f"no {', '.join(IMAGE_SUFFIXES)} behind the name's first dot, but {_listed(run)}"
        return _Problem("missing_image", detail)
    if suffixes.isdisjoint(CAPTION_SUFFIXES):
        return _Problem("missing_caption", f"neither txt nor json among: {_listed(run)}")
    if images[0].size == 0:
        return _Problem("empty_image", f"{images[0].name!r} has no bytes")
    return None


def _listed(run: _Run) -> str:
    return ", ".join(item.suffix for item in run)


def _blame_damage(scan: MemberScan, runs: list[_Run], problems: list[_Problem | None]) -> None:
    """Mark the run before the damage when members of it may be lost.

    That is so when it lacks a member that makes a sample, or that the shard's other samples have: a
    sample that lost its json would otherwise pass as one that never had a safety score.
    """
    if scan.damage is None or not runs:
        return
    others = set[str]().union(*(_suffixes(run) & _SAMPLE_SUFFIXES for run in runs[:-1]))
    lost = sorted((others & set(CAPTION_SUFFIXES)) - _suffixes(runs[-1]))
    last = problems[-1]
    is_incomplete = last is not None and last.error_class in {"missing_image", "missing_caption"}
    if is_incomplete or (last is None and lost):
        detail = f"{scan.damage} (at byte {scan.damage_offset}), and this sample is not complete"
        problems[-1] = _Problem("truncated_member", detail)


def _blame_repeated_keys(runs: list[_Run], problems: list[_Problem | None]) -> None:
    """Mark the runs whose key another run of the shard has too."""
    places: dict[str, list[int]] = {}
    for place, run in enumerate(runs):
        places.setdefault(run[0].key, []).append(place)
    for same_key in places.values():
        if len(same_key) > 1:
            _blame_one_key(same_key, runs, problems)


def _blame_one_key(same_key: list[int], runs: list[_Run], problems: list[_Problem | None]) -> None:
    """Keep the first run when it is full; a second full one is a duplicate, the rest are fragments.

    A run that is bad for another reason than being incomplete keeps that reason.
    """
    first = same_key[0]
    has_full = False
    for place in same_key:
        problem = problems[place]
        is_full = _is_full(runs[place])
        is_incomplete = problem is not None and problem.error_class.startswith("missing_")
        if is_incomplete or (problem is None and place != first and not has_full):
            detail = f"members of this key are in {len(same_key)} places of the shard"
            problems[place] = _Problem("non_contiguous_members", detail)
        elif problem is None and place != first:
            detail = f"row {first} has the same key"
            problems[place] = _Problem("duplicate_key", detail)
        has_full = has_full or is_full


def _row(number: int, run: _Run, problem: _Problem | None) -> TarSample | BadSample:
    key = run[0].key
    members = tuple(item.member for item in run)
    if problem is not None:
        return BadSample(number, key, problem.error_class, problem.detail, members)
    spans = {item.suffix: Span(item.member.offset, item.member.size) for item in run}
    suffix = next(suffix for suffix in spans if suffix in IMAGE_SUFFIXES)
    txt, json = (spans.get(name) for name in CAPTION_SUFFIXES)
    return TarSample(number, key, suffix, spans[suffix], txt, json, members)
