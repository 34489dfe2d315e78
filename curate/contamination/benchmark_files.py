"""The files of an evaluation set: its images and texts, read one by one.

An image is called as its file below the place that the recipe names, with that place's own name in
front (val2014/COCO_val2014_000000000042.jpg); a tar's member stands behind "::", a text's line or
row (from 1) behind ":".
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from curate.media import image_places
from manifests import paths, store
from manifests.errors import UserError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp")
TEXT_SUFFIXES = (".txt", ".jsonl", ".json", ".csv", ".tsv")
MAX_FIELD_CHARS = 1 << 27

Locations = str | Sequence[str] | None


class SetFile(NamedTuple):
    """A file of a set: what it is called, where it lies, its size in bytes and time of change."""

    name: str
    path: str
    size: int
    stamp: str | None


class SetImage(NamedTuple):
    """An image of a set: its bytes, or why there are none."""

    name: str
    data: bytes
    error: str = ""


def image_files(set_name: str, locations: Locations) -> list[SetFile]:
    """Return the image files and tars of a set, in order.

    Raises: UserError for a place that is missing or holds neither.
    """
    return [
        file
        for location in _listed(locations)
        for file in _image_files(f"decontaminate.sets.{set_name}.images", location)
    ]


def text_files(set_name: str, locations: Locations) -> list[SetFile]:
    """Return the files of texts of a set. Raises: UserError for one that is missing or unknown."""
    where, found = f"decontaminate.sets.{set_name}.texts", []
    for location in _listed(locations):
        if not location.lower().endswith(TEXT_SUFFIXES):
            raise UserError(
                f"{where} names {location!r}.",
                f"Texts are read from {', '.join(TEXT_SUFFIXES)}.",
                "Give a file of one of these, with its suffix.",
            )
        found.append(_one(where, location, paths.name_of(location)))
    return found


def identity(set_name: str, images: Locations, texts: Locations) -> dict[str, str]:
    """Return digests of the names, sizes and change times of a set's files. Raises: UserError."""
    files = {"images": image_files(set_name, images), "texts": text_files(set_name, texts)}
    return {
        kind: hashlib.sha256(
            json.dumps([[one.name, one.size, one.stamp] for one in found]).encode()
        ).hexdigest()
        for kind, found in files.items()
    }


def read_images(files: Sequence[SetFile]) -> Iterator[SetImage]:
    """Yield the images of some files and tars, in order.

    Raises: UserError when a tar is gone or is none.
    """
    for file in files:
        if file.name.lower().endswith(".tar"):
            yield from _members(file)
        else:
            yield _whole(file)


def read_texts(file: SetFile, column: str | None) -> Iterator[tuple[str, str]]:
    """Yield (name, text) of each text of a file; empty ones too.

    Raises: UserError when it cannot be read, is not what its suffix says, or lacks the column.
    """
    try:
        content = store.read_bytes(file.path).decode("utf-8-sig")
        for number, value in _values(file, content, column):
            if isinstance(value, list):
                yield from ((f"{file.name}:{number}", str(one)) for one in value)
            elif value is not None:
                yield f"{file.name}:{number}", str(value)
    except (OSError, ValueError, RecursionError, csv.Error) as error:
        raise UserError(
            f"{file.path} cannot be read as texts.", f"{error}.", "Mend it, or leave it out."
        ) from error


def _listed(locations: Locations) -> list[str]:
    given = [locations] if isinstance(locations, str) else list(locations or ())
    return [paths.resolve_resource(one) for one in given]


def _image_files(where: str, location: str) -> list[SetFile]:
    if "::" in location or location.endswith((".tar", ".tar}")):
        try:
            root, names = paths.expand(location, suffix=".tar")
        except UserError as error:
            raise UserError(error.what, f"{where} names it.", error.fix) from error
        return [_one(where, paths.join(root, name), name) for name in names]
    if location.lower().endswith(IMAGE_SUFFIXES) and not _is_folder(location):
        return [_one(where, location, paths.name_of(location))]
    found = list(_below(where, location))
    if not found:
        raise UserError(
            f"{where}: {location!r} holds no image and no tar.",
            f"Images end in {', '.join(IMAGE_SUFFIXES)}; it was searched with all below it.",
            "Check the path; it is relative to the folder where the command runs.",
        )
    return found


