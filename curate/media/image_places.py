"""Where the images of instruction rows may lie: a map from path prefixes to folders and tars.

An image path is a prefix + "/" + a name below one of the prefix's places. The longest prefix is
tried first, then shorter ones; the places of a prefix in their order. A place is a folder, or tars
(of a WebDataset too): then the name is a member's. Nothing is ever extracted.
"""

from __future__ import annotations

import hashlib
import os
import posixpath
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import groupby
from typing import Any, NamedTuple, TypeVar

import pyarrow as pa

from curate.media.image_ends import Read
from curate.media.tar_scan import REGULAR, RangeReader, scan_members
from curate.media.tars import is_unsafe_name
from manifests import paths
from manifests.errors import UserError

Roots = Mapping[str, str | Sequence[str]]
Seen = TypeVar("Seen")
Look = Callable[[Read, int], Seen]
"""Is given the reader of an open image and its size in bytes."""

MEMBERS = pa.schema([("name", pa.string()), ("offset", pa.uint64()), ("size", pa.uint64())])
"""The regular members of one tar, each name once."""

# A pipe under an image's name must not block, nor a file stay open in a child process.
_OPEN_FLAGS = os.O_RDONLY | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NONBLOCK", 0)
_MISSING = (FileNotFoundError, NotADirectoryError)
_STAMPS = ("ETag", "mtime", "LastModified", "updated")


class Place(NamedTuple):
    """One place of one prefix."""

    prefix: str
    choice: int  # its position among the prefix's places
    location: str

    @property
    def is_tars(self) -> bool:
        """Whether the images are members of tars, not files of a folder."""
        return "::" in self.location or self.location.endswith((".tar", ".tar}"))


class PlacedImage(NamedTuple):
    """Where an image was found: the columns of RESOLVED."""

    root: str
    choice: int
    file: str
    offset: int
    size: int


class RootMap:
    """The places of a map of roots, and which of them may hold an image."""

    def __init__(self, roots: Roots) -> None:
        self._of_prefix = {prefix: _places(prefix, given) for prefix, given in roots.items()}
        by_length = sorted(self._of_prefix, key=lambda prefix: (-len(prefix), prefix))
        self.places = [place for prefix in by_length for place in self._of_prefix[prefix]]

    def place(self, prefix: str, choice: int) -> Place:
        """Return a place by the columns of RESOLVED. Raises: UserError when the map has none."""
        places = self._of_prefix.get(prefix, ())
        if choice < len(places):
            return places[choice]
        raise UserError(
            f"resolve.roots[{prefix!r}] has no place {choice}.",
            "Images were found there when they were resolved.",
            "Put it back, or run with a new --out.",
        )

    def candidates(self, image: str) -> Iterator[tuple[Place, str]]:
        """Yield (place, name below it) of all places that may hold an image, in order."""
        if "//" in image or "./" in image:
            image = posixpath.normpath(image)
        end = len(image) - 1
        while (end := image.rfind("/", 0, end)) > 0:
            for place in self._of_prefix.get(image[:end], ()):
                yield place, image[end + 1 :]
        for place in self._of_prefix.get("", ()) if image else ():
            yield place, image


def _places(prefix: str, given: str | Sequence[str]) -> tuple[Place, ...]:
    locations = [given] if isinstance(given, str) else given
    found = enumerate(map(paths.resolve_resource, locations))
    return tuple(Place(prefix, choice, location) for choice, location in found)


@lru_cache(maxsize=256)
def tars_of(place: Place) -> tuple[str, tuple[str, ...]]:
    """Return (folder, names below it, in order) of a place's tars. Raises: UserError for none."""
    try:
        root, names = paths.expand(place.location, suffix=".tar")
    except UserError as error:
        why = f"It is a place of resolve.roots[{place.prefix!r}]."
        raise UserError(error.what, why, error.fix) from error
    return root, tuple(names)


