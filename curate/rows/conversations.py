"""Instruction rows of any known form, in one: images, roles, texts, and what else the row has.

    LLaVA, ALLaVA, ShareGPT   {"id", "image"?, "conversations": [{"from", "value"}]}
    WizardLM, Alpaca          {"instruction", "output", "input"?}
    OpenAI                    {"messages": [{"role", "content"}]}, content a text or a list of parts

An image stands in the text as `<image>`. In a row of one image, a turn's only placeholder moves to
the turn's front, as the loaders of LLaVA and Bunny move it (preprocess_multimodal in
github.com/haotian-liu/LLaVA, llava/train/train.py; github.com/BAAI-DCAI/Bunny,
bunny/util/data_utils.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import NoneType
from typing import Any, Literal, NamedTuple

from curate.media.llava_rows import IMAGE_PLACEHOLDER

RowErrorClass = Literal["bad_json", "not_an_object", "unknown_format", "bad_field"]

_ROLES = {
    "human": "human",
    "user": "human",
    "gpt": "gpt",
    "assistant": "gpt",
    "chatgpt": "gpt",
    "bard": "gpt",
    "bing": "gpt",
    "model": "gpt",
    "system": "system",
}
_USED = {"id", "image", "images", "url"}
_FIELDS = {  # of each form, those that make it
    "conversations": {"conversations"},
    "messages": {"messages"},
    "instruction": {"instruction", "input", "output"},
}
_NO_IMAGE: tuple[Any, ...] = (None, "", [])
_IMAGE_PARTS = ("image", "image_url")


class BadRow(Exception):
    """A row that cannot be used: its error class, and the same in words."""

    def __init__(self, error: RowErrorClass, detail: str) -> None:
        super().__init__(error, detail)
        self.error = error
        self.detail = detail


class Conversation(NamedTuple):
    """One row in the common form. key and url are None, extra is {}, where the row has none."""

    key: str | None
    images: list[str]
    roles: list[str]
    texts: list[str]
    url: str | None
    extra: dict[str, Any]


@dataclass(slots=True)
class Conversations:
    """Many rows in the common form, column by column; of images and turns, all rows' in a row."""

    keys: list[str | None] = field(default_factory=list)
    images: list[str] = field(default_factory=list)
    num_images: list[int] = field(default_factory=list)
    roles: list[str] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    num_turns: list[int] = field(default_factory=list)
    urls: list[str | None] = field(default_factory=list)
    extras: list[dict[str, Any]] = field(default_factory=list)

    def add(self, row: Conversation) -> None:
        """Append a row."""
        self.keys.append(row.key)
        self.images += row.images
        self.num_images.append(len(row.images))
        self.roles += row.roles
        self.texts += row.texts
        self.num_turns.append(len(row.texts))
        self.urls.append(row.url)
        self.extras.append(row.extra)

    def first_questions(self) -> list[str]:
        """Return each row's first human turn without placeholders, "" where it has none."""
        found, start = [], 0
        for count in self.num_turns:
            at = next((i for i in range(start, start + count) if self.roles[i] == "human"), None)
            text = "" if at is None else self.texts[at]
            found.append(text.replace(IMAGE_PLACEHOLDER, "").strip())
            start += count
        return found


def conversations_of(rows: Sequence[Any]) -> Conversations | None:
    """Return what `normalise` makes of LLaVA rows, all at once and several times faster.

    Returns None when any row is unlike the others: then they must be looked at one by one.
    """
    try:
        turns = [row["conversations"] for row in rows]
        roles = [_ROLES[turn["from"]] for said in turns for turn in said]
        texts = [turn["value"] for said in turns for turn in said]
        keys = [row["id"] for row in rows]
        images = [row.get("image") for row in rows]
        named = [row.get("url") for row in rows]
    except (TypeError, KeyError, AttributeError):
        return None
    if not (
        _all_of(rows, {dict})
        and _all_of(turns, {list})
        and _all_of(texts, {str})
        and _all_of(keys, {str})
        and _all_of(images, {str, NoneType})
        and _all_of(named, {str, NoneType})
        and not any("images" in row for row in rows)
    ):
        return None
    found = Conversations(roles=roles, num_turns=[len(said) for said in turns], urls=named)
    found.keys = [key or None for key in keys]
    found.num_images = [1 if image else 0 for image in images]
    found.images = [image for image in images if image]
    used = _USED | _FIELDS["conversations"]
    found.extras = [
        {name: row[name] for name in row if name not in used} if row.keys() - used else {}
        for row in rows
    ]
    has_one = [
        image for image, count in zip(images, found.num_turns, strict=True) for _ in range(count)
    ]
    found.texts = [
        _placeholder_first(text) if image and IMAGE_PLACEHOLDER in text else text
        for text, image in zip(texts, has_one, strict=True)
    ]
    return found


def _all_of(values: Sequence[Any], kinds: set[type]) -> bool:
    return set(map(type, values)) <= kinds


