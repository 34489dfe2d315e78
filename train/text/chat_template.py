"""Conversations by the tokenizer's own chat template, and which characters of them are trained.

Where the template has `{% generation %}` marks, what they enclose is trained, as transformers has
it (huggingface.co/docs/transformers/chat_templating_writing). Where it has none, an answer is what
the conversation gains by it: the text with it begins with the text before it, generation prompt and
all.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Any, ClassVar

from manifests.errors import UserError
from train.text.marks import SpecialStrings, ends_with_mark, marked_tokenizer
from train.text.rounds import SampleRefused, Span, Turn

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
_ROLES = {"system": "system", "human": "user", "gpt": "assistant"}


@dataclass(frozen=True, slots=True)
class ChatTemplate:
    """A chat template in jinja; `special_tokens`: what it knows by name, such as bos_token."""

    jinja: str
    special_tokens: Mapping[str, Any]
    strings: SpecialStrings
    specials: ClassVar[Sequence[str]] = ()
    with_prefix: ClassVar[bool] = False

    def render(self, turns: Sequence[Turn]) -> tuple[str, list[Span]]:
        """Return the conversation with its special tokens marked, and the answers' spans.

        Raises: SampleRefused when the template refuses the turns; UserError when the answers
        cannot be told from the rest.
        """
        messages = [
            {"role": _ROLES[turn.role], "content": self.strings.disguise(turn.text)}
            for turn in turns
        ]
        if _GENERATION.search(self.jinja):
            rendered, spans = self._rendered(messages, return_assistant_tokens_mask=True)
        else:
            rendered, spans = self._by_prefixes(messages)
        answers = sum(turn.role == "gpt" for turn in turns)
        if len(spans) != answers:
            raise UserError(
                f"The chat template marks {len(spans)} answers of {answers}.",
                "Each answer needs one {% generation %} block.",
                "Mend the template, or choose another one.",
            )
        return self._revealed(rendered, spans)

    def _rendered(
        self, messages: Sequence[Mapping[str, str]], **options: bool
    ) -> tuple[str, list[Span]]:
        """Return the text and its generation spans."""
        from transformers.utils.chat_template_utils import render_jinja_template

        known: dict[str, Any] = {**self.special_tokens, **options}
        one = [dict(message) for message in messages]
        try:  # a pair, whatever its annotation says
            found: Any = render_jinja_template([one], chat_template=self.jinja, **known)
        except Exception as error:  # jinja's errors, and whatever else a template can raise
            raise SampleRefused("template_error", f"{type(error).__name__}: {error}") from error
        texts, spans = found
        return texts[0], [Span(*span) for span in (spans[0] if spans else [])]

    def _by_prefixes(self, messages: Sequence[Mapping[str, str]]) -> tuple[str, list[Span]]:
        """Return the text and the spans by which each answer lengthens it."""
        whole, _ = self._rendered(messages)
        spans = []
        for at, message in enumerate(messages):
            if message["role"] == "assistant":
                before, _ = self._rendered(messages[:at], add_generation_prompt=True)
                after, _ = self._rendered(messages[: at + 1])
                if not (after.startswith(before) and whole.startswith(after)):
                    raise UserError(
                        "The chat template marks no answers and changes earlier turns.",
                        "An unmarked answer is found by what it adds to the text before it.",
                        "Put {% generation %} ... {% endgeneration %} around the answers.",
                    )
                spans.append(Span(len(before), len(after)))
        return whole, spans

    def _revealed(self, rendered: str, spans: Sequence[Span]) -> tuple[str, list[Span]]:
        """Return the text with special tokens as marks, and the spans where they lie now.

        What is only white space behind an answer's end token starts the next turn: not trained.
        """
        edges = [0, *(edge for span in spans for edge in span), len(rendered)]
        pieces = [self.strings.reveal(rendered[start:end]) for start, end in pairwise(edges)]
        at = list(accumulate(map(len, pieces), initial=0))
        found = []
        for number in range(1, len(pieces) - 1, 2):
            bare = pieces[number].rstrip()
            num_chars = len(bare) if ends_with_mark(bare) else len(pieces[number])
            found.append(Span(at[number], at[number] + num_chars))
        return "".join(pieces), found


def chat_template_of(tokenizer: PreTrainedTokenizerBase) -> ChatTemplate:
    """Return the tokenizer's chat template; raises UserError when it has none."""
    jinja = tokenizer.chat_template
    if not isinstance(jinja, str):
        raise UserError(
            "The tokenizer has no chat template.",
            "Template chat is the tokenizer's own.",
            "Choose bunny, or a language model tuned for chat.",
        )
    strings = SpecialStrings(marked_tokenizer(tokenizer).specials)
    return ChatTemplate(jinja, dict(tokenizer.special_tokens_map), strings)
