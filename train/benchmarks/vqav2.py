"""VQAv2: short answers; soft accuracy against ten people's on val, an upload for test-dev.

Rules: Goyal et al., arXiv 1612.00837, GT-Vision-Lab/VQA vqaEval.py, and Bunny's
eval/vqav2/convert_vqav2_for_submission.py. lmms: lmms-eval, tasks/vqav2/utils.py (0.7).
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from manifests.errors import UserError
from train.benchmarks import files, vqa_text
from train.benchmarks.contract import (
    Benchmark,
    Profile,
    Question,
    QuestionSet,
    Report,
    Texts,
)
from train.benchmarks.wording import SINGLE_WORD, bare

COUNTS = {"val2014": 214_354, "test-dev2015": 107_394, "test2015": 447_793}
HUB_SPLITS = {"validation": "val2014", "testdev": "test-dev2015", "test": "test2015"}


def soft_accuracy(text: str, answers: Sequence[str], *, always: bool = False) -> float:
    """Return the official accuracy of one answer, from 0 to 1.

    Each person is left out in turn: min(1, others who say the same / 3), and the mean of those.
    Nothing is normalised when all people wrote the same, unless `always`.
    """
    said = [vqa_text.on_one_line(one) for one in answers]
    found = vqa_text.on_one_line(text)
    if always or len(set(said)) > 1:
        said = [vqa_text.official(one) for one in said]
        found = vqa_text.official(found)
    same = [one == found for one in said]
    return sum(min(1.0, (sum(same) - one) / 3) for one in same) / len(same)


def accuracy_of(text: str, answers: Sequence[str], profile: Profile = "bunny") -> float:
    """Return the accuracy of a model's answer, from 0 to 1.

    bunny: what the server gives for the text as it is uploaded, that is after M4C's processor.
    lmms: the text itself, with both sides always normalised.
    """
    if profile == "lmms":
        return soft_accuracy(text, answers, always=True)
    return soft_accuracy(vqa_text.m4c(text), answers)


def score(questions: QuestionSet, texts: Texts, profile: Profile = "bunny") -> Report:
    """Return the accuracy in percent, to two decimals, and per type of answer and question.

    Raises: UserError when the split's answers are not public.
    """
    hidden = [one.id for one in questions.questions if not one.answer]
    if hidden:
        raise UserError(
            f"{len(hidden)} questions of VQAv2 {questions.version} have no public answers.",
            "Test answers are on the server alone.",
            "Score on val, or write the upload with `warren submission vqav2`.",
        )
    rates = {
        one.id: 0.0
        if texts[one.id] is None
        else accuracy_of(str(texts[one.id]), one.answer, profile)
        for one in questions.questions
    }
    raw = [soft_accuracy(texts[one.id] or "", one.answer) for one in questions.questions]
    metrics = {"accuracy": _percent(list(rates.values()))}
    if profile == "bunny":
        metrics["accuracy_of_raw_text"] = _percent(raw)
    return Report(
        "vqav2",
        profile,
        metrics,
        len(rates),
        missing=[one.id for one in questions.questions if texts[one.id] is None],
        tables={name: _table(questions, rates, name) for name in ("answer_type", "question_type")},
        notes=[*questions.notes, f"the split is {questions.version}, not test-dev"],
    )


def _percent(rates: Sequence[float]) -> float:
    return round(100 * sum(rates) / len(rates), 2)


def _table(questions: QuestionSet, rates: Mapping[str, float], name: str) -> list[dict[str, Any]]:
    groups: dict[str, list[float]] = defaultdict(list)
    for one in questions.questions:
        groups[one.details[name]].append(rates[one.id])
    return [
        {name: kind, "accuracy": _percent(group), "questions": len(group)}
        for kind, group in sorted(groups.items())
    ]


def submission(questions: QuestionSet, texts: Texts) -> bytes:
    """Return the upload: every question of test2015, in file order, normalised by M4C's processor.

    An answer to what is not in test-dev may be missing: it is "".
    Raises: UserError when the questions are not test2015, or one of test-dev has no answer.
    """
    if questions.version.startswith("test-dev"):
        raise UserError(
            "The upload must hold all ids of test2015.",
            "The server refuses a file of test-dev's alone.",
            "Give bunny_vqav2_mscoco_test2015.jsonl, or test2015's official questions.",
        )
    lost = [
        one.id
        for one in questions.questions
        if not one.details["optional"] and texts[one.id] is None
    ]
    if lost:
        raise UserError(
            f"{len(lost)} questions have no answer, e.g. {lost[0]}.", "", "Answer them."
        )
    rows = [
        {"question_id": one.question_id, "answer": vqa_text.m4c(texts[one.id] or "")}
        for one in questions.questions
    ]
    return json.dumps(rows, ensure_ascii=False).encode()


def read(path: str) -> QuestionSet:
    """Return VQAv2's questions; see LAYOUTS. Raises: UserError when there are none.

    Of a folder with several splits, val with its answers is taken, then test2015, then test-dev.
    Questions of test2015 outside test-dev are `optional` (details): none of them needs an answer.
    """
    root = files.require(path)
    tables = files.parquet_files(root)
    if tables:
        return _from_parquet(tables)
    asked = _asked(root)
    split = _split(asked)
    if asked.suffix == ".jsonl":
        rows = files.read_jsonl(asked)
    else:
        told = files.read_json(asked)
        split = str(told.get("data_subtype", split))
        rows = told.get("questions") or told["annotations"]
    return _with_answers([_question(row, asked.parent, split) for row in rows], asked, split)


def _asked(root: Path) -> Path:
    """Return the file to read the questions from. Raises: UserError when there is none."""
    if root.is_file() and "annotations" in root.name:
        return _beside(root.parent, "val2014", ASKED) or root
    if root.is_file():
        return root
    wanted = [(split, ASKED) for split in ("val2014", "test2015", "test-dev2015")]
    for split, names in (*wanted, ("", ("*questions*.json",)), ("val2014", ANSWERED)):
        found = _beside(root, split, names)
        if found:
            return found
    raise UserError(
        f"{root} holds no questions of VQAv2.", "", f"Give one of: {'; '.join(LAYOUTS)}."
    )


def _with_answers(questions: list[Question], asked: Path, split: str) -> QuestionSet:
    """Return the set, joined with what else lies beside: val's answers, or test-dev's ids."""
    sources = [asked]
    answers = _beside(asked.parent, split, ANSWERED) if split == "val2014" else None
    if answers is not None:
        questions = _joined(questions, files.read_json(answers)["annotations"], answers)
        sources += [answers] if answers != asked else []
    testdev = _beside(asked.parent, "test-dev2015", ASKED)
    if split == "test2015":
        needed = set() if testdev is None else _ids(testdev)
        questions = [
            replace(one, details={**one.details, "optional": one.id not in needed})
            for one in questions
        ]
        sources += [testdev] if testdev else []
    return _question_set(questions, split, sources)


def _question_set(
    questions: Sequence[Question], split: str, sources: Sequence[Path]
) -> QuestionSet:
    whole = COUNTS.get(split) == len(questions)
    version = split if whole else f"{split}, subset of {len(questions)} questions"
    told = f"{len(questions)} questions; {split} has {COUNTS.get(split, 'an unknown number')}"
    return QuestionSet("vqav2", version, questions, files.digests(sources), [] if whole else [told])


def _question(row: Mapping[str, Any], folder: Path, split: str) -> Question:
    """Return a question of Bunny's file (`text`, `image`) or the official one."""
    text = row.get("text") or row.get("question", "")  # answers alone can be scored, not asked
    image_id = int(row.get("image_id") or 0)  # not needed to score
    name = row.get("image") or f"COCO_{split.replace('-dev', '')}_{image_id:012}.jpg"
    places = [folder / split.replace("-dev", ""), folder / "images"]
    place = next((one for one in places if one.is_dir()), places[0])
    return Question(
        str(row["question_id"]),
        row["question_id"],
        text if "text" in row else text + SINGLE_WORD,
        (files.FileImage(str(place / str(name))),),
        answer=_answers(row.get("answers")),
        details=_details(row),
    )


