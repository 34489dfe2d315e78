"""MMBench (English): a question counts when it is right with its options in every rotation.

Questions (`--questions`), a folder or a file of it:
- `MMBench_DEV_EN_legacy.tsv` or `MMBench_TEST_EN_legacy.tsv`, which Bunny uses, or VLMEvalKit's
  TSV, where `image` may hold the index of another row that has the picture;
- the hub's parquet (lmms-lab/MMBench, `en`), or its rows as JSON or JSON lines.
Of a folder with both splits dev counts; test is `mmbench-test`. "NA" and "None" are texts of
options; an empty cell, or the hub's "nan", is none.

Rotations are rows: index = k * 1,000,000 + the question's. The editions of 4329 and 6666 rows
(dev, test) are the published ones; those of 4377 and 6718 rows are older and say so.

Sources: Bunny's bunny/eval/model_vqa_mmbench.py and eval/mmbench/convert_mmbench_for_submission.py;
VLMEvalKit's mcq_circular_eval; lmms-eval's tasks/mmbench.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import takewhile
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
from train.benchmarks.mmbench_parse import named_option
from train.benchmarks.wording import OPTION_LETTER
from train.benchmarks.xlsx import xlsx

LETTERS = "ABCD"
ROTATION = 1_000_000
OLDER = "an older edition: its figures do not compare with those of the usual one"
EDITIONS = {
    "dev": {4329: ("MMBench dev, 4329 rows",), 4377: ("MMBench dev, 4377 rows", OLDER)},
    "test": {6666: ("MMBench test, 6666 rows",), 6718: ("MMBench test, 6718 rows", OLDER)},
}
MAX_REFERENCE = 64
HINT = "Take the edition with the column `answer`, or write the submission."


def read(path: str, split: str | None = None) -> QuestionSet:
    """Return the rows of a folder or file (see above). split: "dev" or "test"; None: either.

    details: `options` (letter -> text), `base` (index without rotation), `rotation`, `l2`, and
    the row's `split` and `columns`. Raises: UserError when files are neither, or mixed.
    """
    found = files.require(path)
    used, rows = _rows(found, split)
    listed = [_question(row) for row in rows]
    refuse_twice("MMBench", listed)
    here = _only_split(listed, split)
    known = EDITIONS.get(here) or EDITIONS["dev"] | EDITIONS["test"]
    version, notes = edition("MMBench", len(listed), known)
    notes += _rotation_notes(listed)
    return QuestionSet("mmbench", version, tuple(listed), files.digests(used), notes)


@dataclass(frozen=True, slots=True)
class _Row:
    """A row of any layout. values: column in lower case but for A to D -> value, None if empty."""

    values: Mapping[str, Any]
    images: tuple[ImageSource, ...]


def _rows(found: Path, split: str | None) -> tuple[list[Path], list[_Row]]:
    """Return the files that were read, and their rows."""
    listed = files.parquet_files(found)
    if found.is_dir():
        listed += sorted(found.glob("*.tsv"))
        listed = listed or json_files(found, "index")
    used = _of_one_split(listed or [found], split)
    if len({one.suffix for one in used}) > 1 or (len(used) > 1 and used[0].suffix != ".parquet"):
        names = ", ".join(one.name for one in used)
        raise UserError(
            f"MMBench: {found} has several sets: {names}.",
            "They would be mixed.",
            "Name one file, or leave one there.",
        )
    if used[0].suffix == ".parquet":
        hub = files.parquet_rows(used)
        return used, [_Row(_values(row.values), row.images()) for row in hub]
    if used[0].suffix == ".tsv":
        return used, _tsv_rows(used[0])
    if used[0].suffix in {".json", ".jsonl"}:
        raw = files.read_json_rows(used[0])
        return used, [_Row(_values(row), _named_image(row, used[0].parent)) for row in raw]
    raise files.unreadable(found, "It is neither TSV, parquet nor JSON.", "Give one of them.")


def _of_one_split(listed: Sequence[Path], split: str | None) -> list[Path]:
    """Return the files whose names do not say the other split; of several, dev where it is."""
    named = {
        one: next((name for name in EDITIONS if name in one.name.lower()), None) for one in listed
    }
    if split is None and len(set(named.values())) > 1:
        split = "dev" if "dev" in named.values() else None
    return [one for one in listed if split is None or named[one] in (None, split)] or list(listed)


def _tsv_rows(path: Path) -> list[_Row]:
    """Return a TSV file's rows. VLMEvalKit stores a picture once, and its row's index elsewhere."""
    rows: list[tuple[dict[str, Any], str]] = []
    holders: dict[str, ImageSource] = {}
    for row in files.tsv_rows(path):
        cell, index = row.values.get("image", ""), row.values.get("index", "")
        if cell and not (cell.isdigit() and len(cell) <= MAX_REFERENCE):
            holders[index], cell = row.image(), index
        rows.append((_values(row.values), cell))
    return [
        _Row(values, (holders.get(place) or LostImage(str(path), place),) if place else ())
        for values, place in rows
    ]


@dataclass(frozen=True, slots=True)
class LostImage:
    """A picture that is said to be in a row where there is none: enough to score, not to ask."""

    path: str
    index: str

    def read(self) -> bytes:
        """Raise the error. Raises: UserError."""
        raise UserError(
            f"{self.path}: a row refers to the picture of row {self.index}.",
            "There is no such row, or it has no picture.",
            "Download the file again.",
        )


def _values(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return the cells without the picture; an empty one, or a "nan" of pandas, is None."""
    return {
        name if name in LETTERS else name.lower(): None if _is_empty(cell) else cell
        for name, cell in row.items()
        if name != "image"
    }


