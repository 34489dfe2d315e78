"""A sample as a LLaVA-format row: a question about the image, and its caption as the answer.

Row format: LLaVA's (github.com/haotian-liu/LLaVA, docs/Finetune_Custom_Data.md) with the image
placeholder always before the prompt, as in Bunny's pretraining set.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

IMAGE_PLACEHOLDER = "<image>"
CHARS_PER_TOKEN = 4

PROMPTS = (
    "What does this picture show?",
    "Write a caption for this image.",
    "Say in one line what is in the picture.",
    "Give this photo a short caption.",
    "What can be seen here?",
    "Caption this picture in a few words.",
    "Tell me in short what this image is about.",
    "Which caption would suit this image?",
    "State the content of this picture in one sentence.",
    "How would you title this image?",
    "Put this picture into words, briefly.",
    "What is this an image of?",
)


def conversation(caption: str, prompt: str) -> list[dict[str, str]]:
    """Return one question and its answer.

    The placeholder's text inside a caption would count as a second image: it loses its brackets.
    """
    answer = caption.replace(IMAGE_PLACEHOLDER, IMAGE_PLACEHOLDER.strip("<>"))
    return [
        {"from": "human", "value": f"{IMAGE_PLACEHOLDER}\n{prompt}"},
        {"from": "gpt", "value": answer},
    ]


def token_estimate(turns: list[dict[str, str]]) -> int:
    """Return about how many text tokens the turns take: four characters each, image not counted."""
    num_chars = sum(len(one["value"].replace(IMAGE_PLACEHOLDER, "")) for one in turns)
    return math.ceil(num_chars / CHARS_PER_TOKEN)


def pretrain_row(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a LLaVA loader reads of a shard's JSON member: id, image and conversations."""
    return {name: row[name] for name in ("id", "image", "conversations")}


def as_json(row: Mapping[str, Any]) -> str:
    """Return the row's one JSON text: sorted keys, no spaces, text as it is."""
    return json.dumps(
        row, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
    )