def _details(row: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "text": bare(row.get("text") or row.get("question", "")),
        "answer_type": str(row.get("answer_type", "")),
        "question_type": str(row.get("question_type", "")),
        "optional": False,
    }


def _answers(told: Sequence[Any] | None) -> tuple[str, ...] | None:
    """Return the people's answers; None where they are not public."""
    if not told:
        return None
    return tuple(str(one["answer"]) if isinstance(one, Mapping) else str(one) for one in told)


def _joined(
    questions: Sequence[Question], annotations: Sequence[Mapping[str, Any]], origin: Path
) -> list[Question]:
    told = {str(one["question_id"]): one for one in annotations}
    lost = [one.id for one in questions if one.id not in told]
    if lost:
        raise UserError(
            f"{origin} does not have the answers to the questions beside it.",
            f"{len(questions)} questions, {len(told)} with answers; {len(lost)} have none.",
            "Take both files of one split and version.",
        )
    kept = ("answer_type", "question_type")
    return [
        replace(
            one,
            answer=_answers(told[one.id]["answers"]),
            details={**one.details, **{name: str(told[one.id].get(name, "")) for name in kept}},
        )
        for one in questions
    ]


def _from_parquet(tables: Sequence[Path]) -> QuestionSet:
    splits = {files.split_of(one) for one in tables}
    name = next((one for one in HUB_SPLITS if one in splits), files.split_of(tables[0]))
    here = [one for one in tables if files.split_of(one) == name]
    split = HUB_SPLITS.get(name, name)
    questions = []
    for row in files.parquet_rows(here):
        one = row.values
        number = int(one["question_id"])
        answers = _answers(one.get("answers"))
        asked = one["question"] + SINGLE_WORD
        details = {**_details(one), "optional": split == "test2015"}
        questions.append(Question(str(number), number, asked, row.images(), "", answers, details))
    return _question_set(questions, split, here)


