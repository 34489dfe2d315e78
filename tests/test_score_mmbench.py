"""MMBench: options read from free text, all rotations right, editions never mixed."""

from __future__ import annotations

import base64
import csv
import importlib.util
import io
from pathlib import Path
from typing import Any

import pytest
from score_cases import hub_image, png, questions_of, scored, write_jsonl, write_parquet

from manifests.errors import UserError
from train.benchmarks.editions import edition
from train.benchmarks.mmbench import BENCHMARK, EDITIONS, TEST, submission
from train.benchmarks.mmbench_parse import named_option

COLUMNS = ["index", "question", "hint", "A", "B", "C", "D", "answer", "category", "image"]
COLUMNS += ["source", "l2-category", "comment", "split"]
OPTIONS = {"A": "cat", "B": "brown dog", "C": "NA", "D": "None"}
ANIMALS = ("cat", "dog", "cow")


def row(index: int, options: tuple[str, ...], answer: str, **more: str) -> dict[str, str]:
    cells = dict(zip("ABCD", options, strict=False))
    picture = base64.b64encode(png((index % 7, 0, 0))).decode()
    return {
        "index": str(index),
        "question": "Which one?",
        "answer": answer,
        "category": "object",
        "image": picture,
        "source": "s",
        "l2-category": "coarse",
        "split": "dev",
        **cells,
        **more,
    }


def circle(base: int, options: tuple[str, ...], right: str, **more: str) -> list[dict[str, str]]:
    """All rotations of a question: the row of rotation k begins with option k."""
    turned = [options[k:] + options[:k] for k in range(len(options))]
    return [
        row(k * 1_000_000 + base, one, "ABCD"[one.index(right)], **more)
        for k, one in enumerate(turned)
    ]


