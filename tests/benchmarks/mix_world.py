"""Synthetic instruction data: one LLaVA JSON file and a folder of JPEG files, from a seed.

    <world>/rows.json                  [{"id", "image", "conversations"}, ...], on one line
    <world>/images/0000/000000000.jpg  1000 files a folder; rows name them "images/0000/..."

The image rows are spread evenly over the file and each has an image of its own. A row has one to
eight rounds, and about 1400 bytes. Images of about 20 kB are a few pictures of noise, each written
with its own number in a JPEG comment: all files differ, and none has to be encoded. The same
arguments give the same bytes.
"""

from __future__ import annotations

import io
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import orjson
from PIL import Image

IMAGES_PER_FOLDER = 1000
NUM_PICTURES = 16
SIDE, QUALITY = 224, 58  # 20 kB of noise
WORDS_CHARS = 1 << 20
ROUNDS = (1, 1, 2, 2, 2, 3, 4, 8)
QUESTION_CHARS, ANSWER_CHARS = (20, 120), (60, 780)
DONE = "made"


def write_world(folder: Path, *, num_rows: int, num_images: int, seed: int = 0) -> Path:
    """Write the file and the images unless they are there already; return the folder.

    A world that was broken off is made anew. Raises: ValueError for more images than rows.
    """
    if num_images > num_rows:
        raise ValueError(f"{num_images} images are more than {num_rows} rows")
    world = folder / f"mix-{num_rows}-{num_images}-{seed}"
    if (world / DONE).exists():
        return world
    shutil.rmtree(world, ignore_errors=True)
    world.mkdir(parents=True)
    _write_images(world, num_images)
    with (world / "rows.json").open("wb") as file:
        file.write(b"[")
        for number, row in enumerate(rows(num_rows, num_images, seed)):
            file.write(b", " * bool(number) + orjson.dumps(row))
        file.write(b"]\n")
    (world / DONE).touch()
    return world


def rows(num_rows: int, num_images: int, seed: int = 0) -> Iterator[dict[str, Any]]:
    """Yield the rows in file order; row i has an image where i * images / rows steps on."""
    random_of = random.Random(seed)
    words = _words(random_of)
    for number in range(num_rows):
        image = number * num_images // num_rows
        has_image = image < (number + 1) * num_images // num_rows
        row: dict[str, Any] = {"id": f"row_{number}"}
        if has_image:
            row["image"] = path_of(image)
        yield row | {"conversations": _turns(random_of, words, has_image=has_image)}


def path_of(image: int) -> str:
    """Return the path by which a row names an image."""
    return f"images/{image // IMAGES_PER_FOLDER:04d}/{image:09d}.jpg"


def _turns(random_of: random.Random, words: str, *, has_image: bool) -> list[dict[str, str]]:
    turns = []
    for _ in range(random_of.choice(ROUNDS)):
        for role, (least, most) in (("human", QUESTION_CHARS), ("gpt", ANSWER_CHARS)):
            start = random_of.randrange(WORDS_CHARS - most)
            said = words[start : start + random_of.randint(least, most)]
            # an answer that stood in its question would be dropped
            turns.append({"from": role, "value": said if role == "human" else f"{said} Right."})
    if has_image:
        turns[0]["value"] = "<image>\n" + turns[0]["value"]
    return turns


def _words(random_of: random.Random) -> str:
    """Return a text of made-up words, with the line breaks, quotes and accents of real answers."""
    letters = "etaoinshrdlucmfwypvbgk" + "é"
    known = ["".join(random_of.choices(letters, k=random_of.randint(1, 10))) for _ in range(5000)]
    known += ["\n", '"', "."] * 200
    text = " ".join(random_of.choices(known, k=WORDS_CHARS // 3))
    return text[:WORDS_CHARS]


def _write_images(world: Path, num_images: int) -> None:
    pictures = [_picture(number) for number in range(NUM_PICTURES)]
    for image in range(num_images):
        path = world / path_of(image)
        if not image % IMAGES_PER_FOLDER:
            path.parent.mkdir(parents=True)
        path.write_bytes(numbered(pictures[image % NUM_PICTURES], image))


def _picture(number: int) -> bytes:
    pixels = np.random.default_rng(number).integers(0, 256, (SIDE, SIDE, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=QUALITY)
    return file.getvalue()


def numbered(jpeg: bytes, number: int) -> bytes:
    """Return a JPEG file with a comment of eight digits behind its start marker (COM, ITU T.81)."""
    comment = b"%08d" % number
    return jpeg[:2] + b"\xff\xfe" + (len(comment) + 2).to_bytes(2, "big") + comment + jpeg[2:]
