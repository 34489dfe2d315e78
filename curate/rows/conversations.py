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

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

PLACEHOLDER = "<image>"

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


def normalise(row: Any) -> Conversation:
    """Return a parsed row in the common form. Roles that nobody knows stay as they are.

    Raises: BadRow for what is no object, has none of the known forms, or a field of a wrong type.
    """
    if not isinstance(row, dict):
        raise BadRow("not_an_object", f"a row is {type(row).__name__}, not an object")
    form = next((name for name in _FIELDS if name in row), None)
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
        texts = [_placeholder_first(text) if PLACEHOLDER in text else text for text in texts]
    used = _USED | _FIELDS[form]
    extra = {name: value for name, value in row.items() if name not in used}
    return Conversation(_key(row), images, roles, texts, _url(row), extra)


def _key(row: Mapping[str, Any]) -> str | None:
    key = row.get("id")
    if key is None or isinstance(key, str):
        return key or None
    if isinstance(key, int) and not isinstance(key, bool):
        return str(key)
    raise BadRow("bad_field", f"id is {type(key).__name__}, not a text")


def _url(row: Mapping[str, Any]) -> str | None:
    url = row.get("url")
    return url if isinstance(url, str) else None


def _images(row: Mapping[str, Any]) -> list[str]:
    given = row.get("image") or row.get("images") or []
    images = [given] if isinstance(given, str) else given
    if not isinstance(images, list) or not all(isinstance(one, str) and one for one in images):
        raise BadRow("bad_field", "image is neither a path nor a list of paths")
    return images


def _turns(turns: Any) -> tuple[list[str], list[str]]:
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
    path = part.get(kind, part.get("path"))
    path = path.get("url") if isinstance(path, dict) else path
    if isinstance(path, str):
        images.append(path)
    return PLACEHOLDER


def _placeholder_first(text: str) -> str:
    if text.count(PLACEHOLDER) != 1:
        return text
    return f"{PLACEHOLDER}\n{text.replace(PLACEHOLDER, '').strip()}".strip()
