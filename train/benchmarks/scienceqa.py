"""ScienceQA: pictures of school books, answered by a letter; the figure is IMG accuracy.

Questions (`--questions`), a folder or one file of it:
- the official `problems.json` and `pid_splits.json` (its "test"), with Bunny's or LLaVA's prompts
  (`*_test_CQM-A.json`) beside them where they are; pictures in `test/<pid>/`;
- the prompts' file alone: right letters and numbers of choices are then read from it;
- the hub's parquet (ScienceQA-IMG or -FULL), or its rows as JSON or JSON lines. They have no ids:
  a question's id is its row, from 0.

Sources: Bunny's eval/scienceqa/eval_science_qa.py and bunny/eval/model_vqa_science.py; lmms-eval's
tasks/scienceqa. Bunny takes a picture as it is here, squashed to a square and not padded.
"""

from __future__ import annotations

import re
import string
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from manifests.errors import UserError
from train.benchmarks import files
from train.benchmarks.contract import (
    Asking,
    Benchmark,
    ImageSource,
    Profile,
    Question,
    QuestionSet,
    Report,
    Texts,
)
from train.benchmarks.editions import edition, percent, refuse_hidden_answers, refuse_twice
from train.benchmarks.folders import json_files
from train.benchmarks.wording import OPTION_LETTER

LETTERS = "ABCDE"
SAID = re.compile(r"The answer is ([A-Z]).")
SPLIT = "test"
EDITIONS = {4241: ("ScienceQA test",), 2017: ("ScienceQA test, the questions with a picture",)}
HINT = "Put problems.json beside the questions."
STRIPPED = "no pictures in these files: all questions count as those of ScienceQA-IMG"


def read(path: str) -> QuestionSet:
    """Return the questions of a folder or file (see above). Raises: UserError when it is neither.

    A question's answer is the 0-based place of the right choice; details: `num_choices`.
    """
    found = files.require(path)
    parquet = [one for one in files.parquet_files(found) if _is_test(one)]
    if parquet:
        rows = files.parquet_rows(parquet)
        are_full = any("FULL" in str(one) for one in parquet)
        are_img = not are_full and not any(row.images() for row in rows)
        return _question_set(
            _hub_questions([(row.values, row.images()) for row in rows], are_img=are_img), parquet
        )
    used = _official_files(found)
    if "problems" in used:
        problems = files.read_json(used["problems"])
        if not isinstance(problems, dict):
            raise files.unreadable(used["problems"], "It is not a mapping of id to problem.")
        return _question_set(_official(problems, used), used.values())
    rows_file = used.get("prompts", found)
    if rows_file.is_dir():
        raise files.unreadable(found, "It has no problems.json, prompts or parquet file.", HINT)
    raw = files.read_json_rows(rows_file)
    folder = rows_file.parent
    if raw and "conversations" in raw[0]:
        return _question_set([_prompted(row, None, folder) for row in raw], [rows_file])
    return _question_set(_hub_rows(raw, folder), [rows_file])


def _is_test(path: Path) -> bool:
    return files.split_of(path) not in {"train", "validation"}


def _official_files(found: Path) -> dict[str, Path]:
    """Return the official files of a folder, or those beside the one that is given."""
    if found.is_file() and found.suffix not in {".json", ".jsonl"}:
        raise files.unreadable(found, "It is neither JSON nor parquet.", HINT)
    folder = found if found.is_dir() else found.parent
    is_alone = found.is_file() and not found.name.startswith(("problems", "pid_splits"))
    names = {"problems": "problems.json", "splits": "pid_splits.json"}
    used = {role: folder / name for role, name in names.items() if (folder / name).exists()}
    prompts = [found] if is_alone else json_files(folder, "conversations")
    if not prompts and not used:
        prompts = json_files(folder, "choices")
    if len(prompts) > 1:
        raise UserError(
            f"{folder} has {len(prompts)} files of prompts.",
            ", ".join(one.name for one in prompts),
            "Name the one that was asked, or leave one there.",
        )
    if is_alone:
        used.pop("splits", None)  # the file that is named says which questions count
    return used | ({"prompts": prompts[0]} if prompts else {})


