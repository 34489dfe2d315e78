"""The clean stage against a reading of its rules row by row, and one worked example per rule."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers

from curate.rows.clean import CleanConfig, clean, identity, plan, work
from curate.rows.mend import MENDS, mend
from curate.source_config import SourceConfig
from manifests import ledger, store
from manifests.errors import UserError
from manifests.schemas import CLEANED, CONVERSATIONS, VERDICTS, conform
from manifests.work import Item, Output, StageDir, View, commit

Turn = tuple[str, str]
Row = tuple[list[str], list[Turn]]
LONG = "it is a long answer, of more than thirty characters"
MARKERS = CleanConfig().end_strings


def table(rows: Sequence[Row]) -> pa.Table:
    """Return CONVERSATIONS with uids 10, 11, ..."""
    found = [
        {
            "uid": uid,
            "images": images,
            "turns": [{"role": role, "text": text} for role, text in turns],
        }
        for uid, (images, turns) in enumerate(rows, start=10)
    ]
    return conform(pa.Table.from_pylist(found, CONVERSATIONS), CONVERSATIONS)


def rows_of(conversations: pa.Table) -> list[Row]:
    return [
        (row["images"], [(turn["role"], turn["text"]) for turn in row["turns"]])
        for row in conversations.to_pylist()
    ]


def reasons(rows: Sequence[Row], **config: Any) -> list[str]:
    """Return each row's reason; the accounts of the stage are checked on the way."""
    made = clean(table(rows), CleanConfig.load(config, where="recipe.clean"))
    assert made.table.schema.equals(CLEANED)
    assert made.verdicts.schema.equals(VERDICTS)
    found = made.verdicts.to_pylist()
    assert [one["uid"] for one in found] == list(range(10, 10 + len(rows)))
    kept = [(one["uid"], one["reason"].removeprefix("mended:")) for one in found if one["keep"]]
    assert kept == [(one["uid"], one["mended"]) for one in made.table.to_pylist()]
    return [one["reason"] for one in found]


def says(*texts: str, images: Sequence[str] = ()) -> Row:
    """Return a row whose turns are by human and gpt in turn."""
    return list(images), [(("human", "gpt")[at % 2], text) for at, text in enumerate(texts)]


# The rules, row by row


def bare(text: str) -> str:
    return text.replace("<image>", "").strip()


def mended(turns: list[Turn], end_strings: Sequence[str]) -> tuple[list[str], list[Turn]]:
    """Return the names of the mends that a conversation needs, and its mended turns."""
    names, turns = [], list(turns)
    while turns and turns[0][0] == "system" and not bare(turns[0][1]):
        names, turns = ["blank_system_turn"], turns[1:]
    first = 1 if turns and turns[0][0] == "system" else 0
    if len(turns) > first and turns[first][0] == "gpt":
        names.append("leading_gpt_turn")
        del turns[first]
    if turns and turns[-1][0] == "human":
        names.append("dangling_human_turn")
        while turns and turns[-1][0] == "human":
            turns.pop()
    if any(end in text for _, text in turns for end in end_strings):
        names.append("end_string")
        turns = [(role, broken(text, end_strings)) for role, text in turns]
    return names, turns


def broken(text: str, end_strings: Sequence[str]) -> str:
    for end in end_strings:
        while end in text:
            text = text.replace(end, f"{end[0]} {end[1:]}")
    return text


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
good_turns = st.lists(texts, min_size=1, max_size=6).map(lambda found: says(*found)[1])
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


# Mends


SYSTEM, ASK, TELL = ("system", "Be brief."), ("human", "Why?"), ("gpt", "Because.")
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


def test_more_turns_or_images_than_a_table_can_count_are_dropped() -> None:
    rows = [says(*["x"] * 65_534), says(*["x"] * 65_536)]
    many = [says("<image>" * n, "x", images=["a"] * n) for n in (65_535, 65_536)]
    assert reasons([*rows, *many]) == ["", "too_many_turns"] * 2


# Files


def test_benchmark_images_are_found_by_path_name_stem_and_last_piece(tmp_path: Path) -> None:
    ids = tmp_path / "ids.txt"
    ids.write_text("\ufeffcoco/a.jpg\r\n b.jpg \n\nc.tar\n000042\n", encoding="utf-8")
    leaked = ["coco/a.jpg", "coco/b.jpg", "b.jpg", "coco/c.tar.jpg", "coco/COCO_val_000042.png"]
    leaked += ["000042", "x/000042"]
    fine = ["gqa/a.jpg", "coco/bb.jpg", "c.jpg", "coco/000042_1.jpg", "coco/1000042.jpg", "x/"]
    rows = [says("<image>", "Yes.", images=[image]) for image in [*leaked, *fine]]
    expected = ["benchmark_leakage"] * len(leaked) + [""] * len(fine)
    assert reasons(rows, leakage=[{"ids": str(ids)}]) == expected
    second = says("<image><image>", "Yes.", images=[fine[0], leaked[0]])
    text_only = says("coco/a.jpg", "Yes.")
    assert reasons([second, text_only], leakage=[{"ids": str(ids)}]) == ["benchmark_leakage", ""]