def identity(roots: Roots) -> list[list[Any]]:
    """Return [prefix, what each of its places holds now], by prefix: other images, other result.

    Of tars name, size and time of change count; of folders the names and sizes of all files below.
    Lists the tars anew; later calls in this process use that list.
    Raises: UserError when a place is missing or cannot be listed.
    """
    tars_of.cache_clear()
    places = RootMap(roots).places
    grouped = groupby(places, key=lambda place: place.prefix)
    return sorted([prefix, [_contents(place) for place in group]] for prefix, group in grouped)


def _contents(place: Place) -> Any:
    if place.is_tars:
        root, names = tars_of(place)
        return [[name, *stamp(paths.join(root, name))] for name in names]
    try:
        fs, folder = paths.filesystem(place.location)
        if paths.is_local(place.location):
            return listing_digest(folder)
        fs.invalidate_cache()
        if not fs.isdir(folder):
            raise FileNotFoundError(place.location)
        entries = fs.find(folder, detail=True).items()
        below = len(folder.rstrip("/")) + 1
        return _digest((str(path)[below:], info["size"]) for path, info in sorted(entries))
    except OSError as error:
        raise UserError(
            f"The folder {place.location} cannot be listed: {error.strerror or error}.",
            f"resolve.roots[{place.prefix!r}] says that images lie there.",
            "Check the path; it is relative to the folder where the command runs.",
        ) from error


def stamp(path: str) -> list[Any]:
    """Return [size in bytes, time of change or the like] of a file. Raises: OSError."""
    fs, local = paths.filesystem(path)
    info = fs.info(local)
    found = next((info[key] for key in _STAMPS if key in info), None)
    return [info["size"], None if found is None else str(found)]


def listing_digest(folder: str) -> str:
    """Return a SHA-256 of the names and sizes of all files below a local folder.

    Links are followed, a link to a folder that it lies in is not. Raises: OSError.
    """
    return _digest(_walk(folder, "", frozenset()))


def files_below(location: str) -> list[str]:
    """Return the names of all files below a folder, local or remote. Raises: OSError."""
    fs, folder = paths.filesystem(location)
    if paths.is_local(location):
        return [name for name, _ in _walk(folder, "", frozenset())]
    fs.invalidate_cache()
    if not fs.isdir(folder):
        raise FileNotFoundError(2, "no such folder", location)
    below = len(folder.rstrip("/")) + 1
    return [str(path)[below:] for path in fs.find(folder)]


def _digest(entries: Iterable[tuple[str, int | None]]) -> str:
    digest = hashlib.sha256()
    for name, size in entries:
        digest.update(f"{name}\0{size}\0".encode(errors="surrogateescape"))
    return digest.hexdigest()


def _walk(folder: str, below: str, above: frozenset[tuple[int, int]]) -> Iterator[tuple[str, int]]:
    """Yield (name, size) of the files below a folder; `above` are the folders that lead to it."""
    status = os.stat(folder)  # noqa: PTH116 - text in, as all paths here are
    me = (status.st_dev, status.st_ino)
    if me in above:
        return
    with os.scandir(folder) as entries:
        found = sorted(entries, key=lambda entry: entry.name)
    for entry in found:
        if entry.is_dir():
            yield from _walk(entry.path, f"{below}{entry.name}/", above | {me})
        else:
            yield below + entry.name, _size_of(entry)


def _size_of(entry: os.DirEntry[str]) -> int:
    try:
        return entry.stat().st_size
    except OSError:
        return -1  # a link that leads nowhere


