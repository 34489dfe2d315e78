"""The demo world's benchmark: questions of pictures that no stage has seen, one right answer each.

A line of its questions is Bunny's, and says what is right:
{"question_id": 0, "image": "images/0.jpg", "text": "How many ...", "category": "count",
"answer": "3"}. Any benchmark of one's own with exact answers can be written so.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

from train.benchmarks import files
from train.benchmarks.contract import (
    Asking,
    Benchmark,
    Profile,
    Question,
    QuestionSet,
    Report,
    Texts,
)

QUESTIONS = "questions.jsonl"
LAYOUTS = (f"{QUESTIONS}: question_id, text, category, answer, image (a path beside it) or none",)
_NEEDED = ("question_id", "text", "answer")


def read(path: str) -> QuestionSet:
    """Return the questions of a folder or of its file. Raises: UserError for a row that is odd."""
    found = files.require(path)
    source = found / QUESTIONS if found.is_dir() else found
    rows = files.read_jsonl(source)
    questions = []
    for number, row in enumerate(rows, start=1):
        lacking = [name for name in _NEEDED if not isinstance(row.get(name), str | int)]
        if lacking:
            raise files.unreadable(source, f"Line {number} has no {lacking[0]}.", LAYOUTS[0])
        questions.append(_question(row, str(source.parent)))
    return QuestionSet("demo", f"{len(rows)} questions", questions, files.digests([source]))


def _question(row: Mapping[str, Any], folder: str) -> Question:
    name = row.get("image")
    return Question(
        str(row["question_id"]),
        row["question_id"],
        str(row["text"]),
        (files.FileImage(f"{folder}/{name}"),) if name else (),
        str(row.get("category", "")),
        str(row["answer"]),
    )


def score(questions: QuestionSet, texts: Texts, profile: Profile = "bunny") -> Report:
    """Return the share of answers that are right to the letter, in percent: of all, by category.

    White space around an answer does not count. Both profiles are the same.
    """
    right: dict[str, list[bool]] = defaultdict(list)
    for one in questions.questions:
        said = texts[one.id]
        right[one.category].append(said is not None and said.strip() == one.answer)
    rows = [
        {"category": name, "accuracy": 100 * sum(some) / len(some), "questions": len(some)}
        for name, some in right.items()
    ]
    num_right, num_asked = sum(map(sum, right.values())), len(questions.questions)
    return Report(
        "demo",
        profile,
        {"accuracy": 100 * num_right / max(num_asked, 1)},
        num_asked,
        missing=[one.id for one in questions.questions if texts[one.id] is None],
        tables={"categories": rows},
        notes=list(questions.notes),
    )


BENCHMARK = Benchmark(
    name="demo",
    title="the demo world",
    read=read,
    score=score,
    columns={},
    asking=Asking(max_new_tokens=16),
    layouts=LAYOUTS,
)
