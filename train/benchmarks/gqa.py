"""GQA, testdev balanced: open and yes-no questions about scenes, one right answer each.

Rules: the official eval.py of Hudson and Manning, arXiv 1902.09506, after Bunny's
eval/gqa/convert_gqa_for_eval.py. lmms: lmms-eval, tasks/gqa (exact_match, case and punctuation
ignored).
"""

from __future__ import annotations

import string
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from manifests.errors import UserError
from train.benchmarks import files
from train.benchmarks.contract import (
    Benchmark,
    ImageSource,
    Profile,
    Question,
    QuestionSet,
    Report,
    Texts,
)
from train.benchmarks.wording import SINGLE_WORD, bare

NUM_TESTDEV_BALANCED = 12_578
OFFICIAL = "testdev_balanced_questions.json"

_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def is_right(text: str, answer: str, profile: Profile = "bunny") -> bool:
    """Return whether an answer is the right one.

    bunny: equal once final "." are cut and it is in lower case; no other leniency.
    lmms: equal in lower case and without any punctuation, on both sides.
    """
    if profile == "lmms":
        return _plain(text) == _plain(answer)
    return text.rstrip(".").lower() == answer


def _plain(text: str) -> str:
    return text.lower().translate(_NO_PUNCTUATION)


def score(questions: QuestionSet, texts: Texts, profile: Profile = "bunny") -> Report:
    """Return the accuracy over balanced questions, in percent, and of binary and open ones.

    open: questions whose structure is `query`; binary: all others.
    """
    counted = [one for one in questions.questions if one.details["balanced"]]
    if not counted:
        raise UserError("No question is balanced.", "GQA's accuracy is over those.", LAYOUTS[0])
    right = {
        one.id: texts[one.id] is not None and is_right(str(texts[one.id]), one.answer, profile)
        for one in counted
    }
    kinds = _table(counted, right, "kind")
    metrics = {"accuracy": 100 * sum(right.values()) / len(counted)}
    metrics |= {str(row["kind"]): row["accuracy"] for row in kinds}
    notes = list(questions.notes)
    if len(counted) < len(questions.questions):
        told = "questions are not balanced and do not count"
        notes.append(f"{len(questions.questions) - len(counted)} {told}")
    tables = {"kinds": kinds}
    for name in ("structural", "semantic"):
        tables[name] = _table(counted, right, name)
    return Report(
        "gqa",
        profile,
        metrics,
        len(counted),
        missing=[one.id for one in counted if texts[one.id] is None],
        tables=tables,
        notes=notes,
    )


def _table(
    counted: Sequence[Question], right: Mapping[str, bool], name: str
) -> list[dict[str, Any]]:
    groups: dict[str, list[bool]] = defaultdict(list)
    for one in counted:
        groups[one.details[name]].append(right[one.id])
    return [
        {name: kind, "accuracy": 100 * sum(group) / len(group), "questions": len(group)}
        for kind, group in sorted(groups.items())
    ]


def read(path: str) -> QuestionSet:
    """Return GQA's questions; see LAYOUTS. Raises: UserError when answers are missing."""
    root = files.require(path)
    tables = files.parquet_files(root)
    if tables:
        named = [one for one in tables if "testdev_balanced" in str(one.parent)]
        tables = named or tables  # the hub's other configs may lie beside
        asked = [one for one in tables if "question" in files.parquet_columns(one)]
        return _question_set(_from_parquet(asked, tables), asked)
    folder = root if root.is_dir() else root.parent
    official = root if root.suffix == ".json" else _official(folder)
    lines = [root] if root.suffix == ".jsonl" else files.question_lines(folder, "*gqa*")
    may_tell = official is None or lines == [root]  # a file that is named comes first
    if may_tell and lines and "answer" in files.read_jsonl(lines[0])[0]:
        rows = files.read_jsonl(lines[0])
        return _question_set([_from_row(row, folder) for row in rows], lines[:1])
    if official is None:
        raise UserError(
            f"{path} has no answers to GQA.",
            f"They are in {OFFICIAL}, which is neither there nor in a folder below.",
            f"Give one of: {'; '.join(LAYOUTS)}.",
        )
    told = files.read_json(official)
    if not lines or root == official:
        return _question_set(
            [_question(name, one, folder) for name, one in told.items()], [official]
        )
    rows = files.read_jsonl(lines[0])
    return _question_set(_from_jsonl(rows, told, folder), [lines[0], official])


