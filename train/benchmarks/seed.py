"""SEED-Bench-1: twelve kinds of questions on images and on videos, answered by a letter.

Questions (`--questions`), a folder or a file of it:
- the official `SEED-Bench.json`, with Bunny's or LLaVA's prompts (`*seed-bench*.jsonl`) beside it
  where they are; pictures in `SEED-Bench-image/<data_id>`, a video's middle frame in
  `SEED-Bench-video-image/<type>_<question_id>.png`;
- the hub's parquet (lmms-lab/SEED-Bench), or its rows as JSON or JSON lines; of a video's frames
  the middle one is shown.

The figure of all questions is not comparable between editions: Bunny's file has 5009 video
questions, today's 3757. The image figure is: both have the same 14,233.

Sources: Bunny's eval/seed-bench/convert_seed_for_submission.py and extract_video_frames.py;
lmms-eval's tasks/seedbench.
"""

from __future__ import annotations

import json
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
from train.benchmarks.editions import edition, percent, refuse_hidden_answers, refuse_twice
from train.benchmarks.folders import json_files
from train.benchmarks.wording import OPTION_LETTER

LETTERS = "ABCD"
CHOICES = ("choice_a", "choice_b", "choice_c", "choice_d")
VIDEO_DIFFERS = "the published figure of all has 5009 video questions, this has 3757"
EDITIONS = {
    19242: ("SEED-Bench-1 as Bunny used it, 14233 image and 5009 video questions",),
    17990: ("SEED-Bench-1 of today, 14233 image and 3757 video questions", VIDEO_DIFFERS),
    14233: ("SEED-Bench-1, the image questions",),
}
TYPES = {
    "Scene Understanding": 1,
    "Instance Identity": 2,
    "Instance Location": 3,
    "Instance Attributes": 4,
    "Instances Counting": 5,
    "Spatial Relation": 6,
    "Instance Interaction": 7,
    "Visual Reasoning": 8,
    "Text Understanding": 9,
    "Action Recognition": 10,
    "Action Prediction": 11,
    "Procedure Understanding": 12,
}
"""As SEED-Bench's DATASET.md lists them; a file's own `question_type` comes first."""


def read(path: str) -> QuestionSet:
    """Return the questions of a folder or file (see above). Raises: UserError when it is neither.

    details: `data_type` (image | video), `type_id`. category: the name of the type.
    """
    found = files.require(path)
    parquet = files.parquet_files(found)
    if parquet:
        rows = files.parquet_rows(parquet)
        listed = [_question(row.values, _middle(row.images()), {}, TYPES) for row in rows]
        return _question_set(listed, parquet)
    official = _official_file(found)
    folder = official.parent
    whole = _official_rows(official)
    prompts_file = _prompts_file(folder, official)
    prompts = _prompts(prompts_file) if prompts_file else {}
    types = {str(name): int(no) for name, no in (whole.get("question_type") or TYPES).items()}
    listed = []
    for row in whole["questions"]:
        prompt = prompts.get(question_id(row["question_id"]), {})
        listed.append(_question(row, _picture(row, prompt, folder), prompt, types))
    used = [official, *([prompts_file] if prompts_file else [])]
    return _question_set(listed, used)


def _official_file(found: Path) -> Path:
    """Return SEED-Bench.json, or a file of the hub's rows: the one given or the one in a folder."""
    if found.is_file():
        is_prompts = found.suffix == ".jsonl" and not _are_official(files.read_jsonl(found))
        official = found.parent / "SEED-Bench.json"
        if not is_prompts:
            return found
        if official.exists():
            return official
        raise files.unreadable(
            found, "It has prompts and no answers.", f"Put {official.name} here."
        )
    listed = json_files(found, "choice_a")
    if len(listed) != 1:
        raise files.unreadable(
            found,
            f"It has {len(listed)} files that may be the questions.",
            "Give a folder with SEED-Bench.json or the hub's parquet.",
        )
    return listed[0]


def _are_official(rows: Sequence[Mapping[str, Any]]) -> bool:
    return all("choice_a" in row for row in rows)


def _official_rows(path: Path) -> dict[str, Any]:
    with path.open(encoding="utf-8-sig") as file:
        is_whole = path.suffix == ".json" and file.read(64).lstrip()[:1] == "{"
    if is_whole:
        found = files.read_json(path)
        if isinstance(found.get("questions"), list):
            return dict(found)
        raise files.unreadable(path, "It has no list `questions`.", "Give SEED-Bench.json.")
    return {"questions": files.read_json_rows(path)}


def _prompts_file(folder: Path, official: Path) -> Path | None:
    listed = [one for one in json_files(folder, "image") if one.suffix == ".jsonl"]
    listed = [one for one in listed if one != official and "seed" in one.name.lower()]
    if len(listed) > 1:
        names = ", ".join(one.name for one in listed)
        raise files.unreadable(folder, f"It has several files of prompts: {names}.", "Leave one.")
    return listed[0] if listed else None


def _prompts(path: Path) -> dict[str, dict[str, Any]]:
    return {question_id(row["question_id"]): row for row in files.read_jsonl(path)}


def question_id(raw: Any) -> str:
    """Return an id as upstream compares them: as a whole number where it is one, else as text."""
    try:
        return str(int(raw))
    except ValueError:
        return str(raw)


