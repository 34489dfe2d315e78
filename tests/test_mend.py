"""Each mend by a worked example; what is mended stays as it is when it is mended again."""

from __future__ import annotations

import pyarrow as pa
import pytest
from conversation_rows import (
    ASK,
    MARKERS,
    SYSTEM,
    TELL,
    Turn,
    broken,
    mended,
    reasons,
    rows_of,
    says,
    table,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from curate.rows.clean import CleanConfig, clean
from curate.rows.mend import MENDS, mend
from manifests import ledger

MENDED: list[tuple[str, list[Turn], list[Turn]]] = [
    ("", [ASK, TELL], [ASK, TELL]),
    ("", [SYSTEM, ASK, TELL], [SYSTEM, ASK, TELL]),
    ("blank_system_turn", [("system", " \n"), ASK, TELL], [ASK, TELL]),
    ("blank_system_turn", [("system", ""), ("system", ""), ASK, TELL], [ASK, TELL]),
    ("leading_gpt_turn", [TELL, ASK, TELL], [ASK, TELL]),
    ("leading_gpt_turn", [SYSTEM, TELL, ASK, TELL], [SYSTEM, ASK, TELL]),
    ("dangling_human_turn", [ASK, TELL, ASK], [ASK, TELL]),
    ("dangling_human_turn", [ASK, TELL, ASK, ("human", "")], [ASK, TELL]),
    ("end_string", [ASK, ("gpt", "x</s>y</s>")], [ASK, ("gpt", "x< /s>y< /s>")]),
    ("end_string", [("human", "<|im_end|>"), TELL], [("human", "< |im_end|>"), TELL]),
    ("end_string", [("system", "a<|end|>"), ASK, TELL], [("system", "a< |end|>"), ASK, TELL]),
    (
        "blank_system_turn,leading_gpt_turn,dangling_human_turn,end_string",
        [("system", "<image>"), TELL, ("human", "</s>"), TELL, ASK],
        [("human", "< /s>"), TELL],
    ),
]


@pytest.mark.parametrize(("names", "turns", "expected"), MENDED)
def test_a_mend_repairs_what_it_names_and_the_row_is_kept(
    names: str, turns: list[Turn], expected: list[Turn]
) -> None:
    assert reasons([([], turns)]) == [ledger.MENDED_PREFIX + names if names else ""]
    assert rows_of(mend(table([([], turns)]), [names], CleanConfig())) == [([], expected)]


def test_the_worked_examples_show_every_mend() -> None:
    assert {name for names, *_ in MENDED for name in names.split(",") if name} == set(MENDS)


def test_only_the_named_mends_are_made_each_in_its_own_row() -> None:
    turns = [("system", ""), TELL, ("human", "</s>"), TELL, ASK]
    rows = table([(["a"], turns)] * 5)
    found = [one for _, one in rows_of(mend(rows, ["", *MENDS], CleanConfig()))]
    unbroken = [("human", "</s>"), TELL]
    assert found == [
        turns,
        [TELL, *unbroken, ASK],
        [("system", ""), *unbroken, ASK],
        turns[:-1],
        [("system", ""), TELL, ("human", "< /s>"), TELL, ASK],
    ]


def test_mending_no_rows_gives_no_rows() -> None:
    nothing = table([])
    assert mend(nothing, [], CleanConfig()).equals(nothing)
    assert reasons([]) == []


def test_a_slice_of_a_table_is_cleaned_like_the_same_rows_alone() -> None:
    rows = [says(f"Why {n}?</s>", "Because.", "?", images=[]) for n in range(6)]
    whole = table(rows)
    parted = pa.concat_tables([whole.slice(1, 2), whole.slice(4, 1)])
    expected = [(images, mended(turns, MARKERS)[1]) for images, turns in (rows[1:3] + rows[4:5])]
    names = ["dangling_human_turn,end_string"] * 3
    assert rows_of(mend(parted, names, CleanConfig())) == expected
    made = clean(parted, CleanConfig())
    assert made.table.column("uid").to_pylist() == [11, 12, 14]
    hashes = clean(whole, CleanConfig()).table.column("conversation_hash").to_pylist()
    assert made.table.column("conversation_hash").to_pylist() == [hashes[1], hashes[2], hashes[4]]


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.text("a$|<", min_size=2, max_size=4), min_size=1, max_size=3),
    st.lists(st.text("a$|< ", max_size=12), min_size=1, max_size=4),
)
def test_end_strings_that_overlap_are_all_broken_and_nothing_is_lost(
    end_strings: list[str], found: list[str]
) -> None:
    config = CleanConfig(end_strings=end_strings)
    rows = [([], [("human", text)]) for text in found]
    after = [
        turns[0][1] for _, turns in rows_of(mend(table(rows), ["end_string"] * len(rows), config))
    ]
    assert after == [broken(text, end_strings) for text in found]
    assert not any(end in text for end in end_strings for text in after)
    assert [text.replace(" ", "") for text in after] == [text.replace(" ", "") for text in found]
