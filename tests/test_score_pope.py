"""POPE by hand: words before the first ".", joined by key, the mean of three F1."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest
from scored_files import answered, refused, score, write_lines, write_parquet

from train.benchmarks import pope

WORDS = "\nAnswer the question using a single word or phrase."
FIRST = {"adversarial": 0, "random": 10_000_000, "popular": 20_000_000}


@pytest.mark.parametrize(
    ("text", "read"),
    [
        ("Yes", "yes"),
        ("No", "no"),
        ("no", "no"),
        ("NO", "yes"),
        ("Nope", "yes"),
        ("", "yes"),
        ("no\nway", "yes"),
        ("No, there is", "no"),
        ("n,o", "no"),
        ("It is not there", "no"),
        ("Yes. No", "yes"),
        ("No. Yes", "no"),
        (".no", "yes"),
        ("No!", "yes"),
        ("\tno", "yes"),
    ],
)
def test_bunny_reads_no_as_a_word_and_all_else_as_yes(text: str, read: str) -> None:
    assert pope.parse(text) == read


@pytest.mark.parametrize(
    ("text", "read"), [("Yes", "yes"), (" NO ", "no"), ("Yes.", "yes."), ("", "")]
)
def test_lmms_takes_exact_words_alone(text: str, read: str) -> None:
    assert pope.parse(text, "lmms") == read


def labelled(folder: Path, labels: dict[str, list[str]], start: int = 1) -> Path:
    """Write the three official files; question n of a category is of image n."""
    for category, wanted in labels.items():
        rows = [row(number, label) for number, label in enumerate(wanted, start)]
        write_lines(folder / f"coco_pope_{category}.json", rows)
    return folder


def row(number: int, label: str, thing: str = "dog") -> dict[str, Any]:
    image = f"COCO_val2014_{number:012}.jpg"
    text = f"Is there a {thing} in the image?"
    return {"question_id": number, "image": image, "text": text, "label": label}


def bunny_rows(labels: dict[str, list[str]]) -> list[dict[str, Any]]:
    return [
        {
            "question_id": FIRST[category] + number,
            "image": row(number, label)["image"],
            "text": row(number, label)["text"] + WORDS,
            "category": category,
        }
        for category, wanted in labels.items()
        for number, label in enumerate(wanted, 1)
    ]


LABELS = {
    "adversarial": ["yes", "yes", "no", "no"],
    "random": ["yes", "no"],
    "popular": ["yes", "no", "no"],
}
TEXTS = {
    # tp 1, fn 1, fp 1, tn 1: precision 1/2, recall 1/2, F1 1/2
    "adversarial": ["Yes", "No", "Yes", "no"],
    # tp 1, tn 1: F1 1
    "random": ["Yes", "not here"],
    # no yes predicted: precision 0 of 0 is 0, F1 0
    "popular": ["No", "No", "No"],
}


def bunny_answers(folder: Path, texts: dict[str, list[str]] = TEXTS) -> Path:
    ids = [one["question_id"] for one in bunny_rows(LABELS)]
    said = [text for category in LABELS for text in texts[category]]
    return write_lines(folder / "answers.jsonl", answered(ids, said)[::-1])


@pytest.mark.parametrize("layout", ["official", "beside", "labels-in-rows", "parquet", "full"])
def test_every_layout_gives_the_mean_of_three_f1(tmp_path: Path, layout: str) -> None:
    questions = tmp_path / "pope"
    rows = bunny_rows(LABELS)
    if layout == "official":
        labelled(questions, LABELS)
    elif layout == "beside":
        labelled(questions / "coco", LABELS)
        write_lines(questions / "bunny_pope_test.jsonl", rows)
    elif layout == "labels-in-rows":
        labels = [label for wanted in LABELS.values() for label in wanted]
        told = [{**one, "label": label} for one, label in zip(rows, labels, strict=True)]
        questions = write_lines(questions / "mine.jsonl", told)
    else:
        parquet(questions, whole=layout == "parquet")
    found = score("pope", questions, bunny_answers(tmp_path))
    assert found["metrics"]["f1"] == pytest.approx(100 * (0.5 + 1.0 + 0.0) / 3)
    # pooled: tp 2, fp 1, fn 2: precision 2/3, recall 1/2
    assert found["metrics"]["pooled_f1"] == pytest.approx(100 * 4 / 7)
    table = {one["category"]: one for one in found["tables"]["categories"]}
    assert table["adversarial"]["accuracy"] == 0.5
    assert (table["popular"]["precision"], table["popular"]["f1"]) == (0.0, 0.0)
    assert (table["popular"]["yes_ratio"], table["adversarial"]["yes_ratio"]) == (0.0, 0.5)
    assert found["columns"] == {"POPE": found["metrics"]["f1"]}
    assert found["items"] == 9


def parquet(folder: Path, *, whole: bool) -> None:
    rows = [
        {
            "id": str(at),
            "question_id": str(number),
            "question": row(number, label)["text"],
            "answer": label,
            "image_source": row(number, label)["image"].removesuffix(".jpg"),
            "image": b"pixels",
            "category": category,
        }
        for category, wanted in LABELS.items()
        for at, (number, label) in enumerate(enumerate(wanted, 1))
    ]
    if whole:
        write_parquet(folder / "data" / "test-00000-of-00001.parquet", rows)
    for category in LABELS:  # the hub has them twice
        some = [one for one in rows if one["category"] == category]
        write_parquet(folder / "Full" / f"{category}-00000-of-00001.parquet", some)


def test_lmms_pools_and_takes_the_ratio_of_predictions(tmp_path: Path) -> None:
    texts = {
        "adversarial": ["yes", "Yes.", "Yes", "no"],  # tp 1, neither, fp 1, tn 1
        "random": ["YES ", "maybe"],  # tp 1, neither
        "popular": ["No", "no", "no"],  # fn 1, tn 2
    }
    questions = labelled(tmp_path / "pope", LABELS)
    found = score("pope", questions, bunny_answers(tmp_path, texts), "--profile", "lmms")
    # tp 2, fp 1, fn 1 ("Yes." and "maybe" are neither): precision and recall 2/3
    assert found["metrics"]["f1"] == pytest.approx(100 * 2 / 3)
    pooled = found["tables"]["categories"][-1]
    assert pooled["accuracy"] == pytest.approx(5 / 9)
    assert pooled["yes_ratio"] == pytest.approx(3 / 9)  # of predictions; of labels it is 4/9


def test_the_figures_of_a_published_run_of_the_pinned_random_set(tmp_path: Path) -> None:
    """TP 1183, FP 31, TN 1379, FN 317, as told in an issue of LLaVA (626)."""
    labels = ["yes"] * 1500 + ["no"] * 1410
    said = ["Yes"] * 1183 + ["No"] * 317 + ["Yes"] * 31 + ["No"] * 1379
    path = labelled(tmp_path, {"random": labels}) / "coco_pope_random.json"
    answers = write_lines(tmp_path / "a.jsonl", answered(range(1, 2911), said))
    found = score("pope", path, answers)
    random = found["tables"]["categories"][0]
    assert random["f1"] == 0.8717759764185703
    assert (random["tp"], random["fp"], random["tn"], random["fn"]) == (1183, 31, 1379, 317)
    assert found["metrics"]["f1"] == pytest.approx(87.17759764185703)
    assert any("random alone" in note for note in found["notes"])


def test_a_missing_answer_is_refused_or_wrong(tmp_path: Path) -> None:
    questions = labelled(tmp_path / "pope", LABELS)
    ids = [one["question_id"] for one in bunny_rows(LABELS)]
    said = [text for texts in TEXTS.values() for text in texts]
    some = write_lines(tmp_path / "some.jsonl", answered(ids, said)[1:])
    assert "1 of 9 questions" in refused("pope", questions, some)
    found = score("pope", questions, some, "--allow-missing")
    assert found["missing"] == ["1"]
    adversarial = found["tables"]["categories"][0]
    assert (adversarial["tp"], adversarial["fn"], adversarial["questions"]) == (0, 2, 4)


def test_answers_that_say_neither_are_counted(tmp_path: Path) -> None:
    texts = {**TEXTS, "random": ["", "perhaps"]}
    found = score("pope", labelled(tmp_path / "p", LABELS), bunny_answers(tmp_path, texts))
    assert sorted(found["unreadable"]) == ["10000001", "10000002"]
    assert found["empty"] == ["10000001"]


def test_labels_of_other_questions_are_refused(tmp_path: Path) -> None:
    labelled(tmp_path / "coco", LABELS, start=3)
    questions = write_lines(tmp_path / "bunny_pope_test.jsonl", bunny_rows(LABELS))
    assert "have no label" in refused("pope", questions, bunny_answers(tmp_path))


def test_a_whole_set_by_its_counts_says_which_edition_it_is(tmp_path: Path) -> None:
    for random, version in ((2910, "e3e3926, 8910 questions"), (3000, "newer, 9000 questions")):
        counts = {"adversarial": 3000, "random": random, "popular": 3000}
        labels = {name: ["yes", "no"] * (count // 2) for name, count in counts.items()}
        found = pope.read(str(labelled(tmp_path / str(random), labels)))
        assert found.version == version
        assert found.notes, "planted questions are not the published ones"


def test_a_question_asked_twice_counts_twice_and_a_file_given_twice_is_refused(
    tmp_path: Path,
) -> None:
    twice = [row(1, "yes"), {**row(1, "yes"), "question_id": 2}]
    path = write_lines(tmp_path / "coco_pope_random.json", twice)
    answers = write_lines(tmp_path / "a.jsonl", answered([1, 2], ["yes", "no"]))
    assert score("pope", path, answers)["tables"]["categories"][0]["accuracy"] == 0.5
    write_lines(path, [twice[0], twice[0]])
    assert "is there twice" in refused("pope", path, answers)


def test_ids_that_are_bunnys_already_stay(tmp_path: Path) -> None:
    for category, wanted in LABELS.items():
        rows = [row(at, label) for at, label in enumerate(wanted, 1)]
        rows = [{**one, "question_id": FIRST[category] + one["question_id"]} for one in rows]
        write_lines(tmp_path / "p" / f"coco_pope_{category}.json", rows)
    found = score("pope", tmp_path / "p", bunny_answers(tmp_path))
    assert found["metrics"]["f1"] == pytest.approx(50.0)


def test_answers_beside_the_questions_are_not_taken_for_questions(tmp_path: Path) -> None:
    labelled(tmp_path, LABELS)
    answers = bunny_answers(tmp_path).rename(tmp_path / "a_pope_answers.jsonl")
    assert score("pope", tmp_path, answers)["metrics"]["f1"] == pytest.approx(50.0)
    write_lines(tmp_path / "questions.jsonl", bunny_rows(LABELS))
    assert score("pope", tmp_path, answers)["metrics"]["f1"] == pytest.approx(50.0)


def test_categories_of_two_editions_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The published ids are not here: two planted sets stand for the two commits."""
    questions = pope.read(str(labelled(tmp_path, LABELS))).questions
    marks = {}
    for category, edition in (("adversarial", "e3e3926"), ("random", "newer")):
        names = sorted(one.id for one in questions if one.category == category)
        marks[hashlib.sha256("\n".join(names).encode()).hexdigest()[:16]] = edition
    monkeypatch.setattr(pope, "EDITIONS", marks)
    assert "two editions" in refused("pope", tmp_path, bunny_answers(tmp_path))
