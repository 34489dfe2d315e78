"""MMMU: college questions of 30 subjects, by an option's letter or a short answer.

Questions (`--questions`), a folder or a file of it:
- the hub's parquet: MMMU/MMMU (a folder per subject), or lmms-lab/MMMU (all in one), or its rows
  as JSON or JSON lines. Of a folder with several splits the validation split counts; the test
  split is `mmmu-test`. `answer_dict_val.json` or `answer_dict_test.json` beside them gives the
  right answers, and is what Bunny scores by;
- such an answer file alone: then answers must be letters or name them, and there are no prompts.

Answers may have the letter alone, as Bunny's runner writes it, or the model's whole text.

Sources: Bunny's eval/mmmu/eval_mmmu.py and bunny/eval/model_vqa_mmmu.py; lmms-eval 0.7.3 tasks/mmmu
(earlier releases score open questions by single characters, so all of them wrong). A model sees
`image_1` alone: the branch for several pictures never runs upstream.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
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
from train.benchmarks.editions import edition, refuse_hidden_answers, refuse_twice
from train.benchmarks.folders import has_field, json_files
from train.benchmarks.mmmu_parse import drawn_option, is_right, letters_of, named_option
from train.benchmarks.wording import OPTION_LETTER, SINGLE_WORD

DOMAINS = {
    "Art and Design": "Art Art_Theory Design Music",
    "Business": "Accounting Economics Finance Manage Marketing",
    "Science": "Biology Chemistry Geography Math Physics",
    "Health and Medicine": "Basic_Medical_Science Clinical_Medicine "
    "Diagnostics_and_Laboratory_Medicine Pharmacy Public_Health",
    "Humanities and Social Science": "History Literature Sociology Psychology",
    "Tech and Engineering": "Agriculture Architecture_and_Engineering Computer_Science "
    "Electronics Energy_and_Power Materials Mechanical_Engineering",
}
DOMAIN_OF = {one: domain for domain, subjects in DOMAINS.items() for one in subjects.split()}
SPLITS = {"validation": "val", "test": "test"}
EDITIONS = {"val": {900: ("MMMU validation",)}, "test": {10500: ("MMMU test",)}}
MULTIPLE_CHOICE = "multiple-choice"
NUM_UNKNOWN_OPTIONS = 9
DIGITS = {"bunny": 3, "lmms": 5}
HINT = "Put answer_dict_val.json or answer_dict_test.json beside them, or write the submission."
PROTOCOL = (
    "validation figures published before June 2024 come from sampling (temperature 1, 5 beams) "
    "without padding: greedy answers differ by up to about 1.3"
)


def read(path: str, split: str | None = None) -> QuestionSet:
    """Return the questions of a folder or file (see above). split: "val" or "test"; None: either.

    A question's answer: a list of right letters, or of right texts. details: `options` (None for
    an open question; texts, or "" where only an answer file is there). Raises: UserError.
    """
    found = files.require(path)
    keys = _answer_files(found)
    parquet = [one for one in files.parquet_files(found) if files.split_of(one) != "dev"]
    parquet = _of_one_split(parquet, split)
    rows_file = _rows_file(found)
    rows: list[tuple[Mapping[str, Any], tuple[ImageSource, ...]]] = []
    if parquet:
        hub = files.parquet_rows(parquet)
        rows = [(row.values, row.images("image_1")[:1]) for row in hub]
    elif rows_file is not None:
        raw = files.read_json_rows(rows_file)
        rows = [(row, _named_image(row.get("image_1"), rows_file.parent)) for row in raw]
    read_from = [*parquet, *([rows_file] if rows_file and not parquet else [])]
    return _question_set(rows, read_from, keys, split)


def _answer_files(found: Path) -> list[Path]:
    if found.is_file() and _is_key(found):
        return [found]
    return sorted(filter(_is_key, (found if found.is_dir() else found.parent).glob("*.json")))


def _is_key(path: Path) -> bool:
    """Return whether a file has right answers alone, as answer_dict_val.json, under any name."""
    is_json = path.suffix == ".json"
    return is_json and has_field(path, "ground_truth") and not has_field(path, "options")


def _rows_file(found: Path) -> Path | None:
    """Return the JSON file of the hub's rows: the one given, or the only one of a folder."""
    if found.is_file():
        is_rows = found.suffix in {".json", ".jsonl"} and not _is_key(found)
        return found if is_rows else None
    listed = json_files(found, "question_type")
    rows = [one for one in listed if not _is_key(one)]
    if len(rows) > 1:
        names = ", ".join(one.name for one in rows)
        raise files.unreadable(found, f"It has several sets: {names}.", "Name one of them.")
    return rows[0] if rows else None