def _is_empty(cell: Any) -> bool:
    is_nan = isinstance(cell, float) and cell != cell
    return cell is None or is_nan or (isinstance(cell, str) and cell.lower() in ("", "nan"))


def _named_image(row: Mapping[str, Any], folder: Path) -> tuple[ImageSource, ...]:
    name = row.get("image")
    return (files.FileImage(str(folder / name)),) if isinstance(name, str) and name else ()


def _question(row: _Row) -> Question:
    values = row.values
    index, options = _index(values), _options(values)
    hint = values.get("hint")
    has_hint = hint is not None and str(hint).lower() != "none"
    asked = "\n".join(
        [
            *([str(hint)] if has_hint else []),
            str(values.get("question") or ""),
            *(f"{letter}. {text}" for letter, text in _shown(options)),
        ]
    )
    answer = str(values["answer"]).strip() if values.get("answer") is not None else None
    if answer is not None and answer not in options:
        raise UserError(
            f"MMBench: the answer of row {index} is {answer!r}, which is none of its options.",
            f"It has {', '.join(options)}.",
            "Download the file again.",
        )
    rotation, base = divmod(index, ROTATION)
    details = {
        "options": options,
        "base": base,
        "rotation": rotation,
        "l2": str(values.get("l2-category") or ""),
        "split": str(values.get("split") or "").lower(),
        "columns": tuple(name for name in ("answer", "split") if name in values),
        "question": values.get("question"),
        "text": str(values.get("question") or ""),
        "row": _answer_columns(options),
    }
    category = str(values.get("category") or "")
    prompt = asked + OPTION_LETTER
    return Question(str(index), index, prompt, row.images, category, answer, details)


def _answer_columns(options: Mapping[str, str]) -> dict[str, Any]:
    """Return what Bunny's answers have besides: the one round, and the options as asked."""
    shown = dict(_shown(options))
    return {"round_id": 0, "options": list(shown.values()), "option_char": list(shown)}


def _index(values: Mapping[str, Any]) -> int:
    try:
        number = float(values["index"])
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"MMBench: {values.get('index')!r} is no index.", "", "Give MMBench's own file."
        ) from error
    if number != int(number):
        raise UserError(
            f"MMBench: the index {number} is no whole number.", "", "Download it again."
        )
    return int(number)


def _options(values: Mapping[str, Any]) -> dict[str, str]:
    """Return letter -> option, without empty ones. "NA" and "None" are options like any."""
    return {one: str(values[one]) for one in LETTERS if values.get(one) is not None}


