"""One output shard: checked original bytes, captions and LLaVA rows as a tar, and its index."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import BinaryIO, NamedTuple, cast

import pyarrow as pa

from curate.media import llava_rows
from curate.media.assembled_rows import OutputRow
from curate.media.images import SUFFIX_OF_FORMAT, ImageError, sniff
from curate.media.originals import read_originals
from curate.media.shard_list import Md5Sink
from curate.media.tars import CAPTION_SUFFIXES, IMAGE_SUFFIXES, TarMember, write_tar
from manifests.errors import UserError
from manifests.schemas import TRAIN_INDEX, conform


class Problem(NamedTuple):
    """Why a row's image is not written: the error class, and the same in words."""

    error: str
    detail: str


@dataclass(frozen=True, slots=True)
class Rehearsal:
    """What a shard's tar will be: its members by key and suffix, its size, its MD5.

    problems: uid -> why its row is left out.
    """

    members: Mapping[str, Mapping[str, TarMember]]
    problems: Mapping[int, Problem]
    num_bytes: int
    md5: str

    def image_suffix(self, row: OutputRow) -> str:
        """Return the suffix of a written row's image."""
        return next(suffix for suffix in self.members[row.key] if suffix not in CAPTION_SUFFIXES)


def rehearse(rows: Sequence[OutputRow], root: str) -> Rehearsal:
    """Read and check every image and make the tar, but keep only its description.

    Raises: UserError when a source shard is gone.
    """
    problems: dict[int, Problem] = {}
    sink = Md5Sink()
    members: dict[str, dict[str, TarMember]] = {}
    for member in write_tar(cast(BinaryIO, sink), _entries(rows, root, problems)):
        key, _, suffix = member.name.rpartition(".")
        members.setdefault(key, {})[suffix] = member
    return Rehearsal(members, problems, sink.num_bytes, sink.hexdigest())


def perform(file: BinaryIO, rows: Sequence[OutputRow], root: str, *, md5: str) -> None:
    """Write the rehearsed tar of the good rows; memory holds one sample at a time.

    Raises: UserError when a source shard has changed since the rehearsal.
    """
    sink = Md5Sink(file)
    write_tar(cast(BinaryIO, sink), _entries(rows, root, {}))
    if sink.hexdigest() != md5:
        raise UserError(
            "A source shard changed while its images were being copied.",
            f"They were read twice and differ: see {rows[0].given['shard']} and those after it.",
            "Leave the source alone while a run reads it, then run again.",
        )


def index_of(rehearsal: Rehearsal, rows: Sequence[OutputRow], *, shard: str) -> pa.Table:
    """Return the TRAIN_INDEX of a shard's good rows, in the order of their members."""
    found = [_index_row(rehearsal, row, shard) for row in rows]
    return conform(pa.Table.from_pylist(found, TRAIN_INDEX), TRAIN_INDEX)


def _index_row(rehearsal: Rehearsal, row: OutputRow, shard: str) -> dict[str, object]:
    suffix = rehearsal.image_suffix(row)
    image, text = (rehearsal.members[row.key][one] for one in (suffix, "json"))
    return {
        "uid": row.uid,
        "key": row.key,
        "shard": shard,
        "images": [{"suffix": suffix, "offset": image.offset, "size": image.size}],
        "json_offset": text.offset,
        "json_size": text.size,
        "source": row.given["source"],
        "has_image": True,
        "turns": len(row.turns) // 2,  # a turn is a question with its answer
        "token_estimate": llava_rows.token_estimate(row.turns),
    }


def _entries(
    rows: Sequence[OutputRow], root: str, problems: dict[int, Problem]
) -> Iterator[tuple[str, bytes]]:
    """Yield the members of the rows by (key, suffix); the uids of bad images go to `problems`."""
    originals = read_originals(root, (row.place for row in rows))
    for row, data in zip(rows, originals, strict=True):
        found = _checked(row, data)
        if isinstance(found, Problem):
            problems[row.uid] = found
            continue
        suffix, image = found
        members = {
            suffix: image,
            "json": llava_rows.as_json(row.as_json(suffix)).encode(),
            "txt": str(row.given["caption"]).encode(),
        }
        yield from ((f"{row.key}.{one}", members[one]) for one in sorted(members))


def _checked(row: OutputRow, data: bytes | None) -> tuple[str, bytes] | Problem:
    """Return (suffix, bytes) of a row's image, or what is wrong with them.

    The suffix is the one the image came with: readers look at the bytes anyway, and one suffix
    throughout matters more to them than the right one.
    """
    if data is None:
        return Problem("unreadable_bytes", "the shard now ends before the image does")
    digest = row.given["image_sha256"]
    if digest is not None and hashlib.sha256(data).digest() != digest:
        return Problem("unreadable_bytes", "the image has changed since it was ingested (SHA-256)")
    try:
        suffix = SUFFIX_OF_FORMAT[sniff(data).format]
    except ImageError as error:
        return Problem(error.error_class, error.detail)
    declared = str(row.given["image_format"]).lower()
    return (declared if declared in IMAGE_SUFFIXES else suffix), data
