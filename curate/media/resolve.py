"""The resolve stage: each image of the kept conversations is found and seen to be whole.

    RESOLVED    one row per image of a row whose images are all good: place, format, sides
    places/     the members of every tar of the roots, listed once

A row with a missing, damaged or unsafe image is quarantined whole, by its first bad image: a model
would be asked about a picture that it is not shown. The format is told by the content, never by the
suffix; the original bytes stay where they are.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import lru_cache, partial
from itertools import groupby
from typing import Any, ClassVar, Literal, NamedTuple, Self, TypeAlias

import numpy as np
import numpy.typing as npt
import polars as pl
import pyarrow as pa
from pydantic import Field, model_validator

from curate.media import image_places
from curate.media.image_ends import Read, inspect
from curate.media.image_places import Folder, Look, Place, RootMap
from curate.media.images import SUFFIX_OF_FORMAT, ImageError, ImageHeader, decode, sniff
from curate.media.tars import RangeReader, is_unsafe_name
from curate.rows.conversation_parts import read_conversations
from manifests import ledger, paths, store
from manifests.schemas import RESOLVED, conform
from manifests.strict import Strict
from manifests.work import Item, Output, StageDir, View, part_name

MAX_IMAGE_BYTES = 1 << 30
"""More in one file is no picture to train on; one read returns it."""
MAX_SHOWN_CHARACTERS = 200

_LASTING = (PermissionError, IsADirectoryError)
_MEMBERS_FOLDER = "places"
_REMOTE = re.compile(r"(?:[A-Za-z][A-Za-z0-9+.-]*:)?//|data:", re.IGNORECASE)
_FOUND_COLUMNS: dict[str, Any] = {
    "image": pl.String,
    "root": pl.String,
    "choice": pl.UInt16,
    "file": pl.String,
    "offset": pl.UInt64,
    "size": pl.UInt32,
    "suffix": pl.String,
    "width": pl.UInt32,
    "height": pl.UInt32,
    "error": pl.String,
    "detail": pl.String,
}


class ResolveConfig(Strict):
    """Where the images lie, and how closely they are looked at."""

    location_fields: ClassVar[frozenset[str]] = frozenset({"roots"})

    roots: dict[str, str | list[str]] = Field(min_length=1)
    """Prefix of the image paths ("coco/train2017", "" for all) -> a place, or several that are
    tried in order: a folder, or tars as a path, glob, braces or "::" list that ends in .tar. An
    image is the prefix + "/" + its name below the place. The longest prefix is tried first. Keep
    --out outside these folders: what they hold decides which finished run is reused."""
    check: Literal["header", "decode"] = "header"
    """header: format and sides, and the end that the format has, so that broken-off downloads are
    found by two reads. decode: every image is decoded, ten times slower and more. Neither sees
    wrong bytes that a decoder takes for a picture."""
    max_pixels: int = Field(default=128_000_000, ge=1)
    """Width times height; rows with larger images are quarantined."""

    @model_validator(mode="after")
    def _has_prefixes_and_places(self) -> Self:
        for prefix, given in self.roots.items():
            if prefix.startswith("/") or prefix.endswith("/") or is_unsafe_name(prefix):
                raise ValueError(f"the prefix {prefix!r} is not a relative path without end slash")
            if not given or (isinstance(given, list) and not all(given)):
                raise ValueError(f"the prefix {prefix!r} has no place, or an empty one")
        return self


_Row: TypeAlias = dict[str, Any]
"""Columns of RESOLVED of a good image; error and detail of another."""
_Seen: TypeAlias = tuple[ImageHeader, int]
"""Header and size in bytes."""


class _Member(NamedTuple):
    """A member of the tar number `tar` of all tars of the roots."""

    tar: int
    offset: int
    size: int


def identity(config: ResolveConfig) -> list[list[Any]]:
    """Return the prefixes and what their places hold. Raises: UserError for a missing place."""
    return image_places.identity(config.roots)


def plan_places(view: View) -> list[Item]:
    """One item per tar of the roots, in the order in which they are searched."""
    tars = enumerate(_tars(_config(view)))
    return [_place_item(number, place, file) for number, (place, file) in tars]


def list_place(view: View, item: Item) -> Output:
    """List the members of one tar."""
    asked = item.payload
    place = RootMap(_config(view).roots).place(asked["root"], asked["choice"])
    root, _ = image_places.tars_of(place)
    members, damage = image_places.members_of(paths.join(root, asked["file"]))
    notes = {"members": members.num_rows} | ({"damage": damage} if damage else {})
    return Output(files={f"{_MEMBERS_FOLDER}/{item.name}.parquet": members}, notes=notes)


def plan(view: View) -> list[Item]:
    """One item per source part."""
    return [Item(part_name(one["part"]), {"part": one["part"]}) for one in view.parts()]


def work(view: View, item: Item) -> Output:
    """Resolve the images of one part's kept rows."""
    part = item.payload["part"]
    uids = view.kept_in_part(part)
    images = _images_of(view, part, uids)
    found = _Resolver(_config(view), view.own).resolve(images["image"].unique(maintain_order=True))
    rows = images.join(found, on="image", how="left", maintain_order="left")
    bad = rows.filter(pl.col("error").is_not_null()).unique(
        "uid", keep="first", maintain_order=True
    )
    good = rows.join(bad, on="uid", how="anti", maintain_order="left").select(RESOLVED.names)
    reasons = np.full(len(uids), "", dtype=object)
    reasons[np.searchsorted(uids, bad["uid"].to_numpy())] = [
        ledger.quarantine_reason(error) for error in bad["error"]
    ]
    return Output(
        files={f"{item.name}.parquet": conform(good.to_arrow(), RESOLVED)},
        verdicts=ledger.verdicts(view.stage, uids, reasons=reasons),
        quarantine=_quarantine(view, part, bad),
        notes={"images": good.height, "files": good["image"].n_unique()},
    )


