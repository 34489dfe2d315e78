"""Special tokens by construction: what a template puts in is marked, what people wrote never is.

A rendered text holds `mark("<|endoftext|>")` where the template ends an answer. A copy of the
tokenizer knows the marked strings as ordinary added tokens, which stand for the special ones, and
reads bare special strings as any other text (`encode_special_tokens`). So a text is tokenized once,
in one piece, with the same neighbours as in generation, and offsets are those of the rendered text.

The marks are Unicode noncharacters (U+FDD0..U+FDEF, unicode.org/faq/private_use.html), which no
interchanged text holds.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from tokenizers import AddedToken

from manifests.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_OPEN, _CLOSE, IMAGE_MARK, _BREAK = "\ufdd0", "\ufdd1", "\ufdd2", "\ufdd3"
_ANY_MARK = re.compile("[\ufdd0-\ufdd3]")


def mark(special: str) -> str:
    """Return how a rendered text has a special token that the template puts there."""
    return f"{_OPEN}{special}{_CLOSE}"


def has_mark(text: str) -> bool:
    """Return whether the text holds a noncharacter that is a mark here."""
    return _ANY_MARK.search(text) is not None


def ends_with_mark(text: str) -> bool:
    """Return whether the last thing in a rendered text is a special token."""
    return text.endswith(_CLOSE)


class SpecialStrings:
    """Tells special strings that a chat template wrote from those that people wrote."""

    def __init__(self, specials: Iterable[str]) -> None:
        ordered = sorted(
            specials, key=len, reverse=True
        )  # the longest match, as tokenizers have it
        either = "|".join(map(re.escape, ordered)) or r"(?!)"
        self._starts = re.compile(f"(?={either})(.)", re.DOTALL)
        self._specials = re.compile(either)

    def disguise(self, text: str) -> str:
        """Return a person's text with every special string in it broken up, to be mended later."""
        return self._starts.sub(rf"\1{_BREAK}", text)

    def reveal(self, rendered: str) -> str:
        """Return rendered text with its own special strings marked and people's mended."""
        marked = self._specials.sub(lambda found: mark(found[0]), rendered)
        return marked.replace(_BREAK, "")


class Encoded(NamedTuple):
    """Tokens of a rendered text.

    ids: int64 [n], IMAGE_ID at image marks; starts: int64 [n], the first character of each token,
    -1 for those before the text (BOS).
    """

    ids: np.ndarray
    starts: np.ndarray


IMAGE_ID = -200  # of an image until it is expanded, as in LLaVA


class MarkedTokenizer:
    """A tokenizer's copy that reads rendered texts."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        backend: Any = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise UserError(
                f"{type(tokenizer).__name__} tells no character offsets.",
                "Labels are found by offsets, which only fast tokenizers have.",
                "Load it with AutoTokenizer, which makes a fast one of most.",
            )
        self._prefix = _prefix_ids(backend)
        self._backend = copy.deepcopy(backend)
        self._backend.post_processor = None  # no BOS here, and offsets that include spaces
        self._backend.encode_special_tokens = True  # reads bare special strings as text
        self._backend.no_truncation()
        self._backend.no_padding()
        self.specials: Mapping[str, int] = _specials(backend)
        self._ids = self._add_marks(backend.get_added_tokens_decoder())

    def _add_marks(self, added: Mapping[int, AddedToken]) -> np.ndarray:
        """Add the marks; return what each id of the copy stands for."""
        num_before = max(self._backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        stands_for = {mark(one.content): id_ for id_, one in added.items() if one.special}
        marks = [_marked(one) for one in added.values() if one.special]
        self._backend.add_tokens([*marks, AddedToken(IMAGE_MARK, normalized=False, special=False)])
        known = {self._backend.token_to_id(text): id_ for text, id_ in stands_for.items()}
        known[self._backend.token_to_id(IMAGE_MARK)] = IMAGE_ID
        table = np.arange(max(num_before, *known) + 1, dtype=np.int64)
        table[list(known)] = list(known.values())
        return table

    def require(self, specials: Iterable[str]) -> None:
        """Raise UserError when the tokenizer lacks a special token that the template writes."""
        missing = [one for one in specials if one not in self.specials]
        if missing:
            raise UserError(
                f"The tokenizer has no special token {missing[0]!r}, which the template writes.",
                f"Its special tokens: {', '.join(list(self.specials)[:12])}.",
                "Choose the template of this language model.",
            )

    def encode(self, text: str, *, with_prefix: bool) -> Encoded:
        """Return the tokens of a rendered text, behind the tokenizer's own BOS where it has one."""
        found = self._backend.encode(text, add_special_tokens=False)
        prefix = self._prefix if with_prefix else []
        ids = self._ids[np.array(found.ids, dtype=np.int64)]
        starts = [-1] * len(prefix) + [start for start, _ in found.offsets]
        joined = np.concatenate([np.array(prefix, dtype=np.int64), ids])
        return Encoded(joined, np.array(starts, dtype=np.int64))


def marked_tokenizer(tokenizer: PreTrainedTokenizerBase) -> MarkedTokenizer:
    """Return the tokenizer's copy that reads rendered texts; made once, as copies take a second.

    Raises: UserError for a tokenizer without character offsets.
    """
    return _made_once(tokenizer, len(tokenizer))


@lru_cache(maxsize=4)
def _made_once(tokenizer: PreTrainedTokenizerBase, _num_tokens: int) -> MarkedTokenizer:
    return MarkedTokenizer(tokenizer)


def _prefix_ids(backend: Any) -> list[int]:
    """Return the special tokens that the tokenizer puts before a text, and none that end it."""
    found = backend.encode("a", add_special_tokens=True)
    mask = found.special_tokens_mask
    return list(found.ids[: mask.index(0)]) if 0 in mask else []


def _specials(backend: Any) -> dict[str, int]:
    added = backend.get_added_tokens_decoder()
    return {one.content: id_ for id_, one in added.items() if one.special}


def _marked(special: AddedToken) -> AddedToken:
    return AddedToken(
        mark(special.content),
        single_word=special.single_word,
        lstrip=special.lstrip,
        rstrip=special.rstrip,
        normalized=False,
        special=False,
    )
