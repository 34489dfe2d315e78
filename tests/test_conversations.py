"""Instruction rows: a worked example of each form, what is refused, and many rows at once."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from curate.rows.conversations import (
    BadRow,
    Conversation,
    Conversations,
    conversations_of,
    normalise,
)

CAT, PARROT = "coco/train2017/1.jpg", "vg/2.jpg"


def said(*turns: tuple[Any, Any]) -> list[dict[str, Any]]:
    return [{"from": role, "value": text} for role, text in turns]


# ---- one worked example of each form


def test_a_llava_row_with_a_number_for_its_id() -> None:
    turns = said(("human", "What is it?\n<image>"), ("gpt", "A cat."))
    row = {"id": 33471, "image": CAT, "conversations": turns}
    texts = ["<image>\nWhat is it?", "A cat."]
    assert normalise(row) == Conversation("33471", [CAT], ["human", "gpt"], texts, None, {})


def test_a_llava_row_of_two_images_keeps_its_placeholders_where_they_are() -> None:
    turns = said(("human", "Is <image> like <image>?"), ("gpt", "See <image>"))
    row = {"id": "a", "image": [CAT, PARROT], "conversations": turns}
    texts = ["Is <image> like <image>?", "See <image>"]
    assert normalise(row) == Conversation("a", [CAT, PARROT], ["human", "gpt"], texts, None, {})


def test_an_allava_row_keeps_its_other_keys_and_its_url() -> None:
    row = {
        "id": "allava_laion_caption_0",
        "image": "allava_laion/images/1.jpeg",
        "conversations": said(("human", "Describe this.<image>"), ("gpt", "A red bus.")),
        "url": "https://example.org/1.jpg",
        "prompt": {"en": "Describe", "n": 2},
        "score": None,
    }
    assert normalise(row) == Conversation(
        "allava_laion_caption_0",
        ["allava_laion/images/1.jpeg"],
        ["human", "gpt"],
        ["<image>\nDescribe this.", "A red bus."],
        "https://example.org/1.jpg",
        {"prompt": {"en": "Describe", "n": 2}, "score": None},
    )


def test_a_sharegpt_row_has_no_image_key_and_roles_of_other_services() -> None:
    turns = said(
        ("system", "Be brief."), ("human", "Hi"), ("gpt", "Yo"), ("user", "?"), ("bing", "")
    )
    row = {"id": "i6IyJda_0", "model": "", "conversations": turns}
    roles = ["system", "human", "gpt", "human", "gpt"]
    texts = ["Be brief.", "Hi", "Yo", "?", ""]
    assert normalise(row) == Conversation("i6IyJda_0", [], roles, texts, None, {"model": ""})


def test_a_wizardlm_row_is_a_question_and_its_answer() -> None:
    row = {"instruction": " Count to 2. ", "output": "1 2\n"}
    expected = Conversation(None, [], ["human", "gpt"], [" Count to 2. ", "1 2\n"], None, {})
    assert normalise(row) == expected
    assert normalise(row | {"input": ""}) == expected
    assert normalise(row | {"input": None}) == expected


def test_an_alpaca_rows_input_is_joined_to_its_instruction() -> None:
    row = {"instruction": "Sum up.", "input": "A long text", "output": "Short", "text": "all of it"}
    texts = ["Sum up.\nA long text", "Short"]
    assert normalise(row) == Conversation(
        None, [], ["human", "gpt"], texts, None, {"text": row["text"]}
    )


def test_messages_with_plain_texts() -> None:
    row = {
        "id": "m",
        "messages": [
            {"role": "system", "content": "Be kind."},
            {"role": "user", "content": "Name it: <image>"},
            {"role": "assistant", "content": "A cat."},
        ],
        "images": [CAT],
    }
    texts = ["Be kind.", "<image>\nName it:", "A cat."]
    assert normalise(row) == Conversation("m", [CAT], ["system", "human", "gpt"], texts, None, {})


def test_messages_of_parts_bring_placeholders_and_paths_where_the_parts_stand() -> None:
    content = [
        {"type": "text", "text": "Compare"},
        {"type": "image", "image": CAT},
        {"type": "text", "text": "with"},
        {"type": "image_url", "image_url": {"url": PARROT}},
        {"type": "image_url", "image_url": "3.jpg"},
        {"type": "image", "path": "4.jpg"},
    ]
    row = {
        "messages": [
            {"role": "user", "content": content},
            {"role": "assistant", "content": [{"type": "text", "text": "No."}]},
        ]
    }
    texts = ["Compare\n<image>\nwith\n<image>\n<image>\n<image>", "No."]
    images = [CAT, PARROT, "3.jpg", "4.jpg"]
    assert normalise(row) == Conversation(None, images, ["human", "gpt"], texts, None, {})


@pytest.mark.parametrize("name", ["image", "images"])
@pytest.mark.parametrize(
    "part", [{"type": "image"}, {"type": "image", "image": None, "text": None}]
)
def test_messages_of_parts_may_have_their_paths_beside(name: str, part: dict[str, Any]) -> None:
    content = [{"type": "text", "text": "What is it?"}, part]
    row = {"messages": [{"role": "user", "content": content}], name: [CAT]}
    texts = ["<image>\nWhat is it?"]
    assert normalise(row) == Conversation(None, [CAT], ["human"], texts, None, {})


# ---- rules


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<image>\nWhat?", "<image>\nWhat?"),
        ("What?\n<image>", "<image>\nWhat?"),
        ("  Is <image> red? ", "<image>\nIs  red?"),
        ("<image>", "<image>"),
        (" <image> \n", "<image>"),
        ("<image>What?", "<image>\nWhat?"),
        ("<image> or <image>?", "<image> or <image>?"),
        (" no image ", " no image "),
        (" <Image> ", " <Image> "),
    ],
)
def test_the_only_placeholder_of_a_turn_moves_to_the_front_where_the_row_has_one_image(
    text: str, expected: str
) -> None:
    turns = said(("human", "<image>?"), ("gpt", text))
    one = {"id": "a", "image": CAT, "conversations": turns}
    for row in (one, one | {"image": [CAT]}):
        assert normalise(row).texts == ["<image>\n?", expected]
    for row in (one | {"image": None}, one | {"image": [CAT, PARROT]}):
        assert normalise(row).texts == ["<image>?", text]
    found = conversations_of([one, one | {"image": ""}])
    assert found is not None
    assert found.texts == ["<image>\n?", expected, "<image>?", text]


@pytest.mark.parametrize("image", [None, "", []])
def test_no_path_is_no_image(image: Any) -> None:
    row = {"id": "a", "conversations": said(("human", "Hi")), "image": image}
    assert normalise(row).images == []
    assert normalise(row | {"images": image}).images == []
    assert normalise(row | {"images": [CAT]}).images == [CAT]


@pytest.mark.parametrize(
    ("role", "expected"),
    [
        *((role, "human") for role in ("human", "user")),
        *((role, "gpt") for role in ("gpt", "assistant", "chatgpt", "bard", "bing", "model")),
        ("system", "system"),
        ("tool", "tool"),
        ("Human", "Human"),
        ("", ""),
    ],
)
def test_known_roles_have_one_name_and_others_keep_theirs(role: str, expected: str) -> None:
    assert normalise({"conversations": said((role, "x"))}).roles == [expected]
    assert normalise({"messages": [{"role": role, "content": "x"}]}).roles == [expected]


def test_turns_may_be_spelled_as_messages_are() -> None:
    turns = [{"role": "user", "content": "Hi"}, {"from": "gpt", "value": "Yo"}]
    found = normalise({"conversations": turns})
    assert (found.roles, found.texts) == (["human", "gpt"], ["Hi", "Yo"])


def test_no_key_is_none_and_a_url_that_is_no_text_is_kept_beside() -> None:
    row = {"id": "", "url": ["a", "b"], "conversations": []}
    assert normalise(row) == Conversation(None, [], [], [], None, {"url": ["a", "b"]})
    assert normalise(row | {"id": None, "url": None}).key is None
    assert normalise(row | {"id": 0}).key == "0"


def test_the_first_question_is_the_first_human_turn_without_placeholders() -> None:
    rows = Conversations()
    for turns in (
        said(("system", "s"), ("human", "<image> What? "), ("gpt", "x"), ("human", "y")),
        said(("gpt", "only")),
        [],
        said(("human", "<image>")),
        said(("human", "last")),
    ):
        rows.add(normalise({"conversations": turns}))
    assert rows.first_questions() == ["What?", "", "", "", "last"]


OK = said(("human", "Hi"))


@pytest.mark.parametrize(
    ("row", "error", "detail"),
    [
        (None, "not_an_object", "NoneType"),
        ([1], "not_an_object", "list"),
        ("text", "not_an_object", "str"),
        ({}, "unknown_format", r"\[\]"),
        ({"id": "a", "caption": "b"}, "unknown_format", "'caption', 'id'"),
        ({"instruction": "a"}, "unknown_format", "instruction"),
        ({"output": "a"}, "unknown_format", "output"),
        ({"instruction": None, "output": "a"}, "bad_field", "instruction is NoneType"),
        ({"instruction": "a", "output": ["b"]}, "bad_field", "output is list"),
        ({"instruction": "a", "output": "b", "input": ["c"]}, "bad_field", "input is list"),
        ({"conversations": None}, "bad_field", "not a list of turns"),
        ({"conversations": ""}, "bad_field", "not a list of turns"),
        ({"conversations": "Hi"}, "bad_field", "not a list of turns"),
        ({"conversations": {}}, "bad_field", "not a list of turns"),
        ({"conversations": OK[0]}, "bad_field", "not a list of turns"),
        ({"conversations": [["human", "Hi"]]}, "bad_field", "not a list of turns"),
        ({"conversations": [*OK, None]}, "bad_field", "not a list of turns"),
        ({"conversations": said(("human", None))}, "bad_field", "value is NoneType"),
        ({"conversations": said(("human", 5))}, "bad_field", "value is int"),
        ({"conversations": [{"from": "human"}]}, "bad_field", "value is NoneType"),
        ({"conversations": [{"value": "Hi"}]}, "bad_field", "no role"),
        ({"conversations": said((None, "Hi"))}, "bad_field", "no role"),
        ({"conversations": said((["human"], "Hi"))}, "bad_field", "no role"),
        ({"conversations": OK, "id": 1.5}, "bad_field", "id is float"),
        ({"conversations": OK, "id": True}, "bad_field", "id is bool"),
        ({"conversations": OK, "id": ["a"]}, "bad_field", "id is list"),
        ({"conversations": OK, "image": 7}, "bad_field", "image is neither"),
        ({"conversations": OK, "image": 0}, "bad_field", "image is neither"),
        ({"conversations": OK, "image": False}, "bad_field", "image is neither"),
        ({"conversations": OK, "image": {}}, "bad_field", "image is neither"),
        ({"conversations": OK, "image": {"path": "a"}}, "bad_field", "image is neither"),
        ({"conversations": OK, "image": ["a", None]}, "bad_field", "image is neither"),
        ({"conversations": OK, "images": ["a", ""]}, "bad_field", "image is neither"),
        ({"messages": None}, "bad_field", "messages is not a list"),
        ({"messages": {}}, "bad_field", "messages is not a list"),
        ({"messages": ["Hi"]}, "bad_field", "messages is not a list"),
        ({"messages": [{"role": "user"}]}, "bad_field", "content is NoneType"),
        ({"messages": [{"content": "Hi"}]}, "bad_field", "no role"),
        ({"messages": [{"role": "user", "content": ["Hi"]}]}, "bad_field", "part is not an object"),
        (
            {"messages": [{"role": "user", "content": [{"type": "text"}]}]},
            "bad_field",
            "text is None",
        ),
        ({"messages": [{"role": "user", "content": [{"type": "audio"}]}]}, "bad_field", "'audio'"),
        ({"messages": [{"role": "user", "content": [{"type": ["x"]}]}]}, "bad_field", "type"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image", "image": 5}]}]},
            "bad_field",
            "image is int",
        ),
    ],
)
def test_a_row_that_cannot_be_used_says_why(row: Any, error: str, detail: str) -> None:
    with pytest.raises(BadRow, match=detail) as caught:
        normalise(row)
    assert caught.value.error == error
    assert conversations_of([row]) is None


# ---- all at once as one by one

TEXTS = st.sampled_from(
    ["", " ", "<image>", "a <image>", " <image>\nb ", "<image><image>", "é\ud800"]
)
ROLES = st.sampled_from(["human", "gpt", "system", "user", "bing"])
PLAIN = st.fixed_dictionaries(
    {
        "id": st.sampled_from(["", "a", "b"]),
        "conversations": st.lists(
            st.fixed_dictionaries({"from": ROLES, "value": TEXTS}), max_size=4
        ),
    },
    optional={
        "image": st.sampled_from(["", "1.jpg", "2.jpg", None]),
        "url": st.sampled_from(["", "http://x", None]),
        "model": st.sampled_from(["", None, [1]]),
        "input": st.just("x"),
        "messages": st.just([]),
    },
)
ODD = st.sampled_from(
    [
        None,
        "conversations",
        {},
        {"conversations": ""},
        {"conversations": {}},
        {"id": "a", "conversations": "text"},
        {"id": 7, "conversations": OK},
        {"conversations": OK},
        {"id": "a", "image": ["1.jpg"], "conversations": OK},
        {"id": "a", "image": 0, "conversations": OK},
        {"id": "a", "images": ["1.jpg"], "conversations": OK},
        {"id": "a", "url": 5, "conversations": OK},
        {"id": "a", "conversations": said(("tool", "x"))},
        {"id": "a", "conversations": said(("human", None))},
        {"id": "a", "conversations": [None]},
        {"id": "a", "conversations": {}},
        {"id": "a", "conversations": ""},
        {"instruction": "a", "output": "b"},
        {"id": "a", "messages": []},
    ]
)
BATCHES = st.lists(PLAIN, max_size=6) | st.lists(PLAIN | PLAIN | PLAIN | PLAIN | ODD, max_size=6)


def one_by_one(rows: list[Any]) -> Conversations:
    found = Conversations()
    for row in rows:
        found.add(normalise(row))
    return found


@settings(max_examples=500, deadline=None)
@given(BATCHES)
@example([{"id": "a", "conversations": ""}])
@example([{"id": "a", "conversations": {}}])
def test_rows_all_at_once_are_what_they_are_one_by_one(rows: list[Any]) -> None:
    found = conversations_of(rows)
    if found is None:
        return
    expected = one_by_one(rows)
    for field in fields(Conversations):
        assert getattr(found, field.name) == getattr(expected, field.name), field.name


@settings(max_examples=100, deadline=None)
@given(st.lists(PLAIN, max_size=6))
def test_plain_rows_are_taken_all_at_once(rows: list[Any]) -> None:
    assert conversations_of(rows) == one_by_one(rows)