def _config(view: View) -> ResolveConfig:
    assert isinstance(view.config, ResolveConfig), f"not a resolve section: {view.config!r}"
    return view.config


def _tars(config: ResolveConfig) -> Iterator[tuple[Place, str]]:
    for place in RootMap(config.roots).places:
        if place.is_tars:
            yield from ((place, file) for file in image_places.tars_of(place)[1])


def _place_item(number: int, place: Place, file: str) -> Item:
    payload = {"tar": number, "root": place.prefix, "choice": place.choice, "file": file}
    root, _ = image_places.tars_of(place)
    return Item(_place_name(number), payload, float(paths.size_of(paths.join(root, file)) or 0))


def _place_name(number: int) -> str:
    return f"tar-{number:05d}"


def _images_of(view: View, part: int, uids: npt.NDArray[np.uint64]) -> pl.DataFrame:
    """Return uid, position and image, a row per image of the kept rows, in order."""
    rows = pl.DataFrame(read_conversations(view.before["ingest"], part, ["uid", "images"]))
    rows = rows.filter(
        pl.col("uid").is_in(pl.Series(uids).implode()), pl.col("images").list.len() > 0
    )
    positions = pl.int_ranges(pl.col("images").list.len(), dtype=pl.UInt16)
    named = rows.select("uid", positions.alias("position"), pl.col("images").alias("image"))
    return named.explode("position", "image").sort("uid", "position")


def _quarantine(view: View, part: int, bad: pl.DataFrame) -> pa.Table:
    if not bad.height:
        return ledger.quarantine([])
    samples = pl.DataFrame(view.samples(part, ["uid", "key", "shard"]))
    columns = ["uid", "key", "shard", "error", "detail"]
    return ledger.quarantine(bad.join(samples, on="uid").sort("uid").select(columns).to_dicts())


class _Resolver:
    """Finds images by their paths and looks at them, each path once."""

    def __init__(self, config: ResolveConfig, own: StageDir) -> None:
        self._roots = RootMap(config.roots)
        self._own = own
        check = _look_inside if config.check == "header" else _look_at_pixels
        self._look: Look[_Seen] = partial(check, max_pixels=config.max_pixels)
        self._folders = {p: Folder(p.location) for p in self._roots.places if not p.is_tars}

    def resolve(self, images: Iterable[str]) -> pl.DataFrame:
        """Return image, the columns of RESOLVED that say where and what it is, error, detail."""
        found: dict[str, _Row] = {}
        in_tars: list[tuple[_Member, str]] = []
        names = list(images)
        members = self._members_of(names)
        for image in names:
            where = _problem(image) or self._find(image, members)
            if isinstance(where, _Member):
                in_tars.append((where, image))
            else:
                found[image] = where
        found |= self._look_into_tars(sorted(in_tars))
        rows = [{"image": image, **row} for image, row in found.items()]
        return pl.DataFrame(rows, schema=_FOUND_COLUMNS)

    def _members_of(self, images: Iterable[str]) -> dict[tuple[Place, str], _Member]:
        """Return the members of tars that may be one of the images."""
        if len(self._folders) == len(self._roots.places):
            return {}
        wanted = {
            (place, name)
            for image in images
            for place, name in self._roots.candidates(image)
            if place.is_tars
        }
        return _lookup(self._own, wanted)

    def _find(self, image: str, members: Mapping[tuple[Place, str], _Member]) -> _Row | _Member:
        """Return what an image in a folder is, or the member that it is, or that it is missing."""
        for place, name in self._roots.candidates(image):
            folder = self._folders.get(place)
            if folder is None:
                if member := members.get((place, name)):
                    return member
                continue
            with suppress(FileNotFoundError, NotADirectoryError):
                return self._judged(image, place, name, 0, partial(folder.look, name))
        return _bad("missing_image", image, self._where_sought(image))

    def _where_sought(self, image: str) -> str:
        tried = {place.prefix: None for place, _ in self._roots.candidates(image)}
        return f"is not below the roots {list(tried)}" if tried else "no root has a prefix of it"

    def _look_into_tars(self, wanted: Sequence[tuple[_Member, str]]) -> dict[str, _Row]:
        """Return what each member is; args by tar and offset, so that a tar is read once."""
        found: dict[str, _Row] = {}
        tars = _tars_listed(self._own)
        for tar, group in groupby(wanted, key=lambda one: one[0].tar):
            place = self._roots.place(tars[tar]["root"], tars[tar]["choice"])
            file = tars[tar]["file"]
            path = paths.join(image_places.tars_of(place)[0], file)
            with image_places.open_tar(path) as reader:
                for member, image in group:
                    look = partial(_look_at_member, reader, member)
                    found[image] = self._judged(image, place, file, member.offset, look)
        return found

    def _judged(
        self, image: str, place: Place, file: str, offset: int, open_it: Callable[[Any], Any]
    ) -> _Row:
        """Return the columns of a good image, or the error. Raises: the errors of no such file."""
        try:
            header, size = open_it(self._look)
        except ImageError as error:
            return _bad(error.error_class, image, error.detail)
        except (FileNotFoundError, NotADirectoryError):
            raise
        except OSError as error:
            if not paths.is_local(place.location) and not isinstance(error, _LASTING):
                raise  # it may pass: the item is tried again
            return _bad("unreadable_image", image, error.strerror or str(error))
        return {
            "root": place.prefix,
            "choice": place.choice,
            "file": file,
            "offset": offset,
            "size": size,
            "suffix": SUFFIX_OF_FORMAT[header.format],
            "width": header.width,
            "height": header.height,
        }