def normalise(row: Any) -> Conversation:
    """Return a parsed row in the common form. Roles that nobody knows stay as they are.

    A field that is null is as good as not there: tables of mixed forms have all their fields.

    Raises: BadRow for what is no object, has none of the known forms, or a field of a wrong type.
    """
    if not isinstance(row, dict):
        raise BadRow("not_an_object", f"a row is {type(row).__name__}, not an object")
    form = next((name for name in _FIELDS if row.get(name) is not None), None)
    if form is None or (form == "instruction" and "output" not in row):
        raise BadRow("unknown_format", f"its keys are {sorted(map(str, row))[:12]}")
    images = _images(row)
    if form == "conversations":
        roles, texts = _turns(row["conversations"])
    elif form == "messages":
        roles, texts, images = _messages(row["messages"], images)
    else:
        roles, texts = ["human", "gpt"], [_question(row), _text(row["output"], "output")]
    if len(images) == 1:
        texts = [_placeholder_first(text) if IMAGE_PLACEHOLDER in text else text for text in texts]
    used = _USED | _FIELDS[form]
    extra = {name: value for name, value in row.items() if name not in used}
    url = row.get("url")
    if url is not None and not isinstance(url, str):
        extra["url"], url = url, None
    return Conversation(_key(row), images, roles, texts, url, extra)


def _key(row: Mapping[str, Any]) -> str | None:
    key = row.get("id")
    if key is None or isinstance(key, str):
        return key or None
    if isinstance(key, int) and not isinstance(key, bool):
        return str(key)
    raise BadRow("bad_field", f"id is {type(key).__name__}, not a text")


def _images(row: Mapping[str, Any]) -> list[str]:
    named = (row.get(name) for name in ("image", "images"))
    given: Any = next((one for one in named if one not in _NO_IMAGE), [])
    images = [given] if isinstance(given, str) else given
    if not isinstance(images, list) or not all(isinstance(one, str) and one for one in images):
        raise BadRow("bad_field", "image is neither a path nor a list of paths")
    return images


def _turns(turns: Any) -> tuple[list[str], list[str]]:
    if not isinstance(turns, list):
        return _mixed_turns(turns)  # "" and {} have no turn that could be wrong
    try:
        roles = [turn["from"] for turn in turns]
        texts = [turn["value"] for turn in turns]
    except (TypeError, KeyError):
        return _mixed_turns(turns)
    return _checked_roles(roles), [_text(text, "value") for text in texts]


def _mixed_turns(turns: Any) -> tuple[list[str], list[str]]:
    """Return turns that are spelled role and content, or say what is wrong with them."""
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise BadRow("bad_field", "conversations is not a list of turns")
    roles, texts = [], []
    for turn in turns:
        roles.append(turn.get("from", turn.get("role")))
        texts.append(_text(turn.get("value", turn.get("content")), "value"))
    return _checked_roles(roles), texts


def _checked_roles(roles: list[Any]) -> list[str]:
    found = [_ROLES.get(role, role) if isinstance(role, str) else None for role in roles]
    if None in found:
        raise BadRow("bad_field", "a turn has no role")
    return [role for role in found if role is not None]


def _text(value: Any, name: str) -> str:
    if isinstance(value, str):
        return value
    raise BadRow("bad_field", f"{name} is {type(value).__name__}, not a text")


def _question(row: Mapping[str, Any]) -> str:
    instruction, more = _text(row["instruction"], "instruction"), row.get("input") or ""
    return f"{instruction}\n{_text(more, 'input')}" if more else instruction


def _messages(messages: Any, images: list[str]) -> tuple[list[str], list[str], list[str]]:
    if not isinstance(messages, list) or not all(isinstance(one, dict) for one in messages):
        raise BadRow("bad_field", "messages is not a list of messages")
    texts: list[str] = []
    in_parts: list[str] = []
    for message in messages:
        content = message.get("content")
        if isinstance(content, list):
            texts.append("\n".join(_part(part, in_parts) for part in content))
        else:
            texts.append(_text(content, "content"))
    roles = _checked_roles([message.get("role") for message in messages])
    return roles, texts, images or in_parts


def _part(part: Any, images: list[str]) -> str:
    """Return a part's text, a placeholder for an image; its path, if given, joins `images`."""
    if not isinstance(part, dict):
        raise BadRow("bad_field", "a content part is not an object")
    kind = part.get("type")
    if kind == "text":
        return _text(part.get("text"), "text")
    if kind not in _IMAGE_PARTS:
        raise BadRow("bad_field", f"a content part of type {kind!r}")
    path = part.get(kind) or part.get("path")
    path = path.get("url") if isinstance(path, dict) else path
    if path:
        images.append(_text(path, kind))
    return IMAGE_PLACEHOLDER


def _placeholder_first(text: str) -> str:
    if text.count(IMAGE_PLACEHOLDER) != 1:
        return text
    return f"{IMAGE_PLACEHOLDER}\n{text.replace(IMAGE_PLACEHOLDER, '').strip()}".strip()
