"""An instruction mix of the demo world: files as people download them, and the truth beside.

    python -m pipelines.demo.conversations OUT_DIR

writes `OUT_DIR/instruct/{svit_mix.json, wizardlm.json, messages.jsonl, leaked.txt}`, the images
below `OUT_DIR/images`, and `OUT_DIR/mix_truth.parquet`, which no stage reads: for each row of the
files what it is, what must become of it, and the questions and answers that it must then hold.
The same seed gives the same bytes and file times.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.demo.mix_dirt import (
    CLEAN,
    COPY_IN_MESSAGES,
    COPY_IN_WIZARDLM,
    COPY_OF_REPLACED,
    DIRT,
    LEAKED,
    NOT_LEAKED,
    REPLACED,
    Dirt,
)
from pipelines.demo.mix_pictures import FOLDERS, Picture, folder_names, make_picture, write_pictures
from pipelines.demo.mix_rows import (
    Row,
    compared,
    llava_record,
    messages_record,
    wizardlm_record,
)
from pipelines.demo.mix_text import text_task
from pipelines.demo.seeds import rng_for
from pipelines.demo.world import FILE_TIME

FILES = {"svit": "svit_mix.json", "wizardlm": "wizardlm.json", "messages": "messages.jsonl"}
"""Source -> its file, in the order in which the recipe names them."""
TRUTH = "mix_truth.parquet"
LEAKED_LIST = "leaked.txt"
_SHARES = {"text_only": 0.13, "wizardlm": 0.20, "messages": 0.04}
"""Rows without a picture of their own, per picture."""
_DIRT_SHARE = 0.004
"""Rows of each kind of dirt, per picture; never fewer than two."""

_ROUND = pa.struct([("kind", pa.string()), ("question", pa.string()), ("answer", pa.string())])
TRUTH_SCHEMA = pa.schema(
    [
        ("source", pa.string()),
        ("row", pa.int64()),  # in its file
        ("key", pa.string()),  # as ingest names it
        ("kind", pa.string()),  # of dirt; "clean" for most
        ("stage", pa.string()),  # that drops it; "" when it is kept as it is
        ("reason", pa.string()),
        ("is_kept", pa.bool_()),
        ("images", pa.list_(pa.string())),
        ("image_sha256", pa.list_(pa.binary())),
        ("suffixes", pa.list_(pa.string())),  # by content; one per image, as are the digests
        ("rounds", pa.list_(_ROUND)),
        ("scenes_json", pa.list_(pa.string())),
    ]
)


@dataclass(frozen=True, slots=True)
class Mix:
    """Where a made mix lies, and how many of its rows each kind of dirt has."""

    instruct_dir: Path
    images_dir: Path
    truth_path: Path
    num_rows_by_source: dict[str, int]
    num_rows_by_kind: dict[str, int]


@dataclass(frozen=True, slots=True)
class _Planted:
    """One row of a file: its truth, and how it stands there (bytes: a line that is no JSON)."""

    row: Row
    record: Any
    dirt: Dirt
    pictures: tuple[Picture, ...] = ()


def make_mix(out_dir: Path, *, seed: int = 0, num_pictures: int = 1_500) -> Mix:
    """Write a mix of about twice as many rows as pictures under `out_dir` and say where it lies."""
    rows = _in_files(seed, [*_clean_rows(seed, num_pictures), *_dirty_rows(seed, num_pictures)])
    instruct, images = out_dir / "instruct", out_dir / "images"
    instruct.mkdir(parents=True, exist_ok=True)
    pictures = {one.path: one for row in _all(rows) for one in row.pictures}
    written = write_pictures(images, pictures.values(), FILE_TIME)
    texts = {FILES[source]: _file_text(source, rows[source]) for source in FILES}
    texts[LEAKED_LIST] = _leaked_list(rows)
    for name, text in texts.items():
        (instruct / name).write_bytes(text)
        written.append(instruct / name)
    truth = [_truth(source, at, one) for source in FILES for at, one in enumerate(rows[source])]
    pq.write_table(pa.Table.from_pylist(truth, TRUTH_SCHEMA), out_dir / TRUTH, compression="zstd")
    for path in [*written, out_dir / TRUTH]:
        os.utime(path, (FILE_TIME, FILE_TIME))
    by_source = {source: len(found) for source, found in rows.items()}
    by_kind = Counter(one.dirt.kind for one in _all(rows))
    return Mix(instruct, images, out_dir / TRUTH, by_source, dict(sorted(by_kind.items())))


def _clean_rows(seed: int, num_pictures: int) -> Iterator[_Planted]:
    for number, folder in enumerate(folder_names(num_pictures)):
        picture = make_picture(seed, number, folder)
        for at in range(len(picture.folder.builders)):
            yield _pictured(seed, number, picture, CLEAN, builder=at)
    num = {name: round(share * num_pictures) for name, share in _SHARES.items()}
    for index in range(num["text_only"]):
        yield _text_only(seed, index, "svit", REPLACED)
    for index in range(num["text_only"], num["text_only"] + num["wizardlm"]):
        yield _text_only(seed, index, "wizardlm", CLEAN)
    first = _OTHER_PICTURES
    for number in range(first, first + 2 * num["messages"], 2):
        yield _with_two_pictures(seed, number, CLEAN)


_OTHER_PICTURES = 1 << 20
"""Numbers of pictures from here on belong to rows of two pictures, and twice that to dirt."""


def _dirty_rows(seed: int, num_pictures: int) -> Iterator[_Planted]:
    """Yield the rows of DIRT; then copies, which so stand behind what they copy."""
    num_each = max(2, round(_DIRT_SHARE * num_pictures))
    for kind, dirt in enumerate(DIRT):
        for at in range(num_each):
            number = 2 * _OTHER_PICTURES + 1_000 * kind + 2 * at
            if dirt.source == "svit":
                picture = make_picture(seed, number, dirt.folder, dirt)
                yield _pictured(seed, number, picture, dirt)
            elif dirt.source == "wizardlm":
                yield _text_only(seed, number, "wizardlm", dirt)
            else:
                yield _with_two_pictures(seed, number, dirt)
    for at in range(num_each):
        yield _copy_in_messages(seed, at)
        yield _text_only(seed, at, "wizardlm", COPY_OF_REPLACED)
    first = round(_SHARES["text_only"] * num_pictures)
    for index in range(first, first + num_each):
        yield _text_only(seed, index, "wizardlm", COPY_IN_WIZARDLM)


def _pictured(
    seed: int, number: int, picture: Picture, dirt: Dirt, *, builder: int = 0
) -> _Planted:
    """Return a row in SVIT's file on one picture, made by one of its folder's builders."""
    rng = rng_for(seed, f"mix row {builder}", number)
    prefix, rounds = picture.folder.builders[builder](picture.scene, rng)
    row = Row(f"{prefix}_{2 * number + builder}", "svit", (picture.path,), rounds)
    return _Planted(row, dirt.mar(llava_record(row, rng)), dirt, (picture,))


def _text_only(seed: int, index: int, source: str, dirt: Dirt) -> _Planted:
    row = Row("", source, (), (text_task(seed, index),))
    if source == "wizardlm":
        return _Planted(row, dirt.mar(wizardlm_record(row)), dirt)
    rng = rng_for(seed, "share id", index)
    letters = "".join(chr(ord("a") + int(i)) for i in rng.integers(26, size=7))
    row = Row(f"llavav1.5_{letters}_{index}", source, (), row.rounds)
    return _Planted(row, llava_record(row, rng), dirt)


def _with_two_pictures(seed: int, number: int, dirt: Dirt) -> _Planted:
    pictures = tuple(make_picture(seed, number + at, "coco") for at in (0, 1))
    rounds = compared(pictures[0].scene, pictures[1].scene)
    row = Row(f"compared_{number}", "messages", tuple(p.path for p in pictures), rounds)
    return _Planted(row, dirt.mar(messages_record(row)), dirt, pictures)


def _copy_in_messages(seed: int, number: int) -> _Planted:
    """Return a row of SVIT's file once more, in another format and under another id."""
    picture = make_picture(seed, number, next(iter(FOLDERS)))
    original = _pictured(seed, number, picture, CLEAN)
    row = Row(f"copy_{number}", "messages", original.row.images, original.row.rounds)
    return _Planted(row, messages_record(row), COPY_IN_MESSAGES, (picture,))


