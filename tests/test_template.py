"""Conversations as ids and labels: Bunny's where those are right, and right elsewhere too."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_tokenizers import (
    IGNORED,
    IMAGE_ID,
    NUM_IMAGE_TOKENS,
    bunny_labels,
    bunny_plain_labels,
    row_of,
    small_tokenizer,
)

from manifests.errors import UserError
from train.text.rounds import SampleRefused
from train.text.template import (
    BunnyTemplate,
    PlainTemplate,
    Template,
    Tokenized,
    preview,
    template_named,
    tokenize,
)

LONG = "The dog looks at the cat, and the cat sits on the mat. " * 20
HEALTHY = {
    "one round": (("What is it?", "A cat."), "human"),
    "three rounds": (("What?", "A cat.", "And why?", "Because.", "Sure?", "Yes"), "human"),
    "other scripts": (("猫が好きです?", "猫🙂 naïve 狗 café 猫"), "human"),
    "code": (("Write f\n\nplease", "def f(x):\n        return x\n\n"), "human"),
    "space first": (("Why?", "  two spaces", "Again?", "\n\na new line"), "human"),
    "punctuation first": (("Why?", '(3.5) "yes"', "Why?", ": 12"), "human"),
    "long": ((LONG, LONG, LONG, LONG), "human"),
    "answer first": (("Hello!", "What is it?", "A cat."), "gpt"),
}
KINDS = {"byte": False, "byte_bos": True, "always": True, "prepend": True}


def made(
    row: dict[str, Any], kind: str, template: Template | None = None, **more: Any
) -> Tokenized:
    tokenizer = small_tokenizer(kind)
    options = {"max_length": 10_000, "image_token_id": IMAGE_ID, **more}
    options.setdefault("num_image_tokens", NUM_IMAGE_TOKENS)
    return tokenize(row, template or bunny(kind), tokenizer, **options)


def bunny(kind: str) -> BunnyTemplate:
    return BunnyTemplate(small_tokenizer(kind).eos_token)


def trained(found: Tokenized, kind: str = "byte") -> str:
    """Return the text of the labels; the ids there must be the same."""
    chosen = found.labels != IGNORED
    assert (found.ids[chosen] == found.labels[chosen]).all()
    return small_tokenizer(kind).decode(found.labels[chosen], clean_up_tokenization_spaces=False)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("image", [False, True], ids=["text", "image"])
@pytest.mark.parametrize("case", HEALTHY)
def test_ids_and_labels_are_bunnys_on_healthy_rows(case: str, image: bool, kind: str) -> None:
    texts, first = HEALTHY[case]
    row = row_of(*texts, image=image, first=first)
    ids, labels = bunny_labels(row, small_tokenizer(kind), knows_bos=KINDS[kind])
    assert any(label != IGNORED for label in labels), "the reference should know this row"
    found = made(row, kind)
    assert found.ids.tolist() == ids
    assert found.labels.tolist() == labels
    assert found.ids.dtype == found.labels.dtype == np.int64
    assert (found.num_images, found.rounds_dropped) == (int(image), 0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("asked", "answered"),
    [
        ("<image>\nWhy?", "So."),
        ("<image>", "A cat."),
        (" <image>\n", "A cat."),
        ("Show a cat", "Here: <image> "),
    ],
    ids=["in front", "alone", "spaces about it", "in the answer"],
)
def test_an_image_moves_to_the_front_of_its_turn_as_bunnys(
    asked: str, answered: str, kind: str
) -> None:
    row = row_of(asked, answered) | {"image": "1.jpg"}
    ids, labels = bunny_labels(row, small_tokenizer(kind), knows_bos=KINDS[kind])
    assert any(label != IGNORED for label in labels)
    found = made(row, kind)
    assert found.ids.tolist() == ids
    assert found.labels.tolist() == labels


@pytest.mark.parametrize("kind", KINDS)
def test_plain_is_bunnys(kind: str) -> None:
    row = row_of("Write a caption.", "A cat sits on the mat", image=True)
    ids, labels = bunny_plain_labels("A cat sits on the mat", small_tokenizer(kind))
    found = made(row, kind, PlainTemplate())
    assert found.ids.tolist() == ids
    assert found.labels.tolist() == labels


BROKEN = {
    "empty question": (("Why?", "So.", "", "A cat."), " So.<|endoftext|> A cat.<|endoftext|>"),
    "empty answer": (("Why?", "So.", "Why?", ""), " So.<|endoftext|> <|endoftext|>"),
    "role in a turn": (("Why?", "Say ASSISTANT: no"), " Say ASSISTANT: no<|endoftext|>"),
    "end token in a turn": (
        ("What is <|endoftext|>?", "<|endoftext|> ends it"),
        " <|endoftext|> ends it<|endoftext|>",
    ),
    "dangling question": (("Why?", "So.", "And?"), " So.<|endoftext|>"),
}


@pytest.mark.parametrize("image", [False, True], ids=["text", "image"])
@pytest.mark.parametrize("case", BROKEN)
def test_what_costs_bunny_the_whole_row_is_trained_here(case: str, image: bool) -> None:
    texts, expected = BROKEN[case]
    row = row_of(*texts, image=image)
    labels = bunny_labels(row, small_tokenizer("byte"), knows_bos=False)[1]
    assert set(labels) == {IGNORED}
    assert trained(made(row, "byte")) == expected


def test_a_bos_that_bunny_does_not_expect_costs_it_every_row_and_nothing_here() -> None:
    row = row_of("Why?", "So.", "And?", "Thus.")
    labels = bunny_labels(row, small_tokenizer("byte_bos"), knows_bos=False)[1]
    assert set(labels) == {IGNORED}
    assert trained(made(row, "byte_bos"), "byte_bos") == " So.<|endoftext|> Thus.<|endoftext|>"


def test_a_template_of_another_model_is_refused_before_any_row() -> None:
    with pytest.raises(UserError, match="no special token '<|end_of_text|>'"):
        template_named("llama", small_tokenizer("byte"))


def test_special_strings_in_a_text_are_text_and_only_the_template_ends_answers() -> None:
    found = made(row_of("Is <|im_end|> or <s> one?", "No <|endoftext|><|im_start|>"), "byte")
    ids = small_tokenizer("byte").convert_tokens_to_ids(["<|im_end|>", "<s>", "<|im_start|>"])
    assert not set(ids) & set(found.ids.tolist())
    assert (found.ids == small_tokenizer("byte").eos_token_id).sum() == 1
    assert found.ids[-1] == found.labels[-1] == small_tokenizer("byte").eos_token_id


said = st.text(st.characters(exclude_categories=["Cs", "Cn"]), max_size=20) | st.sampled_from(
    [" ASSISTANT: ", "<|endoftext|>", "<image>", "USER: ", "<s>a", " \n", "猫"]
)


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.tuples(said, said), min_size=1, max_size=4), st.sampled_from(["byte", "byte_bos"])
)
def test_exactly_the_answers_are_trained(rounds: list[tuple[str, str]], kind: str) -> None:
    found = made(row_of(*(text for pair in rounds for text in pair)), kind)
    assert trained(found, kind) == "".join(f" {answer}<|endoftext|>" for _, answer in rounds)
    whole = small_tokenizer(kind).decode(found.ids, clean_up_tokenization_spaces=False)
    asked = "".join(f"USER: {q} ASSISTANT: {a}<|endoftext|>" for q, a in rounds)
    assert whole == ("<s>" if kind == "byte_bos" else "") + f"{BunnyTemplate().system} {asked}"


def test_images_take_their_places_in_interleaved_rows() -> None:
    row = row_of("First <image> then <image>?", "Two cats.", "<image>", "A third")
    found = made(row | {"image": ["1.jpg", "2.jpg", "3.jpg"]}, "byte")
    assert found.num_images == 3
    assert (found.ids == IMAGE_ID).sum() == 3 * NUM_IMAGE_TOKENS
    assert trained(found) == " Two cats.<|endoftext|> A third<|endoftext|>"
    shown = preview(found, small_tokenizer("byte"))
    picture = f"<image x {NUM_IMAGE_TOKENS}>"
    assert f"USER: First {picture} then {picture}? ASSISTANT:⟦ Two cats.<|endoftext|>⟧" in shown
    assert f"USER: {picture} ASSISTANT:⟦ A third<|endoftext|>⟧" in shown
    assert "\x1b[32m A third<|endoftext|>\x1b[0m" in preview(
        found, small_tokenizer("byte"), colour=True
    )


def test_an_image_is_one_piece_of_text_as_the_processor_will_have_it() -> None:
    """Bunny puts a space before the text behind an image where only a text's start should have one;
    transformers' processors tokenize the whole, and the served model reads theirs."""
    kind, row = "first", row_of("Why?", "So.", image=True)
    found = made(row, kind)
    tokenizer = small_tokenizer(kind)
    before, after = (found.ids == IMAGE_ID).nonzero()[0][[0, -1]]
    text = f"{BunnyTemplate().system} USER: </s>\nWhy? ASSISTANT: So.</s>"
    whole = tokenizer(text).input_ids
    assert whole[:before] == found.ids[:before].tolist()
    assert whole[before + 1 :] == found.ids[after + 1 :].tolist()


