"""How many tokens a conversation takes, by the tokenizer of the model that is to be trained."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import polars as pl

from curate.media.llava_rows import IMAGE_PLACEHOLDER
from curate.rows.turns import Ints, Mask, Turns
from manifests import paths, store
from manifests.errors import UserError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

TOKENIZER_FILE = "tokenizer.json"
TEXTS_PER_CALL = 1 << 14


def local_file(name: str) -> str | None:
    """Return the tokenizer file that a name means on this machine; None for a name of the hub.

    Raises: UserError for a folder without one.
    """
    path = Path(paths.resolve_resource(name))
    if path.is_file():
        return str(path)
    if not path.is_dir():
        return None
    if not (path / TOKENIZER_FILE).is_file():
        raise UserError(
            f"clean.tokenizer {name!r} has no {TOKENIZER_FILE}.",
            "The folder of a fast tokenizer has that file.",
            "Save the tokenizer with save_pretrained of transformers, and give that folder.",
        )
    return str(path / TOKENIZER_FILE)


def identity(name: str) -> str:
    """Return what the tokenizer is: its file's SHA-256, or its name on the hub."""
    file = local_file(name)
    return name if file is None else store.sha256_of(file)


def load(name: str) -> Tokenizer:
    """Return a tokenizer that neither cuts nor pads. Raises: UserError when it cannot be read."""
    return _load(local_file(name) or name, identity(name))


@lru_cache(maxsize=2)
def _load(where: str, identity: str) -> Tokenizer:
    """Load it once per process; another file at the same place has another identity."""
    from tokenizers import Tokenizer

    try:
        is_here = Path(where).is_file()
        found = Tokenizer.from_file(where) if is_here else Tokenizer.from_pretrained(where)
    except Exception as error:  # tokenizers raises Exception itself, for whatever goes wrong
        raise UserError(
            f"clean.tokenizer {where!r} cannot be loaded.",
            f"{error}.",
            f"Give a folder with {TOKENIZER_FILE}, that file, or a repository of the hub.",
        ) from error
    found.no_truncation()
    found.no_padding()
    return found


def num_tokens(turns: Turns, rows: Mask, tokenizer: Tokenizer) -> Ints:
    """Return the tokens of each row's turns without placeholders, int64 [n]; 0 for other rows.

    Every turn is encoded alone, without the special tokens and role names of a chat template.
    Args: rows: bool [n], those to count.
    """
    counted = rows[turns.row]
    texts = turns.text.filter(pl.Series(counted)).str.replace_all(
        IMAGE_PLACEHOLDER, "", literal=True
    )
    lengths = np.zeros(len(turns.code), np.int64)
    lengths[counted] = _lengths(texts, tokenizer)
    return turns.sums(lengths)


def _lengths(texts: pl.Series, tokenizer: Tokenizer) -> npt.NDArray[np.int64]:
    found: list[int] = []
    for at in range(0, len(texts), TEXTS_PER_CALL):
        batch = texts[at : at + TEXTS_PER_CALL].to_list()
        encoded = tokenizer.encode_batch_fast(batch, add_special_tokens=False)
        found += [len(one) for one in encoded]
    return np.array(found, np.int64)
