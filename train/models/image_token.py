"""Which row of the vocabulary stands for an image: one that text never uses.

Its embedding is always overwritten by image features, so a row without a token, or a reserved
token, serves as well as a new one and no matrix changes its size.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from manifests.errors import UserError

IMAGE = "<image>"
_RESERVED = re.compile(r"<\|?(reserved|unused|placeholder)[a-z_]*\d*\|?>")


@dataclass(frozen=True, slots=True)
class ImageToken:
    """The token that a processor repeats once per image feature, and its id."""

    text: str
    id: int


def pick_image_token(tokenizer: Any, num_rows: int, asked: str | None) -> ImageToken:
    """Choose the image token and make the tokenizer know it as a special token.

    Args:
        tokenizer: of the language model; changed.
        num_rows: rows of the embedding matrix, those to be added included.
        asked: token to use; None: `<image>` on a row without a token, else the last reserved one.

    Raises: UserError when no row is free, or when text uses the asked token.
    """
    if asked is None:
        asked = _default(tokenizer, num_rows)
    if asked in tokenizer.get_vocab():
        return _known(tokenizer, num_rows, asked)
    taken = set(tokenizer.get_vocab().values())
    _make_special(tokenizer, asked)
    token_id = int(tokenizer.convert_tokens_to_ids(asked))
    if token_id >= num_rows or token_id in taken:
        raise _no_free_row(num_rows)
    return ImageToken(asked, token_id)


def _make_special(tokenizer: Any, token: str) -> None:
    more = {"additional_special_tokens": [token]}
    tokenizer.add_special_tokens(more, replace_extra_special_tokens=False)


def _default(tokenizer: Any, num_rows: int) -> str:
    vocabulary: dict[str, int] = tokenizer.get_vocab()
    if IMAGE in vocabulary or max(vocabulary.values()) + 1 < num_rows:
        return IMAGE
    reserved = [token for token in vocabulary if _RESERVED.fullmatch(token)]
    if not reserved:
        raise _no_free_row(num_rows)
    return max(reserved, key=lambda token: vocabulary[token])


def _known(tokenizer: Any, num_rows: int, token: str) -> ImageToken:
    """Use a token of the vocabulary; it must be one that no text turns into."""
    token_id = int(tokenizer.get_vocab()[token])
    special = tokenizer.added_tokens_decoder.get(token_id)
    is_reserved = _RESERVED.fullmatch(token) is not None
    in_use = token in tokenizer.special_tokens_map.values()  # bos, eos, pad, ...
    if token_id >= num_rows or in_use or not (is_reserved or (special and special.special)):
        raise UserError(
            f"{token!r} (row {token_id}) cannot stand for images.",
            "Text uses it, or the embedding has no such row.",
            "Name a reserved token of this tokenizer, or a word that it does not have.",
        )
    if special is None or not special.special:
        _make_special(tokenizer, token)
    return ImageToken(token, token_id)


def _no_free_row(num_rows: int) -> UserError:
    return UserError(
        f"No row of the vocabulary is free for images: all {num_rows} have a token that text uses.",
        "The image token needs a row of its own.",
        "Ask for more rows (resize: 64), or name one of the tokenizer's own special tokens.",
    )