def _of_one_split(parquet: Sequence[Path], split: str | None) -> list[Path]:
    """Return the files of the split asked for, or of validation where several are there."""
    by_split = {
        short: [one for one in parquet if files.split_of(one) == name]
        for name, short in SPLITS.items()
    }
    if split is None:
        return by_split["val"] or by_split["test"] or list(parquet)
    others = {id(one) for short, listed in by_split.items() if short != split for one in listed}
    return [one for one in parquet if id(one) not in others]


def _named_image(name: Any, folder: Path) -> tuple[ImageSource, ...]:
    return (files.FileImage(str(folder / name)),) if isinstance(name, str) and name else ()


def _question_set(
    rows: Sequence[tuple[Mapping[str, Any], tuple[ImageSource, ...]]],
    read_from: Sequence[Path],
    keys: Sequence[Path],
    split: str | None,
) -> QuestionSet:
    if not rows and not keys:
        raise UserError(
            "MMMU: there are no questions there.",
            "It needs the hub's parquet, its rows as JSON, or answer_dict_val.json.",
            "Give the folder of one of them.",
        )
    truth: dict[str, Any] = {}
    for key in keys:
        truth |= files.read_json(key)
    if rows:
        listed = [_question(row, images, truth.get(str(row["id"]))) for row, images in rows]
        listed = [one for one in listed if not one.id.startswith("dev_")]
    else:
        listed = [_bare_question(name, entry) for name, entry in truth.items()]
    if split is None and len(keys) > 1 and not rows:
        split = "val" if any(one.details["split"] == "val" for one in listed) else None
    if split is not None and not rows:
        listed = [one for one in listed if one.details["split"] == split]
    listed.sort(key=lambda one: one.category)  # Bunny goes through the subjects by name
    refuse_twice("MMMU", listed)
    here = _only_split(listed, split)
    version, notes = edition("MMMU", len(listed), EDITIONS[here])
    notes += (PROTOCOL,) if here == "val" else ()
    return QuestionSet("mmmu", version, tuple(listed), files.digests([*read_from, *keys]), notes)


def _only_split(questions: Sequence[Question], wanted: str | None) -> str:
    splits = {str(one.details["split"]) for one in questions}
    if len(splits) > 1 or (wanted and splits - {wanted}):
        raise UserError(
            f"MMMU: questions of {' and '.join(sorted(splits))}"
            + (f" where {wanted} was asked for." if wanted else " are mixed."),
            "A figure is of one split.",
            "Give the files of one split.",
        )
    return splits.pop() if splits else "val"


def _question(
    row: Mapping[str, Any], images: tuple[ImageSource, ...], truth: Mapping[str, Any] | None
) -> Question:
    name = str(row["id"])
    is_choice = (truth or row).get("question_type") == MULTIPLE_CHOICE
    options = _listed(row.get("options"), name)
    if is_choice and not options:
        raise UserError(f"MMMU: {name} has no options.", "", "Download the files again.")
    gold = truth["ground_truth"] if truth else row.get("answer")
    details = _details(name, options if is_choice else None, str(row["question"]))
    asked = str(row["question"])
    if is_choice:
        pairs = zip(letters_of(len(options)), options, strict=True)
        lines = [f"({letter}) {option}" for letter, option in pairs]
        prompt = "\n".join([asked, *lines, ""]) + OPTION_LETTER
    else:
        prompt = asked + SINGLE_WORD
    return Question(name, name, prompt, images, _subject(name), _gold(gold), details)


def _bare_question(name: str, truth: Mapping[str, Any]) -> Question:
    """Return a question of an answer file: options without texts, no prompt."""
    is_choice = truth["question_type"] == MULTIPLE_CHOICE
    options = [""] * NUM_UNKNOWN_OPTIONS if is_choice else None
    gold = _gold(truth["ground_truth"])
    return Question(name, name, "", (), _subject(name), gold, _details(name, options, ""))


def _details(name: str, options: list[str] | None, text: str) -> dict[str, Any]:
    split = name.partition("_")[0]
    return {"options": options, "split": SPLITS.get(split, split), "text": text}


def _subject(name: str) -> str:
    """Return the subject in an id: "validation_Art_Theory_1" -> "Art_Theory"."""
    subject = "_".join(name.split("_")[1:-1])
    if subject not in DOMAIN_OF or name.partition("_")[0] not in {*SPLITS, "dev"}:
        raise UserError(
            f"MMMU: {name!r} is no id of a question.",
            "An id is split, subject and number: validation_Art_Theory_1.",
            "Give MMMU's own files.",
        )
    return subject


