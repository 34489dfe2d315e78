"""The clean stage against a reading of its rules row by row, and one worked example per rule."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from conversation_rows import (
    ASK,
    LONG,
    MARKERS,
    SYSTEM,
    TELL,
    Row,
    Turn,
    bare,
    mended,
    reasons,
    rows_of,
    says,
    table,
    word_tokenizer,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from curate.rows.clean import CleanConfig, clean, plan, work
from curate.rows.clean_rules import repeats_question
from curate.rows.conversation_hash import hashes
from curate.rows.mend import mend
from curate.rows.turns import Images, Turns
from curate.source_config import SourceConfig
from manifests import ledger, store
from manifests.schemas import CONVERSATIONS
from manifests.work import Item, Output, StageDir, View, commit

# The rules, row by row


def why_dropped(images: list[str], turns: list[Turn], min_chars: int) -> str:
    """Return the reason to drop a mended row, or "", by the rules that read no file."""
    after_system = turns[1:] if turns and turns[0][0] == "system" else turns
    roles = [role for role, _ in after_system]
    answers = [text for role, text in turns if role == "gpt"]
    pairs = list(zip(turns, turns[1:], strict=False))
    if not after_system:
        return "no_rounds"
    if not {role for role, _ in turns} <= {"system", "human", "gpt"}:
        return "unknown_role"
    if roles != (["human", "gpt"] * len(roles))[: len(roles)]:
        return "roles_not_alternating"
    if any(not bare(text) and (role != "human" or not text.strip()) for role, text in turns):
        return "empty_turn"
    if sum(text.count("<image>") for _, text in turns) != len(images):
        return "image_count"
    if images and any("message is empty" in text.lower() for text in answers):
        return "message_is_empty"
    for (asker, question), (answerer, answer) in pairs:
        asked = (asker, answerer) == ("human", "gpt") and len(answer.strip()) >= min_chars
        if asked and answer.strip() in question.strip():
            return "repeated_output"
    return ""


PIECES = [
    *("", " ", "\n", "\u3000", "<image>", "<image>\n", "<ima", "ge>", "<image", ">"),
    *("</s>", "<|im_end|>", "<|im", "_end|>", "<", "/s>", "<|end|>"),
    *("hello", "h\u00e9llo \U0001f600", "Message is EMPTY.", LONG, f" {LONG}\n", "?"),
]
texts = st.lists(st.sampled_from(PIECES), max_size=3).map("".join)
loose = st.lists(
    st.tuples(st.sampled_from(["human", "gpt", "human", "gpt", "system", "observer"]), texts),
    max_size=6,
)
speech = st.tuples(st.sampled_from(PIECES[-4:] + ["yes"] * 3), texts).map("".join)
good_turns = st.lists(speech, min_size=1, max_size=6).map(lambda found: says(*found)[1])
with_system = st.tuples(texts, good_turns).map(lambda found: [("system", found[0]), *found[1]])


@st.composite
def conversations(draw: st.DrawFn) -> Row:
    """Draw a row; most have as many images as placeholders, so that later rules are reached."""
    turns = draw(st.one_of(loose, good_turns, good_turns, with_system))
    places = sum(text.count("<image>") for _, text in mended(turns, MARKERS)[1])
    images = places if draw(st.integers(0, 4)) else draw(st.integers(0, 2))
    return [f"coco/{draw(st.integers(0, 2))}.jpg" for _ in range(images)], turns


@settings(max_examples=400, deadline=None)
@given(st.lists(conversations(), max_size=8))
def test_a_table_is_cleaned_as_each_row_alone_by_the_rules(rows: list[Row]) -> None:
    made = clean(table(rows), CleanConfig())
    expected, kept = [], []
    for images, turns in rows:
        names, left = mended(turns, MARKERS)
        dropped = why_dropped(images, left, 30)
        expected.append(dropped or ("mended:" + ",".join(names) if names else ""))
        if not dropped:
            kept.append((images, left, names))
    assert made.verdicts.column("reason").to_pylist() == expected
    figures = made.table.to_pylist()
    assert [
        (one["mended"], one["rounds"], one["num_images"], one["token_estimate"]) for one in figures
    ] == [
        (
            ",".join(names),
            sum(role == "gpt" for role, _ in turns),
            len(images),
            math.ceil(sum(len(text.replace("<image>", "")) for _, text in turns) / 4),
        )
        for images, turns, names in kept
    ]
    assert made.mended == Counter(name for *_, names in kept for name in names)
    digests = {
        (tuple(i), tuple(t)): one["conversation_hash"]
        for (i, t, _), one in zip(kept, figures, strict=True)
    }
    assert all(
        digests[tuple(i), tuple(t)] == one["conversation_hash"]
        for (i, t, _), one in zip(kept, figures, strict=True)
    )
    assert len(set(digests.values())) == len(digests), "another conversation, another digest"


@settings(max_examples=200, deadline=None)
@given(st.lists(conversations(), max_size=8))
def test_what_is_mended_needs_no_more_mends(rows: list[Row]) -> None:
    given_rows, config = table(rows), CleanConfig()
    made = clean(given_rows, config)
    kept = given_rows.filter(made.verdicts.column("keep"))
    again = mend(kept, made.table.column("mended").to_pylist(), config)
    assert again.schema.equals(CONVERSATIONS)
    alone = [row for row, keep in zip(rows, made.verdicts["keep"].to_pylist(), strict=True) if keep]
    assert rows_of(again) == [(images, mended(turns, MARKERS)[1]) for images, turns in alone]
    second = clean(again, config)
    assert set(second.verdicts.column("reason").to_pylist()) <= {""}
    assert second.table.drop("mended").equals(made.table.drop("mended"))


# Reasons


QUESTION = f"Which is it? {LONG}. Say so."
DROPPED: list[tuple[str, list[Row], list[Row]]] = [
    (
        "no_rounds",
        [([], []), ([], [ASK]), ([], [TELL]), ([], [SYSTEM]), ([], [SYSTEM, TELL, ASK, ASK])],
        [says("Why?", "Because.")],
    ),
    (
        "unknown_role",
        [([], [("observer", "x")]), ([], [ASK, ("Human", "x")]), ([], [ASK, TELL, ("", "x")])],
        [([], [SYSTEM, ASK, TELL])],
    ),
    (
        "roles_not_alternating",
        [
            ([], [ASK, ASK, TELL]),
            ([], [ASK, TELL, TELL]),
            ([], [TELL, TELL, ASK, TELL]),
            ([], [ASK, SYSTEM, TELL]),
            ([], [SYSTEM, SYSTEM, ASK, TELL]),
            ([], [ASK, TELL, SYSTEM]),
        ],
        [([], [ASK, TELL, ASK, TELL])],
    ),
    (
        "empty_turn",
        [
            says("Why?", ""),
            says(" \u3000\n", "Because."),
            says("", "Because.", "Why?", "So."),
            says("Why?", "<image>", images=["a"]),
        ],
        [says("<image>", "A dog.", images=["a"]), says(" <image>\n", "A dog.", images=["a"])],
    ),
    (
        "image_count",
        [
            says("<image>\nWhy?", "Because."),
            says("Why?", "Because.", images=["a"]),
            says("<image><image>", "Because.", images=["a"]),
            says("Why?", "Because.", "<image> And this?", images=["a"]),  # nobody answers
        ],
        [
            says("<image><image>", "Because.", images=["a", "a"]),
            says("<image>", "Because.", "<image> And this?", "Too.", images=["a", "b"]),
            says("<image> Why?", "As in <image>.", images=["a", "b"]),
        ],
    ),
    (
        "message_is_empty",
        [
            says("<image>", "Message is empty", images=["a"]),
            says("<image>", "A dog.", "And?", "the MESSAGE IS EMPTY.", images=["a"]),
        ],
        [
            says("What if it is sent?", "Then the message is empty."),
            says("<image> message is empty?", "No.", images=["a"]),
            says("<image>", "Me\u017f\u017fage is empty", images=["a"]),  # no letter of ASCII
        ],
    ),
    (
        "repeated_output",
        [says(QUESTION, LONG), says(QUESTION, f"\n {LONG}  "), says(LONG, LONG)],
        [
            says(QUESTION, LONG.upper()),
            says("Red or blue?", "blue"),
            says(LONG, "No.", "Sure?", LONG),  # not the question before it
            says("Why?", LONG, LONG, "Yes."),
        ],
    ),
]


@pytest.mark.parametrize(("reason", "bad", "good"), DROPPED)
def test_a_rule_drops_what_it_names_and_only_that(
    reason: str, bad: list[Row], good: list[Row]
) -> None:
    assert reasons(bad) == [reason] * len(bad)
    assert reasons(good) == [""] * len(good)


def test_the_first_rule_that_applies_gives_the_reason(tmp_path: Path) -> None:
    (tmp_path / "ids").write_text("a")
    words = word_tokenizer(tmp_path / "words")
    failed, nothing = f"{LONG}, message is empty", ("human", "")
    asks, tells = ("human", f"<image>{failed}"), ("gpt", failed)
    later = {  # each row breaks all rules after the one that it is dropped by, where it can
        "no_rounds": (["a"], [("system", f"{failed}</s>")]),
        "unknown_role": (["a"] * 3, [("observer", ""), asks, nothing, tells]),
        "roles_not_alternating": (["a"] * 3, [asks, nothing, tells]),
        "empty_turn": (["a"] * 3, [asks, tells, nothing, tells]),
        "image_count": (["a"] * 3, [asks, tells]),
        "message_is_empty": (["a"], [asks, tells]),
        "repeated_output": (["a"], [asks, ("gpt", LONG)]),
        "benchmark_leakage": (["a"], [asks, ("gpt", LONG.upper())]),
        "too_long": (["b"], [asks, ("gpt", LONG.upper())]),
    }
    leakage = [{"ids": str(tmp_path / "ids")}]
    found = reasons(list(later.values()), leakage=leakage, tokenizer=str(words), max_tokens=1)
    assert found == list(later)


def test_a_repeated_answer_is_judged_from_its_least_length_on() -> None:
    rows = [says("x" * 40, "x" * length) for length in (9, 10)]
    assert reasons(rows, repeated_output_min_chars=10) == ["", "repeated_output"]
    assert reasons(rows, repeated_output_min_chars=None) == ["", ""]
    assert reasons([says("\u00e9" * 40, "\u00e9" * 9)], repeated_output_min_chars=10) == [""]


def test_an_answer_is_compared_with_no_other_rows_question() -> None:
    turns = Turns.of(table([([], [("human", LONG)]), ([], [("gpt", LONG)]), says(LONG, LONG)]))
    assert repeats_question(turns, 30).tolist() == [False, False, True]


@pytest.mark.timeout(10)
def test_texts_of_megabytes_are_judged_like_short_ones() -> None:
    many = "a" * 2_000_000
    for answer, expected in ((many, "repeated_output"), (many[1:] + "b", "")):
        assert reasons([says(many, answer)]) == [expected]
    assert reasons([says(" " * 2_000_000, "\n" * 2_000_000)]) == ["empty_turn"]
    assert reasons([says("</s>" * 500_000, "x")]) == ["mended:end_string"]


def test_more_turns_or_images_than_a_table_can_count_are_dropped() -> None:
    rows = [says(*["x"] * 65_534), says(*["x"] * 65_536)]
    many = [says("<image>" * n, "x", images=["a"] * n) for n in (65_535, 65_536)]
    assert reasons([*rows, *many]) == ["", "too_many_turns"] * 2


# Hash


def test_the_digest_tells_apart_what_only_its_borders_tell_apart() -> None:
    rows = [
        says("<image>ab", "c", images=["x"]),
        says("<image>a", "bc", images=["x"]),
        says("<image>a", "b", "c", "d", images=["x"]),
        says("<image>a", "bcd", images=["x"]),
        says("<image><image>a", "b", images=["xy", "z"]),
        says("<image><image>a", "b", images=["x", "yz"]),
        says("<image>a", "b", images=["y"]),
        ([], [("system", "a"), ("human", "b"), ("gpt", "c")]),
        ([], [("system", "a"), ("human", "bc"), ("gpt", "c")]),
    ]
    digests = clean(table(rows), CleanConfig()).table.column("conversation_hash").to_pylist()
    assert len(set(digests)) == len(rows) == len(digests)
    mended_twin = ([], [("system", ""), ("human", "a</s>"), ("gpt", "b"), ("human", "?")])
    twins = clean(table([mended_twin, says("a< /s>", "b")]), CleanConfig()).table
    first, second = twins.column("conversation_hash").to_pylist()
    assert first == second, "ids and mends do not count, what is trained on does"


def test_the_digest_knows_who_said_what_even_out_of_turn() -> None:
    conversations = table([([], [(role, "a")]) for role in ("system", "human", "gpt")])
    turns, images = Turns.of(conversations), Images.of(conversations)
    assert len(set(hashes(turns, images, np.arange(3)).to_pylist())) == 3
    assert hashes(turns, images, np.array([2])).to_pylist() == [
        hashes(turns, images, np.arange(3))[2].as_py()
    ]


# Stage


def committed(folder: Path, stage: str, parts: Sequence[tuple[Item, Output]]) -> StageDir:
    view = View(stage, CleanConfig(), CleanConfig(), 0, str(folder / stage))
    for item, output in parts:
        commit(view, item, output, seconds=0.0)
    return view.own


def verdicts(rows: pa.Table, stage: str, lost: Sequence[int] = ()) -> pa.Table:
    uids = rows.column("uid").to_numpy()
    found = ["lost" if uid in lost else "" for uid in uids.tolist()]
    return ledger.verdicts(stage, uids, reasons=found)


def test_a_stage_cleans_each_part_of_what_the_stage_before_kept(tmp_path: Path) -> None:
    rows = table([says(f"Why {n}?", "Because.", *["And?"] * (n == 3)) for n in range(6)])
    parts = []
    for part, at in enumerate((0, 3)):
        piece = rows.slice(at, 3)
        name = f"part-{part:05d}"
        output = Output({f"conversations/{name}.parquet": piece}, verdicts(piece, "ingest"))
        parts.append((Item(name, {"part": part}), output))
    before = {"ingest": committed(tmp_path, "ingest", parts)}
    source = SourceConfig(kind="llava_json", files={"a": "a.json"})
    for lost in ([], [11, 15]):
        if lost:
            judged = [
                (item, Output(verdicts=verdicts(rows.slice(at, 3), "filter", lost)))
                for (item, _), at in zip(parts, (0, 3), strict=True)
            ]
            before["filter"] = committed(tmp_path, "filter", judged)
        view = View("clean", CleanConfig(), source, 0, str(tmp_path / "clean"), before)
        markers = [commit(view, item, work(view, item), seconds=0.0) for item in plan(view)]
        found = [store.read_table(path) for path in view.own.files()]
        kept = [uid for uid in range(10, 16) if uid not in lost]
        assert pa.concat_tables(found).column("uid").to_pylist() == kept
        assert [len(one) for one in found] == [one["counts"]["kept"] for one in markers]
        assert [one["notes"]["mended"] for one in markers] == [{}, {"dangling_human_turn": 1}]
