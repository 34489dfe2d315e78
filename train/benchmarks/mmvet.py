"""MM-Vet: open questions that a language model judges; here its upload, and averages of grades.

Questions (`--questions`), a folder or a file of it:
- the official `mm-vet.json`, with the pictures in `images/`;
- Bunny's `bunny-mm-vet.jsonl`: ids 0 to 217, no capabilities;
- the hub's parquet (lmms-lab/MMVet), or its rows as JSON or JSON lines.

A judge (gpt-4-0613 in the paper) grades the upload `{"v1_0": text, ..}`. Its file of grades,
`*-grade-*runs.json` as MM-Vet's evaluator writes it, is averaged when it lies beside the
questions, or when it is given in place of answers: `{"v1_0": {"score": [1.0, 0.9, ..]}, ..}`.

Sources: MM-Vet's mm-vet_evaluator.py; Bunny's eval/mm-vet/convert_mmvet_for_eval.py. lmms-eval
asks for steps of thought first and has another judge: its figures do not compare.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, pstdev
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
from train.benchmarks.editions import edition, refuse_twice
from train.benchmarks.folders import json_files

CAPABILITIES = ("rec", "ocr", "know", "gen", "spat", "math")
EDITIONS = {218: ("MM-Vet",)}
GRADES = "*-grade-*.json"
RUNS = 5
JUDGED = (
    "MM-Vet needs a judge's grades.",
    "Its answers are free text, graded from 0 to 1 by a language model.",
    "Write the submission and have it graded; then give the file of grades as --answers, or put "
    "it beside the questions.",
)
OTHER_JUDGE = "lmms-eval's figures have another prompt and another judge: they do not compare"

Grades = Mapping[str, Sequence[float]]
"""Question id ("v1_0") -> one grade per run of the judge, each from 0 to 1."""


def read(path: str) -> QuestionSet:
    """Return the questions of a folder or file (see above). Raises: UserError when it is neither.

    details: `capabilities`, `question`, and `grades` where the judge's file is there.
    """
    found = files.require(path)
    folder = found if found.is_dir() else found.parent
    grade_files = sorted(folder.glob(GRADES))
    parquet = files.parquet_files(found)
    if parquet:
        used = parquet
        listed = [_question(row.values, row.images()) for row in files.parquet_rows(parquet)]
    else:
        used = [_questions_file(found)]
        listed = [_question(row, _picture(row, folder)) for row in _rows(used[0])]
    refuse_twice("MM-Vet", listed)
    grades = _grades_of(grade_files)
    listed = [_graded(one, grades) for one in listed]
    version, notes = edition("MM-Vet", len(listed), EDITIONS)
    return QuestionSet("mmvet", version, tuple(listed), files.digests([*used, *grade_files]), notes)


def _questions_file(found: Path) -> Path:
    if found.is_file():
        return found
    listed = json_files(found, "capability") or json_files(found, "image")
    named = [one for one in listed if one.name == "mm-vet.json"] or listed
    if len(named) != 1:
        raise files.unreadable(
            found, f"{len(named)} of its files may be the questions.", "Give mm-vet.json."
        )
    return named[0]


def _rows(path: Path) -> list[dict[str, Any]]:
    """Return rows with `question_id`: mm-vet.json maps an id to its row."""
    with path.open(encoding="utf-8-sig") as file:
        is_json = path.suffix == ".json" and file.read(64).lstrip()[:1] == "{"
    if not is_json:
        return files.read_json_rows(path)
    return [{"question_id": name} | row for name, row in files.read_json(path).items()]


def question_id(raw: Any) -> str:
    """Return an id in MM-Vet's own form: 7 and "7" are "v1_7"."""
    text = str(raw)
    return f"v1_{text}" if text.isdigit() else text


def _question(row: Mapping[str, Any], images: Sequence[ImageSource]) -> Question:
    name = question_id(row["question_id"])
    asked = str(row.get("question") or row.get("text") or "").replace("<image>", "").strip()
    raw = row.get("capability") or ()
    listed = raw.split(",") if isinstance(raw, str) else raw
    abilities = tuple(str(one).strip() for one in listed)
    details = {"capabilities": abilities, "question": asked, "text": asked}
    answer = row.get("answer")
    return Question(
        name, row["question_id"], asked, tuple(images), "_".join(abilities), answer, details
    )


def _picture(row: Mapping[str, Any], folder: Path) -> tuple[ImageSource, ...]:
    name = str(row.get("imagename") or row.get("image") or f"{question_id(row['question_id'])}.png")
    path = folder / "images" / name
    return (files.FileImage(str(path if path.exists() else folder / name)),)


def _grades_of(paths: Sequence[Path]) -> dict[str, Any]:
    if len(paths) > 1:
        raise UserError(
            f"{paths[0].parent} has {len(paths)} files of grades.",
            ", ".join(one.name for one in paths),
            "Leave the one of these answers.",
        )
    return dict(files.read_json(paths[0])) if paths else {}