def _in_files(seed: int, rows: Sequence[_Planted]) -> dict[str, list[_Planted]]:
    """Return the rows of each file, shuffled; copies stay behind all others."""
    found = {}
    for source in FILES:
        mine = [one for one in rows if one.row.source == source]
        order = rng_for(seed, f"order of {source}", 0).permutation(len(mine)).tolist()
        copies = {at for at in order if mine[at].dirt.reason == "duplicate_conversation"}
        found[source] = [mine[at] for at in sorted(order, key=copies.__contains__)]
    return found


def _all(rows: dict[str, list[_Planted]]) -> Iterator[_Planted]:
    return (one for found in rows.values() for one in found)


def _file_text(source: str, rows: Sequence[_Planted]) -> bytes:
    records = [one.record for one in rows]
    if source == "messages":
        lines = [one if isinstance(one, bytes) else json.dumps(one).encode() for one in records]
        return b"\n".join([*lines, b""])
    return json.dumps(records, indent=4 if source == "wizardlm" else 2).encode()


def _leaked_list(rows: dict[str, list[_Planted]]) -> bytes:
    """Return one image id a line; ids of another folder's pictures are not meant by them."""
    listed = [one.pictures[0].path for one in _all(rows) if one.dirt in (LEAKED, NOT_LEAKED)]
    names = sorted(Path(path).stem for path in listed)
    return "".join(f"{name}\n" for name in names).encode()


def _truth(source: str, at: int, planted: _Planted) -> dict[str, Any]:
    dirt, row = planted.dirt, planted.row
    no_key = dirt.stage == "ingest" or not row.key  # ingest numbers the rows it cannot use
    images = [picture.image for picture in planted.pictures]
    rounds = [{"kind": q.kind, "question": q.text, "answer": q.answer} for q in row.rounds]
    rounds[0]["answer"] += dirt.ending
    return {
        "source": source,
        "row": at,
        "key": f"{source}_{at}" if no_key else row.key,
        "kind": dirt.kind,
        "stage": dirt.stage,
        "reason": dirt.reason,
        "is_kept": dirt.is_kept,
        "images": list(row.images),
        "image_sha256": [None if i is None else hashlib.sha256(i).digest() for i in images],
        "suffixes": ["gif" if (i or b"").startswith(b"GIF") else "jpg" for i in images],
        "rounds": rounds,
        "scenes_json": [
            json.dumps(picture.scene.to_dict(), sort_keys=True) for picture in planted.pictures
        ],
    }


if __name__ == "__main__":
    make_mix(Path(sys.argv[1]))