def _problem(image: str) -> _Row | None:
    """Return why a path is not looked up at all, or None."""
    if _REMOTE.match(image):
        return _bad("remote_image", image, "is an address: download it, and name the file")
    if "\\" in image or is_unsafe_name(image):
        return _bad("unsafe_image_path", image, "is not a plain path below a folder")
    return None


def _bad(error: str, image: str, detail: str) -> _Row:
    shown = image if len(image) <= MAX_SHOWN_CHARACTERS else f"{image[:MAX_SHOWN_CHARACTERS]}..."
    return {"error": error, "detail": f"{shown!r}: {detail}"}


def _look_inside(read: Read, num_bytes: int, *, max_pixels: int) -> _Seen:
    _check_size(num_bytes)
    return inspect(read, num_bytes, max_pixels=max_pixels), num_bytes


def _look_at_pixels(read: Read, num_bytes: int, *, max_pixels: int) -> _Seen:
    _check_size(num_bytes)
    data = read(0, num_bytes)
    header = sniff(data)
    decode(data, max_pixels=max_pixels)
    return header, num_bytes


def _check_size(num_bytes: int) -> None:
    if num_bytes > MAX_IMAGE_BYTES:
        raise ImageError("undecodable_image", f"{num_bytes} bytes are more than {MAX_IMAGE_BYTES}")


def _look_at_member(reader: RangeReader, member: _Member, look: Look[_Seen]) -> _Seen:
    try:
        return look(lambda at, size: reader.read(member.offset + at, size), member.size)
    except EOFError as error:
        raise ImageError("truncated_image", f"the tar ends within it: {error}") from error


@lru_cache(maxsize=4)
def _tars_listed(own: StageDir) -> dict[int, dict[str, Any]]:
    """Return what plan_places said of each tar, by number; read once, all are listed by then."""
    payloads = [marker["payload"] for marker in own.markers()]
    return {one["tar"]: one for one in payloads if "tar" in one}


@lru_cache(maxsize=1)
def _all_members(own: StageDir) -> pl.DataFrame:
    """Return root, choice, tar, name, offset, size of all members, some 60 bytes each."""
    listed = []
    for number, tar in sorted(_tars_listed(own).items()):
        path = paths.join(own.path, _MEMBERS_FOLDER, f"{_place_name(number)}.parquet")
        key = (pl.lit(tar[name]).alias(name) for name in ("root", "choice", "tar"))
        listed.append(pl.DataFrame(store.read_table(path)).with_columns(*key))
    return pl.concat(listed)


def _lookup(
    own: StageDir, wanted: Collection[tuple[Place, str]]
) -> dict[tuple[Place, str], _Member]:
    """Return the first member of each wanted name in a place's tars."""
    places = {(place.prefix, place.choice): place for place, _ in wanted}
    rows = [(place.prefix, place.choice, name) for place, name in wanted]
    key = ["root", "choice", "name"]
    schema = {"root": pl.String, "choice": pl.Int32, "name": pl.String}
    asked = pl.DataFrame(rows, schema, orient="row")
    hits = _all_members(own).join(asked, on=key, how="semi").sort("tar")
    hits = hits.unique(key, keep="first", maintain_order=True)
    return {
        (places[root, choice], name): _Member(tar, offset, size)
        for root, choice, name, tar, offset, size in hits.select(
            *key, "tar", "offset", "size"
        ).iter_rows()
    }
