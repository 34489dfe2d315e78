"""Rows of every known form in the one form, and the error class of each that has none."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from curate.rows.conversations import BadRow, Conversations, conversations_of, normalise

Row = dict[str, Any]


def said(*texts: str) -> list[Row]:
    return [{"from": ("human", "gpt")[at % 2], "value": text} for at, text in enumerate(texts)]


def chat(*contents: Any) -> list[Row]:
    names = ("user", "assistant")
    return [{"role": names[at % 2], "content": one} for at, one in enumerate(contents)]


IMAGE_PART = {"type": "image"}


def text_part(text: str) -> Row:
    return {"type": "text", "text": text}


def url_part(url: str) -> Row:
    return {"type": "image_url", "image_url": {"url": url}}


# ---- what rows become: (row, images, roles, texts)

LONE = [
    ({"conversations": said("Hi", "Ho")}, [], ["human", "gpt"], ["Hi", "Ho"]),
    ({"conversations": []}, [], [], []),
    ({"instruction": "Add", "output": "5"}, [], ["human", "gpt"], ["Add", "5"]),
    ({"instruction": "Add", "input": "", "output": "5"}, [], ["human", "gpt"], ["Add", "5"]),
    ({"instruction": "Add", "input": None, "output": "5"}, [], ["human", "gpt"], ["Add", "5"]),
    ({"instruction": "A", "input": "2 3", "output": "5"}, [], ["human", "gpt"], ["A\n2 3", "5"]),
    ({"instruction": "", "output": ""}, [], ["human", "gpt"], ["", ""]),
    ({"messages": chat("Hi", "Ho")}, [], ["human", "gpt"], ["Hi", "Ho"]),
    ({"conversations": chat("Hi", "Ho")}, [], ["human", "gpt"], ["Hi", "Ho"]),
    (
        {"messages": [{"role": "system", "content": "Be kind."}, *chat("Hi")]},
        [],
        ["system", "human"],
        ["Be kind.", "Hi"],
    ),
]
IMAGES: list[tuple[Any, list[str]]] = [
    (None, []),
    ("", []),
    ([], []),
    ("a/b.jpg", ["a/b.jpg"]),
    (["a.jpg"], ["a.jpg"]),
    (["b.jpg", "a.jpg"], ["b.jpg", "a.jpg"]),
]
PARTS = [
    ({"messages": chat([IMAGE_PART, text_part("Hi")]), "image": "a"}, ["a"], "<image>\nHi"),
    ({"messages": chat([text_part("Hi"), IMAGE_PART]), "images": ["a"]}, ["a"], "<image>\nHi"),
    ({"messages": chat([text_part("Hi"), url_part("a")])}, ["a"], "<image>\nHi"),
    (
        {"messages": chat([url_part("a"), text_part("or"), url_part("b")])},
        ["a", "b"],
        "<image>\nor\n<image>",
    ),
    ({"messages": chat([text_part("Hi"), text_part("you")])}, [], "Hi\nyou"),
    ({"messages": chat([{"type": "image", "image": "a"}])}, ["a"], "<image>"),
]
PLACED = [
    ("<image>\nWhat?", "<image>\nWhat?"),
    ("What?\n<image>", "<image>\nWhat?"),
    ("What <image> is?", "<image>\nWhat  is?"),
    (" <image>  What? ", "<image>\nWhat?"),
    ("<image>", "<image>"),
    ("\n<image>\n", "<image>"),
    (" no place ", " no place "),
    ("<image> or <image>", "<image> or <image>"),
]


@pytest.mark.parametrize(("row", "images", "roles", "texts"), LONE)
def test_a_row_of_each_form_is_images_roles_and_texts(
    row: Row, images: list[str], roles: list[str], texts: list[str]
) -> None:
    found = normalise(row)
    assert (found.images, found.roles, found.texts) == (images, roles, texts)
    assert (found.key, found.url, found.extra) == (None, None, {})


def test_a_null_field_chooses_no_form() -> None:
    row = {"conversations": None, "messages": chat("Hi"), "instruction": None}
    assert (normalise(row).texts, normalise(row).roles) == (["Hi"], ["human"])
    assert normalise(row).extra == {"conversations": None, "instruction": None}


@pytest.mark.parametrize(("given_image", "images"), IMAGES)
@pytest.mark.parametrize("field", ["image", "images"])
def test_an_image_is_a_path_a_list_or_none(field: str, given_image: Any, images: list[str]) -> None:
    found = normalise({field: given_image, "conversations": said("Hi")})
    assert (found.images, found.extra) == (images, {})


@pytest.mark.parametrize(("row", "images", "text"), PARTS)
def test_placeholders_stand_where_the_parts_stand(row: Row, images: list[str], text: str) -> None:
    found = normalise(row)
    assert (found.images, found.texts) == (images, [text])


@pytest.mark.parametrize(("given_text", "text"), PLACED)
def test_the_only_placeholder_of_a_row_with_one_image_moves_to_the_front(
    given_text: str, text: str
) -> None:
    turns = said(given_text, "Yes.")
    assert normalise({"image": "a", "conversations": turns}).texts == [text, "Yes."]
    for images in ([], ["a", "b"]):
        found = normalise({"image": images, "conversations": turns})
        assert found.texts == [given_text, "Yes."]


@pytest.mark.parametrize(
    ("role", "expected"),
    [
        *((name, "human") for name in ("human", "user")),
        *((name, "gpt") for name in ("gpt", "assistant", "chatgpt", "bard", "bing", "model")),
        ("system", "system"),
        ("Human", "Human"),
        ("tool", "tool"),
        ("", ""),
    ],
)
def test_known_roles_have_one_name_and_others_keep_theirs(role: str, expected: str) -> None:
    for turn in ({"from": role, "value": "x"}, {"role": role, "content": "x"}):
        assert normalise({"conversations": [turn]}).roles == [expected]
        assert all_at_once_or_singly([{"id": "1", "conversations": [turn]}]).roles == [expected]


@pytest.mark.parametrize(("key", "expected"), [("a", "a"), (12, "12"), (0, "0"), ("", None)])
def test_a_key_is_text(key: Any, expected: str | None) -> None:
    assert normalise({"id": key, "conversations": []}).key == expected


def test_other_fields_are_kept_as_given() -> None:
    row = {"id": "1", "image": None, "model": "", "conversations": [], "n": [1, {"a": None}]}
    assert normalise(row).extra == {"model": "", "n": [1, {"a": None}]}
    assert normalise({"conversations": [], "url": "http://a"}).url == "http://a"
    assert normalise({"conversations": [], "url": 5}).extra == {"url": 5}
    assert normalise({"conversations": [], "instruction": "i"}).extra == {"instruction": "i"}


@pytest.mark.parametrize("path", [{}, {"image": None}, {"image": ""}, {"image": {"url": None}}])
def test_an_image_part_without_a_path_takes_that_of_the_row(path: dict[str, Any]) -> None:
    part = {"type": "image"} | path
    row = {"messages": chat([{"type": "text", "text": "What?"}, part])}
    assert normalise(row).images == []
    found = normalise(row | {"images": ["a.jpg"]})
    assert (found.images, found.texts[0]) == (["a.jpg"], "<image>\nWhat?")
    row["messages"][0]["content"][1]["path"] = "b.jpg"
    assert normalise(row).images == ([] if isinstance(path.get("image"), dict) else ["b.jpg"])


# ---- what rows are refused

BAD = [
    ([1], "not_an_object"),
    ("text", "not_an_object"),
    (None, "not_an_object"),
    (5, "not_an_object"),
    ({}, "unknown_format"),
    ({"id": "1", "text": "x"}, "unknown_format"),
    ({"conversations": None}, "unknown_format"),
    ({"instruction": "x"}, "unknown_format"),
    ({"conversations": "Hi"}, "bad_field"),
    ({"conversations": ""}, "bad_field"),
    ({"conversations": {}}, "bad_field"),
    ({"conversations": {"from": "human", "value": "Hi"}}, "bad_field"),
    ({"conversations": ["Hi"]}, "bad_field"),
    ({"conversations": [None]}, "bad_field"),
    ({"conversations": [{"value": "Hi"}]}, "bad_field"),
    ({"conversations": [{"from": 5, "value": "Hi"}]}, "bad_field"),
    ({"conversations": [{"from": ["human"], "value": "Hi"}]}, "bad_field"),
    ({"conversations": [{"from": "human"}]}, "bad_field"),
    ({"conversations": [{"from": "human", "value": None}]}, "bad_field"),
    ({"conversations": [{"from": "human", "value": 5}]}, "bad_field"),
    ({"messages": "Hi"}, "bad_field"),
    ({"messages": chat(None)}, "bad_field"),
    ({"messages": chat([5])}, "bad_field"),
    ({"messages": chat([{"type": "audio"}])}, "bad_field"),
    ({"messages": chat([{"type": "text", "text": 5}])}, "bad_field"),
    ({"messages": chat([{"type": "image", "image": 5}])}, "bad_field"),
    ({"messages": chat([{"type": "image_url", "image_url": {"url": ["a"]}}])}, "bad_field"),
    ({"instruction": 5, "output": "x"}, "bad_field"),
    ({"instruction": "x", "output": None}, "bad_field"),
    ({"instruction": "x", "output": "y", "input": 5}, "bad_field"),
    ({"image": 5, "conversations": []}, "bad_field"),
    ({"image": 0, "conversations": []}, "bad_field"),
    ({"image": False, "images": ["a"], "conversations": []}, "bad_field"),
    ({"image": {}, "conversations": []}, "bad_field"),
    ({"image": [None], "conversations": []}, "bad_field"),
    ({"image": [""], "conversations": []}, "bad_field"),
    ({"image": {"path": "a"}, "conversations": []}, "bad_field"),
    ({"id": True, "conversations": []}, "bad_field"),
    ({"id": ["a"], "conversations": []}, "bad_field"),
]


@pytest.mark.parametrize(("row", "error"), BAD)
def test_a_row_that_is_no_conversation_has_an_error_class(row: Any, error: str) -> None:
    with pytest.raises(BadRow) as caught:
        normalise(row)
    assert caught.value.error == error
    assert caught.value.detail
    assert conversations_of([{"id": "1", "conversations": []}, row]) is None


# ---- all at once


def one_by_one(rows: list[Any]) -> Conversations:
    found = Conversations()
    for row in rows:
        found.add(normalise(row))
    return found


def all_at_once_or_singly(rows: list[Any]) -> Conversations:
    return conversations_of(rows) or one_by_one(rows)


TEXTS = st.sampled_from(["", "Hi", "<image>", " <image> Hi", "a <image> b <image>", " x "])
TURNS = st.fixed_dictionaries(
    {"from": st.sampled_from(["human", "gpt", "user", "system", "tool"]), "value": TEXTS},
    optional={"markdown": st.none()},
)
ROWS = st.fixed_dictionaries(
    {"id": st.sampled_from(["", "a", "b"]), "conversations": st.lists(TURNS, max_size=4)},
    optional={
        "image": st.sampled_from([None, "", "a.jpg", [], ["a.jpg"], ["a.jpg", "b.jpg"]]),
        "images": st.sampled_from([None, ["c.jpg"]]),
        "url": st.sampled_from([None, "http://a", 5]),
        "model": st.just(""),
        "instruction": st.just("x"),
    },
)


@given(st.lists(ROWS, max_size=5))
def test_all_at_once_is_the_same_as_one_by_one(rows: list[Row]) -> None:
    found = conversations_of(rows)
    assert found is None or found == one_by_one(rows)


def test_plain_llava_rows_are_done_all_at_once() -> None:
    rows = [
        {"id": "1", "image": "a.jpg", "conversations": said("What? <image>", "A cat.")},
        {"id": "2", "model": "", "url": "http://a", "conversations": said("Hi", "Ho", "Hey")},
    ]
    found = conversations_of(rows)
    assert found is not None
    assert found == one_by_one(rows)
    assert found.texts == ["<image>\nWhat?", "A cat.", "Hi", "Ho", "Hey"]
    assert found.first_questions() == ["What?", "Hi"]
    assert (found.images, found.num_images, found.num_turns) == (["a.jpg"], [1, 0], [2, 3])