def test_benchmark_images_are_looked_for_only_under_their_prefix(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).write_text(name)
    lists = [
        {"ids": str(tmp_path / "one"), "under": "coco/"},
        {"ids": str(tmp_path / "two"), "under": "vg/"},
    ]
    images = ["coco/one.jpg", "vg/one.jpg", "coco/two.jpg", "vg/two.jpg", "x/coco/one.jpg"]
    found = reasons([says("<image>", "Yes.", images=[one]) for one in images], leakage=lists)
    assert found == ["benchmark_leakage", "", "", "benchmark_leakage", ""]


def word_tokenizer(folder: Path, *, words: Sequence[str] = ("a", "b")) -> Path:
    """Write a tokenizer of one token a word that would cut at 3 and pad to 8, were it let."""
    vocabulary = {word: number for number, word in enumerate(["?", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))  # noqa: S106 - no password
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.enable_truncation(3)
    tokenizer.enable_padding(length=8)
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def test_rows_of_too_many_tokens_are_dropped_with_their_number(tmp_path: Path) -> None:
    folder = word_tokenizer(tmp_path / "words")
    rows = [
        says("a b a", "b b"),
        says("a b a b", "b b"),
        says("<image> a", "b", images=["i"]),
        says("<image><image>\na", "b", images=["i", "i"]),
        says("a b a b a b", ""),
        says("a", "b </s>"),  # its space makes the marker two words: 5 tokens with a, b and c
        says("a", "b </s> a a a"),
    ]
    for tokenizer in (folder, folder / "tokenizer.json"):
        config = CleanConfig(tokenizer=str(tokenizer), max_tokens=5, image_tokens=3)
        found = clean(table(rows), config).verdicts.to_pylist()
        assert [(one["reason"], one["score"], one["cutoff"]) for one in found] == [
            ("", None, None),
            ("too_long", 6.0, 5.0),
            ("", None, None),
            ("too_long", 8.0, 5.0),
            ("empty_turn", None, None),
            ("mended:end_string", None, None),
            ("too_long", 7.0, 5.0),
        ]


def test_a_moved_list_or_tokenizer_is_the_same_input_and_a_changed_one_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def decided(folder: Path, *words: str) -> str:
        folder.mkdir()
        (folder / "ids.txt").write_text("\n".join(words))
        word_tokenizer(folder / folder.name, words=words)
        values = {"tokenizer": folder.name, "max_tokens": 5}
        values |= {"leakage": [{"ids": "ids.txt", "under": "coco"}]}
        monkeypatch.chdir(folder)
        config = CleanConfig.load(values, where="recipe.clean").located()
        assert config.leakage[0].ids == str(folder / "ids.txt")
        assert config.tokenizer == str(folder / folder.name)
        monkeypatch.chdir(tmp_path)
        return json.dumps([config.canonical(), identity(config)], sort_keys=True)

    first = decided(tmp_path / "here", "a", "b")
    assert decided(tmp_path / "there", "a", "b") == first
    assert decided(tmp_path / "other", "a", "c") != first
    assert str(tmp_path) not in first


def test_a_tokenizer_of_the_hub_is_known_by_its_name_and_an_unused_one_not_at_all() -> None:
    config = CleanConfig(tokenizer="microsoft/phi-2", max_tokens=2048)
    assert config.located() == config
    assert identity(config) == {"leakage": [], "tokenizer": "microsoft/phi-2"}
    assert identity(CleanConfig(tokenizer="microsoft/phi-2"))["tokenizer"] is None


def test_a_file_that_is_missing_or_not_what_it_should_be_is_named(tmp_path: Path) -> None:
    missing = CleanConfig.load({"leakage": [{"ids": str(tmp_path / "no")}]}, where="r")
    with pytest.raises(UserError, match=r"leakage\.ids '.*no' cannot be read"):
        identity(missing)
    with pytest.raises(UserError, match=r"leakage\.ids '.*no' cannot be read"):
        clean(table([]), missing)
    (tmp_path / "latin").write_bytes(b"caf\xe9")
    with pytest.raises(UserError, match="UTF-8 text file"):
        reasons([], leakage=[{"ids": str(tmp_path / "latin")}])
    with pytest.raises(UserError, match=r"has no tokenizer\.json"):
        identity(CleanConfig(tokenizer=str(tmp_path), max_tokens=5))
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match="cannot be loaded"):
        reasons([says("a", "b")], tokenizer=str(tmp_path), max_tokens=5)


ABSURD: list[tuple[dict[str, Any], str]] = [
    ({"max_tokens": 5}, "needs tokenizer"),
    ({"max_tokens": 0, "tokenizer": "x"}, r"clean\.max_tokens is 0"),
    ({"image_tokens": -1}, r"clean\.image_tokens is -1"),
    ({"repeated_output_min_chars": 0}, r"clean\.repeated_output_min_chars is 0"),
    ({"end_strings": ["x"]}, "2 or more characters"),
    ({"end_strings": ["end of text"]}, "none of them a space"),
    ({"end_strings": ["image"]}, "would break <image>"),
    ({"end_strings": ["x<image>"]}, "would break <image>"),
    ({"leakage": [{"under": "coco"}]}, r"clean\.leakage\.0\.ids is missing"),
    ({"leakage": [{"idz": "coco"}]}, r"Did you mean 'ids'|ids is missing"),
    ({"end_string": []}, "Did you mean 'end_strings'"),
]


@pytest.mark.parametrize(("config", "message"), ABSURD)
def test_a_config_that_makes_no_sense_is_refused(config: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        CleanConfig.load(config, where="recipe.clean")


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