def _official(problems: Mapping[str, Any], used: Mapping[str, Path]) -> list[Question]:
    """Return the questions of the test split, or of the prompts where there is no split file."""
    rows = files.read_json_rows(used["prompts"]) if "prompts" in used else []
    if rows and "conversations" not in rows[0]:  # the hub's rows beside an unused problems.json
        folder = used["prompts"].parent
        return _hub_rows(rows, folder)
    prompts = {str(row["id"]): row for row in rows}
    if len(prompts) < len(rows):
        raise UserError(f"{used['prompts']} has two questions of one id.", "", "Download it again.")
    pids = _test_pids(used) if "splits" in used else list(prompts) or list(problems)
    lost = [pid for pid in pids if pid not in problems]
    alien = [pid for pid in prompts if pid not in set(pids)]
    if lost or alien:
        what = (
            f"{len(lost)} questions are not in problems.json"
            if lost
            else (f"{len(alien)} prompts are to questions outside the {SPLIT} split")
        )
        raise UserError(
            f"ScienceQA: {what}, e.g. {(lost or alien)[0]}.",
            "The files are of different versions.",
            "Give problems.json, pid_splits.json and prompts of one download.",
        )
    folder = used["problems"].parent
    return [
        _prompted(prompts[pid], problems[pid], folder)
        if pid in prompts
        else _problem_question(pid, problems[pid], folder)
        for pid in pids
    ]


def _test_pids(used: Mapping[str, Path]) -> list[str]:
    splits = files.read_json(used["splits"])
    if not isinstance(splits, dict) or SPLIT not in splits:
        raise files.unreadable(used["splits"], f"It has no list {SPLIT!r}.")
    return [str(pid) for pid in splits[SPLIT]]


def _prompted(row: Mapping[str, Any], problem: Mapping[str, Any] | None, folder: Path) -> Question:
    """Return a question of Bunny's prompts; without its problem, by what the row itself tells."""
    pid, turns = str(row["id"]), row["conversations"]
    asked = str(turns[0]["value"]).replace("<image>", "").strip()
    images = _named_images(row.get("image"), folder)
    if problem is None:
        told = str(turns[1]["value"]) if len(turns) > 1 else ""
        letter = bunny_letter(told) or bunny_letter(told + ".")
        choices, answer = _num_listed(asked), LETTERS.index(letter) if letter else None
    else:
        choices, answer = len(problem["choices"]), int(problem["answer"])
    return _question(pid, asked, choices, answer, images)


def _num_listed(asked: str) -> int:
    """Return how many choices a prompt ends with: lines "A. ..", "B. .."."""
    starts = [line[:3] for line in asked.split("\n")]
    found = (n for n in range(len(LETTERS), 0, -1) if f"{LETTERS[n - 1]}. " in starts)
    return next(found, len(LETTERS))


def _problem_question(pid: str, problem: Mapping[str, Any], folder: Path) -> Question:
    name = f"{pid}/{problem['image']}" if problem.get("image") else None
    answer = problem.get("answer")
    return _question(
        pid,
        _asked(problem),
        len(problem["choices"]),
        None if answer is None else int(answer),
        _named_images(name, folder),
    )


def _hub_rows(rows: Sequence[Mapping[str, Any]], folder: Path) -> list[Question]:
    """Return the questions of the hub's rows as JSON; without the key `image` they are of IMG."""
    are_img = not any("image" in row for row in rows)
    named = [(row, _named_images(row.get("image"), folder)) for row in rows]
    return _hub_questions(named, are_img=are_img)


def _hub_questions(
    rows: Sequence[tuple[Mapping[str, Any], Sequence[ImageSource]]], *, are_img: bool
) -> list[Question]:
    """Return the hub's questions. are_img: of ScienceQA-IMG, from files without its pictures."""
    listed = [_hub_question(row, no, images) for no, (row, images) in enumerate(rows)]
    return [replace(one, category="image") for one in listed] if are_img else listed


def _hub_question(row: Mapping[str, Any], no: int, images: Sequence[ImageSource]) -> Question:
    ids = [row[name] for name in ("question_id", "id", "pid") if row.get(name) is not None]
    answer = row.get("answer")
    place = string.ascii_uppercase.index(answer) if isinstance(answer, str) else answer
    return _question(str(ids[0] if ids else no), _asked(row), len(row["choices"]), place, images)


