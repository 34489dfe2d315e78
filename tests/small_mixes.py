"""Small instruction data for tests: LLaVA, WizardLM and messages files, and their images."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from small_inputs import picture, tar_of

Row = dict[str, Any]


def turns(*texts: str) -> list[dict[str, str]]:
    """Return LLaVA turns, human first, by turns."""
    return [{"from": ("human", "gpt")[at % 2], "value": text} for at, text in enumerate(texts)]


def image_row(key: str, image: str | list[str], *texts: str) -> Row:
    """Return a LLaVA row with image; the first text gets a placeholder for each."""
    count = 1 if isinstance(image, str) else len(image)
    first, *rest = texts or (f"What is {key}?", f"It is {key}.")
    return {
        "id": key,
        "image": image,
        "conversations": turns("<image>\n" * count + first, *rest),
    }


def text_row(key: str, *texts: str) -> Row:
    """Return a ShareGPT-like row."""
    said = texts or (f"Tell me of {key}.", f"This is said of {key}.")
    return {"id": key, "model": "", "conversations": turns(*said)}


def write_json(path: Path, rows: Sequence[Any]) -> str:
    """Write a JSON array and return the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(rows, indent=1))
    return str(path)


def write_jsonl(path: Path, rows: Sequence[Any]) -> str:
    """Write a row a line and return the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def write_images(folder: Path, images: Mapping[str, bytes]) -> str:
    """Write image files below a folder and return it."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in images.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return str(folder)


def mix_recipe(
    folder: Path, *, num_rows: int = 90, samples_per_shard: int = 16, bytes_per_part: int = 4000
) -> Row:
    """Write three sources, a folder and a tar of images, and return a recipe of all stages.

    Some rows are lost in each stage, some mended; one image is missing, one is cut short.
    """
    photos = {f"photos/{n}.jpg": picture(8 + n % 7, 6, shade=40 + n) for n in range(num_rows)}
    photos["photos/3.jpg"] = picture()[:-40]
    scans = {f"{n}.png": picture(9, 5 + n % 5, kind="PNG", shade=n) for n in range(num_rows)}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "scans.tar").write_bytes(tar_of(scans.items()))
    svit = [image_row(f"svit_{n}", f"photos/{n}.jpg") for n in range(num_rows)]
    svit += [text_row(f"chat_{n}") for n in range(num_rows // 3)]
    svit[5] = image_row("svit_5", "photos/none.jpg")
    svit[7]["conversations"].append({"from": "human", "value": "And?"})
    svit[9]["conversations"][1]["value"] = " "
    svit[11] = image_row("svit_11", ["photos/1.jpg", "photos/2.jpg"], "Which is wider?", "None.")
    scanned = [image_row(f"scan_{n}", f"scans/{n}.png") for n in range(num_rows)]
    scanned.append(scanned[4] | {"id": "again"})
    wizard: list[Any] = [
        {"instruction": f"Count to {n}.", "output": "".join(f"{i} " for i in range(1, n + 1))}
        for n in range(1, num_rows)
    ]
    wizard[2] = "no row"
    return {
        "seed": 4,
        "max_quarantine_fraction": 0.2,
        "source": {
            "kind": "llava_json",
            "bytes_per_part": bytes_per_part,
            "files": {
                "svit": write_json(folder / "svit.json", svit),
                "scans": write_jsonl(folder / "scans.jsonl", scanned),
                "wizard": write_json(folder / "wizard.json", wizard),
            },
        },
        "clean": {},
        "resolve": {
            "roots": {
                "photos": write_images(folder / "images", photos) + "/photos",
                "scans": str(folder / "scans.tar"),
            }
        },
        "mix": {
            "replace": {"text_only_of": "svit", "with": "wizard"},
            "sources": {"scans": {"weight": 1.5}},
            "samples_per_shard": samples_per_shard,
        },
    }
