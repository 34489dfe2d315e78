"""Conversations for tests of the clean stage, and what its mends should make of them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
from tokenizers import Tokenizer, models, pre_tokenizers

from curate.rows.clean import CleanConfig, clean
from manifests.schemas import CLEANED, CONVERSATIONS, VERDICTS, conform

Turn = tuple[str, str]
Row = tuple[list[str], list[Turn]]
LONG = "it is a long answer, of more than thirty characters"
SYSTEM, ASK, TELL = ("system", "Be brief."), ("human", "Why?"), ("gpt", "Because.")
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
