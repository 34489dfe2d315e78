"""SEED-Bench-1: a letter exactly, or the first character; all, image and video kept apart."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from score_cases import hub_image, png, questions_of, scored, write_json, write_jsonl, write_parquet

from manifests.errors import UserError
from train.benchmarks.editions import edition
from train.benchmarks.seed import BENCHMARK, EDITIONS, answered, submission

TYPES = {"Scene Understanding": 1, "Text Understanding": 9, "Action Prediction": 11}


def row(name: Any, answer: str, type_id: int = 1, **more: Any) -> dict[str, Any]:
    is_video = type_id >= 10
    return {
        "question_id": name,
        "question": "What is there?",
        "choice_a": "a cat",
        "choice_b": "a dog",
        "choice_c": "NA",
        "choice_d": "None",
        "answer": answer,
        "data_id": f"clip_{name}" if is_video else f"{name}.jpg",
        "data_type": "video" if is_video else "image",
        "question_type_id": type_id,
        **({"segment": [1.0, 2.0]} if is_video else {}),
        **more,
    }


PROMPT = (
    "What is there?\nA. a cat\nB. a dog\nC. NA\nD. None\n"
    "Answer with the option's letter from the given choices directly."
)


def official(folder: Path, rows: list[dict[str, Any]]) -> Path:
    return write_json(folder / "SEED-Bench.json", {"questions": rows, "question_type": TYPES})


FOUR = [row("101669", "A"), row("101670", "B", 9), row("v1", "C", 11), row("v2", "D", 11)]


@pytest.mark.parametrize(
    ("text", "bunny", "lmms"),
    [
        ("A", "A", "A"),
        ("A.", None, "A"),
        ("a", None, "A"),
        (" A", None, "A"),
        ("A. a cat", None, "A"),
        ("Dogs", None, "D"),  # the first character is all that counts
        ("E", None, None),
        ("AB", None, "A"),
        ("", None, None),
    ],
)
def test_the_letter_of_an_answer(text: str, bunny: str | None, lmms: str | None) -> None:
    assert answered(text, "bunny") == bunny
    assert answered(text, "lmms") == lmms


def test_all_image_and_video_are_averages_over_questions(tmp_path: Path) -> None:
    file = official(tmp_path, [*FOUR, row("101671", "A")])
    # Ids are compared as numbers where they are numbers: 101669 answers "101669".
    texts = {101669: "A", 101670: "A", "v1": "C", "v2": "D", 101671: "A"}
    report = scored("seed", file, texts)
    assert report.metrics == {"all": 80.0, "image": 66.67, "video": 100.0}
    assert report.items == 5
    assert report.tables["Types"] == [
        {"type": "Scene Understanding", "id": 1, "items": 2, "accuracy": 100.0},
        # None right and none missing: upstream stops with KeyError here.
        {"type": "Text Understanding", "id": 9, "items": 1, "accuracy": 0.0},
        {"type": "Action Prediction", "id": 11, "items": 2, "accuracy": 100.0},
    ]


def test_the_profiles_differ_on_whole_answers(tmp_path: Path) -> None:
    file = official(tmp_path, FOUR)
    texts = {"101669": "A", "101670": "b", "v1": "C. NA", "v2": " D"}
    bunny, lmms = (scored("seed", file, texts, one) for one in ("bunny", "lmms"))
    assert bunny.metrics == {"all": 25.0, "image": 50.0, "video": 0.0}
    assert list(bunny.unreadable) == ["101670", "v1", "v2"]
    assert lmms.metrics == {"all": 100.0, "image": 100.0, "video": 100.0}


def test_a_missing_answer_is_wrong_when_allowed(tmp_path: Path) -> None:
    file = official(tmp_path, FOUR)
    texts = {"101669": "A", "101670": "B", "v1": "C"}
    with pytest.raises(UserError, match="v2"):
        scored("seed", file, texts)
    report = scored("seed", file, texts, allow_missing=True)
    assert report.metrics["all"] == 75.0
    assert list(report.missing) == ["v2"]


def test_prompts_are_bunnys_and_a_video_is_its_middle_frame(tmp_path: Path) -> None:
    file = official(tmp_path, FOUR)
    frames = tmp_path / "SEED-Bench-video-image"
    frames.mkdir()
    (frames / "11_v1.png").write_bytes(png())
    questions = questions_of("seed", tmp_path)
    assert {one.prompt for one in questions.questions} == {PROMPT}
    assert questions.questions[2].images[0].read() == png()
    rows = [
        {"question_id": 101669, "image": "SEED-Bench-image/x", "text": f"{PROMPT} !"}
        | {"category": 1}
    ]
    write_jsonl(tmp_path / "bunny-seed-bench.jsonl", rows)
    with_prompts = questions_of("seed", file)
    assert with_prompts.questions[0].prompt == f"{PROMPT} !"  # as the file has it
    assert with_prompts.questions[1].prompt == PROMPT
    assert set(with_prompts.files) == {"SEED-Bench.json", "bunny-seed-bench.jsonl"}
    assert BENCHMARK.asking.max_new_tokens == 128


def test_the_hubs_parquet_shows_the_middle_frame(tmp_path: Path) -> None:
    frames = [png((no, 0, 0)) for no in range(8)]
    rows = [
        row("1", "A", image=[hub_image(png())]),
        row("2", "B", 11, image=[hub_image(frame) for frame in frames]),
    ]
    write_parquet(tmp_path / "test-00000-of-00001.parquet", rows)
    questions = questions_of("seed", tmp_path)
    assert questions.questions[0].images[0].read() == png()
    assert questions.questions[1].images[0].read() == frames[3]  # (8 - 1) // 2
    assert questions.questions[1].category == "Action Prediction"
    report = scored("seed", tmp_path, {1: "A", 2: "A"})
    assert report.metrics == {"all": 50.0, "image": 100.0, "video": 0.0}


def test_image_questions_alone_say_so(tmp_path: Path) -> None:
    file = official(tmp_path, FOUR[:2])
    report = scored("seed", file, {"101669": "A", "101670": "B"})
    assert report.metrics == {"all": 100.0, "image": 100.0}
    assert any("no video questions" in note for note in report.notes)


def test_editions_are_told_by_their_counts() -> None:
    assert "5009 video" in edition("SEED-Bench", 14233 + 5009, EDITIONS)[0]
    version, notes = edition("SEED-Bench", 14233 + 3757, EDITIONS)
    assert "3757 video" in version
    assert notes  # its figure of all is not the published one
    assert edition("SEED-Bench", 10, EDITIONS)[0] == "subset of 19242"
    with pytest.raises(UserError, match="more than any edition"):
        edition("SEED-Bench", 24371, EDITIONS)


def test_the_upload_has_ids_as_written_in_file_order(tmp_path: Path) -> None:
    questions = questions_of("seed", official(tmp_path, FOUR))
    texts = {"101669": "A", "101670": None, "v1": "C", "v2": "line\nbreak\t"}
    lines = submission(questions, texts).decode().splitlines()
    assert [json.loads(line) for line in lines] == [
        {"question_id": "101669", "prediction": "A"},
        {"question_id": "101670", "prediction": ""},
        {"question_id": "v1", "prediction": "C"},
        {"question_id": "v2", "prediction": "line\nbreak\t"},
    ]


def test_prompts_without_answers_and_other_seed_benches_are_refused(tmp_path: Path) -> None:
    prompts = write_jsonl(tmp_path / "bunny-seed-bench.jsonl", [{"question_id": 1, "text": "?"}])
    with pytest.raises(UserError, match="Put SEED-Bench.json here"):
        questions_of("seed", prompts)
    second = row("9", "A") | {"data_type": "Image Generation"}
    with pytest.raises(UserError, match="is of type 'Image Generation'"):
        questions_of("seed", official(tmp_path / "two", [second]))
    with pytest.raises(UserError, match="two questions have the id 1"):
        questions_of("seed", official(tmp_path / "twice", [row("1", "A"), row(1, "B")]))