def write_tsv(path: Path, rows: list[dict[str, str]], columns: list[str] = COLUMNS) -> Path:
    written = io.StringIO()
    writer = csv.DictWriter(written, columns, "", delimiter="\t", extrasaction="ignore")
    writer.writeheader()
    writer.writerows(rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(written.getvalue(), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("text", "bunny", "lmms"),
    [
        ("B", "B", "B"),
        ("B. brown dog", "B", "B"),
        ("(B)", "B", "B"),
        ("The picture shows B", "B", "B"),
        # "A" is not among the last four words, and one option's text is contained.
        ("A large brown dog is seen", "B", "B"),
        ("B is what I would say here", None, "B"),
        ("The correct answer is **C**, and here is why it is", "C", "C"),
        ("ANSWER IS d", "D", "A"),  # lmms, at last: any capital letter
        ("A or B", None, "A"),  # lmms, at last: the letter at the start
        ("it is the Brown Dog", "B", "B"),
        ("cat and brown dog", None, None),
        ("Z", None, None),
        ("Cannot determine the answer B", None, "B"),
        ("none of these", "D", "D"),  # "None" is an option's text
        ("na", "C", "C"),
        ("", None, None),
    ],
)
def test_the_option_that_is_named(text: str, bunny: str | None, lmms: str | None) -> None:
    assert named_option(text, OPTIONS, "bunny") == bunny
    assert named_option(text, OPTIONS, "lmms") == lmms


def test_a_letter_counts_among_the_last_four_words() -> None:
    assert named_option("B one two three", OPTIONS, "bunny") == "B"
    assert named_option("B one two three four", OPTIONS, "bunny") is None


def test_an_options_text_counts_in_short_answers_alone() -> None:
    size = sum(len(text) for text in OPTIONS.values())  # 3 + 9 + 2 + 4
    just = "cat".ljust(2 * size, "x")
    assert named_option(just, OPTIONS, "bunny") == "A"
    assert named_option(just + "x", OPTIONS, "bunny") is None
    assert named_option(just + "x", OPTIONS, "lmms") == "A"  # no limit there


def test_a_question_is_right_when_all_its_rotations_are(tmp_path: Path) -> None:
    rows = circle(1, ANIMALS, "dog") + circle(2, ANIMALS, "cow", category="person")
    file = write_tsv(tmp_path / "MMBench_DEV_EN_legacy.tsv", rows)
    right = {int(one["index"]): one["answer"] for one in rows}
    report = scored("mmbench", file, right)
    assert report.metrics == {"dev_accuracy": 100.0, "vanilla": 100.0}
    assert report.items == 2
    report = scored("mmbench", file, right | {2_000_001: "A" if right[2_000_001] != "A" else "B"})
    assert report.metrics == {"dev_accuracy": 50.0, "vanilla": 100.0}  # the first pass is right
    assert report.tables["Categories"] == [
        {"category": "object", "questions": 1, "accuracy": 0.0},
        {"category": "person", "questions": 1, "accuracy": 100.0},
    ]
    assert report.tables["L2 categories"] == [
        {"category": "coarse", "questions": 2, "accuracy": 50.0}
    ]
    report = scored("mmbench", file, right | {1: "I do not know"})
    assert report.metrics == {"dev_accuracy": 50.0, "vanilla": 50.0}
    assert list(report.unreadable) == ["1"]


def test_a_missing_row_fails_its_question(tmp_path: Path) -> None:
    rows = circle(1, ANIMALS, "dog")
    file = write_tsv(tmp_path / "dev.tsv", rows)
    texts = {int(one["index"]): one["answer"] for one in rows[:2]}
    with pytest.raises(UserError, match="2000001"):
        scored("mmbench", file, texts)
    report = scored("mmbench", file, texts, allow_missing=True)
    assert report.metrics == {"dev_accuracy": 0.0, "vanilla": 100.0}
    assert list(report.missing) == ["2000001"]


def test_na_and_none_are_options_and_empty_cells_are_not(tmp_path: Path) -> None:
    rows = [
        row(1, ("NA", "None", "nan", "Ca"), "B", hint="None"),
        row(2, ("null", "N/A"), "A", hint="See\nthis"),
        row(3, ("yes", "no"), "A", hint="nan", question='5" or "6"?'),
    ]
    questions = questions_of("mmbench", write_tsv(tmp_path / "dev.tsv", rows)).questions
    tail = "Answer with the option's letter from the given choices directly."
    assert [one.prompt for one in questions] == [
        f"Which one?\nA. NA\nB. None\n{tail}",  # options stop at the first missing one
        f"See\nthis\nWhich one?\nA. null\nB. N/A\n{tail}",
        f'5" or "6"?\nA. yes\nB. no\n{tail}',
    ]
    report = scored("mmbench", tmp_path / "dev.tsv", {1: "None", 2: "null", 3: "yes"})
    assert report.metrics["vanilla"] == 100.0
    assert BENCHMARK.asking.max_new_tokens == 128
    assert BENCHMARK.asking.image_mode == "pad"


def test_pictures_are_in_the_row_or_in_the_row_it_refers_to(tmp_path: Path) -> None:
    rows = circle(241, ANIMALS, "dog")
    for one in rows[1:]:
        one["image"] = "241"  # as VLMEvalKit's files have it
    questions = questions_of("mmbench", write_tsv(tmp_path / "DEV.tsv", rows)).questions
    assert {one.images[0].read() for one in questions} == {png((241 % 7, 0, 0))}
    rows[1]["image"] = "77"
    with pytest.raises(UserError, match="to the picture of row 77"):
        questions_of("mmbench", write_tsv(tmp_path / "DEV.tsv", rows)).questions[1].images[0].read()


def hub_rows(split: str, answers: tuple[str, ...]) -> list[dict[str, Any]]:
    return [
        {"index": no, "question": "Which one?", "hint": "nan", "answer": answer}
        | {"A": "cat", "B": "NA", "C": "nan", "D": "nan", "category": "object"}
        | {"image": hub_image(png()), "source": "s", "L2-category": "coarse"}
        | {"comment": "nan", "split": split}
        for no, answer in enumerate(answers)
    ]


def test_the_hubs_parquet_has_nan_for_none(tmp_path: Path) -> None:
    write_parquet(tmp_path / "en" / "dev-00000-of-00001.parquet", hub_rows("dev", ("B", "A")))
    write_parquet(tmp_path / "en" / "test-00000-of-00001.parquet", hub_rows("test", ("nan",)))
    questions = questions_of("mmbench", tmp_path)
    assert [one.details["options"] for one in questions.questions] == [{"A": "cat", "B": "NA"}] * 2
    assert questions.questions[0].images[0].read() == png()
    assert scored("mmbench", tmp_path, {0: "NA", 1: "B"}).metrics["dev_accuracy"] == 50.0
    test = TEST.read(str(tmp_path))
    assert [one.details["split"] for one in test.questions] == ["test"]
    with pytest.raises(UserError, match="no answer in these files"):
        TEST.score(test, {"0": "A"}, "bunny")


def test_mixed_and_odd_sets_are_refused(tmp_path: Path) -> None:
    dev, test = row(1, ANIMALS, "A"), row(2, ANIMALS, "A", split="test")
    with pytest.raises(UserError, match="rows of dev and test"):
        questions_of("mmbench", write_tsv(tmp_path / "a.tsv", [dev, test]))
    with pytest.raises(UserError, match="two questions have the id 1"):
        questions_of("mmbench", write_tsv(tmp_path / "b.tsv", [dev, dev]))
    with pytest.raises(UserError, match="1 questions have no first row, e.g. 5"):
        questions_of("mmbench", write_tsv(tmp_path / "c.tsv", [dev, row(1_000_005, ANIMALS, "A")]))
    with pytest.raises(UserError, match="'D', which is none of its options"):
        questions_of("mmbench", write_tsv(tmp_path / "d.tsv", [row(1, ANIMALS, "D")]))
    with pytest.raises(UserError, match="is no index"):
        questions_of("mmbench", write_tsv(tmp_path / "e.tsv", [dev | {"index": "x"}]))
    with pytest.raises(UserError, match="has several sets"):
        questions_of("mmbench", tmp_path)
    # Answers to another edition's rows belong to no question of this one.
    with pytest.raises(UserError, match="belong to no question"):
        scored("mmbench", write_tsv(tmp_path / "f.tsv", [dev]), {1: "A", 4: "A"})


def test_editions_are_told_by_their_rows() -> None:
    assert edition("MMBench", 4329, EDITIONS["dev"]) == ("MMBench dev, 4329 rows", ())
    version, notes = edition("MMBench", 4377, EDITIONS["dev"])
    assert version == "MMBench dev, 4377 rows"
    assert "do not compare" in notes[0]
    assert edition("MMBench", 6666, EDITIONS["test"])[1] == ()
    assert edition("MMBench", 6718, EDITIONS["test"])[1] != ()
    assert edition("MMBench", 12, EDITIONS["dev"])[0] == "subset of 4329"
    with pytest.raises(UserError, match="more than any edition"):
        edition("MMBench", 4329 + 4377, EDITIONS["dev"])


def test_rows_as_json_lines(tmp_path: Path) -> None:
    lines: list[dict[str, Any]] = [
        {"index": 7, "question": "Which?", "hint": None, "A": "x", "B": "NA", "C": None, "D": None}
        | {"answer": "B", "category": "c", "l2-category": "l", "split": "dev"}
    ]
    file = write_jsonl(tmp_path / "rows.jsonl", lines)
    assert scored("mmbench", file, {7: "B"}).metrics["dev_accuracy"] == 100.0


has_openpyxl = importlib.util.find_spec("openpyxl") is not None


@pytest.mark.skipif(not has_openpyxl, reason="needs the extra `eval`")
def test_the_upload_is_the_servers_table(tmp_path: Path) -> None:
    import openpyxl

    rows = [row(1, ("NA", "None"), "B"), row(1_000_001, ("None", "NA"), "A")]
    rows += [row(2, ("=1+1", "3"), "A"), row(3, ("x", "y"), "A")]
    questions = questions_of("mmbench", write_tsv(tmp_path / "dev.tsv", rows))
    texts = {"1": "B", "1000001": "tab\tand\nline\x07", "2": "=A", "3": None}
    book = openpyxl.load_workbook(io.BytesIO(submission(questions, texts)))
    sheet = [list(cells) for cells in book.active.iter_rows(values_only=True)]
    ask = "Which one?"
    assert sheet == [
        ["index", "question", "A", "B", "C", "D", "prediction", "answer", "split"],
        [1, ask, "NA", "None", None, None, "B", "B", "dev"],
        [1_000_001, ask, "None", "NA", None, None, "tab\tand\nline ", "A", "dev"],
        [2, ask, "=1+1", "3", None, None, "=A", "A", "dev"],
        [3, ask, "x", "y", None, None, None, "A", "dev"],
    ]
    no_answers = [name for name in COLUMNS if name != "answer"]
    questions = questions_of("mmbench", write_tsv(tmp_path / "test.tsv", rows[:1], no_answers))
    book = openpyxl.load_workbook(io.BytesIO(submission(questions, {"1": "B"})))
    header = next(iter(book.active.iter_rows(values_only=True)))
    assert header == ("index", "question", "A", "B", "C", "D", "prediction", "split")


@pytest.mark.skipif(has_openpyxl, reason="the extra `eval` is installed")
def test_without_openpyxl_it_says_what_to_install(tmp_path: Path) -> None:
    questions = questions_of("mmbench", write_tsv(tmp_path / "dev.tsv", [row(1, ANIMALS, "A")]))
    with pytest.raises(UserError, match="openpyxl is not installed"):
        submission(questions, {"1": "A"})
