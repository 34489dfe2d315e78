"""Turn written shards back into a LLaVA JSON file and an image folder, losslessly.

    FOLDER/rows.json    the JSON members of all samples, as one list in the order of the shards
    FOLDER/images/...   each image once, under the path by which its rows name it

rows.json appears last: a folder without it is unfinished, and the same command goes on with it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any
from uuid import uuid4

import orjson

from curate.media.shard_list import write_json_list
from curate.media.tars import is_unsafe_name
from manifests import paths, store
from manifests.errors import UserError
from manifests.work import StageDir
from train.data.index import TrainSample, read_samples

ROWS = "rows.json"
IMAGES = "images"
_WRITES_SHARDS = ("mix", "assemble")


@dataclass(slots=True)
class Unmixed:
    """What was written: rows, image files, and images renamed as their path had other bytes."""

    num_rows: int = 0
    num_images: int = 0
    renamed: int = 0
    digests: dict[str, bytes] = field(default_factory=dict)  # of the image under each path

    def as_json(self) -> dict[str, int]:
        """Return the counts."""
        return {"rows": self.num_rows, "images": self.num_images, "renamed": self.renamed}


def unmix(chain: Mapping[str, StageDir], folder: str) -> Unmixed:
    """Write the newest shards of a chain as rows.json and images below `folder`.

    Raises: UserError when the chain has no shards, when the folder is finished already, or holds
    another image under a path that is needed.
    """
    directory = next((chain[name] for name in _WRITES_SHARDS if name in chain), None)
    if directory is None:
        raise UserError(
            "This run has written no shards.",
            "Neither its mix nor its assemble stage is finished.",
            "Run the recipe to its end first.",
        )
    if paths.size_of(paths.join(folder, ROWS)) is not None:
        raise UserError(
            f"{folder!r} holds a finished {ROWS}.",
            "Nothing finished is overwritten.",
            "Choose another folder, or remove that one.",
        )
    done = Unmixed()
    store.write(
        folder,
        ROWS,
        lambda file: write_json_list(file, _rows(read_samples(directory.path), folder, done)),
    )
    return done


def _rows(samples: Iterator[TrainSample], folder: str, done: Unmixed) -> Iterator[bytes]:
    """Yield each sample's JSON, after its images are written."""
    for sample in samples:
        row = dict(sample.row)
        named = row.get("image", [])
        given = [named] if isinstance(named, str) else list(named)
        written = [
            put(folder, path, data, done) for path, data in zip(given, sample.images, strict=True)
        ]
        if written != given:
            row["image"] = written[0] if isinstance(named, str) else written
        done.num_rows += 1
        yield orjson.dumps(row, option=orjson.OPT_SORT_KEYS)


def put(folder: str, path: str, data: bytes, done: Unmixed) -> str:
    """Write an image unless it is there; return the path under which it is."""
    digest = hashlib.sha256(data).digest()
    if done.digests.get(path, digest) != digest:  # another root had another image of that name
        stem, dot, suffix = path.rpartition(".")
        path = f"{stem or suffix}-{digest.hex()[:8]}{dot}{suffix if stem else ''}"
        done.renamed += path not in done.digests
    if path not in done.digests:
        _write_once(paths.join(folder, IMAGES), path, data)
        done.digests[path] = digest
        done.num_images += 1
    return path


def _write_once(base: str, path: str, data: bytes) -> None:
    if is_unsafe_name(path):
        raise UserError(
            f"The image path {path!r} of a row is unsafe.",
            "It could lie outside the folder.",
            "Such shards were not made by Warren; mend their JSON first.",
        )
    final = paths.join(base, path)
    size = paths.size_of(final)
    if size is None:
        fs, local = paths.filesystem(final)
        fs.makedirs(local.rpartition("/")[0], exist_ok=True)
        temporary = f"{local}.{uuid4().hex[:12]}.tmp"
        fs.pipe_file(temporary, data)
        fs.mv(temporary, local)
    elif size != len(data) or store.read_bytes(final) != data:
        raise UserError(
            f"{final} is there, with other bytes.",
            "A row of the shards has an image of that path.",
            "Choose an empty folder.",
        )


def summary(done: Mapping[str, Any]) -> str:
    """Return the counts as a sentence."""
    renamed = f", {done['renamed']:,} of them renamed" if done["renamed"] else ""
    return f"{done['rows']:,} rows, {done['images']:,} images{renamed}"
