"""Lists of ids that a recipe names: UTF-8 text files with one id a line."""

from __future__ import annotations

from manifests import store
from manifests.errors import UserError


def read_ids(path: str, *, where: str) -> list[str]:
    """Return the distinct ids of a list, sorted, without the white space around them.

    Args: where: what of the recipe names it, for the error. Raises: UserError.
    """
    try:
        lines = store.read_bytes(path).decode("utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise _unreadable(path, where, error) from error
    return sorted({line.strip() for line in lines} - {""})


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
