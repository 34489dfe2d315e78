"""ScienceQA: letters exactly as Bunny reads them, and the figure of questions with a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from score_cases import (
    hub_image,
    png,
    questions_of,
    scored,
    write_json,
    write_jsonl,
    write_parquet,
)

from manifests.errors import UserError
from train.benchmarks.scienceqa import BENCHMARK, bunny_letter, choice, lmms_letter

PROBLEMS = {
    "3": {
        "question": "Which is hot?",
        "choices": ["ice", "fire"],
        "answer": 1,
        "hint": "Look.",
        "image": "image.png",
    },
    "5": {
        "question": "Pick a metal.",
        "choices": ["wood", "iron", "wool"],
        "answer": 1,
        "hint": "",
        "image": "image.png",
    },
    "8": {"question": "2 + 2?", "choices": ["4", "5"], "answer": 0, "hint": "", "image": None},
    "9": {"question": "Of train.", "choices": ["a", "b"], "answer": 0, "hint": "", "image": None},
}
TEXT_3 = "Context: Look.\nWhich is hot?\nA. ice\nB. fire"
INSTRUCTION = "\nAnswer with the option's letter from the given choices directly."


def official(folder: Path, *, prompts: bool = True) -> Path:
    write_json(folder / "problems.json", PROBLEMS)
    write_json(folder / "pid_splits.json", {"train": ["9"], "test": ["3", "5", "8"]})
    (folder / "test" / "3").mkdir(parents=True)
    (folder / "test" / "3" / "image.png").write_bytes(png())
    if prompts:
        rows: list[dict[str, Any]] = [
            {"id": "3", "image": "3/image.png", "conversations": turns(f"<image>\n{TEXT_3}", "B")},
            {
                "id": "5",
                "image": "5/image.png",
                "conversations": turns("<image>\nPick a metal.\nA. wood\nB. iron\nC. wool", "B"),
            },
            {"id": "8", "conversations": turns("2 + 2?\nA. 4\nB. 5", "A")},
        ]
        write_json(folder / "bunny_test_CQM-A.json", rows)
    return folder


def turns(asked: str, told: str) -> list[dict[str, str]]:
    return [{"from": "human", "value": asked}, {"from": "gpt", "value": told}]


@pytest.mark.parametrize(
    ("text", "bunny", "lmms"),
    [
        ("B", "B", "B"),
        ("B. fire", "B", "B"),
        ("B. ", "B", "B"),
        ("B.", None, "B"),  # bunny wants a letter alone, or three characters
        ("b", None, "B"),
        (" B\n", None, "B"),
        ("(B)", None, None),
        ("The answer is B.", "B", None),
        ("The answer is B", None, None),  # one more character is needed
        ("The answer is B. The answer is A.", None, None),  # exactly one match
        ("B.fire", None, "B"),
        ("b. fire", None, None),
        ("F. no such letter", None, "F"),
        ("", None, None),
    ],
)
def test_an_answer_is_read_as_written(text: str, bunny: str | None, lmms: str | None) -> None:
    assert bunny_letter(text) == bunny
    assert lmms_letter(text) == lmms


def test_a_letter_beyond_the_choices_is_no_choice() -> None:
    assert choice("C", 2, "bunny") is None
    assert choice("C", 3, "bunny") == 2
    assert choice("The answer is Z.", 5, "bunny") is None


def test_img_accuracy_is_over_questions_with_a_picture(tmp_path: Path) -> None:
    report = scored("scienceqa", official(tmp_path), {"3": "B", "5": "C", "8": "A"})
    assert report.metrics == {"img_accuracy": 50.0, "accuracy": 66.67}  # 1 of 2; 2 of 3
    assert report.items == 3
    assert report.unreadable == report.missing == []
    assert [row["right"] for row in report.tables["Parts"]] == [1, 1]


def test_the_profiles_differ_by_what_they_read(tmp_path: Path) -> None:
    answers = {"3": "b", "5": "B.", "8": "The answer is A."}
    folder = official(tmp_path)
    bunny, lmms = (scored("scienceqa", folder, answers, one) for one in ("bunny", "lmms"))
    assert bunny.metrics == {"img_accuracy": 0.0, "accuracy": 33.33}
    assert list(bunny.unreadable) == ["3", "5"]
    assert lmms.metrics == {"img_accuracy": 100.0, "accuracy": 66.67}
    assert list(lmms.unreadable) == ["8"]


def test_a_missing_answer_is_refused_or_counts_as_wrong(tmp_path: Path) -> None:
    folder = official(tmp_path)
    with pytest.raises(UserError, match=r"1 of 3 questions .* have no answer: 5"):
        scored("scienceqa", folder, {"3": "B", "8": "A"})
    report = scored("scienceqa", folder, {"3": "B", "8": "A"}, allow_missing=True)
    # Upstream leaves "5" out of the denominator and would say 100.
    assert report.metrics["img_accuracy"] == 50.0
    assert list(report.missing) == ["5"]


def test_prompts_are_bunnys_and_text_only_questions_have_no_picture(tmp_path: Path) -> None:
    questions = questions_of("scienceqa", official(tmp_path))
    assert [one.id for one in questions.questions] == ["3", "5", "8"]
    first, _, last = questions.questions
    assert first.prompt == TEXT_3 + INSTRUCTION
    assert first.images[0].read() == png()
    assert last.prompt == "2 + 2?\nA. 4\nB. 5" + INSTRUCTION
    assert last.images == ()
    assert questions.version == "subset of 4241"
    assert set(questions.files) == {"problems.json", "pid_splits.json", "bunny_test_CQM-A.json"}
    assert BENCHMARK.asking.image_mode == "square"  # squashed, never padded
    assert BENCHMARK.asking.max_new_tokens == 1024


def test_without_prompts_they_are_built_to_the_same_text(tmp_path: Path) -> None:
    with_prompts = questions_of("scienceqa", official(tmp_path / "with"))
    built = questions_of("scienceqa", official(tmp_path / "built", prompts=False))
    assert [one.prompt for one in built.questions] == [one.prompt for one in with_prompts.questions]
    assert [one.answer for one in built.questions] == [1, 1, 0]


def test_the_prompts_alone_tell_answers_and_choices(tmp_path: Path) -> None:
    official(tmp_path / "all")
    file = tmp_path / "bunny_test_CQM-A.json"
    file.write_bytes((tmp_path / "all" / file.name).read_bytes())
    report = scored("scienceqa", file, {"3": "C", "5": "B", "8": "A"})
    assert report.metrics == {"img_accuracy": 50.0, "accuracy": 66.67}
    assert list(report.unreadable) == ["3"]  # it has two choices


def test_the_hubs_parquet_is_scored_by_row(tmp_path: Path) -> None:
    rows = [
        {"image": hub_image(png()), "question": "Which is hot?", "choices": ["ice", "fire"]}
        | {"answer": 1, "hint": "Look."},
        {"image": None, "question": "2 + 2?", "choices": ["4", "5"], "answer": 0, "hint": ""},
    ]
    file = write_parquet(tmp_path / "data" / "test-00000-of-00001.parquet", rows)
    write_parquet(tmp_path / "data" / "validation-00000-of-00001.parquet", rows)  # not the test
    questions = questions_of("scienceqa", tmp_path)
    assert [one.id for one in questions.questions] == ["0", "1"]
    assert questions.questions[0].prompt == TEXT_3 + INSTRUCTION
    assert questions.questions[0].images[0].read() == png()
    assert scored("scienceqa", file, {0: "B", 1: "B"}).metrics["img_accuracy"] == 100.0


def test_files_of_different_versions_are_refused(tmp_path: Path) -> None:
    official(tmp_path)
    write_json(tmp_path / "pid_splits.json", {"test": ["3", "77"]})
    with pytest.raises(UserError, match=r"1 questions are not in problems.json, e.g. 77"):
        questions_of("scienceqa", tmp_path)
    write_json(tmp_path / "pid_splits.json", {"test": ["3"]})
    with pytest.raises(UserError, match="2 prompts are to questions outside the test split"):
        questions_of("scienceqa", tmp_path)


def test_all_splits_at_once_are_refused(tmp_path: Path) -> None:
    many = {str(no): PROBLEMS["8"] for no in range(4300)}
    write_json(tmp_path / "problems.json", many)
    with pytest.raises(UserError, match="4300 questions are more than any edition has"):
        questions_of("scienceqa", tmp_path)


def test_an_answer_to_another_question_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="belong to no question"):
        scored("scienceqa", official(tmp_path), {"3": "B", "5": "B", "8": "A", "9": "A"})


def test_rows_as_json_lines_are_read_too(tmp_path: Path) -> None:
    row = {"id": "x", "question": "2 + 2?", "choices": ["4", "5"], "answer": 0, "hint": ""}
    file = write_jsonl(tmp_path / "rows.jsonl", [row | {"image": None}])
    report = scored("scienceqa", file, {"x": "A"})
    assert report.metrics == {"accuracy": 100.0}  # no picture: there is no IMG figure
