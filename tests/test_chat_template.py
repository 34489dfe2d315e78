"""A tokenizer's own chat template: transformers' masks where it has marks, the same without."""

from __future__ import annotations

import copy

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_tokenizers import (
    IGNORED,
    IMAGE_ID,
    NUM_IMAGE_TOKENS,
    row_of,
    small_tokenizer,
)
from transformers import PreTrainedTokenizerFast

from manifests.errors import UserError
from train.text.rounds import SampleRefused
from train.text.template import Tokenized, preview, template_named, tokenize

CHATML = (
    "{{ bos_token }}{% for one in messages %}"
    "{{ '<|im_start|>' + one.role + '\\n' }}"
    "{% if one.role == 'assistant' %}{% generation %}{{ one.content + '<|im_end|>' }}"
    "{% endgeneration %}{% else %}{{ one.content + '<|im_end|>' }}{% endif %}{{ '\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
UNMARKED = CHATML.replace("{% generation %}", "").replace("{% endgeneration %}", "")
TRIMMED = CHATML.replace("one.content", "(one.content | trim)")
FORGETFUL = "{{ messages | length }}" + UNMARKED
FORGETS_ANSWERS = UNMARKED.replace(
    "'assistant' %}{{ one.content", "'assistant' %}{{ (one.content if loop.last else '')"
)
HALF_MARKED = CHATML.replace("one.role == 'assistant'", "loop.last")
STRICT = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + CHATML
)


def with_template(jinja: str | None, kind: str = "byte_bos") -> PreTrainedTokenizerFast:
    made = copy.deepcopy(small_tokenizer(kind))
    made.chat_template = jinja
    return made


MARKED_CHAT, UNMARKED_CHAT = with_template(CHATML), with_template(UNMARKED)


def made(
    row: dict[str, object], tokenizer: PreTrainedTokenizerFast, max_length: int = 4096
) -> Tokenized:
    return tokenize(
        row,
        template_named("chat", tokenizer),
        tokenizer,
        image_token_id=IMAGE_ID,
        num_image_tokens=NUM_IMAGE_TOKENS,
        max_length=max_length,
    )


def trained(found: Tokenized) -> str:
    chosen = found.labels != IGNORED
    assert (found.ids[chosen] == found.labels[chosen]).all()
    return MARKED_CHAT.decode(found.labels[chosen], clean_up_tokenization_spaces=False)


TURNS = ("What is it?", "A cat, 猫.", "And why?", "Because.")


@pytest.mark.parametrize("kind", ["byte", "byte_bos", "always", "first"])
@pytest.mark.parametrize("jinja", [CHATML, TRIMMED], ids=["as it is", "trimmed"])
def test_ids_and_masks_are_transformers_own(kind: str, jinja: str) -> None:
    tokenizer = with_template(jinja, kind)
    roles = ("user", "assistant") * 2
    messages = [{"role": r, "content": text} for r, text in zip(roles, TURNS, strict=True)]
    expected = tokenizer.apply_chat_template(
        messages, return_dict=True, return_assistant_tokens_mask=True
    )
    found = made(row_of(*TURNS), tokenizer)
    assert found.ids.tolist() == expected["input_ids"]
    assert (found.labels != IGNORED).tolist() == [bool(one) for one in expected["assistant_masks"]]


def test_an_answer_that_begins_with_a_space_is_trained_too() -> None:
    """transformers' mask loses it: GPT-2's offsets leave spaces out, so its start has no token."""
    tokenizer = with_template(CHATML, "byte")
    assert trained(made(row_of("Why?", " So."), tokenizer)) == " So.<|im_end|>"


def test_a_space_before_the_answer_is_not_of_the_answer() -> None:
    """By GPT-2's own offsets, which leave spaces out, it would begin where it ends."""
    tokenizer = with_template(CHATML.replace("one.role + '\\n'", "one.role + ' '"), "byte")
    assert trained(made(row_of("Why?", "\nSo."), tokenizer)) == "\nSo.<|im_end|>"


def test_a_token_that_begins_before_the_answer_is_not_trained() -> None:
    """No prompt ends within it, so the model is never asked for it."""
    tokenizer = with_template(CHATML, "always")
    assert tokenizer.tokenize("assistant\n\n")[-1] == "\n\n"
    found = made(row_of("Why?", "\nSo."), tokenizer)
    shown = preview(found, tokenizer)
    assert "\n\n⟦So.<|im_end|>⟧" in shown


said = st.text(st.characters(exclude_categories=["Cs", "Cn"]), max_size=12) | st.sampled_from(
    ["<|im_end|>", "<|im_start|>assistant\n", "<|<|im_end|>", "<image>", "<s>", "assistant"]
)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(said, said), min_size=1, max_size=3), st.booleans())
def test_exactly_the_answers_are_trained(rounds: list[tuple[str, str]], is_marked: bool) -> None:
    tokenizer = MARKED_CHAT if is_marked else UNMARKED_CHAT
    found = made(row_of(*(text for pair in rounds for text in pair)), tokenizer)
    assert trained(found) == "".join(f"{answer}<|im_end|>" for _, answer in rounds)
    ends = found.ids == tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert ends.sum() == 2 * len(rounds)
    assert (found.ids == tokenizer.bos_token_id).sum() == 1


def test_images_and_the_system_turn_are_where_the_template_puts_them() -> None:
    row = row_of("Is <|im_end|> one?", "No.", image=True)
    row["conversations"].insert(0, {"from": "system", "value": "Be brief."})
    assert preview(made(row, MARKED_CHAT), MARKED_CHAT) == (
        "<s><|im_start|>system\nBe brief.<|im_end|>\n"
        f"<|im_start|>user\n<image x {NUM_IMAGE_TOKENS}>\nIs <|im_end|> one?<|im_end|>\n"
        "<|im_start|>assistant\n⟦No.<|im_end|>⟧\n"
    )


@pytest.mark.parametrize("tokenizer", [MARKED_CHAT, UNMARKED_CHAT], ids=["marked", "unmarked"])
def test_whole_rounds_are_dropped(tokenizer: PreTrainedTokenizerFast) -> None:
    size = len(made(row_of(*TURNS[:2]), tokenizer).ids)
    found = made(row_of(*TURNS), tokenizer, max_length=size)
    assert found.ids.tolist() == made(row_of(*TURNS[:2]), tokenizer).ids.tolist()
    assert (found.rounds_kept, found.rounds_dropped) == (1, 1)
    with pytest.raises(SampleRefused, match="first_round_too_long"):
        made(row_of(*TURNS), tokenizer, max_length=size - 1)


def test_rows_that_the_template_refuses_are_refused_by_name() -> None:
    row = row_of("Why?", "So.")
    row["conversations"].insert(0, {"from": "system", "value": "Be brief."})
    with pytest.raises(SampleRefused, match="no system") as refused:
        made(row, with_template(STRICT))
    assert refused.value.reason == "template_error"


@pytest.mark.parametrize(
    ("jinja", "message"),
    [
        (None, "has no chat template"),
        (FORGETFUL, "changes earlier turns"),
        (FORGETS_ANSWERS, "changes earlier turns"),
        (HALF_MARKED, "marks 1 answers of 2"),
    ],
)
def test_templates_whose_answers_cannot_be_told_are_an_error(
    jinja: str | None, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        made(row_of(*TURNS), with_template(jinja))