def _asked(row: Mapping[str, Any]) -> str:
    """Return the question as in Bunny's prompts: a hint, if any, then question and choices."""
    hint = str(row.get("hint") or "").strip()
    choices = [f"{letter}. {text}" for letter, text in zip(LETTERS, row["choices"], strict=False)]
    lines = [*([f"Context: {hint}"] if hint else []), str(row["question"]), *choices]
    return "\n".join(lines).replace("  ", " ").strip()  # as LLaVA's script does: no two blanks


def _question(
    pid: str, asked: str, num_choices: int, answer: int | None, images: Sequence[ImageSource]
) -> Question:
    prompt = asked + OPTION_LETTER
    # Bunny's own scorer tells questions with a picture by their prompt
    row = {"prompt": f"<image>\n{prompt}"} if images else {}
    details = {"num_choices": num_choices, "text": asked, "row": row}
    category = "image" if images else "text only"
    return Question(pid, pid, prompt, tuple(images), category, answer, details)


def _named_images(name: Any, folder: Path) -> tuple[ImageSource, ...]:
    if not name:
        return ()
    path = folder / SPLIT / str(name)
    return (files.FileImage(str(path if path.exists() else folder / str(name))),)


def _question_set(questions: Sequence[Question], used: Any) -> QuestionSet:
    refuse_twice("ScienceQA", questions)
    version, notes = edition("ScienceQA", len(questions), EDITIONS)
    if any(one.category == "image" and not one.images for one in questions):
        notes += (STRIPPED,)
    return QuestionSet("scienceqa", version, tuple(questions), files.digests(used), notes)


def bunny_letter(text: str) -> str | None:
    """Return the letter of an answer "B", "B. ..", or with one "The answer is B" and a character.

    Exactly so: "B.", "b", "(B)" and "The answer is B" are None.
    """
    if len(text) == 1 and text in LETTERS:
        return text
    if text[:1] in tuple(LETTERS) and text[1:3] == ". ":
        return text[0]
    said = SAID.findall(text)
    return str(said[0]) if len(said) == 1 else None


def lmms_letter(text: str) -> str | None:
    """Return the letter of an answer "b", or of one that begins with "B."; blanks are stripped."""
    text = text.strip()
    if len(text) == 1:
        return text.upper()
    return text[0] if len(text) > 1 and text[0].isupper() and text[1] == "." else None


def choice(text: str, num_choices: int, profile: Profile) -> int | None:
    """Return the 0-based place of the choice an answer names, or None when it names none."""
    letter = bunny_letter(text) if profile == "bunny" else lmms_letter(text)
    place = string.ascii_uppercase.find(letter) if letter else -1
    return place if 0 <= place < num_choices else None


def score(questions: QuestionSet, texts: Texts, profile: Profile) -> Report:
    """Return the accuracy in percent of questions with a picture (the published one), and of all.

    An answer that is missing or unreadable is wrong. Upstream leaves a missing one out of the
    IMG figure; here it counts.
    """
    refuse_hidden_answers(questions, HINT)
    read_choices = {
        one.id: choice(text, one.details["num_choices"], profile)
        for one in questions.questions
        if (text := texts[one.id]) is not None
    }
    rows = []
    for part in ("image", "text only"):
        asked = [one for one in questions.questions if one.category == part]
        right = sum(read_choices.get(one.id) == one.answer for one in asked)
        row = {"part": part, "items": len(asked), "right": right}
        rows.append(row | {"accuracy": percent(right, len(asked))})
    num_right, num = sum(row["right"] for row in rows), len(questions.questions)
    metrics = {"img_accuracy": rows[0]["accuracy"]} if rows[0]["items"] else {}
    return Report(
        benchmark="scienceqa",
        profile=profile,
        metrics=metrics | {"accuracy": percent(num_right, num)},
        items=num,
        missing=[one.id for one in questions.questions if one.id not in read_choices],
        unreadable=[name for name, place in read_choices.items() if place is None],
        tables={"Parts": [row for row in rows if row["items"]]},
        notes=questions.notes,
    )


BENCHMARK = Benchmark(
    name="scienceqa",
    title="ScienceQA-IMG",
    read=read,
    score=score,
    columns={"SQA-I": "img_accuracy"},
    asking=Asking(max_new_tokens=1024, image_mode="square"),
    layouts=(
        "folder: problems.json, pid_splits.json, *_test_CQM-A.json, test/<pid>/image.png",
        "one of these files, or the hub's ScienceQA parquet (ids are rows, from 0)",
    ),
)