def _shown(options: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """Yield the options that are asked: up to the first empty one."""
    return takewhile(
        lambda pair: pair[0] in options, ((one, options.get(one, "")) for one in LETTERS)
    )


def _only_split(questions: Sequence[Question], wanted: str | None) -> str:
    """Return the split of the rows, "" where they tell none. Raises: UserError when mixed."""
    splits = {str(one.details["split"]) for one in questions}
    if len(splits) > 1 or splits - {"", *EDITIONS} or (wanted and splits - {"", wanted}):
        told = " and ".join(sorted(one or "no split" for one in splits))
        raise UserError(
            f"MMBench: rows of {told}" + (f" where {wanted} was asked for." if wanted else "."),
            "A figure is of dev or of test, never of a mixed set.",
            "Give the file of one split.",
        )
    return splits.pop() if splits else ""


def _rotation_notes(questions: Sequence[Question]) -> tuple[str, ...]:
    """Return what is odd about the rotations. Raises: UserError for those without a first row."""
    groups = _groups(questions)
    orphans = [base for base, rows in groups.items() if rows[0].details["rotation"] != 0]
    if orphans:
        raise UserError(
            f"MMBench: {len(orphans)} questions have no first row, e.g. {orphans[0]}.",
            "Rows are missing, or editions are mixed.",
            "Give the whole file.",
        )
    partial_groups = [
        rows for rows in groups.values() if len(rows) != len(rows[0].details["options"])
    ]
    if not partial_groups:
        return ()
    told = f"{len(partial_groups)} of {len(groups)} questions have not as many rotations as options"
    return (told,)


def _groups(questions: Sequence[Question]) -> dict[int, list[Question]]:
    """Return base index -> its rows, the first one first."""
    groups: dict[int, list[Question]] = defaultdict(list)
    for one in questions:
        groups[one.details["base"]].append(one)
    return {
        base: sorted(rows, key=lambda one: int(one.details["rotation"]))
        for base, rows in groups.items()
    }


def score(questions: QuestionSet, texts: Texts, profile: Profile) -> Report:
    """Return circular accuracy in percent over questions: right when all their rows are right.

    Also `vanilla`, by the first rows alone, and circular accuracy per category. items: questions,
    not rows. A missing or unreadable answer is wrong.
    """
    refuse_hidden_answers(questions, HINT)
    listed = questions.questions
    letters = {
        one.id: named_option(text, one.details["options"], profile)
        for one in listed
        if (text := texts[one.id]) is not None
    }
    groups = _groups(listed)
    circular = {
        base: all(letters.get(one.id) == one.answer for one in rows)
        for base, rows in groups.items()
    }
    first = [rows[0] for rows in groups.values()]
    num_first_right = sum(letters.get(one.id) == one.answer for one in first)
    split = _only_split(listed, None)
    headline = f"{split}_accuracy" if split else "accuracy"
    return Report(
        benchmark="mmbench",
        profile=profile,
        metrics={
            headline: percent(sum(circular.values()), len(circular)),
            "vanilla": percent(num_first_right, len(first)),
        },
        items=len(first),
        missing=[one.id for one in listed if one.id not in letters],
        unreadable=[name for name, letter in letters.items() if letter is None],
        tables=_tables(first, circular),
        notes=[*questions.notes, f"{len(listed)} rows of {len(first)} questions"],
    )


def _tables(
    first: Sequence[Question], circular: Mapping[int, bool]
) -> dict[str, list[dict[str, Any]]]:
    """Return circular accuracy by the wider category (l2) and by category, names in order."""
    by = {
        "L2 categories": [str(one.details["l2"]) for one in first],
        "Categories": [one.category for one in first],
    }
    tables: dict[str, list[dict[str, Any]]] = {}
    for title, names in by.items():
        for name in sorted({name for name in names if name}):
            here = [one for one, of in zip(first, names, strict=True) if of == name]
            right = sum(circular[one.details["base"]] for one in here)
            row = {"category": name, "questions": len(here), "accuracy": percent(right, len(here))}
            tables.setdefault(title, []).append(row)
    return tables


def submission(questions: QuestionSet, texts: Texts) -> bytes:
    """Return the server's Excel file: index, question, A to D, prediction, and answer and split
    where the questions have them. A question without an answer has an empty cell.

    Raises: UserError when openpyxl (extra `eval`) is not installed.
    """
    columns = questions.questions[0].details["columns"]
    header = ["index", "question", *LETTERS, "prediction", *columns]
    rows = []
    for one in questions.questions:
        options = [one.details["options"].get(letter) for letter in LETTERS]
        last = {"answer": one.answer, "split": one.details["split"] or None}
        cells = [one.question_id, one.details["question"], *options, texts[one.id]]
        rows.append([*cells, *(last[name] for name in columns)])
    return xlsx(header, rows)


BENCHMARK = Benchmark(
    name="mmbench",
    title="MMBench",
    read=read,
    score=score,
    columns={"MMB-T": "test_accuracy", "MMB-D": "dev_accuracy"},
    submission=submission,
    submission_suffix=".xlsx",
    layouts=(
        "file: MMBench_DEV_EN_legacy.tsv, MMBench_TEST_EN_legacy.tsv, or VLMEvalKit's TSV",
        "folder or file: the hub's parquet (lmms-lab/MMBench, en), or its rows as JSON",
    ),
)
TEST = replace(BENCHMARK, name="mmbench-test", read=partial(read, split="test"))
DEV = replace(BENCHMARK, read=partial(read, split="dev"))