def _ids(path: Path) -> set[str]:
    rows = files.read_jsonl(path) if path.suffix == ".jsonl" else files.read_json(path)["questions"]
    return {str(row["question_id"]) for row in rows}


def _split(path: Path) -> str:
    return next((one for one in COUNTS if one in path.name), "val2014")


def _beside(folder: Path, split: str, names: Sequence[str]) -> Path | None:
    """Return a split's first file in a folder, by names in order of preference."""
    lines = files.question_lines(folder, "*")
    found = (one for name in names for one in sorted(folder.glob(name.format(split))))
    return next((one for one in found if one.suffix != ".jsonl" or one in lines), None)


ASKED = ("*_{}.jsonl", "*_{}_questions.json")
ANSWERED = ("*_{}_annotations.json", "*annotations*.json")

LAYOUTS = (
    "v2_OpenEnded_mscoco_val2014_questions.json with v2_mscoco_val2014_annotations.json beside it",
    "bunny_vqav2_mscoco_test2015.jsonl or the official test2015 questions, for an upload; with"
    " test-dev2015's beside it, all of those must be answered",
    "bunny_vqav2_mscoco_test-dev2015.jsonl or its official file, to be answered",
    "a folder with these; val's answers alone are enough to score, not to ask",
    "parquet of the hub: validation, testdev or test",
)

BENCHMARK = Benchmark(
    name="vqav2",
    title="VQAv2",
    read=read,
    score=score,
    columns={"VQAv2": "accuracy"},
    submission=submission,
    submission_suffix=".json",
    layouts=LAYOUTS,
)