def _question_set(questions: Sequence[Question], sources: Sequence[Path]) -> QuestionSet:
    whole = len(questions) == NUM_TESTDEV_BALANCED
    version = "testdev_balanced" if whole else f"subset of {len(questions)} questions"
    told = f"{len(questions)} questions; testdev balanced has {NUM_TESTDEV_BALANCED}"
    return QuestionSet("gqa", version, questions, files.digests(sources), [] if whole else [told])


def _question(
    name: str,
    told: Mapping[str, Any],
    folder: Path,
    images: Sequence[ImageSource] = (),
    asked: str = "",
) -> Question:
    types = told.get("types") or {}
    structural = str(types.get("structural", ""))
    details = {
        "balanced": bool(told.get("isBalanced", True)),
        "kind": ("open" if structural == "query" else "binary") if structural else "unknown",
        "structural": structural,
        "semantic": str(types.get("semantic", "")),
        "text": bare(told["question"]),
    }
    here = images or (files.FileImage(str(folder / "images" / f"{told.get('imageId')}.jpg")),)
    prompt = asked or told["question"] + SINGLE_WORD
    return Question(str(name), str(name), prompt, here, structural, told["answer"], details)


def _from_jsonl(
    rows: Sequence[Mapping[str, Any]], told: Mapping[str, Any], folder: Path
) -> list[Question]:
    unknown = [str(row["question_id"]) for row in rows if str(row["question_id"]) not in told]
    if unknown:
        raise UserError(
            f"{len(unknown)} of {len(rows)} questions are not in {OFFICIAL}, e.g. {unknown[0]}.",
            "The two files are of different splits.",
            "Give the official file of the questions that were asked.",
        )
    found = []
    for row in rows:
        name = str(row["question_id"])
        image = files.FileImage(str(folder / "images" / row["image"]))
        found.append(_question(name, told[name], folder, (image,), row["text"]))
    return found


def _from_row(row: Mapping[str, Any], folder: Path) -> Question:
    """Return the question of a row of the hub, or of Bunny's file with an `answer`."""
    name = str(row.get("question_id", row.get("id")))
    image = str(row.get("imageId") or Path(str(row["image"])).stem)
    text = bare(row.get("question") or row["text"])
    return _question(name, {**row, "imageId": image, "question": text}, folder)


def _from_parquet(asked: Sequence[Path], tables: Sequence[Path]) -> list[Question]:
    """Return the questions of the config of instructions, with the images of the other."""
    if not asked:
        raise UserError(
            f"{tables[0].parent} has no questions of GQA.",
            "Its parquet files have no column `question`.",
            "Give the config testdev_balanced_instructions too.",
        )
    rest = [one for one in tables if one not in asked]
    images = {str(row.values["id"]): row.images() for row in files.parquet_rows(rest)}
    found = []
    for row in files.parquet_rows(asked):
        one = row.values
        here = row.images() or images.get(str(one["imageId"]), ())
        found.append(_question(str(one["id"]), one, Path(row.path).parent, here))
    return found


def _official(folder: Path) -> Path | None:
    places = (folder, folder / "data", *sorted(one for one in folder.glob("*/") if one.is_dir()))
    named = (one / OFFICIAL for one in places if (one / OFFICIAL).is_file())
    return next(named, None) or next(iter(sorted(folder.glob("*questions*.json"))), None)


LAYOUTS = (
    f"a folder with {OFFICIAL} and images/, or that file",
    f"bunny_gqa_testdev_balanced.jsonl with {OFFICIAL} beside it, or with an `answer` a row",
    "parquet of the hub: testdev_balanced_instructions, and testdev_balanced_images for images",
)

BENCHMARK = Benchmark(
    name="gqa",
    title="GQA",
    read=read,
    score=score,
    columns={"GQA": "accuracy"},
    layouts=LAYOUTS,
)
