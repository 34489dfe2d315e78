"""MME by hand: the first four characters, accuracy and accuracy+, sums of subtasks."""

from __future__ import annotations

from pathlib import Path

import pytest
from scored_files import refused, score, write_lines, write_parquet

from train.benchmarks import mme

WORDS = "\nAnswer the question using a single word or phrase."
ASKED = " Please answer yes or no."
QUESTIONS = {  # image -> (question, answer) twice; the second of the last has two blanks
    "existence/0001.jpg": (("Is there a dog?", "Yes"), ("Is there a cat?", "No")),
    "existence/0002.jpg": (("Is there a bus?", "Yes"), ("Is there a car?", "No")),
    "count/0001.jpg": (("Are there two?", "Yes"), ("Are there three?", "No")),
    "artwork/images/17.jpg": (("Is it modern?", "Yes"), ("Is it old? ", "No")),
    "code_reasoning/0020.png": (("Is it python?", "Yes"), ("Is it C?", "No")),
}


@pytest.mark.parametrize(
    ("text", "bunny", "lmms"),
    [
        ("Yes", "yes", "yes"),
        ("no.", "no", "no"),
        ("Snow covers it", "no", "no"),
        ("Not at all", "no", "no"),
        ("Yeah", "other", "other"),
        ("The answer is no", "other", "other"),
        ("", "other", "other"),
        ("no yes", "no", "no"),
        ("nyes", "yes", "yes"),
        ("  yes", "other", "yes"),
        ("...yes", "other", "yes"),
        ("\tYes", "yes", "yes"),
        ("no\nway\tout", "no", "no"),
        ("y", "other", "yes"),
        ("N.", "other", "no"),
        ("x", "other", "other"),
    ],
)
def test_an_answer_is_read_from_its_first_four_characters(text: str, bunny: str, lmms: str) -> None:
    assert (mme.parse(text), mme.parse(text, "lmms")) == (bunny, lmms)


def release(folder: Path) -> Path:
    """Write the questions as the release has them: flat, or in two folders for artwork."""
    root = folder / "MME_Benchmark_release_version"
    for image, pair in QUESTIONS.items():
        path = root / image
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(image.encode())
        texts = path.parent
        if texts.name == "images":
            texts = texts.parent / "questions_answers_YN"
            texts.mkdir(exist_ok=True)
        lines = [f"{question}{ASKED}\t{answer}\n" for question, answer in pair]
        (texts / f"{path.stem}.txt").write_text("".join(lines))
    return root


def bunny_rows() -> list[dict[str, str]]:
    return [
        {"question_id": image, "image": image, "text": question.strip() + WORDS, "category": "?"}
        for image, pair in QUESTIONS.items()
        for question, _ in pair
    ]


def answers(folder: Path, texts: list[str]) -> Path:
    rows = [
        {"question_id": row["question_id"], "prompt": row["text"], "text": text}
        for row, text in zip(bunny_rows(), texts, strict=True)
    ]
    return write_lines(folder / "answers.jsonl", rows[::-1])  # matched by key, not by order


# existence: 3 of 4 right (75) and one image of two with both (50); count: 1 of 2 and 0 of 1;
# artwork: both; code: both answers "yes", so 50 and 0.
TEXTS = ["Yes", "No", "yes, a bus", "Yes", "Yeah", "No\tcat", "Yes.", "NO", "Yes", "yes"]


@pytest.mark.parametrize("layout", ["release", "folder", "jsonl", "labelled", "parquet"])
def test_every_layout_gives_the_same_sums_of_subtasks(tmp_path: Path, layout: str) -> None:
    root = release(tmp_path / "mme")
    if layout == "release":
        questions = root
    elif layout == "folder":
        questions = root.parent
    elif layout == "jsonl":
        questions = write_lines(root.parent / "bunny_mme.jsonl", bunny_rows())
    elif layout == "labelled":
        truth = [answer for pair in QUESTIONS.values() for _, answer in pair]
        rows = [{**row, "answer": right} for row, right in zip(bunny_rows(), truth, strict=True)]
        questions = write_lines(tmp_path / "alone" / "mine.jsonl", rows)
    else:
        questions = parquet(tmp_path / "hub")
    found = score("mme", questions, answers(tmp_path, TEXTS))
    assert found["metrics"] == {"perception": 125.0 + 50.0 + 200.0, "cognition": 50.0}
    assert found["columns"] == {"MME-P": 375.0, "MME-C": 50.0}
    assert [row["score"] for row in found["tables"]["subtasks"]] == [125.0, 50.0, 200.0, 50.0]
    assert (found["items"], found["missing"]) == (10, [])
    assert found["unreadable"] == ["count/0001|Are there two?"]
    assert found["version"] == "subset of 10 questions"


