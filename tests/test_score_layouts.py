"""`warren score` on layouts that people make of the files: no pictures, other names, other ids."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from scored_files import answered, asked, refused, score, warren, write_json, write_lines

from manifests.errors import UserError
from train.benchmarks.table import MODULES, benchmark

ASKED = "Is there a dog in the image?"


def pope_files(folder: Path) -> Path:
    """Two questions of the same numbers and images in each of the three official files."""
    for category in ("adversarial", "popular", "random"):
        rows = [
            {"question_id": no, "image": f"{no}.jpg", "text": ASKED, "label": label}
            for no, label in ((1, "yes"), (2, "no"))
        ]
        write_lines(folder / f"coco_pope_{category}.json", rows)
    return folder


def test_pope_s_official_ids_are_told_apart_by_the_category_of_the_answer(tmp_path: Path) -> None:
    rows = [
        {"question_id": no, "category": category, "text": "Yes" if category == "random" else "No"}
        for category in ("random", "popular", "adversarial")
        for no in (1, 2)
    ]
    found = score("pope", pope_files(tmp_path), write_lines(tmp_path / "a.jsonl", rows))
    # random: all yes, so precision 1/2, recall 1, F1 2/3; the others have no true yes: 0
    assert found["metrics"]["f1"] == pytest.approx(100 * (2 / 3) / 3)
    by_name = {row["category"]: row["f1"] for row in found["tables"]["categories"]}
    assert by_name["random"] == pytest.approx(2 / 3)
    assert by_name["popular"] == by_name["adversarial"] == 0.0


@pytest.mark.parametrize("profile", ["bunny", "lmms"])
def test_a_missing_yes_of_pope_costs_recall_in_both_profiles(tmp_path: Path, profile: str) -> None:
    rows = [
        {"question_id": no, "image": f"{no}.jpg", "text": ASKED, "label": label}
        for no, label in ((1, "yes"), (2, "yes"), (3, "no"), (4, "no"))
    ]
    questions = write_lines(tmp_path / "coco_pope_random.json", rows)
    answers = write_lines(tmp_path / "a.jsonl", answered([1, 3], ["yes", "no"]))
    assert "2, 4" in refused("pope", questions, answers).replace("10000002, 10000004", "2, 4")
    found = score("pope", questions, answers, "--allow-missing", "--profile", profile)
    # TP 1, FN 1 (2 is missing), FP 1 (4 is missing), TN 1: precision = recall = F1 = 1/2
    assert found["metrics"]["f1"] == pytest.approx(50.0)


@pytest.mark.parametrize("null", [True, False])
def test_scienceqa_img_without_its_pictures_has_its_figure(tmp_path: Path, null: bool) -> None:
    rows: list[dict[str, Any]] = [
        {"question": "Hot?", "choices": ["ice", "fire"], "answer": 1, "hint": ""},
        {"question": "Cold?", "choices": ["ice", "fire"], "answer": 0, "hint": ""},
    ]
    table = pa.Table.from_pylist([row | {"image": None} if null else row for row in rows])
    path = tmp_path / "test-00000-of-00001.parquet"
    pq.write_table(table, path)
    answers = write_lines(tmp_path / "a.jsonl", answered([0, 1], ["B", "B"]))
    found = score("scienceqa", path, answers)
    assert found["metrics"] == {"img_accuracy": 50.0, "accuracy": 50.0}
    assert any("no pictures in these files" in note for note in found["notes"])
    if not null:
        lines = write_lines(tmp_path / "rows.jsonl", rows)
        assert score("scienceqa", lines, answers)["metrics"]["img_accuracy"] == 50.0


def test_questions_whose_pictures_were_taken_away_are_not_asked(tmp_path: Path) -> None:
    from pipelines.evaluating.run import BenchmarkFiles, _check_can_be_asked

    row = {"question": "Hot?", "choices": ["ice", "fire"], "answer": 1, "hint": ""}
    path = write_lines(tmp_path / "rows.jsonl", [row])
    one = benchmark("scienceqa")
    files = BenchmarkFiles("scienceqa", one, str(path))
    with pytest.raises(UserError, match="have no picture"):
        _check_can_be_asked(files, one.read(str(path)).questions)


def test_mmbench_is_scored_without_its_pictures(tmp_path: Path) -> None:
    head = "index\tquestion\tA\tB\tanswer\tcategory\timage\tsplit\n"
    lines = ["7\tWhich?\tNA\tNone\tA\tx\tplaceholder\tdev\n"]
    lines += ["1000007\tWhich?\tNone\tNA\tB\tx\t99\tdev\n"]  # of a row that was left out
    path = tmp_path / "MMBench_DEV_EN_legacy.tsv"
    path.write_text(head + "".join(lines))
    answers = write_lines(tmp_path / "a.jsonl", answered([7, "1000007"], ["NA", "B"]))
    assert score("mmbench", path, answers)["metrics"] == {"dev_accuracy": 100.0, "vanilla": 100.0}
    asked_rows = benchmark("mmbench").read(str(path)).questions
    with pytest.raises(UserError, match="picture of row 99"):
        asked_rows[1].images[0].read()


def test_a_tsv_with_a_lone_carriage_return_is_refused_not_a_crash(tmp_path: Path) -> None:
    path = tmp_path / "MMBench_DEV_EN_legacy.tsv"
    path.write_bytes(b"index\tquestion\tA\tanswer\n1\tWhat\ris it?\tx\tA\n")
    answers = write_lines(tmp_path / "a.jsonl", answered([1], ["A"]))
    assert "Line 2" in refused("mmbench", path, answers)


def test_mme_s_text_files_may_begin_with_a_byte_order_mark(tmp_path: Path) -> None:
    folder = tmp_path / "MME_Benchmark_release_version" / "count"
    folder.mkdir(parents=True)
    lines = (
        "Is it one? Please answer yes or no.\tYes\r\nIs it two? Please answer yes or no.\tNo\r\n"
    )
    (folder / "1.txt").write_bytes(b"\xef\xbb\xbf" + lines.encode())
    rows = [
        {"question_id": "count/1.jpg", "text": "Yes", "prompt": f"{text}\nAnswer the question "
         "using a single word or phrase."}
        for text in ("Is it two?", "Is it one?")
    ]  # fmt: skip
    found = score("mme", tmp_path, write_lines(tmp_path / "a.jsonl", rows))
    assert found["metrics"] == {"perception": 50.0}  # one of two right, no image with both
    assert not any("prompt" in note for note in found["notes"])


def test_mme_s_pictures_need_not_be_there_to_know_their_questions(tmp_path: Path) -> None:
    for subtask in ("artwork/questions_answers_YN", "code_reasoning"):
        folder = tmp_path / "MME_Benchmark_release_version" / subtask
        folder.mkdir(parents=True)
        (folder / "7.txt").write_text("Is it? Please answer yes or no.\tYes\nIs not?\tNo\n")
    names = ["artwork/7.jpg", "artwork/7.jpg", "code_reasoning/7.png", "code_reasoning/7.png"]
    rows = [
        {"question_id": name, "text": text}
        for name, text in zip(names, ["Yes", "No", "Yes", "Yes"], strict=True)
    ]
    found = score("mme", tmp_path, write_lines(tmp_path / "a.jsonl", rows))
    assert found["metrics"] == {"perception": 200.0, "cognition": 50.0}


def test_mmmu_s_right_answers_may_have_any_name(tmp_path: Path) -> None:
    truth = {
        "validation_Math_1": {"question_type": "multiple-choice", "ground_truth": "B"},
        "validation_Math_2": {"question_type": "short-answer", "ground_truth": ["1/2", "0.5"]},
    }
    path = write_json(tmp_path / "truth.json", truth)
    answers = write_lines(tmp_path / "a.jsonl", answered(truth, ["(B)", "So x = 0.501"]))
    assert score("mmmu", path, answers)["metrics"] == {"val_accuracy": 100.0}


def test_of_mmmu_s_two_files_of_right_answers_validation_counts(tmp_path: Path) -> None:
    for split, name in (("val", "validation"), ("test", "test")):
        truth = {f"{name}_Art_1": {"question_type": "multiple-choice", "ground_truth": "A"}}
        write_json(tmp_path / "data" / f"answer_dict_{split}.json", truth)
        answers = write_lines(tmp_path / f"{split}.jsonl", answered([f"{name}_Art_1"], ["A"]))
        bench = "mmmu" if split == "val" else "mmmu-test"
        # the test answers are there from the second round on
        assert score(bench, tmp_path / "data", answers)["metrics"] == {f"{split}_accuracy": 100.0}
    again = score("mmmu", tmp_path / "data", tmp_path / "val.jsonl")
    assert again["metrics"] == {"val_accuracy": 100.0}


def test_ids_as_pandas_writes_them_are_numbers(tmp_path: Path) -> None:
    row = {"question_id": 1, "image": "n1.jpg", "text": "What?", "answer": "dog"}
    path = write_lines(tmp_path / "gqa.jsonl", [row])
    answers = write_lines(tmp_path / "a.jsonl", answered([1.0], ["dog"]))
    assert score("gqa", path, answers)["metrics"]["accuracy"] == 100.0
    half = write_lines(tmp_path / "b.jsonl", answered([1.5], ["dog"]))
    assert "answer 1 has no question_id" in refused("gqa", path, half)


def test_a_gqa_file_that_tells_its_answers_needs_no_other(tmp_path: Path) -> None:
    write_json(tmp_path / "v2_mscoco_val2014_questions.json", {"questions": []})  # of VQAv2
    row = {"question_id": "1", "image": "n1.jpg", "text": "What?", "answer": "dog"}
    path = write_lines(tmp_path / "gqa.jsonl", [row])
    answers = write_lines(tmp_path / "a.jsonl", answered([1], ["Dog."]))
    assert score("gqa", path, answers)["metrics"]["accuracy"] == 100.0


@pytest.mark.parametrize("bench", [name for name in MODULES if name != "demo"])
@pytest.mark.parametrize("content", ["", "[]", "{}", "\n\n"])
@pytest.mark.parametrize("suffix", ["json", "jsonl", "tsv", "parquet"])
def test_an_empty_file_of_questions_is_a_user_s_error(
    tmp_path: Path, bench: str, content: str, suffix: str
) -> None:
    path = tmp_path / f"questions.{suffix}"
    path.write_text(content)
    answers = write_lines(tmp_path / "out" / "a.jsonl", answered([1], ["A"]))
    assert refused(bench, path, answers)


@pytest.mark.parametrize(
    ("told", "meant"),
    [
        *(("POPE", "pope"), ("SEED-Bench", "seed"), ("mm_vet", "mmvet"), ("sqa", "scienceqa")),
        *(("mmbench-dev", "mmbench"), ("MMMU_val", "mmmu"), ("mmmu-test", "mmmu-test")),
    ],
)
def test_names_are_known_as_others_spell_them(told: str, meant: str) -> None:
    assert benchmark(told).name == meant


def test_a_split_in_the_name_is_the_one_that_counts(tmp_path: Path) -> None:
    head = "index\tquestion\tA\tB\tanswer\tsplit\n"
    path = tmp_path / "mmbench.tsv"
    path.write_text(f"{head}7\tWhich?\tx\ty\tA\ttest\n")
    answers = write_lines(tmp_path / "a.jsonl", answered([7], ["A"]))
    assert "dev was asked for" in refused("mmbench-dev", path, answers)
    run = warren("score", "mmbench", *asked(path, answers), "--json")
    assert json.loads(run.stdout)["metrics"]["test_accuracy"] == 100.0


def test_vqav2_is_scored_without_the_numbers_of_its_pictures(tmp_path: Path) -> None:
    said = [{"answer": "x", "answer_confidence": "yes", "answer_id": no} for no in range(10)]
    write_json(tmp_path / "questions.json", {"questions": [{"question_id": 1, "question": "?"}]})
    told = {"question_id": 1, "answer_type": "other", "question_type": "what", "answers": said}
    write_json(tmp_path / "annotations.json", {"annotations": [told]})
    answers = write_lines(tmp_path / "a.jsonl", answered([1], ["X"]))
    found = score("vqav2", tmp_path, answers)["metrics"]
    # the upload is "x", as all ten said; "X" itself is not what they wrote, and nothing is mended
    assert found == {"accuracy": 100.0, "accuracy_of_raw_text": 0.0}
