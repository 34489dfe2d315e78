"""Paths on any fsspec filesystem, and the order of input shards."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterable, Mapping
from typing import Any

import fsspec
from braceexpand import braceexpand

from manifests.errors import UserError

RESOURCE_SCHEME = "warren:"

_TRAILING_DIGITS = re.compile(r"(\d+)$")
_SCHEME = re.compile(r"^([a-z0-9+]+):", re.IGNORECASE)
_ROOT = re.compile(r"^(?:[a-z0-9+]+://|/)", re.IGNORECASE)


def filesystem(path: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """Return the filesystem of `path` and the path on it.

    Raises: UserError for shell pipes and for a scheme that fsspec or its extra package lacks.
    """
    scheme = _SCHEME.match(path)
    if scheme and scheme.group(1).lower() == "pipe":
        raise UserError(
            f"{path!r} would start a shell.",
            "A list of shards is data; data must not run commands.",
            "Give file paths or fsspec URLs such as s3://bucket/00000.tar.",
        )
    try:
        fs, local = fsspec.core.url_to_fs(path)
    except (ValueError, ImportError) as error:
        raise UserError(f"{path!r} cannot be opened.", str(error), "Check the scheme.") from error
    return fs, str(local)


def resolve_resource(path: str) -> str:
    """Return the file that "warren:..." means: one that ships with Warren's pipelines package.

    Example: "warren:demo/model" -> ".../pipelines/demo/model"; any other path comes back as given.
    """
    if not path.startswith(RESOURCE_SCHEME):
        return path
    spec = importlib.util.find_spec("pipelines")  # found, not imported: this package knows no other
    folders = list(spec.submodule_search_locations or []) if spec else []
    return join(folders[0], path.removeprefix(RESOURCE_SCHEME)) if folders else path


def absolute(pattern: str) -> str:
    """Return the pattern with each local path in it absolute: a worker may run in another folder.

    Example: "data/{0..9}.tar::s3://b/c" -> "/home/me/data/{0..9}.tar::s3://b/c"
    Raises: UserError as `filesystem`.
    """
    if pattern.startswith(RESOURCE_SCHEME):
        return pattern
    return "::".join(_anchored(piece) for piece in pattern.split("::"))


def is_local(path: str) -> bool:
    """Tell whether the path is on this machine's own filesystem (mmap, pread and rename work)."""
    return _is_local_fs(filesystem(path)[0])


def _is_local_fs(fs: Any) -> bool:
    protocol = fs.protocol if isinstance(fs.protocol, tuple) else (fs.protocol,)
    return "file" in protocol or "local" in protocol


def join(base: str, *parts: str) -> str:
    """Return the path below `base`, with one slash between the parts; "" is the current folder.

    Example: ("runs/", "a") -> "runs/a", ("", "a") -> "a", ("memory://", "a") -> "memory://a"
    """
    below = "/".join(part.strip("/") for part in parts if part)
    if not base or not below or base.endswith("://"):
        return base + below
    return f"{base.rstrip('/')}/{below}"


def name_of(path: str) -> str:
    """Return the last component of a path."""
    return path.rstrip("/").rsplit("/", 1)[-1]


def exists(path: str) -> bool:
    """Tell whether the path exists now (no cached listing)."""
    fs, local = filesystem(path)
    fs.invalidate_cache()
    return bool(fs.exists(local))


def size_of(path: str) -> int | None:
    """Return the file's size in bytes, or None when it does not exist."""
    fs, local = filesystem(path)
    fs.invalidate_cache()
    try:
        return int(fs.size(local))
    except FileNotFoundError:
        return None


def identity_of(path: str) -> list[Any]:
    """Return [size in bytes, ETag or modification time] of a file; [None, None] when missing."""
    fs, local = filesystem(path)
    try:
        info = fs.info(local)
    except FileNotFoundError:
        return [None, None]
    stamp = next(
        (info[key] for key in ("ETag", "mtime", "LastModified", "updated") if key in info), None
    )
    return [info["size"], None if stamp is None else str(stamp)]


def list_names(folder: str, suffix: str | tuple[str, ...] = "") -> list[str]:
    """Return the sorted names of a folder's files that end with `suffix`; [] when it is missing."""
    fs, local = filesystem(folder)
    fs.invalidate_cache()
    try:
        found = fs.ls(local, detail=True)
    except FileNotFoundError:
        return []
    names = (name_of(entry["name"]) for entry in found if _is_file(fs, entry))
    return sorted(name for name in names if name.endswith(suffix))