def test_a_system_turn_stands_in_place_of_bunnys() -> None:
    row = row_of("Why?", "So.")
    row["conversations"].insert(0, {"from": "system", "value": "Be brief."})
    found = made(row, "byte")
    assert preview(found, small_tokenizer("byte")) == (
        "Be brief. USER: Why? ASSISTANT:⟦ So.<|endoftext|>⟧"
    )


@pytest.mark.parametrize("end_token", [False, True])
def test_a_caption_ends_with_a_token_only_when_asked(end_token: bool) -> None:
    template = template_named("plain", small_tokenizer("byte"), end_token=end_token)
    found = made(row_of("Write.", "A cat", image=True), "byte", template)
    assert trained(found) == "A cat\n" + "<|endoftext|>" * end_token
    assert (found.labels[:NUM_IMAGE_TOKENS] == IGNORED).all()


MANY = row_of("What?", "A cat.", "And why?", "Because it is.", "Sure?", "Yes, sure", image=True)


def test_whole_rounds_are_dropped_at_every_length_and_no_answer_is_cut() -> None:
    sizes = [len(made(row_of(*texts, image=True), "byte").ids) for texts in firsts()]
    for max_length in range(sizes[0], sizes[-1] + 2):
        found = made(MANY, "byte", max_length=max_length)
        kept = sum(size <= max_length for size in sizes)
        assert (found.rounds_kept, found.rounds_dropped) == (kept, 3 - kept)
        assert (
            found.ids.tolist() == made(row_of(*firsts()[kept - 1], image=True), "byte").ids.tolist()
        )
        assert trained(found).endswith("<|endoftext|>")
    with pytest.raises(SampleRefused, match="first_round_too_long"):
        made(MANY, "byte", max_length=sizes[0] - 1)