def _listed(options: Any, name: str) -> list[str]:
    """Return the options: the hub stores a Python list as a string."""
    try:
        found = ast.literal_eval(options) if isinstance(options, str) else options
    except (SyntaxError, ValueError) as error:
        raise UserError(f"MMMU: the options of {name} are no list.", str(error)) from error
    return [str(option) for option in found or []]


def _gold(answer: Any) -> list[str] | None:
    """Return the right answers, or None where the file hides them ("?")."""
    if isinstance(answer, str) and answer.startswith("[") and answer.endswith("]"):
        try:
            answer = ast.literal_eval(answer)
        except (SyntaxError, ValueError):
            return [str(answer)]
    if answer is None or answer in ("", "?"):
        return None
    return [str(one) for one in answer] if isinstance(answer, list) else [str(answer)]


def letter(question: Question, text: str, profile: Profile) -> tuple[str, bool]:
    """Return the letter that an answer to a multiple-choice question names, and False.

    Where it names none: the draw of the question's id, and True.
    """
    options = question.details["options"]
    if any(options):
        named = named_option(text, options, profile)
        return (named, False) if named else (drawn_option(question.id, len(options)), True)
    named = named_option(text, ["\0"] * len(options), profile)  # texts are unknown: letters alone
    return (named, False) if named else ("", True)


def score(questions: QuestionSet, texts: Texts, profile: Profile) -> Report:
    """Return the accuracy in percent over all questions, and per domain and subject.

    As published: a fraction rounded to 3 decimals (lmms: 5), here times 100. A missing answer is
    wrong; upstream leaves it out. An unreadable letter is drawn at random, and counted.
    """
    refuse_hidden_answers(questions, HINT)
    right, drawn = {}, []
    for one in questions.questions:
        text = texts[one.id]
        if text is None:
            right[one.id] = False
        elif one.details["options"] is None:
            right[one.id] = is_right(text, one.answer)
        else:
            named, is_drawn = letter(one, text, profile)
            right[one.id] = named in one.answer
            drawn += [one.id] if is_drawn else []
    split = _only_split(questions.questions, None)
    listed = questions.questions
    told = f"{len(drawn)} answers name no option: each got the random letter of its id, if any"
    return Report(
        benchmark="mmmu",
        profile=profile,
        metrics={f"{split}_accuracy": _accuracy(listed, right, profile)},
        items=len(listed),
        missing=[one.id for one in listed if texts[one.id] is None],
        unreadable=drawn,
        tables=_tables(listed, right, profile),
        notes=[*questions.notes, *([told] if drawn else [])],
    )


def _accuracy(asked: Sequence[Question], right: Mapping[str, bool], profile: Profile) -> float:
    fraction = sum(right[one.id] for one in asked) / len(asked)
    return round(100 * round(fraction, DIGITS[profile]), DIGITS[profile])


def _tables(
    asked: Sequence[Question], right: Mapping[str, bool], profile: Profile
) -> dict[str, list[dict[str, Any]]]:
    """Return the tables of domains and of subjects, in the official order, of what was asked."""
    domains, subjects = [], []
    for domain, names in DOMAINS.items():
        inside = [one for one in asked if one.category in names.split()]
        if inside:
            figure = _accuracy(inside, right, profile)
            domains.append({"domain": domain, "items": len(inside), "accuracy": figure})
        for name in names.split():
            here = [one for one in inside if one.category == name]
            if here:
                row = {"subject": name, "domain": domain, "items": len(here)}
                subjects.append(row | {"accuracy": _accuracy(here, right, profile)})
    return {"Domains": domains, "Subjects": subjects}


def submission(questions: QuestionSet, texts: Texts) -> bytes:
    """Return the server's JSON: id -> letter, or the raw text of an open answer; "" for none."""
    return json.dumps(dict(_submitted(questions.questions, texts)), indent=4).encode()


def _submitted(questions: Iterable[Question], texts: Texts) -> Iterable[tuple[str, str]]:
    for one in questions:
        text = texts[one.id]
        is_choice = one.details["options"] is not None
        yield (
            one.id,
            letter(one, text, "bunny")[0] if is_choice and text is not None else text or "",
        )


BENCHMARK = Benchmark(
    name="mmmu",
    title="MMMU",
    read=read,
    score=score,
    columns={"MMMU-V": "val_accuracy", "MMMU-T": "test_accuracy"},
    submission=submission,
    submission_suffix=".json",
    layouts=(
        "folder: the hub's parquet (MMMU/MMMU or lmms-lab/MMMU), answer_dict_val.json beside it",
        "file: one parquet file, its rows as JSON or JSON lines, or an answer_dict_*.json",
    ),
)
TEST = replace(BENCHMARK, name="mmmu-test", read=partial(read, split="test"))
VAL = replace(BENCHMARK, read=partial(read, split="val"))