def _is_file(fs: Any, entry: Mapping[str, Any]) -> bool:
    """Tell whether a listed entry is a file; a link counts, even a broken one: no silence."""
    if entry.get("islink"):
        return not fs.isdir(entry["name"])
    return bool(entry["type"] == "file")


def numeric_suffix(name: str) -> int | None:
    """Return the digits that end a file's stem, as a number.

    Of a name with several dots, the last piece before the extension that ends in digits counts.
    Example: "img_emb/img_emb_0012.npy" -> 12, "laion.00003.tar" -> 3, "train.tar" -> None
    """
    pieces = name_of(name).split(".")
    for piece in reversed(pieces[:-1] or pieces):
        if found := _TRAILING_DIGITS.search(piece):
            return int(found.group(1))
    return None


def shard_order(names: Iterable[str]) -> list[str]:
    """Return the names ordered by numeric suffix, then name; names without a number come last."""

    def rank(name: str) -> tuple[bool, int, str]:
        suffix = numeric_suffix(name)
        return suffix is None, suffix or 0, name

    return sorted(names, key=rank)


def expand(pattern: str, *, suffix: str | tuple[str, ...]) -> tuple[str, list[str]]:
    """Return (root, names below the root in shard order) of the shards that a pattern means.

    A pattern is a folder (all files in it that end with `suffix`), a glob, WebDataset braces
    ("data/{00000..00099}.tar") or several of these joined by "::". The root is the longest common
    folder, so that names do not change when the whole data set moves. A path that exists as it is
    written is taken so, whatever marks it holds. A shard named twice is one shard.
    Raises: UserError when nothing is found, a listed shard is missing, braces do not match, a name
    is not UTF-8, or the shards lie on several filesystems.
    """
    found = [path for piece in _split(pattern) for path in _expand_one(piece, suffix)]
    if not found:
        shown = suffix if isinstance(suffix, str) else ", ".join(suffix)
        raise UserError(
            f"No {shown or 'such'} file is at {pattern!r}.",
            "The source needs at least one shard.",
            "Check the path; it is relative to the folder where the command runs.",
        )
    for path in found:
        must_be_utf8(path)
    root = _common_folder(found)
    names = {path.removeprefix(root).lstrip("/") for path in found}
    return root, shard_order(names)


def must_be_utf8(path: str) -> None:
    """Check that a path can stand in a table. Raises: UserError."""
    try:
        path.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"The file name {path!r} is not UTF-8.",
            "Names of shards are kept in the manifests, which hold Unicode text.",
            "Rename it.",
        ) from error


def _split(pattern: str) -> list[str]:
    return [_anchored(piece) for whole in pattern.split("::") for piece in _braces(whole)]


def _anchored(piece: str) -> str:
    fs, local = filesystem(piece)
    return local if _is_local_fs(fs) else piece


def _braces(pattern: str) -> list[str]:
    if "{" not in pattern or exists(pattern):
        return [pattern]
    try:
        return list(braceexpand(pattern))
    except ValueError as error:
        raise UserError(
            f"{pattern!r} cannot be expanded.", f"{error}.", "Write e.g. data/{00000..00099}.tar."
        ) from error


def _expand_one(piece: str, suffix: str | tuple[str, ...]) -> list[str]:
    fs, local = filesystem(piece)
    if any(mark in piece for mark in "*?[") and not fs.exists(local):
        found = [str(path) for path in fs.glob(local) if str(path).endswith(suffix)]
        return found if _is_local_fs(fs) else [str(fs.unstrip_protocol(path)) for path in found]
    if fs.isdir(local):
        return [join(piece, name) for name in list_names(piece, suffix)]
    if not fs.exists(local):
        raise UserError(
            f"{piece!r} does not exist.",
            "The recipe's source names it.",
            "Check the path; it is relative to the folder where the command runs.",
        )
    return [piece]


def _common_folder(found: list[str]) -> str:
    starts = {root.group() if (root := _ROOT.match(path)) else "" for path in found}
    if len(starts) > 1:
        raise UserError(
            f"The shards lie on several filesystems: {', '.join(sorted(starts))}.",
            "Their names are kept relative to one common folder.",
            "Ingest them in separate runs, or copy them to one place.",
        )
    (start,) = starts
    common = []
    for steps in zip(*(path.removeprefix(start).split("/")[:-1] for path in found), strict=False):
        if len(set(steps)) > 1:
            break
        common.append(steps[0])
    return start + "/".join(common)
