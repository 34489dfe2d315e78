"""VQAv2 by hand: the official normaliser, leave-one-out accuracy, and the upload's every id."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from scored_files import (
    answered,
    asked,
    refused,
    score,
    warren,
    write_json,
    write_lines,
    write_parquet,
)

from train.benchmarks import vqa_text, vqav2

WORDS = "\nAnswer the question using a single word or phrase."


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("Yes", "yes"),
        ("The dog", "dog"),
        ("an apple a day", "apple day"),
        ("None", "0"),
        ("two hundred and Ten", "2 hundred and 10"),
        ("dont", "don't"),
        ("couldntve", "couldntve"),  # two apostrophes are missing: not in the table
        ("couldn'tve", "couldn't've"),
        ("Id've", "id've"),  # keys with capitals never apply
        ("somebody'd", "somebodyd"),  # the official table's own slip
        ("black/white", "black white"),  # no blank beside it: a blank instead
        ("black / white", "black white"),
        ("red- blue-green", "red bluegreen"),  # a blank beside one of them: all go
        ("red,white", "red white"),
        ("1,000", "1000"),
        ("1,000-2", "10002"),  # a comma in a number: every mark goes
        ("3.50", "3.50"),
        ("st. john", "st john"),
        ("p.m.", "pm"),
        (".5", ".5"),
        ("what?!", "what"),
        ("new\nyork\tcity ", "new york city"),
        ("it's", "it's"),
        ("women's", "women's"),
        ("a", ""),
    ],
)
def test_the_official_normaliser(text: str, found: str) -> None:
    assert vqa_text.official(text) == found


def test_only_the_first_32_periods_go() -> None:
    assert vqa_text.official("a." * 40) == "a" * 33 + ".a" * 7 + "."


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("women's", "women 's"),
        ("red,white", "redwhite"),
        ("Is it?", "is it"),
        (" The Two\ndogs. ", "2 dogs"),
        ("1,000", "1000"),
    ],
)
def test_the_processor_of_uploads(text: str, found: str) -> None:
    assert vqa_text.m4c(text) == found


def test_the_contraction_table_has_the_official_size() -> None:
    assert len(vqa_text.CONTRACTIONS) == 120
    odd = {key for key, word in vqa_text.CONTRACTIONS.items() if len(key) != len(word) - 1}
    assert odd == {"let's", "she's", "somebody'd"}


@pytest.mark.parametrize(
    ("num_same", "accuracy"), [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (9, 1.0)]
)
def test_each_person_is_left_out_in_turn(num_same: int, accuracy: float) -> None:
    people = ["cat"] * num_same + ["dog"] * (10 - num_same)
    assert vqav2.soft_accuracy("cat", people) == pytest.approx(accuracy)


def test_nothing_is_normalised_when_all_people_wrote_the_same() -> None:
    assert vqav2.soft_accuracy("Yes", ["yes"] * 10) == 0.0
    assert vqav2.soft_accuracy("yes\n", [" yes"] * 10) == 1.0
    assert vqav2.soft_accuracy("Yes", ["yes"] * 9 + ["no"]) == 1.0
    assert vqav2.soft_accuracy("The two", ["2"] * 4 + ["two"] * 6) == 1.0
    # what is uploaded went through the processor; lmms normalises both sides always
    assert vqav2.accuracy_of("Yes.", ["yes"] * 10) == 1.0
    assert vqav2.accuracy_of("Yes.", ["yes"] * 10, "lmms") == 1.0
    assert vqav2.accuracy_of("yes", ["the yes"] * 10) == 0.0
    assert vqav2.accuracy_of("yes", ["the yes"] * 10, "lmms") == 1.0


def test_the_processor_costs_what_the_official_normaliser_would_keep() -> None:
    people = ["women's"] * 5 + ["ladies"] * 5
    assert vqav2.accuracy_of("women's", people) == 0.0
    assert vqav2.accuracy_of("women's", people, "lmms") == 1.0
    flags = ["red,white"] * 5 + ["red"] * 5
    assert (vqav2.accuracy_of("red,white", flags), vqav2.soft_accuracy("red,white", flags)) == (
        0.0,
        1.0,
    )


QUESTIONS = [
    {"question_id": 262148000, "image_id": 262148, "question": "Where is he looking?"},
    {"question_id": 262148001, "image_id": 262148, "question": "How many?"},
    {"question_id": 393225000, "image_id": 393225, "question": "Is it soup?"},
]
PEOPLE = [["down"] * 2 + ["at table"] * 8, ["two"] * 3 + ["3"] * 7, ["yes"] * 10]
KINDS = [("other", "where is"), ("number", "how many"), ("yes/no", "is it")]
TEXTS = ["Down", "2", "Yes"]  # 0.6, 0.9, 1.0


def annotations() -> list[dict[str, Any]]:
    return [
        {
            "question_id": one["question_id"],
            "image_id": one["image_id"],
            "answer_type": kind,
            "question_type": asked_as,
            "multiple_choice_answer": people[0],
            "answers": [
                {"answer": text, "answer_confidence": "yes", "answer_id": at}
                for at, text in enumerate(people, 1)
            ],
        }
        for one, people, (kind, asked_as) in zip(QUESTIONS, PEOPLE, KINDS, strict=True)
    ]


def val(folder: Path) -> Path:
    write_json(
        folder / "v2_OpenEnded_mscoco_val2014_questions.json",
        {"data_subtype": "val2014", "questions": QUESTIONS},
    )
    return write_json(
        folder / "v2_mscoco_val2014_annotations.json",
        {"data_subtype": "val2014", "annotations": annotations()},
    )


@pytest.mark.parametrize("layout", ["folder", "questions", "annotations", "alone", "parquet"])
def test_every_layout_of_val_gives_the_mean(tmp_path: Path, layout: str) -> None:
    questions = tmp_path / "vqav2"
    if layout == "parquet":
        rows = [
            {**one, **told, "image": b"pixels"}
            for one, told in zip(QUESTIONS, annotations(), strict=True)
        ]
        write_parquet(questions / "data" / "validation-00000-of-00001.parquet", rows)
    else:
        told = val(questions)
        asked_file = questions / "v2_OpenEnded_mscoco_val2014_questions.json"
        if layout == "alone":
            asked_file.unlink()
        questions = {"annotations": told, "questions": asked_file}.get(layout, questions)
    ids = [one["question_id"] for one in QUESTIONS]
    answers = write_lines(tmp_path / "a.jsonl", answered(ids, TEXTS))
    found = score("vqav2", questions, answers)
    assert found["metrics"]["accuracy"] == 83.33  # (0.6 + 0.9 + 1.0) / 3
    # "Yes" against ten "yes", and nothing else, is lost without the processor
    assert found["metrics"]["accuracy_of_raw_text"] == 50.0
    kinds = {row["answer_type"]: row["accuracy"] for row in found["tables"]["answer_type"]}
    assert kinds == {"number": 90.0, "other": 60.0, "yes/no": 100.0}
    assert found["version"] == "val2014, subset of 3 questions"
    read = vqav2.read(str(questions)).questions
    if layout == "parquet":
        assert read[0].images[0].read() == b"pixels"
    elif layout != "alone":
        assert read[0].prompt == "Where is he looking?" + WORDS
        assert str(read[0].images[0]).count("val2014/COCO_val2014_000000262148.jpg") == 1


def test_a_missing_answer_is_refused_or_wrong(tmp_path: Path) -> None:
    val(tmp_path / "v")
    answers = write_lines(tmp_path / "a.jsonl", answered([262148000], ["down"]))
    assert "262148001, 393225000" in refused("vqav2", tmp_path / "v", answers)
    found = score("vqav2", tmp_path / "v", answers, "--allow-missing")
    assert (found["metrics"]["accuracy"], len(found["missing"])) == (20.0, 2)


def test_answers_to_other_questions_than_annotated_are_refused(tmp_path: Path) -> None:
    path = val(tmp_path)
    write_json(path, {"annotations": annotations()[1:]})
    answers = write_lines(tmp_path / "a.jsonl", answered([1], ["x"]))
    assert "does not have the answers" in refused("vqav2", tmp_path, answers)


def splits_of_test(folder: Path) -> Path:
    rows = [
        {"question_id": number, "image": f"COCO_test2015_{number:012}.jpg", "text": f"What{WORDS}"}
        for number in (5, 3, 9, 7)
    ]
    write_lines(folder / "bunny_vqav2_mscoco_test-dev2015.jsonl", [rows[1], rows[2]])
    return write_lines(folder / "bunny_vqav2_mscoco_test2015.jsonl", rows)


def test_an_upload_has_every_id_of_test2015_in_file_order(tmp_path: Path) -> None:
    questions = splits_of_test(tmp_path)
    answers = write_lines(tmp_path / "a.txt", answered([9, 3], ["The Women's", "Yes."]))
    out = tmp_path / "upload.json"
    run = warren("submission", "vqav2", *asked(questions, answers), "--out", str(out))
    assert run.exit_code == 0, run.output
    assert json.loads(out.read_text()) == [
        {"question_id": 5, "answer": ""},
        {"question_id": 3, "answer": "yes"},
        {"question_id": 9, "answer": "women 's"},
        {"question_id": 7, "answer": ""},
    ]
    again = warren("submission", "vqav2", *asked(questions, answers), "--out", str(out))
    assert (again.exit_code, "is there already" in again.stderr) == (2, True)


@pytest.mark.parametrize("given", ["test-dev", "missing", "suffix"])
def test_an_upload_that_the_server_would_refuse_is_not_written(tmp_path: Path, given: str) -> None:
    questions = splits_of_test(tmp_path)
    if given == "test-dev":
        questions = tmp_path / "bunny_vqav2_mscoco_test-dev2015.jsonl"
    ids = [3] if given == "missing" else [3, 9]
    answers = write_lines(tmp_path / "a.txt", answered(ids, ["yes"] * len(ids)))
    out = tmp_path / ("upload.xlsx" if given == "suffix" else "upload.json")
    run = warren("submission", "vqav2", *asked(questions, answers), "--out", str(out))
    assert (run.exit_code, out.exists()) == (2, False)


def test_a_split_without_public_answers_is_not_scored(tmp_path: Path) -> None:
    splits_of_test(tmp_path)
    questions = tmp_path / "bunny_vqav2_mscoco_test-dev2015.jsonl"
    answers = write_lines(tmp_path / "a.txt", answered([3, 9], ["yes", "no"]))
    assert "warren submission vqav2" in refused("vqav2", questions, answers)
