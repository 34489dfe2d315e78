"""`warren score`: what it takes, what it refuses, and that no figure comes from incomplete data."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from scored_files import answered, asked, refused, score, warren, write_json, write_lines

from manifests.errors import UserError
from train.benchmarks import answers, files, table
from train.benchmarks.contract import Question, QuestionSet


def gqa(folder: Path, num: int = 3) -> Path:
    rows = {
        str(name): {
            "question": f"What is {name}?",
            "answer": "dog",
            "imageId": "n1",
            "isBalanced": True,
            "types": {"structural": "query", "semantic": "obj"},
        }
        for name in range(1, num + 1)
    }
    return write_json(folder / "testdev_balanced_questions.json", rows)


def test_the_text_tells_figures_counts_profile_and_versions(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", answered([1, 2, 3], ["dog", " ", "cat"]))
    run = warren("score", "gqa", *asked(gqa(tmp_path), path))
    assert run.exit_code == 0, run.output
    for told in (
        "GQA: subset of 3 questions, profile bunny",
        "33.33",
        "items: 3",
        "missing: 0",
        "unreadable: 0",
        "empty: 1 (2)",
        "testdev_balanced_questions.json sha256",
        "warren 0.",
    ):
        assert told in run.stdout


def test_plain_rows_and_ids_as_text_or_numbers_are_matched(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"question_id": "1", "text": "dog\twith\ttabs"},
        {"question_id": 2, "text": "dog\nand a newline\u2028and another\r\n"},
        {"question_id": "3", "text": "dog"},
    ]
    found = score("gqa", gqa(tmp_path), write_lines(tmp_path / "a.jsonl", rows))
    assert found["metrics"]["accuracy"] == pytest.approx(100 / 3)
    assert found["files"]["a.jsonl"] == files.digests([tmp_path / "a.jsonl"])["a.jsonl"]


def test_an_array_and_lines_with_other_separators_inside_are_read(tmp_path: Path) -> None:
    rows = answered([1, 2, 3], ["dog\u2028", "dog\x85", "dog"])
    path = tmp_path / "a.jsonl"
    path.write_text("\ufeff" + "\n\n".join(json.dumps(one, ensure_ascii=False) for one in rows))
    array = write_json(tmp_path / "a.json", rows)
    assert answers.read_answers(path) == answers.read_answers(array) == rows


@pytest.mark.parametrize(
    ("lines", "told"),
    [
        ('{"question_id": 1, "text": "dog"}\n{"question_id": 2, "te', "Line 2 is not JSON"),
        ('{"question_id": 1, "text": "dog"}\n[1, 2]', "Line 2 is not a JSON object"),
        ('{"question_id": 1}', "answer 1 has no text"),
        ('{"question_id": 1, "text": null}', "answer 1 has no text"),
        ('{"text": "dog"}', "answer 1 has no question_id"),
        ("", "has no answers"),
    ],
)
def test_a_broken_answers_file_is_refused_by_its_line(
    tmp_path: Path, lines: str, told: str
) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(lines)
    assert told in refused("gqa", gqa(tmp_path), path)
    assert told in refused("gqa", gqa(tmp_path), path, "--allow-missing")


@pytest.mark.parametrize(
    ("ids", "told"),
    [
        ([1, 2], "1 of 3 questions of gqa (subset of 3 questions) have no answer: 3"),
        ([1, 2, 3, 3, 1], "answered already: 3, 1"),
        ([1, 2, 3, 4, 77], "belong to no question of gqa (subset of 3 questions): 4, 77"),
    ],
)
def test_missing_double_and_foreign_ids_are_refused_with_their_list(
    tmp_path: Path, ids: list[int], told: str
) -> None:
    path = write_lines(tmp_path / "a.jsonl", answered(ids, ["dog"] * len(ids)))
    assert told in refused("gqa", gqa(tmp_path), path)
    if len(ids) > 3:  # these stay errors
        assert told in refused("gqa", gqa(tmp_path), path, "--allow-missing")


def test_a_long_list_of_ids_is_cut_with_its_length(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", answered([1], ["dog"]))
    reason = refused("gqa", gqa(tmp_path, num=100), path)
    assert "99 of 100" in reason
    assert "and 79 more" in reason


@pytest.mark.parametrize("what", ["nothing", "no fields", "not json", "empty", "benchmark"])
def test_questions_that_no_layout_fits_are_refused(tmp_path: Path, what: str) -> None:
    path = write_lines(tmp_path / "a.jsonl", answered([1], ["dog"]))
    questions, bench = tmp_path / "testdev_balanced_questions.json", "gqa"
    if what == "no fields":
        write_json(questions, {"1": {"question": "What?"}})
    elif what == "not json":
        questions.write_text('{"1": {\n"question": oops')
    elif what == "empty":
        write_json(questions, {})
    elif what == "benchmark":
        bench = "gqb"
    told = {
        "nothing": "is not there",
        "no fields": "KeyError: 'answer'",
        "not json": "line 2",
        "empty": "holds no questions",
        "benchmark": "Known: mme, pope",
    }
    assert told[what] in refused(bench, questions, path)


def test_a_benchmark_without_a_server_has_no_submission(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", answered([1, 2, 3], ["dog"] * 3))
    out = tmp_path / "out.json"
    run = warren("submission", "gqa", *asked(gqa(tmp_path), path), "--out", str(out))
    assert (run.exit_code, out.exists()) == (2, False)
    assert "no server" in run.stderr


def test_two_questions_of_one_id_are_refused() -> None:
    twice = QuestionSet("made", "mixed", [Question("a", 1, "?"), Question("a", 1, "?")])
    with pytest.raises(UserError, match="two questions have the id a"):
        answers.match([{"question_id": 1, "text": ""}], twice)


def test_questions_that_share_an_id_are_told_apart_by_category_and_prompt() -> None:
    asked = [
        Question("x", 1, "Is it red?", category="a", details={"text": "Is it red?"}),
        Question("y", 1, "Is it old?", category="b", details={"text": "Is it old?"}),
        Question("z", 1, "Is it new?", category="b", details={"text": "Is it new?"}),
    ]
    rows = [
        {"question_id": 1, "text": "3", "prompt": "is it  NEW?\nYes or no."},
        {"question_id": "y", "text": "2", "prompt": "anything"},
        {"question_id": 1, "text": "1", "prompt": "-", "metadata": {"category": "a"}},
    ]
    found = answers.match(rows, QuestionSet("made", "v", asked))
    assert found.texts == {"x": "1", "y": "2", "z": "3"}
    assert found.notes == [
        "2 answers have a prompt that does not hold their question: another version's?"
    ]


def test_an_optional_question_needs_no_answer() -> None:
    asked = [Question("1", 1, "?"), Question("2", 2, "?", details={"optional": True})]
    found = answers.match([{"question_id": 1, "text": "a"}], QuestionSet("made", "v", asked))
    assert found.texts == {"1": "a", "2": None}
    assert found.missing == ["2"]


def test_every_row_of_a_tsv_keeps_its_words_and_knows_its_picture(tmp_path: Path) -> None:
    path = tmp_path / "a.tsv"
    path.write_text('index\tA\timage\n1\t"NA ""x""\n2"\taGV5\n2\tNone\taMOp\n', encoding="utf-8")
    rows = list(files.tsv_rows(path))
    assert [row.values["A"] for row in rows] == ['NA "x"\n2', "None"]
    assert [row.image().read() for row in rows] == [b"hey", "hé".encode()]


def test_pictures_of_parquet_are_read_when_asked(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    one = [{"bytes": b"x", "path": None}, None, {"bytes": None, "path": "far.jpg"}]
    many = [[{"bytes": b"1", "path": "p"}, {"bytes": b"2", "path": None}], [], None]
    columns = {"id": ["a", "b", "c"], "image": pa.array(one, kind)}
    stored = pa.table({**columns, "images": pa.array(many, pa.list_(kind))})
    path = tmp_path / "test-00000-of-00001.parquet"
    pq.write_table(stored, path, row_group_size=2)
    rows = files.parquet_rows(files.parquet_files(tmp_path))
    assert [dict(row.values) for row in rows] == [{"id": "a"}, {"id": "b"}, {"id": "c"}]
    assert [len(row.images()) for row in rows] == [1, 0, 1]
    assert rows[0].images()[0].read() == b"x"
    assert [image.read() for image in rows[0].images("images")] == [b"1", b"2"]
    assert [len(row.images("images")) for row in rows] == [2, 0, 0]
    with pytest.raises(UserError, match="has no bytes"):
        rows[2].images()[0].read()


def test_the_readme_names_every_benchmark_and_its_files() -> None:
    text = (Path(__file__).parents[1] / "train" / "README.md").read_text()
    assert [
        name for name in table.MODULES if f"| `{name.removesuffix('-test')}` |" not in text
    ] == []
    layouts = " ".join(line for name in table.MODULES for line in table.benchmark(name).layouts)
    named = re.findall(r"[\w*{}<>,-]+\.(?:jsonl|json|tsv)\b", layouts)
    assert named
    assert [name for name in named if name not in text and "answer_dict_*" not in name] == []


def test_uploads_of_vqa_and_gqa_are_answers_too(tmp_path: Path) -> None:
    for names in (("question_id", "answer"), ("questionId", "prediction")):
        rows = [dict(zip(names, (number, "dog"), strict=True)) for number in ("1", "2", "3")]
        path = write_json(tmp_path / f"{names[1]}.json", rows)
        assert score("gqa", gqa(tmp_path), path)["metrics"]["accuracy"] == 100.0


def test_every_benchmark_of_the_table_is_named_in_the_help() -> None:
    told = warren("score", "--help").stdout
    assert [name for name in table.MODULES if name not in told] == []
