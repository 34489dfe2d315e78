"""Conversations as token ids and labels: one tokenization of the whole text, labels by characters.

    plain   <image>{caption}\\n                                          stage 1
    bunny   {system} USER: <image>\\n{q} ASSISTANT: {a}<eos>USER: {q} ASSISTANT: {a}<eos>
    chat    the tokenizer's own chat template

Trained are the characters of " {a}<eos>" of each round (of the caption and its newline), whatever
the texts hold. Bunny tokenizes each round again and compares lengths instead
(github.com/BAAI-DCAI/Bunny, bunny/util/data_utils.py), so that an empty turn or " ASSISTANT: " in a
text costs the whole row its labels; on all other rows ids and labels are the same.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Protocol

import numpy as np

from manifests.errors import UserError
from train.text.chat_template import chat_template_of
from train.text.marks import IMAGE_ID, IMAGE_MARK, Encoded, mark, marked_tokenizer
from train.text.rounds import SampleRefused, Span, Turn, read_conversation

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORED = -100  # the label of a token that is not trained, torch's cross_entropy has it so
MIN_IMAGE_RUN = 4  # equal tokens in a row that a preview shows as an image
BUNNY_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives "
    "helpful, detailed, and polite answers to the user's questions."
)
BUNNY_END_TOKENS = {  # of Bunny's conversation versions
    "bunny": "<|endoftext|>",
    "phi3": "<|endoftext|>",
    "minicpm": "</s>",
    "llama": "<|end_of_text|>",
}


class Template(Protocol):
    """How a conversation is written."""

    @property
    def specials(self) -> Sequence[str]:
        """Special tokens that the tokenizer must have."""

    @property
    def with_prefix(self) -> bool:
        """Whether the tokenizer puts its BOS before the text; else the text holds it."""

    def render(self, turns: Sequence[Turn]) -> tuple[str, list[Span]]:
        """Return the text, special tokens and images as marks, and what of it is trained.

        turns: whole rounds, perhaps a system turn first. One span for each round, in order.

        Raises: SampleRefused when the template cannot write these turns.
        """


@dataclass(frozen=True, slots=True)
class PlainTemplate:
    """An image and its caption (LLaVA's and Bunny's stage 1); the question is left out.

    end_token: a special token after the newline, trained; None as in Bunny, where no caption ends.
    """

    end_token: str | None = None
    with_prefix: ClassVar[bool] = True

    @property
    def specials(self) -> Sequence[str]:
        """Special tokens that the tokenizer must have."""
        return () if self.end_token is None else (self.end_token,)

    def render(self, turns: Sequence[Turn]) -> tuple[str, list[Span]]:
        """Return the images' marks and the caption; the caption's span."""
        if [turn.role for turn in turns] != ["human", "gpt"]:
            raise SampleRefused("not_one_round", f"plain is for one round, not {len(turns)} turns")
        images = IMAGE_MARK * turns[0].text.count(IMAGE_MARK)
        end = "" if self.end_token is None else mark(self.end_token)
        text = f"{images}{turns[1].text}\n{end}"
        return text, [Span(len(images), len(text))]


@dataclass(frozen=True, slots=True)
class BunnyTemplate:
    """Vicuna's form with one end token, as in Bunny (bunny/conversation.py).

    A system turn of the row stands in place of `system`.
    """

    end_token: str = BUNNY_END_TOKENS["bunny"]
    system: str = BUNNY_SYSTEM
    with_prefix: ClassVar[bool] = True

    @property
    def specials(self) -> Sequence[str]:
        """Special tokens that the tokenizer must have."""
        return (self.end_token,)

    def render(self, turns: Sequence[Turn]) -> tuple[str, list[Span]]:
        """Return the conversation, and the spans of " {answer}<eos>"."""
        own = bool(turns) and turns[0].role == "system"
        text, rounds = (turns[0].text if own else self.system) + " ", turns[own:]
        spans = []
        for question, answer in zip(rounds[::2], rounds[1::2], strict=True):
            text += f"USER: {question.text} ASSISTANT:"
            start = len(text)
            text += f" {answer.text}{mark(self.end_token)}"
            spans.append(Span(start, len(text)))
        return text, spans


def template_named(
    name: str, tokenizer: PreTrainedTokenizerBase, *, end_token: bool = False
) -> Template:
    """Return template plain, bunny, phi3, minicpm, llama (Bunny's, by end token) or chat.

    end_token: for plain only, whether the tokenizer's own end token ends a caption.

    Raises: UserError for another name, or a tokenizer that lacks what the template needs.
    """
    if name == "plain":
        made: Template = PlainTemplate(_end_token(tokenizer) if end_token else None)
    elif name in BUNNY_END_TOKENS:
        made = BunnyTemplate(BUNNY_END_TOKENS[name])
    elif name == "chat":
        made = chat_template_of(tokenizer)
    else:
        known = ", ".join(["plain", *BUNNY_END_TOKENS, "chat"])
        raise UserError(f"There is no template {name!r}.", fix=f"Choose one of {known}.")
    marked_tokenizer(tokenizer).require(made.specials)
    return made


def _end_token(tokenizer: PreTrainedTokenizerBase) -> str:
    if tokenizer.eos_token is None:
        raise UserError(
            "The tokenizer has no end token.", fix="Set its eos_token, or end_token: no."
        )
    return str(tokenizer.eos_token)


class Tokenized(NamedTuple):
    """A conversation as the language model reads it.

    ids, labels: int64 [n], n <= the maximum length; labels are ids where trained, else IGNORED.
    num_images: of the row's images, in order, those that the kept rounds show.
    """

    ids: np.ndarray
    labels: np.ndarray
    num_images: int
    rounds_kept: int
    rounds_dropped: int


def tokenize(
    row: Mapping[str, Any],
    template: Template,
    tokenizer: PreTrainedTokenizerBase,
    *,
    image_token_id: int,
    num_image_tokens: int,
    max_length: int,
) -> Tokenized:
    """Return the ids and labels of a LLaVA row, whole rounds only.

    Each image is `num_image_tokens` times `image_token_id`. Rounds that would end beyond
    `max_length` tokens are left out, from the last one back: no answer is cut.

    Raises: SampleRefused for a row that cannot be trained on; UserError for a tokenizer that does
    not go with the template.
    """
    marked = marked_tokenizer(tokenizer)
    marked.require(template.specials)
    conversation = read_conversation(row)
    kept = conversation.num_rounds
    while kept:
        text, spans = template.render(conversation.first(kept))
        encoded = marked.encode(text, with_prefix=template.with_prefix)
        lengths = np.where(encoded.ids == IMAGE_ID, num_image_tokens, 1)
        if lengths.sum() <= max_length:
            ids, labels = _expanded(encoded, spans, lengths, image_token_id)
            num_images = int((encoded.ids == IMAGE_ID).sum())
            return Tokenized(ids, labels, num_images, kept, conversation.num_rounds - kept)
        kept = min(kept - 1, _rounds_within(encoded, spans, lengths, max_length))
    raise SampleRefused("first_round_too_long", f"its first round is over {max_length} tokens")


def _expanded(
    encoded: Encoded, spans: Sequence[Span], lengths: np.ndarray, image_token_id: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return ids and labels with each image at its full length.

    A token is where it starts: one that begins before the answer is not trained, as no prompt ends
    within it.
    """
    is_image = encoded.ids == IMAGE_ID
    if (encoded.ids == image_token_id).any():
        raise UserError(
            f"Token {image_token_id} is in a text, and stands for an image.",
            "The model would put an image's features there.",
            "Choose an image token that no text has: a reserved or an added one.",
        )
    ids = np.where(is_image, image_token_id, encoded.ids)
    edges = np.searchsorted(encoded.starts, np.array(spans, dtype=np.int64))
    labels = np.full_like(ids, IGNORED)
    for start, end in edges:
        labels[start:end] = ids[start:end]
    labels[is_image] = IGNORED
    return np.repeat(ids, lengths), np.repeat(labels, lengths)


def _rounds_within(
    encoded: Encoded, spans: Sequence[Span], lengths: np.ndarray, max_length: int
) -> int:
    """Return how many rounds end within `max_length` tokens; a guess where a later round, gone,
    changes the text of earlier ones."""
    ends = np.searchsorted(encoded.starts, np.array([span.end for span in spans]))
    return int((np.cumsum(lengths)[ends - 1] <= max_length).sum())


def preview(
    tokenized: Tokenized, tokenizer: PreTrainedTokenizerBase, *, colour: bool = False
) -> str:
    """Return the text with what is trained in ⟦ ⟧, or in green; images as <image x 729>.

    A token repeated four times or more, untrained, is taken for an image.
    """
    before, after = ("\x1b[32m", "\x1b[0m") if colour else ("⟦", "⟧")
    trained = tokenized.labels != IGNORED
    edges = np.flatnonzero(np.diff(trained)) + 1
    shown = []
    for ids, is_trained in zip(np.split(tokenized.ids, edges), trained[[0, *edges]], strict=True):
        text = _decoded(ids, tokenizer) if is_trained else _with_images(ids, tokenizer)
        shown.append(f"{before}{text}{after}" if is_trained else text)
    return "".join(shown)


def _decoded(ids: np.ndarray, tokenizer: PreTrainedTokenizerBase) -> str:
    return str(tokenizer.decode(ids.tolist(), clean_up_tokenization_spaces=False))


def _with_images(ids: np.ndarray, tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the text of untrained tokens."""
    shown, plain = "", []
    for id_, run in groupby(ids.tolist()):
        count = len(list(run))
        if count < MIN_IMAGE_RUN:
            plain += [id_] * count
        else:
            shown += _decoded(np.array(plain, dtype=np.int64), tokenizer) + f"<image x {count}>"
            plain = []
    return shown + _decoded(np.array(plain, dtype=np.int64), tokenizer)