def parquet(folder: Path) -> Path:
    rows = [
        {
            "question_id": f"{image.split('/')[0]}/{Path(image).name}",
            "image": image.encode(),
            "question": question + ASKED,
            "answer": answer,
            "category": image.split("/")[0],
        }
        for image, pair in QUESTIONS.items()
        for question, answer in pair
    ]
    return write_parquet(folder / "data" / "test-00000-of-00001.parquet", rows).parent.parent


@pytest.mark.parametrize("layout", ["release", "parquet"])
def test_questions_know_their_images_and_bunnys_prompt(tmp_path: Path, layout: str) -> None:
    path = release(tmp_path) if layout == "release" else parquet(tmp_path)
    read = mme.read(str(path)).questions
    by_id = {one.id: one for one in read}
    old = by_id["artwork/17|Is it old?"]
    assert [image.read() for image in old.images] == [b"artwork/images/17.jpg"]
    assert {one.prompt for one in read} == {row["text"] for row in bunny_rows()}


def test_a_missing_answer_is_refused_by_its_id_or_wrong_when_allowed(tmp_path: Path) -> None:
    questions = release(tmp_path)
    all_of_them = answers(tmp_path, TEXTS)
    lines = all_of_them.read_text().splitlines(keepends=True)
    some = tmp_path / "some.jsonl"
    some.write_text("".join(lines[:-1]))
    assert "existence/0001|Is there a dog?" in refused("mme", questions, some)
    found = score("mme", questions, some, "--allow-missing")
    # existence: 2 of 4 right and no image with both
    assert found["metrics"]["perception"] == 50.0 + 50.0 + 200.0
    assert found["missing"] == ["existence/0001|Is there a dog?"]


def test_rows_without_prompts_are_taken_in_file_order_and_say_so(tmp_path: Path) -> None:
    rows = [
        {"question_id": row["question_id"], "text": text}
        for row, text in zip(bunny_rows(), TEXTS, strict=True)
    ]
    path = write_lines(tmp_path / "plain.jsonl", rows)
    found = score("mme", release(tmp_path), path)
    assert found["metrics"] == {"perception": 375.0, "cognition": 50.0}
    assert any("file order" in note for note in found["notes"])
    rows.append(rows[-1])
    assert "code_reasoning/0020.png" in refused(
        "mme", release(tmp_path), write_lines(tmp_path / "thrice.jsonl", rows)
    )


def test_lmms_reads_more_answers(tmp_path: Path) -> None:
    texts = ["y", "n", " yes", "...no", "Yes", "No", "Yes", "No", "Yes", "No"]
    path = answers(tmp_path, texts)
    questions = release(tmp_path)
    assert score("mme", questions, path, "--profile", "lmms")["metrics"]["perception"] == 600.0
    # bunny: "y" and "n" are no answers, " yes" is; "...no" begins with "...n"
    assert score("mme", questions, path)["metrics"]["perception"] == 25.0 + 400.0


def test_an_image_with_one_question_is_refused(tmp_path: Path) -> None:
    questions = release(tmp_path)
    path = questions / "count" / "0001.txt"
    path.write_text(path.read_text().splitlines()[0])
    assert "count/0001" in refused("mme", questions, answers(tmp_path, TEXTS))


def test_questions_without_their_truth_are_refused(tmp_path: Path) -> None:
    questions = write_lines(tmp_path / "bunny_mme.jsonl", bunny_rows())
    reason = refused("mme", questions, answers(tmp_path, TEXTS))
    assert "MME_Benchmark_release_version" in reason
