"""What is wrong in an instruction mix, planted on purpose: what is done to a row or to its image,
and where the run must find it.

Every kind of dirt is one line of DIRT. `mar` changes the row as it stands in the file, `damage` the
image's bytes (None: there is no such file).
"""

from __future__ import annotations

import copy
import io
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from pipelines.demo import junk
from pipelines.demo.mix_rows import Record

Mar = Callable[[Record], Any]
Damage = Callable[[bytes, np.random.Generator], bytes | None]


def as_it_is(record: Record) -> Any:
    """Return the row unchanged."""
    return record


def whole(image: bytes, _rng: np.random.Generator) -> bytes | None:
    """Return the image unchanged."""
    return image


@dataclass(frozen=True, slots=True)
class Dirt:
    """One kind of dirt and its fate.

    stage, reason: who drops the row, and why; reason "" means that it is kept as it is, and
    "mended:<what>" that it is kept. source, folder: where the row and its image lie.
    ending: what the first answer ends with in the end.
    """

    kind: str
    stage: str = ""
    reason: str = ""
    source: str = "svit"
    folder: str = "gqa"
    mar: Mar = as_it_is
    damage: Damage = whole
    ending: str = ""

    @property
    def is_kept(self) -> bool:
        """Whether the row is in the mix in the end."""
        return not self.reason or self.reason.startswith("mended:")


def _only_text(record: Record) -> Any:
    return json.dumps(record["id"])


def _without_turns(record: Record) -> Any:
    return {"id": record["id"], "image": record["image"], "text": "no conversation"}


def _turns_as_text(record: Record) -> Any:
    return record | {"conversations": "human: hello"}


def _cut_line(record: Record) -> Any:
    return json.dumps(record)[:-20].encode()


def _empty_answer(record: Record) -> Any:
    return _turn_set(record, 1, value=" \n")


def _human_twice(record: Record) -> Any:
    return _turn_set(record, 1, **{"from": "human"})


def _unknown_role(record: Record) -> Any:
    return _turn_set(record, 1, **{"from": "function"})


def _placeholder_twice(record: Record) -> Any:
    return _turn_set(record, 0, value=f"<image>\n{record['conversations'][0]['value']}")


def _placeholder_without_image(record: Record) -> Any:
    return {key: value for key, value in record.items() if key != "image"}


def _only_a_question(record: Record) -> Any:
    return record | {"conversations": record["conversations"][:1]}


def _message_is_empty(record: Record) -> Any:
    return _turn_set(record, 1, value="message is empty")


def _answer_in_question(record: Record) -> Any:
    answer = f"The answer, as everybody knows, is {record['output']}"
    return {"instruction": f"{record['instruction']}\n{answer}", "output": answer}


def _endless_answer(record: Record) -> Any:
    return _turn_set(record, 1, value="and so on " * 5_000)


def _blank_system_turn(record: Record) -> Any:
    return _turns_set(record, [{"from": "system", "value": ""}, *record["conversations"]])


def _greeting_first(record: Record) -> Any:
    return _turns_set(record, [{"from": "gpt", "value": "Hello."}, *record["conversations"]])


def _question_last(record: Record) -> Any:
    return _turns_set(record, [*record["conversations"], {"from": "human", "value": "And then?"}])


def _end_string(record: Record) -> Any:
    return _turn_set(record, 1, value=f"{record['conversations'][1]['value']}</s>")


def _way_out(record: Record) -> Any:
    folder, _, name = record["image"].rpartition("/")
    return record | {"image": f"{folder}/../images/{name}"}


def _no_file(_image: bytes, _rng: np.random.Generator) -> bytes | None:
    return None


def _no_bytes(_image: bytes, _rng: np.random.Generator) -> bytes | None:
    return b""


def _html(_image: bytes, _rng: np.random.Generator) -> bytes | None:
    return junk.html_page()


def _gif(image: bytes, _rng: np.random.Generator) -> bytes | None:
    sink = io.BytesIO()
    with Image.open(io.BytesIO(image)) as picture:
        picture.convert("RGB").save(sink, format="GIF")
    return sink.getvalue()


CLEAN = Dirt("clean")
REPLACED = Dirt("text-only row", "mix", "replaced")
COPY_IN_MESSAGES = Dirt("copy in another file", "mix", "duplicate_conversation", "messages")
COPY_IN_WIZARDLM = Dirt("copy in its file", "mix", "duplicate_conversation", "wizardlm")
COPY_OF_REPLACED = Dirt("copy of a replaced row", source="wizardlm")
LEAKED = Dirt("leaked image", "clean", "benchmark_leakage", folder="coco")
NOT_LEAKED = Dirt("leaked name elsewhere")
PLACEHOLDER_ALONE = Dirt(
    "placeholder, no image", "clean", "image_count", mar=_placeholder_without_image
)

DIRT = (
    Dirt("text for a row", "ingest", "not_an_object", mar=_only_text),
    Dirt("no conversation", "ingest", "unknown_format", mar=_without_turns),
    Dirt("turns are text", "ingest", "bad_field", mar=_turns_as_text),
    Dirt("cut line", "ingest", "bad_json", "messages", mar=_cut_line),
    Dirt("empty answer", "clean", "empty_turn", mar=_empty_answer),
    Dirt("two human turns", "clean", "roles_not_alternating", mar=_human_twice),
    Dirt("unknown role", "clean", "unknown_role", mar=_unknown_role),
    Dirt("two placeholders", "clean", "image_count", mar=_placeholder_twice),
    PLACEHOLDER_ALONE,
    Dirt("no answer at all", "clean", "no_rounds", mar=_only_a_question),
    Dirt("message is empty", "clean", "message_is_empty", folder="vg", mar=_message_is_empty),
    Dirt("answer in question", "clean", "repeated_output", "wizardlm", mar=_answer_in_question),
    Dirt("endless answer", "clean", "too_long", mar=_endless_answer),
    LEAKED,
    NOT_LEAKED,
    Dirt("blank system turn", "clean", "mended:blank_system_turn", mar=_blank_system_turn),
    Dirt("greeting first", "clean", "mended:leading_gpt_turn", mar=_greeting_first),
    Dirt("question last", "clean", "mended:dangling_human_turn", mar=_question_last),
    Dirt("end string", "clean", "mended:end_string", mar=_end_string, ending="< /s>"),
    Dirt("no such file", "resolve", "missing_image", folder="coco", damage=_no_file),
    Dirt("not in the tar", "resolve", "missing_image", folder="vg", damage=_no_file),
    Dirt("path with ..", "resolve", "unsafe_image_path", mar=_way_out),
    Dirt("file of no bytes", "resolve", "empty_image", damage=_no_bytes),
    Dirt("cut JPEG", "resolve", "truncated_image", folder="ocr_vqa", damage=junk.truncate),
    Dirt("HTML named .jpg", "resolve", "unknown_format", folder="ocr_vqa", damage=_html),
    Dirt("GIF named .jpg", folder="ocr_vqa", damage=_gif),
)
"""Dirt on rows of its own; copies and replaced rows come from `conversations.py`."""

KINDS = {
    one.kind: one
    for one in (CLEAN, *DIRT, REPLACED, COPY_IN_MESSAGES, COPY_IN_WIZARDLM, COPY_OF_REPLACED)
}


def _turns_set(record: Record, turns: list[Record]) -> Record:
    return record | {"conversations": turns}


def _turn_set(record: Record, at: int, **changes: str) -> Record:
    turns = copy.deepcopy(record["conversations"])
    turns[at].update(changes)
    return _turns_set(record, turns)
