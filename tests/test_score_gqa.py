"""GQA by hand: final periods and case alone are forgiven."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from scored_files import answered, refused, score, write_json, write_lines, write_parquet

from train.benchmarks import gqa

WORDS = "\nAnswer the question using a single word or phrase."


@pytest.mark.parametrize(
    ("text", "answer", "bunny", "lmms"),
    [
        ("no", "no", True, True),
        ("No...", "no", True, True),
        ("T-shirt", "t-shirt", True, True),
        ("tshirt", "t-shirt", False, True),
        ("no!", "no", False, True),
        ("a dog", "dog", False, False),
        ("dogs", "dog", False, False),
        (" dog", "dog", False, False),
        ("dog.\n", "dog", False, False),
        (".dog", "dog", False, True),
        ("", "dog", False, False),
        ("a,b", "ab", False, True),
    ],
)
def test_an_answer_is_right_when_it_is_equal(
    text: str, answer: str, bunny: bool, lmms: bool
) -> None:
    assert gqa.is_right(text, answer) is bunny
    assert gqa.is_right(text, answer, "lmms") is lmms


def told(question: str, answer: str, structural: str, balanced: bool = True) -> dict[str, Any]:
    return {
        "question": question,
        "answer": answer,
        "imageId": "n161313",
        "isBalanced": balanced,
        "types": {"structural": structural, "semantic": "obj", "detailed": "x"},
        "groups": {"global": None, "local": "1"},
    }


QUESTIONS = {
    "201": told("Is it overcast?", "no", "verify"),
    "202": told("Who is wearing it?", "woman", "query"),
    "203": told("Is it red or blue?", "t-shirt", "choose"),
    "204": told("What is it?", "car", "query"),
    "205": told("Is it there?", "yes", "exist", balanced=False),
}
TEXTS = ["No.", "Woman", "t shirt", "cars", "no"]  # right: 201, 202; 205 does not count


@pytest.mark.parametrize("layout", ["file", "folder", "beside", "rows", "parquet"])
def test_every_layout_gives_the_mean_over_balanced_questions(tmp_path: Path, layout: str) -> None:
    questions = tmp_path / "gqa"
    official = questions / "testdev_balanced_questions.json"
    if layout == "parquet":
        parquet(questions)
    elif layout == "rows":
        write_lines(
            questions / "mine.jsonl", [{"id": name, **one} for name, one in QUESTIONS.items()]
        )
    else:
        write_json(official, QUESTIONS)
    if layout == "beside":
        rows = [
            {"question_id": name, "image": "n161313.jpg", "text": one["question"] + WORDS}
            for name, one in QUESTIONS.items()
        ]
        write_lines(questions / "bunny_gqa_testdev_balanced.jsonl", rows)
    answers = write_lines(tmp_path / "a.jsonl", answered(QUESTIONS, TEXTS))
    found = score("gqa", official if layout == "file" else questions, answers)
    assert found["metrics"] == {"accuracy": 50.0, "binary": 50.0, "open": 50.0}
    assert found["items"] == 4
    assert {row["structural"]: row["accuracy"] for row in found["tables"]["structural"]} == {
        "choose": 0.0,
        "query": 50.0,
        "verify": 100.0,
    }
    assert found["columns"] == {"GQA": 50.0}
    read = gqa.read(str(questions)).questions
    assert {one.prompt for one in read} == {one["question"] + WORDS for one in QUESTIONS.values()}
    if layout == "parquet":
        assert read[0].images[0].read() == b"pixels"


def parquet(folder: Path) -> None:
    rows = [{"id": name, **one} for name, one in QUESTIONS.items()]
    write_parquet(folder / "testdev_balanced_instructions" / "testdev-00000-of-00001.parquet", rows)
    images = [{"id": "n161313", "image": b"pixels"}]
    write_parquet(folder / "val_balanced_instructions" / "val-00000-of-00001.parquet", rows[:1])
    write_parquet(folder / "testdev_balanced_images" / "testdev-00000-of-00001.parquet", images)


def test_lmms_forgives_punctuation(tmp_path: Path) -> None:
    questions = write_json(tmp_path / "testdev_balanced_questions.json", QUESTIONS)
    answers = write_lines(
        tmp_path / "a.jsonl", answered(QUESTIONS, ["no!", "woman", "tshirt", "car", "yes"])
    )
    assert score("gqa", questions, answers, "--profile", "lmms")["metrics"]["accuracy"] == 100.0
    assert score("gqa", questions, answers)["metrics"]["accuracy"] == 50.0


def test_the_jsonl_without_answers_and_of_another_split_are_refused(tmp_path: Path) -> None:
    rows = [{"question_id": "999", "image": "n1.jpg", "text": "What?"}]
    questions = write_lines(tmp_path / "bunny_gqa_testdev_balanced.jsonl", rows)
    answers = write_lines(tmp_path / "a.jsonl", answered(["999"], ["dog"]))
    assert "testdev_balanced_questions.json" in refused("gqa", questions, answers)
    write_json(tmp_path / "testdev_balanced_questions.json", QUESTIONS)
    assert "999" in refused("gqa", questions, answers)


def test_a_missing_answer_is_refused_or_wrong(tmp_path: Path) -> None:
    questions = write_json(tmp_path / "testdev_balanced_questions.json", QUESTIONS)
    answers = write_lines(tmp_path / "a.jsonl", answered(QUESTIONS, TEXTS)[1:])
    assert "201" in refused("gqa", questions, answers)
    found = score("gqa", questions, answers, "--allow-missing")
    assert (found["metrics"]["accuracy"], found["missing"]) == (25.0, ["201"])