def _picture(
    row: Mapping[str, Any], prompt: Mapping[str, Any], folder: Path
) -> tuple[ImageSource, ...]:
    """Return the picture that the prompt names, or the one where Bunny's scripts put it."""
    if row["data_type"] == "image":
        name = f"SEED-Bench-image/{row['data_id']}"
    else:
        name = f"SEED-Bench-video-image/{row['question_type_id']}_{row['question_id']}.png"
    named = prompt.get("image") or row.get("image") or name
    return (files.FileImage(str(folder / str(named))),)


def _middle(images: Sequence[ImageSource]) -> tuple[ImageSource, ...]:
    """Return the middle one, as Bunny's script takes of a clip: place (n - 1) // 2."""
    return (images[(len(images) - 1) // 2],) if images else ()


def _question(
    row: Mapping[str, Any],
    images: tuple[ImageSource, ...],
    prompt: Mapping[str, Any],
    types: Mapping[str, int],
) -> Question:
    lines = [f"{letter}. {row[name]}" for letter, name in zip(LETTERS, CHOICES, strict=True)]
    built = "\n".join([str(row["question"]), *lines]) + OPTION_LETTER
    if row["data_type"] not in ("image", "video"):
        raise UserError(
            f"SEED-Bench: {row['question_id']} is of type {row['data_type']!r}.",
            "SEED-Bench-1 has images and videos alone.",
            "Give the files of SEED-Bench-1.",
        )
    type_id = int(row["question_type_id"])
    names = {number: name for name, number in types.items()}
    details = {"data_type": row["data_type"], "type_id": type_id, "text": str(row["question"])}
    return Question(
        question_id(row["question_id"]),
        row["question_id"],
        str(prompt.get("text", built)).replace("<image>", "").strip(),
        images,
        names.get(type_id, f"type {type_id}"),
        row.get("answer") or None,
        details,
    )


def _question_set(questions: Sequence[Question], used: Sequence[Path]) -> QuestionSet:
    refuse_twice("SEED-Bench", questions)
    version, notes = edition("SEED-Bench", len(questions), EDITIONS)
    if not any(one.details["data_type"] == "video" for one in questions):
        notes += ("no video questions: the figure of all is the image figure",)
    return QuestionSet("seed", version, tuple(questions), files.digests(used), notes)


def answered(text: str, profile: Profile) -> str | None:
    """Return the letter of an answer, or None.

    bunny: the answer is the letter and nothing else: "A." and "a" are wrong. lmms: its first
    character after blanks, in either case.
    """
    letter = text if profile == "bunny" else text.strip()[:1].upper()
    return letter if len(letter) == 1 and letter in LETTERS else None


def score(questions: QuestionSet, texts: Texts, profile: Profile) -> Report:
    """Return the accuracy in percent of all, image and video questions, and of each type.

    All are averages over questions. Missing and unreadable answers are wrong; a type without a
    right answer has 0.0 (upstream stops there).
    """
    refuse_hidden_answers(questions, "Take the edition with answers.")
    listed = questions.questions
    letters = {
        one.id: answered(text, profile) for one in listed if (text := texts[one.id]) is not None
    }
    right = {one.id: letters.get(one.id) == one.answer for one in listed}
    parts = {"all": list(listed)} | {
        part: [one for one in listed if one.details["data_type"] == part]
        for part in ("image", "video")
    }
    return Report(
        benchmark="seed",
        profile=profile,
        metrics={part: _accuracy(asked, right) for part, asked in parts.items() if asked},
        items=len(listed),
        missing=[one.id for one in listed if one.id not in letters],
        unreadable=[name for name, letter in letters.items() if letter is None],
        tables={"Types": _by_type(listed, right)},
        notes=questions.notes,
    )


def _accuracy(asked: Sequence[Question], right: Mapping[str, bool]) -> float:
    return percent(sum(right[one.id] for one in asked), len(asked))


def _by_type(asked: Sequence[Question], right: Mapping[str, bool]) -> list[dict[str, Any]]:
    rows = []
    for type_id in sorted({one.details["type_id"] for one in asked}):
        here = [one for one in asked if one.details["type_id"] == type_id]
        row = {"type": here[0].category, "id": type_id, "items": len(here)}
        rows.append(row | {"accuracy": _accuracy(here, right)})
    return rows


def submission(questions: QuestionSet, texts: Texts) -> bytes:
    """Return the leaderboard's JSON lines in file order; "" for a question without an answer."""
    rows = [
        {"question_id": one.question_id, "prediction": texts[one.id] or ""}
        for one in questions.questions
    ]
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


BENCHMARK = Benchmark(
    name="seed",
    title="SEED-Bench-1",
    read=read,
    score=score,
    columns={"SEED": "all", "SEED-IMG": "image"},
    answer_id=lambda row: question_id(row["question_id"]),
    submission=submission,
    submission_suffix=".jsonl",
    layouts=(
        "folder: SEED-Bench.json, *seed-bench*.jsonl, SEED-Bench-image/, SEED-Bench-video-image/",
        "one of these files, or the hub's parquet (lmms-lab/SEED-Bench)",
    ),
)