def members_of(path: str) -> tuple[pa.Table, str | None]:
    """Return the MEMBERS of a tar in archive order, and what is wrong with the tar, if anything.

    Links and names that would leave a folder are left out; of members of one name the last counts,
    which is the one that unpacking would leave. Raises: UserError when it is gone or is no tar.
    """
    try:
        scan = scan_members(path)
    except FileNotFoundError as error:
        raise _gone(path, "It was listed as a tar of images a moment ago.") from error
    if scan.damage is not None and not scan.members:
        raise UserError(f"{path} cannot be read: {scan.damage}.", fix="Write it as a plain tar.")
    found = {
        posixpath.normpath(member.name): member
        for member in scan.members
        if member.type_flag == REGULAR and not is_unsafe_name(member.name)
    }
    columns = [list(found), [m.offset for m in found.values()], [m.size for m in found.values()]]
    damage = scan.damage and f"{scan.damage} at byte {scan.damage_offset} of {scan.num_bytes}"
    return pa.table(columns, schema=MEMBERS), damage


class Folder:
    """Opens the files of one folder, local or remote."""

    def __init__(self, location: str) -> None:
        self._fs, folder = paths.filesystem(location)
        self._is_local = paths.is_local(location)
        self._base = folder.rstrip("/") + "/"

    def look(self, name: str, look: Look[Seen]) -> Seen:
        """Return what `look` makes of a file.

        Raises: FileNotFoundError or NotADirectoryError when there is none; OSError.
        """
        if not self._is_local:
            return self._look_remote(self._base + name, look)
        descriptor = os.open(self._base + name, _OPEN_FLAGS)
        try:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise OSError("it is not a regular file")
            return look(lambda at, size: os.pread(descriptor, size, at), status.st_size)
        finally:
            os.close(descriptor)

    def _look_remote(self, path: str, look: Look[Seen]) -> Seen:
        info = self._fs.info(path)
        if info["type"] != "file":
            raise IsADirectoryError("it is not a regular file")

        def read(at: int, size: int) -> bytes:
            return bytes(self._fs.cat_file(path, start=at, end=at + size)) if size else b""

        return look(read, int(info["size"]))


def read_images(roots: Roots, images: Iterable[tuple[str, int, str, int, int]]) -> Iterator[bytes]:
    """Yield the bytes of images that were resolved, in order; a tar stays open between its own.

    Args: images: (root, choice, file, offset, size) of each, as in RESOLVED.
    Raises: UserError when an image's file is gone, cannot be read, or is not as long as it was.
    """
    root_map = RootMap(roots)
    placed = map(PlacedImage._make, images)
    for (root, choice), group in groupby(placed, key=lambda one: (one.root, one.choice)):
        place = root_map.place(root, choice)
        yield from (_from_tars if place.is_tars else _from_folder)(place, group)


def _from_folder(place: Place, images: Iterable[PlacedImage]) -> Iterator[bytes]:
    folder = Folder(place.location)
    for image in images:
        try:
            data = folder.look(image.file, lambda read, num_bytes: read(0, num_bytes))
        except OSError as error:
            raise _gone(paths.join(place.location, image.file), f"{error.strerror or error}") from (
                error
            )
        if len(data) != image.size:
            raise _changed(paths.join(place.location, image.file), image.size, len(data))
        yield data


def _from_tars(place: Place, images: Iterable[PlacedImage]) -> Iterator[bytes]:
    root, _ = tars_of(place)
    for file, group in groupby(images, key=lambda one: one.file):
        path = paths.join(root, file)
        with open_tar(path) as reader:
            for image in group:
                try:
                    yield reader.read(image.offset, image.size)
                except EOFError as error:
                    raise _changed(path, image.offset + image.size, reader.num_bytes) from error


def open_tar(path: str) -> RangeReader:
    """Return an open reader of a tar whose members are listed. Raises: UserError."""
    try:
        return RangeReader(path)
    except OSError as error:
        raise _gone(path, f"{error.strerror or error}") from error


def _gone(path: str, why: str) -> UserError:
    fix = "Put it back, or run with a new --out to resolve what is there."
    return UserError(f"{path} cannot be read any more.", why, fix)


def _changed(path: str, expected: int, found: int) -> UserError:
    return UserError(
        f"{path} has changed: {expected} bytes are expected, {found} are there.",
        "Its images were listed by the resolve stage.",
        "Put the old file back, or run again to resolve what is there.",
    )
