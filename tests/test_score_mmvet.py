"""MM-Vet: the upload for a judge, and averages of the grades it gave."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from score_cases import hub_image, png, questions_of, scored, write_json, write_jsonl, write_parquet

from manifests.errors import UserError
from train.benchmarks.mmvet import BENCHMARK, submission

QUESTIONS = {
    "v1_0": {"imagename": "v1_0.png", "question": "x?", "answer": "-1 <AND> -5"}
    | {"imagesource": "a", "capability": ["ocr", "math"]},
    "v1_1": {"imagename": "v1_1.jpg", "question": "Who?", "answer": "cat"}
    | {"imagesource": "a", "capability": ["rec"]},
    "v1_2": {"imagename": "v1_2.png", "question": "Where?", "answer": "left"}
    | {"imagesource": "a", "capability": ["rec", "spat", "ocr"]},
}


def entry(*grades: float) -> dict[str, Any]:
    names = ["gpt-4-0613"] * len(grades)
    return {"model": names, "content": [str(one) for one in grades], "score": list(grades)}


GRADES = {"v1_0": entry(1.0, 0.5), "v1_1": entry(0.2, 0.3), "v1_2": entry(0.0, 0.1)}
# Run 1: (1 + .2 + 0) / 3 = .4. Run 2: (.5 + .3 + .1) / 3 = .3. So 40 and 30.
METRICS = {"score": 35.0, "std": 5.0}
CAPABILITIES = {
    "rec": 15.0,  # runs (.2 + 0) / 2 and (.3 + .1) / 2
    "ocr": 40.0,  # (1 + 0) / 2 and (.5 + .1) / 2
    "spat": 5.0,
    "math": 75.0,
}


def official(folder: Path) -> Path:
    (folder / "images").mkdir(parents=True)
    (folder / "images" / "v1_1.jpg").write_bytes(png())
    return write_json(folder / "mm-vet.json", QUESTIONS)


def test_grades_are_averaged_over_questions_then_runs(tmp_path: Path) -> None:
    answers = write_json(tmp_path / "m_gpt-4-0613-grade-2runs.json", GRADES)
    report = scored("mmvet", official(tmp_path / "set"), answers)
    assert report.metrics == METRICS
    assert {row["capability"]: row["score"] for row in report.tables["Capabilities"]} == (
        CAPABILITIES
    )
    assert report.tables["Runs"] == [{"run": 1, "score": 40.0}, {"run": 2, "score": 30.0}]
    assert any("2 runs" in note for note in report.notes)
    assert any("averages of 5 runs" in note for note in report.notes)


def test_grades_may_lie_beside_the_questions(tmp_path: Path) -> None:
    file = official(tmp_path)
    write_json(tmp_path / "m_gpt-4-0613-grade-2runs.json", GRADES)
    for given in (file, tmp_path):
        report = scored("mmvet", given, {0: "5", 1: "a cat", 2: "left"})
        assert report.metrics == METRICS
    lmms = scored("mmvet", file, {0: "5", 1: "a cat", 2: "left"}, "lmms")
    assert lmms.metrics == METRICS
    assert any("do not compare" in note for note in lmms.notes)


def test_one_decimal(tmp_path: Path) -> None:
    grades = {"v1_0": entry(0.1), "v1_1": entry(0.1), "v1_2": entry(0.0)}
    answers = write_json(tmp_path / "grades.json", grades)
    assert scored("mmvet", official(tmp_path / "set"), answers).metrics["score"] == 6.7


def test_without_grades_it_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="needs a judge's grades") as told:
        scored("mmvet", official(tmp_path), {0: "5", 1: "a cat", 2: "left"})
    assert "submission" in told.value.fix


def test_grades_must_be_complete_and_in_range(tmp_path: Path) -> None:
    file = official(tmp_path / "set")
    answers = write_json(tmp_path / "a.json", GRADES | {"v1_2": entry(0.5)})
    with pytest.raises(UserError, match="questions have 1 and 2 grades"):
        scored("mmvet", file, answers)
    answers = write_json(tmp_path / "b.json", GRADES | {"v1_2": entry(0.5, 1.5)})
    with pytest.raises(UserError, match="v1_2 has no grades"):
        scored("mmvet", file, answers)
    answers = write_json(tmp_path / "c.json", {name: GRADES[name] for name in ("v1_0", "v1_1")})
    with pytest.raises(UserError, match="v1_2"):
        scored("mmvet", file, answers)
    report = scored("mmvet", file, answers, allow_missing=True)
    assert report.metrics["score"] == 33.3  # (40 + 80 / 3) / 2: "v1_2" counts as 0
    assert list(report.missing) == ["v1_2"]


def test_the_upload_has_mm_vets_ids(tmp_path: Path) -> None:
    questions = questions_of("mmvet", official(tmp_path))
    assert [one.id for one in questions.questions] == ["v1_0", "v1_1", "v1_2"]
    texts = {"v1_0": "5", "v1_1": "tab\tand\nline", "v1_2": None}
    assert json.loads(submission(questions, texts)) == {
        "v1_0": "5",
        "v1_1": "tab\tand\nline",
        "v1_2": "",
    }


def test_the_question_is_asked_bare(tmp_path: Path) -> None:
    questions = questions_of("mmvet", official(tmp_path))
    assert [one.prompt for one in questions.questions] == ["x?", "Who?", "Where?"]
    assert questions.questions[1].images[0].read() == png()
    assert BENCHMARK.asking.max_new_tokens == 1024
    assert BENCHMARK.asking.image_mode == "pad"
    assert questions.version == "subset of 218"


def test_bunnys_lines_and_the_hubs_parquet(tmp_path: Path) -> None:
    rows = [{"question_id": 0, "image": "v1_0.png", "text": "x?", "category": "default"}]
    lines = questions_of("mmvet", write_jsonl(tmp_path / "bunny-mm-vet.jsonl", rows))
    assert (lines.questions[0].id, lines.questions[0].prompt) == ("v1_0", "x?")
    hub = [{"question_id": "v1_0", "question": "x?", "answer": "5", "capability": "ocr,math"}]
    file = write_parquet(tmp_path / "test-0.parquet", [hub[0] | {"image": hub_image(png())}])
    found = questions_of("mmvet", file).questions[0]
    assert found.details["capabilities"] == ("ocr", "math")
    assert found.images[0].read() == png()
