"""Lists of ids that a recipe names: UTF-8 text files with one id a line.

A listed image id means a path, its last component, that without its extension, or the piece of the
latter after its last underscore: 000000000042 finds coco/val2014/COCO_val2014_000000000042.jpg. A
listed name of COCO's means the number in it too: its 2014 and 2017 sets name one image otherwise.
"""

from __future__ import annotations

import re

import polars as pl

from manifests import store
from manifests.errors import UserError

_COCO_NAME = re.compile(r"(?:^|/)COCO_\w+_(\d{12})(?:\.\w+)?$")


def read_ids(path: str, *, where: str) -> list[str]:
    """Return the distinct ids of a list, sorted, without the white space around them.

    Args: where: what of the recipe names it, for the error. Raises: UserError.
    """
    try:
        lines = store.read_bytes(path).decode("utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise _unreadable(path, where, error) from error
    return sorted({line.strip() for line in lines} - {""})


def read_image_ids(path: str, *, where: str) -> pl.Series:
    """Return what a list of image ids means, String [k], sorted. Raises: as `read_ids`."""
    given = read_ids(path, where=where)
    found = {*given, *(name[1] for line in given if (name := _COCO_NAME.search(line)))}
    return pl.Series("ids", sorted(found), pl.String)


def image_names(path: pl.Series) -> tuple[pl.Series, ...]:
    """Return the four names by which an id finds the image at each path, String [n] each."""
    base = path.str.replace(r"(?s)\A.*/", "")
    stem = base.str.replace(r"\.[^.]*\z", "")
    return path, base, stem, stem.str.replace(r"(?s)\A.*_", "")


def digest_of(path: str, *, where: str) -> str:
    """Return the SHA-256 of a list: another list is another input. Raises: UserError."""
    try:
        return store.sha256_of(path)
    except OSError as error:
        raise _unreadable(path, where, error) from error


def _unreadable(path: str, where: str, error: Exception) -> UserError:
    return UserError(
        f"{where} {path!r} cannot be read.",
        f"{error}.",
        "Give a UTF-8 text file with one id a line.",
    )