def _below(where: str, location: str) -> Iterator[SetFile]:
    """Yield the image files and tars of a folder and of all below it, by name."""
    base = paths.name_of(location)
    try:
        names = image_places.files_below(location)
    except OSError as error:
        raise _missing(where, location, error) from error
    for name in sorted(names):
        paths.must_be_utf8(name)
        if name.lower().endswith((*IMAGE_SUFFIXES, ".tar")):
            yield _one(where, paths.join(location, name), f"{base}/{name}")


def _is_folder(location: str) -> bool:
    fs, local = paths.filesystem(location)
    return bool(fs.isdir(local))


def _one(where: str, path: str, name: str) -> SetFile:
    try:
        size, stamp = image_places.stamp(path)
    except OSError as error:
        raise _missing(where, path, error) from error
    return SetFile(name, path, int(size or 0), stamp)


def _missing(where: str, path: str, error: OSError) -> UserError:
    return UserError(
        f"{path!r} cannot be read: {error.strerror or error}.",
        f"{where} names it.",
        "Check the path; it is relative to the folder where the command runs.",
    )


def _whole(file: SetFile) -> SetImage:
    try:
        return SetImage(file.name, store.read_bytes(file.path))
    except OSError as error:
        return SetImage(file.name, b"", f"{error.strerror or error}")


def _members(file: SetFile) -> Iterator[SetImage]:
    members, damage = image_places.members_of(file.path)
    with image_places.open_tar(file.path) as reader:
        for row in members.to_pylist():
            if not row["name"].lower().endswith(IMAGE_SUFFIXES):
                continue
            name = f"{file.name}::{row['name']}"
            try:
                yield SetImage(name, reader.read(row["offset"], row["size"]))
            except EOFError as error:
                yield SetImage(name, b"", f"the tar ends before it: {error}")
    if damage is not None:
        yield SetImage(file.name, b"", f"the tar is damaged: {damage}")


def _values(file: SetFile, content: str, column: str | None) -> Iterator[tuple[int, Any]]:
    """Yield (line or row from 1, text, texts or None). Raises: ValueError, csv.Error."""
    suffix = file.path.lower().rpartition(".")[2]
    if suffix == "txt":
        yield from enumerate(content.split("\n"), start=1)
        return
    if suffix in ("csv", "tsv"):
        csv.field_size_limit(MAX_FIELD_CHARS)
        rows = csv.DictReader(io.StringIO(content), delimiter="\t" if suffix == "tsv" else ",")
        numbered: Iterator[tuple[int, Any]] = enumerate(rows, start=1)
    else:
        numbered = _json_rows(content, is_lines=suffix == "jsonl")
    for number, row in numbered:
        yield number, _field(row, column, number)


def _json_rows(content: str, *, is_lines: bool) -> Iterator[tuple[int, Any]]:
    """Yield the rows of a JSON list, or of JSON lines, whatever the suffix says of the two."""
    whole = None
    if not is_lines:
        try:
            whole = json.loads(content)
        except json.JSONDecodeError as error:
            if error.msg != "Extra data":
                raise
    if isinstance(whole, list):
        yield from enumerate(whole, start=1)
        return
    for number, line in enumerate(content.split("\n") if whole is None else [content], start=1):
        if line.strip():
            yield number, json.loads(line)


def _field(row: Any, column: str | None, number: int) -> Any:
    if not isinstance(row, dict):
        if column is not None:
            raise ValueError(f"row {number} has no fields, and column is {column!r}")
        return row
    names = [str(name) for name in row]
    if column is None:
        raise ValueError(f"row {number} has several fields; column must name one of {names}")
    if column not in row:
        raise ValueError(f"row {number} has no {column!r}, it has {names}")
    return row[column]