def firsts() -> list[list[str]]:
    """Return the turns of the first round of MANY, of the first two, and of all."""
    turns = [turn["value"].removesuffix("\n<image>") for turn in MANY["conversations"]]
    return [turns[: 2 * count] for count in (1, 2, 3)]


def test_images_of_dropped_rounds_are_not_counted() -> None:
    row = row_of("<image>", "One.", "<image>", "Two.") | {"image": ["1.jpg", "2.jpg"]}
    size = len(made(row, "byte").ids)
    found = made(row, "byte", max_length=size - 1)
    assert (found.num_images, found.rounds_kept, found.rounds_dropped) == (1, 1, 1)


REFUSED: dict[str, dict[str, Any]] = {
    "bad_field": {"conversations": [{"from": "human"}]},
    "bad_field of an image": row_of("Why?", "So.") | {"image": 3},
    "turn_order": {"conversations": 2 * row_of("a")["conversations"]},
    "no_round": row_of("Why?"),
    "placeholder_count": row_of("Why?", "So.") | {"image": "1.jpg"},
    "mark_in_text": row_of("Why\ufdd0?", "So."),
}


@pytest.mark.parametrize("case", REFUSED)
def test_rows_that_cannot_be_trained_on_are_refused_by_name(case: str) -> None:
    with pytest.raises(SampleRefused) as refused:
        made(REFUSED[case], "byte")
    assert refused.value.reason == case.partition(" ")[0]


def test_an_image_token_that_a_text_can_have_is_an_error() -> None:
    period = small_tokenizer("byte").convert_tokens_to_ids(".")
    with pytest.raises(UserError, match=f"Token {period} is in a text"):
        made(row_of("Why?", "So."), "byte", image_token_id=period)


def test_there_is_no_template_of_another_name() -> None:
    with pytest.raises(UserError, match="no template 'buny'"):
        template_named("buny", small_tokenizer("byte"))


def test_plain_takes_one_round() -> None:
    with pytest.raises(SampleRefused, match="not_one_round"):
        made(row_of("a", "b", "c", "d"), "byte", PlainTemplate())