def _graded(one: Question, grades: Mapping[str, Any]) -> Question:
    if one.id not in grades:
        return one
    details = {**one.details, "grades": checked(one.id, grades[one.id])}
    return Question(
        one.id, one.question_id, one.prompt, one.images, one.category, one.answer, details
    )


def checked(name: str, entry: Any) -> list[float]:
    """Return the grades of an entry `{"score": [..]}`. Raises: UserError when they are none."""
    grades = entry.get("score") if isinstance(entry, Mapping) else None
    is_list = isinstance(grades, list) and grades
    if not is_list or not all(isinstance(g, int | float) and 0 <= g <= 1 for g in grades or []):
        raise UserError(
            f"MM-Vet: {name} has no grades.",
            f"Found {json.dumps(entry)[:100]}.",
            'An entry is e.g. {"score": [1.0, 0.9]}, each from 0 to 1.',
        )
    return [float(grade) for grade in grades or []]


def score(questions: QuestionSet, texts: Texts, profile: Profile) -> Report:
    """Return the average of the judge's grades times 100, over questions and runs, 1 decimal.

    Also per capability, and `std` over the runs. A text that is an entry of grades stands for
    them; else the grades beside the questions count. A question that is missing has 0.
    Raises: UserError when there are no grades.
    """
    missing = [one.id for one in questions.questions if texts[one.id] is None]
    grades: dict[str, Sequence[float]] = {}
    for one in questions.questions:
        text = texts[one.id]
        if text is not None:
            grades[one.id] = _entry(one.id, text) or one.details.get("grades") or ()
    ungraded = [name for name, listed in grades.items() if not listed]
    if ungraded or not grades:
        why = f"{len(ungraded)} answers have none, e.g. {ungraded[0]}. " if ungraded else ""
        raise UserError(JUDGED[0], why + JUDGED[1], JUDGED[2])
    runs = {len(listed) for listed in grades.values()}
    if len(runs) > 1:
        raise UserError(
            f"MM-Vet: questions have {' and '.join(map(str, sorted(runs)))} grades.",
            "The judge has not gone through all of them as often.",
            "Let it finish its runs.",
        )
    return _report(questions, grades, missing, profile)


def _entry(name: str, text: str) -> list[float] | None:
    """Return the grades in a text that is an entry of a file of grades."""
    if not text.startswith("{"):
        return None
    try:
        entry = json.loads(text)
    except json.JSONDecodeError:
        return None
    return checked(name, entry) if "score" in entry else None


def _report(
    questions: QuestionSet, grades: Grades, missing: Sequence[str], profile: Profile
) -> Report:
    num_runs = len(next(iter(grades.values())))
    per_run = {one.id: grades.get(one.id, [0.0] * num_runs) for one in questions.questions}
    totals = _averages(list(per_run.values()))
    rows = []
    for ability in CAPABILITIES:
        here = [one for one in questions.questions if ability in one.details["capabilities"]]
        if here:
            average = fmean(_averages([per_run[one.id] for one in here]))
            row = {"capability": ability, "items": len(here), "score": round(average, 1)}
            rows.append(row)
    notes = [*questions.notes, f"{num_runs} runs of the judge"]
    notes += [f"published figures are averages of {RUNS} runs"] if num_runs != RUNS else []
    notes += [OTHER_JUDGE] if profile == "lmms" else []
    return Report(
        benchmark="mmvet",
        profile=profile,
        metrics={"score": round(fmean(totals), 1), "std": round(pstdev(totals), 1)},
        items=len(questions.questions),
        missing=missing,
        tables={
            "Capabilities": rows,
            "Runs": [{"run": no, "score": round(one, 1)} for no, one in enumerate(totals, 1)],
        },
        notes=notes,
    )


def _averages(grades: Sequence[Sequence[float]]) -> list[float]:
    """Return each run's average over questions, times 100."""
    return [100 * fmean(of_run) for of_run in zip(*grades, strict=True)]


def submission(questions: QuestionSet, texts: Texts) -> bytes:
    """Return the judge's upload: {"v1_0": text, ..}; "" for a question without an answer."""
    return json.dumps(
        {one.id: texts[one.id] or "" for one in questions.questions}, indent=2
    ).encode()


BENCHMARK = Benchmark(
    name="mmvet",
    title="MM-Vet",
    read=read,
    score=score,
    columns={"MM-Vet": "score"},
    asking=Asking(max_new_tokens=1024),
    answer_id=lambda row: question_id(row["question_id"]),
    submission=submission,
    submission_suffix=".json",
    layouts=(
        "folder: mm-vet.json and images/, or the hub's parquet (lmms-lab/MMVet)",
        "file: mm-vet.json, bunny-mm-vet.jsonl; *-grade-*runs.json beside it: a judge's grades",
    ),
)
